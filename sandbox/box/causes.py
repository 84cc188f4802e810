"""Decides why a run ended, from what the watchers saw.

The kernel's counters, the signal, the clock and our own deadline decide. The program's last words
only ever explain a failure for which there is evidence beside them: a program may print anything.
"""

import re
import signal
from datetime import datetime
from typing import Any, Literal

from sandbox.box.hardening import Settings
from sandbox.box.link import Counters, ExitReport, Room
from sandbox.box.proof import Proof
from sandbox.contract.record import Record
from sandbox.contract.run import Log, Outcome, OutputFile, RunResult, RunSpec
from sandbox.gpu.run import Attendance

NEARLY_FULL_BYTES = 65536
NEARLY_ALL_MEMORY_BYTES = 4 * 2**20
"""Two huge pages: what the kernel may refuse at once just below the limit."""
LAST_LINES = 20
RANK = r"^(\[(rank|default)\d+\]: ?)*"
"""What a launcher of several processes writes before their lines."""
RAISED = r"([\w.]+(Error|Exception|Failed): )*"
GPU_MEMORY_PATTERN = re.compile(
    RANK + RAISED + r"((CUDA|HIP|XPU) (driver )?(error: )?out of memory"
    r"|CUDA error: \w+_STATUS_ALLOC_FAILED|cuDNN error: \w+_STATUS_ALLOC_FAILED"
    r"|(NCCL error.*)?Cuda failure (\d+ )?'out of memory'"
    r"|(level_zero backend|Native API) failed.*UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"
    r"|RESOURCE_EXHAUSTED: Out of memory)"
)
"""As torch says it for NVIDIA, AMD and Intel, its libraries, NCCL, and JAX."""
GPU_TRIED_PATTERN = re.compile(r"(?:Tried|trying) to allocate (\d+(?:\.\d+)?) (bytes|[KMGT]iB)")
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
NO_SPACE_PATTERN = re.compile(RANK + r"(\w+\.)*\w*Error: .*(No space left on device|\[Errno 28\])")
LAUNCHER = "torch/distributed/elastic/multiprocessing/api.py"
"""Where torchrun begins to tell of a process that failed, after that one's own last words."""


class Observed(Record):
    """What the host saw of a run between go and the end."""

    started_at: datetime
    finished_at: datetime
    wall_seconds: float
    report: ExitReport | None
    """PID 1's; None where it died, or came too late."""
    counters: Counters | None
    """PID 1's, or the host's of a box whose PID 1 died; None where those cannot be seen."""
    log: Log
    output: tuple[OutputFile, ...]
    skipped: dict[str, int]
    killed_by_host: bool
    asked_to_stop: bool
    ended_for: Literal["gpu_memory", "gpu_fault"] | None
    engine_state: dict[str, Any] | None
    """The engine's own view, asked only where PID 1 said nothing."""

    @property
    def log_end(self) -> str:
        """Return the end of the log, where a program says why it failed."""
        return self.log.tail or self.log.head


class Evidence(Record):
    """What the outcome of a run is decided from."""

    reported: bool
    """PID 1 lived to tell; else only the engine's view is known."""
    exit_code: int | None
    signal: int | None
    killed_by: Literal["deadline", "host_deadline", "nightlab", "gpu_memory", "gpu_fault"] | None
    """Ours all of them: PID 1's deadline, the host's, nightlab's wish to see no more of it, and the
    watch over its GPUs."""
    oom_kills: int
    memory_limit_reached: bool
    pids_refused: int
    full: tuple[str, ...]
    """File systems seen full while the program ran."""
    still_full: tuple[str, ...]
    """Those of them that were full when everything was dead: one that was emptied again explains
    an end only where the program's last words do."""
    half_full: bool
    """Whether one was seen at least half full: PID 1 looks often, but a burst that is tidied up at
    once can fall between two looks."""
    last_error: Literal["no_space", "gpu_memory"] | None
    """What the program's own last lines say of its end; only ever explains a failure."""
    gpus_leased: bool
    gpu_memory_reached: bool | None
    """Whether the host saw enough memory taken on a GPU that what the program says it tried to
    allocate could not be had; None where the host cannot see a GPU's memory."""
    engine_oom_killed: bool | None
    """The engine's flag; None when the engine was not asked."""


def decide(evidence: Evidence) -> Outcome:
    """Return the outcome that the evidence supports, the surest cause first.

    - nightlab's own wish to end a run early is no deed of the program: `stopped`.
    - A run that exceeded its GPU memory under the watch's eyes is `out_of_gpu_memory`; one whose
      GPU failed under it is `interrupted`.
    - A deadline ends a run whatever happened before: a hang after a killed worker is `timed_out`,
      and the kill stays in the evidence (`oom_kills`).
    - A run that exits 0 is `ok`, even if a child was killed for memory: the program coped.
    - A run that fails after a memory kill in its box is `out_of_memory`, unless it died of a
      signal of its own making (a segmentation fault is a segmentation fault).
    - A memory kill without the box's own limit being reached means that the machine ran out of
      memory: not the program's fault, so `interrupted`. With cgroup version 1 a box that ever was
      at its limit cannot be told from it.
    - The kernel may pick PID 1 in the program's place: then the host's view of its counters counts.
    - SIGKILL without any memory kill and not from us came from somebody else: `interrupted`. A
      program that kills itself looks the same.
    """
    match evidence.killed_by:
        case "nightlab":
            return Outcome.STOPPED
        case "gpu_memory":
            return Outcome.OUT_OF_GPU_MEMORY
        case "gpu_fault":
            return Outcome.INTERRUPTED
        case "deadline" | "host_deadline":
            return Outcome.TIMED_OUT
    if not evidence.reported and not evidence.oom_kills:
        return Outcome.OUT_OF_MEMORY if evidence.engine_oom_killed else Outcome.INTERRUPTED
    if evidence.exit_code == 0:
        return Outcome.OK
    return _decide_failure(evidence)


def _decide_failure(evidence: Evidence) -> Outcome:
    """Return why a program that was not stopped by us did not end well."""
    if evidence.oom_kills and evidence.signal in (None, signal.SIGKILL):
        return Outcome.OUT_OF_MEMORY if evidence.memory_limit_reached else Outcome.INTERRUPTED
    if evidence.signal == signal.SIGKILL:
        return Outcome.INTERRUPTED
    if _is_disk_full(evidence):
        return Outcome.DISK_FULL
    # Of a GPU's memory the program's own word counts where what the host saw agrees.
    named = evidence.exit_code == 1 and evidence.last_error == "gpu_memory"
    is_full = named and evidence.gpus_leased and evidence.gpu_memory_reached is not False
    return Outcome.OUT_OF_GPU_MEMORY if is_full else Outcome.FAILED


def _is_disk_full(evidence: Evidence) -> bool:
    """Tell whether a file system filled up: left full, or seen filling and named as the reason."""
    # A mapped file that finds no room for a page answers with a bus error: DataLoaders die of it.
    if evidence.signal == signal.SIGBUS:
        return bool(evidence.full)
    named = evidence.half_full and evidence.last_error == "no_space"
    return evidence.signal is None and (bool(evidence.still_full) or named)


def _last_lines(log_tail: str) -> list[str]:
    """Return a log's last lines, the last first; bounded, for one line may be megabytes."""
    lines = log_tail[-65536:].splitlines()
    told = (n for n, line in enumerate(lines) if LAUNCHER in line[:200])
    return lines[: next(told, len(lines))][: -LAST_LINES - 1 : -1]


def last_error(log_tail: str) -> Literal["no_space", "gpu_memory"] | None:
    """Return what the last lines of a log give as the reason of a failure."""
    for line in _last_lines(log_tail):
        if GPU_MEMORY_PATTERN.match(line):
            return "gpu_memory"
        if NO_SPACE_PATTERN.match(line):
            return "no_space"
    return None


def tried_bytes(log_tail: str) -> int:
    """Return what the last lines of a log say was tried to allocate on a GPU; 0 if nothing."""
    for line in _last_lines(log_tail):
        if GPU_MEMORY_PATTERN.match(line) and (found := GPU_TRIED_PATTERN.search(line)):
            # Twenty digits are enough for any GPU, and no text of a program's becomes infinite.
            return int(float(found.group(1)[:20]) * UNITS[found.group(2)])
    return 0


def _taken(proof: Proof, fullest: dict[str, Room], times: int, slack_bytes: int) -> tuple[str, ...]:
    """Return the file systems that would be full with so many times what was seen taken."""
    return tuple(
        place
        for place, most in sorted(fullest.items())
        if times * most.bytes + slack_bytes >= proof.capacities[place].bytes
        or times * most.inodes >= proof.capacities[place].inodes > 0
    )


def _reached_memory_limit(spec: RunSpec, counters: Counters) -> bool:
    """Tell whether the box's own limit was reached; new kernels no longer count it on cgroup v1."""
    if counters.memory_limit_hits is not None:
        return counters.memory_limit_hits > 0
    return (counters.peak_memory_bytes or 0) + NEARLY_ALL_MEMORY_BYTES >= spec.limits.memory_bytes


def gather(
    spec: RunSpec, proof: Proof, observed: Observed, gpu_memory_reached: bool | None
) -> Evidence:
    """Return the evidence of one run; without PID 1's report there is little of it."""
    report, state = observed.report, observed.engine_state
    by_host = "nightlab" if observed.asked_to_stop else "host_deadline"
    killed_by = report.killed_by if report else by_host if observed.killed_by_host else None
    counters = observed.counters
    fullest = report.fullest if report else {}
    # A program stops at the last whole piece that fits, so full is seldom full to the byte.
    slack = min(NEARLY_FULL_BYTES, spec.limits.output_bytes // 2)
    return Evidence.model_validate(
        {
            "reported": report is not None,
            "exit_code": report and report.exit_code,
            "signal": report and report.signal,
            "killed_by": observed.ended_for or killed_by,
            "oom_kills": counters.oom_kills if counters else 0,
            "memory_limit_reached": bool(counters and _reached_memory_limit(spec, counters)),
            "pids_refused": counters.pids_refused if counters else 0,
            "full": _taken(proof, fullest, 1, slack),
            "still_full": _taken(proof, report.left if report else {}, 1, slack),
            "half_full": bool(_taken(proof, fullest, 2, 0)),
            "last_error": last_error(observed.log_end),
            "gpus_leased": bool(spec.gpus),
            "gpu_memory_reached": gpu_memory_reached,
            "engine_oom_killed": None if state is None else bool(state["OOMKilled"]),
        }
    )


def conclude(
    spec: RunSpec, digest: str, proof: Proof, observed: Observed, asked: Settings, gpus: Attendance
) -> RunResult:
    """Return the result of a run, with everything that it was decided from."""
    report = observed.report
    reached = gpus.reaches_memory(tried_bytes(observed.log_end))
    evidence = gather(spec, proof, observed, reached)
    counters = observed.counters
    return RunResult(
        run_id=spec.run_id,
        box=spec.box,
        outcome=decide(evidence),
        exit_code=evidence.exit_code,
        signal=evidence.signal,
        wall_seconds=observed.wall_seconds,
        limits=spec.limits,
        peak_memory_bytes=counters.peak_memory_bytes if counters else None,
        cpu_seconds=counters.cpu_seconds if counters else None,
        oom_kills=evidence.oom_kills,
        gpus=spec.gpus,
        gpu=gpus.uses(),
        log=observed.log,
        output=observed.output,
        image_digest=digest,
        started_at=observed.started_at,
        finished_at=observed.finished_at,
        evidence=evidence.model_dump()
        | {
            "engine_state": observed.engine_state,
            "output_skipped": observed.skipped,
            "report": report and report.model_dump(),
            "gpus": gpus.evidence(),
            "container": {"asked": asked, "proved": proof.model_dump(mode="json")},
        },
    )
