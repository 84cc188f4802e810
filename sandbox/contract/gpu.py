"""A run's GPUs: names, bounds of memory, use."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Literal, Protocol

from pydantic import Field

from sandbox.contract.record import Amount, ByteCount, Record, Share

Devices = Literal["none", "nvidia"]
"""What kind of accelerator a box gets, and so how the engine is asked for it."""
GPU_ID = re.compile(r"^(GPU|MIG)-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
"""What names one device for good: NVIDIA's UUIDs, those of MIG instances included."""
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
    """The number of the driver's report; None for every other kind."""
    is_fault: bool
    """Whether the GPU is to blame and was taken out of use, not the program."""


class GpuReading(Record):
    """What a reading was over a run."""

    mean: float
    max: float


class GpuUse(Record):
    """What a run made of one of its GPUs, sampled on the host; None where nobody could tell."""

    uuid: str
    name: str
    memory_bound: MemoryBound
    """What held the run to its limit; `none` also where no limit was asked."""
    peak_memory_bytes: ByteCount | None
    utilisation: Share | None
    """Mean over the run."""
    energy_joules: Amount | None
    throttled_share: Share | None
    throttled_by: tuple[str, ...]
    """Every reason that was seen."""
    power_watts: GpuReading | None
    sm_clock_mhz: GpuReading | None
    memory_clock_mhz: GpuReading | None
    temperature_celsius: GpuReading | None
    samples: Annotated[int, Field(ge=0)]
    events: tuple[GpuEvent, ...]


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

    def lease(self, purpose: str, *_: object, **__: object) -> nullcontext[tuple[str, ...]]:
        """Return no GPUs at once."""
        return nullcontext(())
