"""What a run is asked, and what came of it.

The only module of `sandbox` that the rest of nightlab may depend on. It knows neither Docker nor
language models. Every size is in bytes, every duration in seconds; each limit must be given, since
a limit that defaults to "none" is no limit.
"""

from __future__ import annotations

import errno
import re
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
ByteCount = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]

RUN_ID_PATTERN = re.compile(r"^[a-z0-9][a-z0-9-]{0,62}$")


class Record(BaseModel):
    """A frozen value, closed to unknown fields, without NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


MAKE_ROOM = "make room on the disk, then go on with `nightlab resume`; nothing recorded is lost"
"""The hint for a disk that is full."""
MAKE_SPACE = "end what else runs on this machine, or raise its limits, then go on"
"""The hint for a machine that has no memory, process or file left to give."""
DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What the kernel says of a disk that is full, over quota, read-only or broken."""
MACHINE_REFUSES = (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE)


class NightlabError(Exception):
    """An error that a person is told in a sentence, with what to do next.

    Args:
        message: what is wrong, and where.
        hint: what the user can do next; the class's own where it is left out.
    """

    usual_hint: ClassVar[str]

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.usual_hint


class SandboxError(NightlabError):
    """nightlab or the engine failed; never the fault of the program that ran."""

    usual_hint = "`nightlab check` tries this machine's boxes; `nightlab resume` goes on"


@contextmanager
def host_faults() -> Iterator[None]:
    """Turn what the host has no room for into a SandboxError: our fault, never the program's.

    Any other OSError is not about room, a pipe without a reader or a missing folder, and passes.
    """
    try:
        yield
    except OSError as error:
        if error.errno in DISK_REFUSES:
            raise SandboxError(f"the disk refused: {error.strerror}", MAKE_ROOM) from error
        if error.errno in MACHINE_REFUSES:
            raise SandboxError(f"the machine refused: {error.strerror}", MAKE_SPACE) from error
        raise


def first_problem(error: ValidationError) -> str:
    """The first field that a record refused, and why."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


class EngineUnavailable(SandboxError):
    """No container engine answers, or it stopped answering."""

    usual_hint = "see whether `docker info` answers, then go on with `nightlab resume`"


class ImageMissing(SandboxError):
    """The image is not on this engine."""


class LimitNotEnforced(SandboxError):
    """The engine dropped a wall or a limit; the run was refused before the program started."""


class ContainerUnkillable(SandboxError):
    """A container would not die; its devices must not be used again before someone looks."""


class BoxLost(SandboxError):
    """A box ended and nobody says how its program did: killed from outside, or PID 1 is gone.

    As a rule that is none of the program's doing; a program that brings it about each time is.
    """


class GpuFault(SandboxError):
    """A GPU failed under a run and is out of use now; the run says nothing about its program."""


class Outcome(StrEnum):
    """How a run ended, as the host saw it."""

    OK = "ok"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    OUT_OF_MEMORY = "out_of_memory"
    OUT_OF_GPU_MEMORY = "out_of_gpu_memory"
    DISK_FULL = "disk_full"
    INTERRUPTED = "interrupted"
    STOPPED = "stopped"
    """nightlab had seen enough and ended it before its time."""


Box = Literal["train", "model", "scorer"]


class Limits(Record):
    """Everything that bounds one run. No field has a default."""

    wall_seconds: Seconds
    memory_bytes: Annotated[int, Field(ge=16 * 2**20)]
    cpus: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    pids: Annotated[int, Field(ge=4)]
    tmp_bytes: Annotated[int, Field(ge=2**20)]
    shm_bytes: Annotated[int, Field(ge=2**20)]
    output_bytes: Annotated[int, Field(ge=2**12)]
    output_files: Annotated[int, Field(ge=1, le=1000)]
    open_files: Annotated[int, Field(ge=64)]
    log_bytes: Annotated[int, Field(ge=2**12, le=2**22)]
    """Bytes kept of the log's head, and again of its tail."""


Devices = Literal["none", "nvidia", "rocm", "xpu"]
"""What kind of accelerator a box gets, and so how the engine is asked for it."""

GPU_ID_PATTERNS: dict[Devices, re.Pattern[str]] = {
    "none": re.compile(r"(?!)"),
    "nvidia": re.compile(r"^(GPU|MIG)-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"),
    "rocm": re.compile(r"^[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$"),
    "xpu": re.compile(r"^[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$"),
}
"""What names one device for good: NVIDIA's UUIDs, MIG instances included; else PCI addresses."""

MemoryBound = Literal["none", "watchdog", "library", "kernel", "hardware"]
"""What holds a run to its GPU memory, the weakest first: nothing; a watch on the host that kills
after the fact; the allocator inside the program, which the program can change; the driver, for the
box's control group; a MIG instance of that size."""


class GpuMemory(Record):
    """How much memory of each of its GPUs a run may use, and what must hold it to that."""

    bytes: Annotated[int, Field(ge=2**20)]
    at_least: MemoryBound
    """A run that can only be bounded by less is refused."""
    allocator_variable: str = ""
    """Variable by which the image's torch bounds its allocator; empty where it cannot."""


class GpuSample(Record):
    """One GPU at one moment, as the driver tells the host; None where it does not tell."""

    uuid: str
    utilisation: Share | None
    """Share of the last period in which a kernel ran."""
    memory_used_bytes: ByteCount | None
    memory_total_bytes: ByteCount | None
    power_watts: Amount | None
    energy_joules: Amount | None
    """Since the driver was loaded."""
    sm_clock_mhz: ByteCount | None
    memory_clock_mhz: ByteCount | None
    temperature_celsius: float | None
    throttled_by: tuple[str, ...]
    """Reasons for lower clocks that are none of the program's doing: heat, power supply."""
    ecc_errors: ByteCount | None
    """Uncorrected memory errors since the driver was loaded."""


class GpuEvent(Record):
    """Something that a GPU or its driver did during a run and that a healthy one does not."""

    kind: Literal["xid", "lost", "unreadable", "throttled", "ecc", "memory_left", "recovery"]
    words: str
    xid: int | None = None
    is_fault: bool
    """Whether the GPU is to blame and was taken out of use, not the program."""


class Spread(Record):
    """What a reading was over a run."""

    mean: float
    max: float


class GpuUse(Record):
    """What a run made of one of its GPUs, sampled on the host."""

    uuid: str
    name: str
    memory_bound: MemoryBound
    """What held the run to its limit; `none` also where no limit was asked."""
    peak_memory_bytes: ByteCount | None
    utilisation: Share | None
    """Mean over the run."""
    energy_joules: Amount | None
    throttled_share: Share | None
    throttled_by: tuple[str, ...] = ()
    """Every reason that was seen; the fields from here to `samples` are not in older ledgers."""
    power_watts: Spread | None = None
    sm_clock_mhz: Spread | None = None
    memory_clock_mhz: Spread | None = None
    temperature_celsius: Spread | None = None
    samples: Annotated[int, Field(ge=0)]
    events: tuple[GpuEvent, ...]


class Mount(Record):
    """A host path seen read-only inside the box."""

    source: Path
    target: str

    @field_validator("target")
    @classmethod
    def _absolute(cls, target: str) -> str:
        if not target.startswith("/") or ".." in target.split("/") or ":" in target:
            raise ValueError("a mount's target is an absolute path without '..' or ':'")
        return target


class RunSpec(Record):
    """One run: what to execute, in which box, within which limits."""

    run_id: str
    session: str
    box: Box
    image: str
    """Image id or digest; never a tag."""
    argv: Annotated[tuple[str, ...], Field(min_length=1)]
    working_directory: str
    environment: dict[str, str]
    mounts: tuple[Mount, ...]
    devices: Devices = "none"
    gpus: tuple[str, ...]
    """What names each leased GPU, see `GPU_ID_PATTERNS`; empty for none."""
    gpu_memory: GpuMemory | None = None
    """None for a run that may use all of its GPUs' memory."""
    limits: Limits

    @model_validator(mode="after")
    def _gpus_are_of_the_kind(self) -> Self:
        if (self.devices == "none") != (not self.gpus):
            raise ValueError("a run with devices names its GPUs, and a run without names none")
        pattern = GPU_ID_PATTERNS[self.devices]
        if any(not pattern.match(gpu) for gpu in self.gpus) or len(set(self.gpus)) < len(self.gpus):
            raise ValueError(f"these do not name {self.devices} GPUs, each once: {self.gpus}")
        if self.gpu_memory is not None and not self.gpus:
            raise ValueError("a run without GPUs has no GPU memory to bound")
        return self

    @field_validator("run_id", "session")
    @classmethod
    def _identifier(cls, value: str) -> str:
        if not RUN_ID_PATTERN.match(value):
            raise ValueError("lower-case letters, digits and dashes only, 63 at most")
        return value


class Log(Record):
    """The run's output, both streams as they came: exact head, exact tail, a counted middle."""

    head: str
    tail: str
    omitted_bytes: ByteCount


class OutputFile(Record):
    """One regular file that a run left in its output directory, as received by the host."""

    name: str
    bytes: ByteCount
    sha256: Sha256


class RunResult(Record):
    """What became of a run, written by the watcher and never by the watched."""

    run_id: str
    box: Box
    outcome: Outcome
    exit_code: int | None
    signal: int | None
    wall_seconds: Annotated[float, Field(ge=0)]
    """From the start of the program to its end, on the host's monotonic clock."""
    limits: Limits
    peak_memory_bytes: ByteCount | None
    cpu_seconds: Annotated[float, Field(ge=0)] | None
    oom_kills: int
    gpus: tuple[str, ...]
    """Those that PID 1 saw before the program started."""
    gpu: tuple[GpuUse, ...] = ()
    """One for each of them; none in ledgers from before GPUs were watched."""
    log: Log
    output: tuple[OutputFile, ...]
    image_digest: str
    started_at: datetime
    finished_at: datetime
    evidence: dict[str, Any]
    """What the outcome was decided from: counters, clock, signal, the engine's own view."""

    @property
    def was_ended_by_somebody_else(self) -> bool:
        """Tell whether it was interrupted in a way that nothing inside the box can bring about.

        A program can kill itself, but not PID 1, which then lives to tell of it.
        """
        told = self.evidence.get("reported") and self.evidence.get("killed_by") is None
        is_own_deed = told and self.signal == signal.SIGKILL and self.oom_kills == 0
        return self.outcome is Outcome.INTERRUPTED and not is_own_deed

    @property
    def was_throttled(self) -> bool:
        """Tell whether heat or power supply slowed one of its GPUs down."""
        return any(event.kind == "throttled" for use in self.gpu for event in use.events)


class Executor(Protocol):
    """The seam in front of the container engine."""

    def run(
        self,
        spec: RunSpec,
        *,
        output_dir: Path | None = None,
        channel: socket.socket | None = None,
        on_log: Callable[[bytes], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> RunResult:
        """Run `spec` to its end and say truthfully what happened.

        Args:
            spec: what to run.
            output_dir: an empty host directory that receives the run's output files as plain
                regular files; without it the output is dropped.
            channel: a connected stream socket that the program finds as file descriptor 3
                (named in `NIGHTLAB_CHANNEL_FD`); the caller's end stays the caller's to close.
            on_log: called with pieces of the log while the run goes on; pieces may be skipped.
            should_stop: asked after each of these pieces, and once a second in between; once it
                says yes, the box is ended as at its deadline and the outcome is `stopped`, unless
                the program was faster.

        Raises:
            SandboxError: the engine or nightlab failed. A failed program is a result, not an error.
            KeyboardInterrupt: passed on after the container is gone.
        """
        ...

    def answers(self) -> bool:
        """Tell within seconds whether the engine is there at all."""
        ...


class GpuSource(Protocol):
    """Where a session's runs get their GPUs from."""

    @property
    def devices(self) -> Devices:
        """Return what kind they are."""
        ...

    def lease(
        self,
        purpose: str,
        on_wait: Callable[[str], None] = ...,
        while_waiting: Callable[[], object] = ...,
    ) -> AbstractContextManager[tuple[str, ...]]:
        """Have the GPUs of one run until the end of the block; wait for them in line.

        Args:
            purpose: a few words for others who wait.
            on_wait: told once why this one has to wait.
            while_waiting: called again and again meanwhile; gives the place up by raising.

        Raises:
            SandboxError: there will never be any.
        """
        ...


class NoGpus:
    """The source of runs that have none."""

    devices: Devices = "none"

    def lease(
        self,
        purpose: str,
        on_wait: Callable[[str], None] = lambda _: None,
        while_waiting: Callable[[], object] = lambda: None,
    ) -> AbstractContextManager[tuple[str, ...]]:
        """Return no GPUs at once."""
        return nullcontext(())
