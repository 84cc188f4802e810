"""Measures what others, and heat, did during a run.

Wall time lies on a machine with neighbours: the same 20 seconds gave 18 steps once and 380
another time. A disturbed run is repeated, not judged; see docs/decisions/0017.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from agent.record.attempts import TrialKey
from agent.record.events import Disturbance, MachineState, RunFinished
from agent.record.history import History
from agent.settings import DisturbanceSettings
from sandbox.contract.run import Outcome

ReadMachine = Callable[[], MachineState]

DISTURBED_ENDS = (Outcome.OK, Outcome.TIMED_OUT, Outcome.STOPPED)
"""Ends that other work on the machine can have brought about."""

_BLOCK = bytes(64 * 1024)
_SLICES, _SLICE_SECONDS = 4, 0.01
CPUS = "sys/devices/system/cpu"
CGROUPS = "sys/fs/cgroup"
_STOLEN_COLUMN = 7
_KERNEL_THREAD = 0x00200000  # PF_KTHREAD of linux/sched.h


@dataclass(frozen=True)
class Usual:
    """What the machine was like beside the runs that a run is compared with."""

    cores: float
    """Used by others; 0 before there are such runs."""
    speed: float | None
    """See `speed`; None before there are such runs."""


@dataclass(frozen=True)
class Sample:
    """The machine at one moment: processor time so far, in core seconds, speed and state."""

    used_seconds: float
    """By all programs, see `used_seconds`."""
    own_seconds: float
    at: float
    speed: float
    """Of one core, see `speed`."""
    state: MachineState


ReadLoad = Callable[[ReadMachine], Sample]
"""As `sample`."""


def used_seconds(root: Path = Path("/")) -> float:
    """Core seconds that programs have used so far, and that a machine outside of ours has taken.

    By the accounts of cgroups. /proc/stat looks who runs when a tick comes, and a program may run
    just then and no longer; and what the kernel's own threads do, a box may have made them do:
    neither is evidence of others. 0 where there are no accounts, as in a container.
    """
    stolen = 0.0
    for line in _texts(root, "proc/stat"):
        stolen = int(line.splitlines()[0].split()[1:][_STOLEN_COLUMN]) / os.sysconf("SC_CLK_TCK")
    whole = next(_numbers(root, f"{CGROUPS}/*cpuacct/cpuacct.usage"), None)
    if whole is not None:  # version 1: one account of all that runs, kernel threads as well
        return stolen + whole / 1e9 - _kernel_seconds(root)
    texts = _texts(root, f"{CGROUPS}/*/cpu.stat")  # version 2 leaves those in the root alone
    return stolen + sum(int(text.split()[1]) for text in texts if text) / 1e6


def _kernel_seconds(root: Path) -> float:
    """Core seconds of the kernel's own threads."""
    rows = [text.rpartition(")")[2].split() for text in _texts(root, "proc/[0-9]*/stat")]
    ticks = (int(row[11]) + int(row[12]) for row in rows if row and int(row[6]) & _KERNEL_THREAD)
    return sum(ticks) / os.sysconf("SC_CLK_TCK")


def sample(read_machine: ReadMachine, clock: Callable[[], float] = time.monotonic) -> Sample:
    """Read the machine's state, speed and processor time, and our own time, now."""
    state, now = read_machine(), speed()
    own = os.times()
    return Sample(
        used_seconds=used_seconds(),
        own_seconds=own.user + own.system,
        at=clock(),
        speed=now,
        state=state,
    )


def speed(clock: Callable[[], float] = time.perf_counter) -> float:
    """How fast one core works now, in MB hashed a second.

    The best of a few slices: what others use is measured elsewhere, and this is about a core that
    is throttled, or that a machine outside of ours has taken a part of.
    """
    rates = []
    for _ in range(_SLICES):
        began, blocks = clock(), 0
        while (elapsed := clock() - began) < _SLICE_SECONDS:
            hashlib.sha256(_BLOCK)
            blocks += 1
        rates.append(blocks * len(_BLOCK) / 1e6 / elapsed)
    return max(rates)


def disturbance(
    before: Sample,
    after: Sample,
    run_cpu_seconds: float,
    limits: DisturbanceSettings,
    *,
    idle: float,
    usual: Usual,
) -> Disturbance:
    """What anything but the run and nightlab did between two samples.

    `idle` is how many cores the run leaves to others.
    """
    elapsed = max(after.at - before.at, 1e-9)
    ours = run_cpu_seconds + (after.own_seconds - before.own_seconds)
    others = max(0.0, (after.used_seconds - before.used_seconds - ours) / elapsed)
    return decided(
        Disturbance(
            other_cores=round(others, 4),
            limit_cores=limits.max_other_cores,
            disturbed=False,
            idle_cores=idle,
            usual_cores=usual.cores,
            speed=round((before.speed + after.speed) / 2, 1),
            usual_speed=usual.speed,
            min_speed=limits.min_speed,
            before=before.state,
            after=after.state,
            held_back=(),
        )
    )


def decided(measured: Disturbance) -> Disturbance:
    """The same measurement with what follows from it: whether the run was disturbed, and why."""
    held = held_back(measured.before, measured.after)
    is_disturbed = is_crowded(measured) or is_slow(measured) or bool(held)
    return measured.model_copy(update={"disturbed": is_disturbed, "held_back": held})


def was_disturbed(run: RunFinished) -> bool:
    """Whether a training ended as it did for reasons that are none of its own."""
    by_others = run.disturbance is not None and run.disturbance.disturbed
    return (by_others or run.result.was_throttled) and run.result.outcome in DISTURBED_ENDS


def idle_cores(cpus: float, cores: int | None = None) -> float:
    """Cores of a machine, of this one if not given, that a run of so many leaves to others."""
    return max(0.0, ((os.cpu_count() or 1) if cores is None else cores) - cpus)


def allowed_cores(found: Disturbance) -> float:
    """How many cores others may use until a run counts as disturbed."""
    at_all, beyond_the_usual = found.limit_cores, found.usual_cores + found.limit_cores / 2
    return found.idle_cores + max(at_all, beyond_the_usual)


def is_crowded(found: Disturbance) -> bool:
    """Whether others used more of the machine than they may."""
    return found.other_cores > allowed_cores(found)


def is_slow(found: Disturbance) -> bool:
    """Whether the machine was slower than it may be; nothing is slow before there is a usual."""
    return found.usual_speed is not None and found.speed < found.min_speed * found.usual_speed


def reasons(noise: Disturbance) -> list[str]:
    """What disturbed a run, a phrase each; nothing when nothing did."""
    found = []
    if is_crowded(noise):
        allowed = f"{allowed_cores(noise):.2f}"
        found.append(f"others used {noise.other_cores:.2f} cores (limit {allowed})")
    if is_slow(noise):
        assert noise.usual_speed is not None
        found.append(f"a core had {noise.speed / noise.usual_speed:.0%} of its usual speed")
    return [*found, *noise.held_back]


def usual_of(history: History, trial: TrialKey) -> Usual:
    """What the runs had that calibrate all others, those of the trial itself aside.

    They are the baseline's at its own seeds, or after a move to another machine those of the best
    there, in checks of the machine and beside close calls. Of each seed the last undisturbed one
    counts for what others used, or the last where none was.
    """
    trainings = [run for run in _calibrating(history) if run.result.box == "train"]
    runs = [run for run in trainings if (run.purpose, run.attempt, run.seed) != trial]
    noises = [(run.seed, run.disturbance) for run in runs if run.disturbance]
    speeds = [noise.speed for _, noise in noises]
    quiet = {seed: noise for seed, noise in noises if not noise.disturbed}
    cores = [noise.other_cores for noise in (dict(noises) | quiet).values()]
    return Usual(cores=round(median(cores or [0.0]), 4), speed=median(speeds) if speeds else None)


def _calibrating(history: History) -> list[RunFinished]:
    if history.drift.moved is not None:
        number, earlier = history.drift.moved
        return [*history.drift.runs_since_move, *history.attempt(number).runs[earlier:]]
    if (baseline := history.baseline) is None:
        return []
    return [run for run in baseline.runs if run.seed in baseline.started.seeds]


def machine_state(root: Path = Path("/")) -> MachineState:
    """The machine as it is now; what it does not tell, as in most virtual machines, is None."""
    clocks = list(_numbers(root, f"{CPUS}/cpu[0-9]*/cpufreq/scaling_cur_freq"))
    highest = list(_numbers(root, f"{CPUS}/cpu[0-9]*/cpufreq/cpuinfo_max_freq"))
    heat = list(_numbers(root, "sys/class/thermal/thermal_zone*/temp"))
    counts = list(_numbers(root, f"{CPUS}/cpu*/thermal_throttle/*_throttle_count"))
    governors = sorted(set(_texts(root, f"{CPUS}/cpu[0-9]*/cpufreq/scaling_governor")))
    return MachineState(
        load=os.getloadavg()[0],
        memory_available_bytes=_available_bytes(root),
        cpu_mhz=round(fmean(clocks) / 1000) if clocks else None,
        cpu_max_mhz=round(max(highest) / 1000) if highest else None,
        governor=", ".join(governors)[:60] or None,
        temperature_celsius=round(max(heat) / 1000, 1) if heat else None,
        throttle_events=int(sum(counts)) if counts else None,
    )


def held_back(before: MachineState, after: MachineState) -> tuple[str, ...]:
    """Why a run had less of the processor than it should have had; empty for a fair one.

    What held a GPU back is in the run's own result.
    """
    times = (after.throttle_events or 0) - (before.throttle_events or 0)
    if before.throttle_events is None or times <= 0:
        return ()
    return (f"the processor was held back by heat ({times} times)",)


def _numbers(root: Path, pattern: str) -> Iterator[float]:
    for text in _texts(root, pattern):
        try:
            yield float(text)
        except ValueError:
            continue


def _texts(root: Path, pattern: str) -> Iterator[str]:
    """What small files say; a sensor that cannot be read now says nothing."""
    for path in sorted(root.glob(pattern)):
        try:
            yield path.read_text(encoding="ascii", errors="replace").strip()
        except OSError:
            continue


def _available_bytes(root: Path) -> int | None:
    found = re.search(r"^MemAvailable: +(\d+)", "".join(_texts(root, "proc/meminfo")), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
