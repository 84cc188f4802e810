"""What a run is asked, and what came of it.

The seam between the two halves of nightlab: it knows neither Docker nor language models. Every
size is in bytes, every duration in seconds; each limit must be given, since a limit that defaults
to "none" is no limit.
"""

import re
import signal
import socket
from collections.abc import Callable
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import Field, field_validator, model_validator

from sandbox.contract.gpu import GPU_ID, Devices, GpuMemory, GpuUse
from sandbox.contract.record import ByteCount, Record, Seconds, Sha256

# They become names of containers, labels and directories.
RUN_ID_PATTERN = re.compile(r"^[a-z0-9][a-z0-9-]{0,62}$")
Box = Literal["train", "model", "scorer"]
"""One level of trust each: the candidate's training, its model under test, our own scoring."""


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
    loopback: bool
    """Whether a training's processes may speak to one another over network sockets: what they send
    and do not read may lie in memory that no limit counts."""


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
    """What names each leased GPU, see `GPU_ID`; empty for none."""
    gpu_memory: GpuMemory | None = None
    """None for a run that may use all of its GPUs' memory."""
    limits: Limits

    @model_validator(mode="after")
    def _gpus_are_of_the_kind(self) -> Self:
        if (self.devices == "none") != (not self.gpus):
            raise ValueError("a run with devices names its GPUs, and a run without names none")
        if len({gpu for gpu in self.gpus if GPU_ID.match(gpu)}) < len(self.gpus):
            raise ValueError(f"these do not name GPUs, each once: {self.gpus}")
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
    gpu: tuple[GpuUse, ...]
    """What the run made of each of them."""
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
        reported = self.evidence.get("reported") and self.evidence.get("killed_by") is None
        is_own_deed = reported and self.signal == signal.SIGKILL and self.oom_kills == 0
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
