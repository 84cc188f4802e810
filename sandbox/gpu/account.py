"""What was seen of one GPU during a run."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from sandbox.contract.gpu import GpuEvent, GpuReading, GpuSample, GpuUse, MemoryBound
from sandbox.gpu.request import Gpu

FAILURES_IN_A_ROW = 3
"""So often may the driver fail to answer before it counts; a reset of a peer stalls it a while."""
THROTTLED_SHARE = 0.1
"""From this share of the samples on a run was throttled enough to say so."""


READINGS = (
    *("utilisation", "power_watts", "sm_clock_mhz", "memory_clock_mhz"),
    "temperature_celsius",
)
"""Fields of a sample of which mean and most are kept."""


@dataclass
class Tally:
    """What a reading was so far."""

    count: int = 0
    total: float = 0.0
    most: float = 0.0

    def add(self, reading: float | None) -> None:
        """Count one reading; none where the driver does not tell."""
        if reading is not None:
            self.most = max(self.most, reading) if self.count else reading
            self.count += 1
            self.total += reading

    @property
    def spread(self) -> GpuReading | None:
        """Return what goes on record."""
        return GpuReading(mean=self.total / self.count, max=self.most) if self.count else None


@dataclass
class Account:
    """What was seen of one GPU while a run had it."""

    gpu: Gpu
    first: GpuSample
    last: GpuSample
    first_unaccounted_bytes: int = 0
    """What no living process accounted for before the run."""
    peak_bytes: int | None = None
    tallies: dict[str, Tally] = field(default_factory=lambda: {name: Tally() for name in READINGS})
    throttled: dict[str, int] = field(default_factory=dict)
    throttled_samples: int = 0
    samples: int = 0
    failures: int = 0
    events: list[GpuEvent] = field(default_factory=list)

    def add(self, sample: GpuSample, used_bytes: int | None) -> None:
        """Count one sample, and what of the GPU's memory is the run's."""
        self.samples += 1
        self.failures = 0
        if used_bytes is not None:
            self.peak_bytes = max(self.peak_bytes or 0, used_bytes)
        for name, tally in self.tallies.items():
            tally.add(getattr(sample, name))
        for reason in sample.throttled_by:
            self.throttled[reason] = self.throttled.get(reason, 0) + 1
        self.throttled_samples += bool(sample.throttled_by)
        if (sample.ecc_errors or 0) > (self.last.ecc_errors or 0):
            new = (sample.ecc_errors or 0) - (self.last.ecc_errors or 0)
            words = f"{new} memory errors that could not be corrected"
            self.events.append(GpuEvent(kind="ecc", words=words, is_fault=True))
        self.last = sample

    def fail(self, event: GpuEvent) -> None:
        """Count an answer that did not come; a lost GPU counts at once, the rest when it lasts."""
        self.failures += 1
        # Once a kind: a GPU that stays silent for hours is one fault, not ten thousand.
        lasts = event.kind == "lost" or self.failures == FAILURES_IN_A_ROW
        if lasts and not any(earlier.kind == event.kind for earlier in self.events):
            self.events.append(event)

    @property
    def has_fault(self) -> bool:
        """Tell whether the GPU is to blame for something."""
        return any(event.is_fault for event in self.events)

    def use(self, bound: MemoryBound) -> GpuUse:
        """Return what goes on record."""
        share = self.throttled_samples / self.samples if self.samples else None
        spreads = {name: tally.spread for name, tally in self.tallies.items()}
        used = spreads["utilisation"]
        return GpuUse(
            uuid=self.gpu.id,
            name=self.gpu.name,
            memory_bound=bound,
            peak_memory_bytes=self.peak_bytes,
            utilisation=None if used is None else min(1.0, used.mean),
            energy_joules=_grown(self.first.energy_joules, self.last.energy_joules),
            throttled_share=share,
            throttled_by=tuple(sorted(self.throttled)),
            power_watts=spreads["power_watts"],
            sm_clock_mhz=spreads["sm_clock_mhz"],
            memory_clock_mhz=spreads["memory_clock_mhz"],
            temperature_celsius=spreads["temperature_celsius"],
            samples=self.samples,
            events=(*self.events, *self._throttling(share or 0.0)),
        )

    def _throttling(self, share: float) -> Iterator[GpuEvent]:
        if share >= THROTTLED_SHARE:
            reasons = ", ".join(sorted(self.throttled))
            words = f"lower clocks in {share:.0%} of the samples: {reasons}"
            yield GpuEvent(kind="throttled", words=words, is_fault=False)


def _grown(first: float | None, last: float | None) -> float | None:
    return None if first is None or last is None else max(0.0, last - first)
