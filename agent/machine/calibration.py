"""What a machine was measured to do; settings that follow.

Nothing here runs anything: measurements come in, proposals come out, each with the numbers that it
was made from. A person decides; nightlab changes no setting by itself.
"""

import math
from collections.abc import Sequence
from datetime import datetime
from statistics import fmean
from typing import Annotated

from pydantic import Field

from agent.attempt.judge import student_t
from agent.machine.rates import Rates
from agent.record.repeats import pooled_noise
from sandbox.contract.record import Record, Sha256
from sandbox.contract.run import Outcome

MAX_START_SHARE = 0.1
"""A budget of which more goes into starting up is too short."""
RELEVANT_GAIN = 0.01
"""Share of the score that one change should gain to be worth finding at night."""
GOOD_ENOUGH_RATE = 0.9
"""Share of the best tokens a second at which a smaller batch is the better one: more steps."""
MAX_REPEATS = 5
"""Noise falls with the root of the seeds: from here on other ideas find more in the same hours."""


class AtBudget(Record):
    """The baseline at one budget: its scores at several seeds, how fast it was, how it began."""

    budget_seconds: Annotated[float, Field(gt=0)]
    values: tuple[float, ...]
    tokens_per_second: Annotated[float, Field(ge=0)] | None
    """By the program's own word, as are the two below; None where it said nothing."""
    start_seconds: Annotated[float, Field(ge=0)] | None
    """Until the first step began."""
    flops_per_token: Annotated[float, Field(ge=0)] | None
    disturbed: int
    """Trainings during which others used the machine."""
    problem: str = ""
    """Why there are no scores."""

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def sigma(self) -> float | None:
        """Standard deviation of one score; None from fewer than two."""
        return pooled_noise([self.values]).sigma if len(self.values) > 1 else None

    @property
    def start_share(self) -> float:
        """Of the budget, before the first step."""
        return (self.start_seconds or 0.0) / self.budget_seconds


class BatchTried(Record):
    """One size of batch in one short training."""

    batch: Annotated[int, Field(ge=1)]
    outcome: Outcome
    peak_memory_bytes: int | None
    tokens_per_second: Annotated[float, Field(ge=0)] | None


class Batches(Record):
    """How large a batch may become within the memory limit."""

    present: int | None
    """The one that train.py has now; None where it has no such knob."""
    tried: tuple[BatchTried, ...]
    ended: str
    """Why no larger one was tried."""

    @property
    def largest(self) -> int | None:
        """The largest that trained to the end."""
        return max((t.batch for t in self.tried if t.outcome is Outcome.OK), default=None)


class ProposedSetting(Record):
    """One setting, and why it should be so."""

    setting: str
    value: str
    reason: str


class Calibration(Record):
    """What was measured of one baseline; image, limits and machine are those of its session."""

    measured_at: datetime
    files: dict[str, Sha256]
    """The baseline's, by name."""
    rates: Rates | None
    at_budgets: tuple[AtBudget, ...]
    batches: Batches
    proposals: tuple[ProposedSetting, ...]

    @property
    def rate_share(self) -> float | None:
        """Share of the measured matmul rate that the longest baseline used."""
        for at in reversed(self.at_budgets):
            if self.rates and at.flops_per_token and at.tokens_per_second:
                return at.flops_per_token * at.tokens_per_second / self.rates.matmul_flops
        return None


def proposals(
    at_budgets: Sequence[AtBudget], batches: Batches, doubt: float
) -> tuple[ProposedSetting, ...]:
    """Budget, batch and repeats that the measurements speak for; nothing without a measurement."""
    found: list[ProposedSetting] = []
    if (chosen := _budget(at_budgets, doubt)) is not None:
        found += [_seconds(*chosen), *_repeats(*chosen)]
    return (*found, *_batch(batches))


def findable(at: AtBudget, doubt: float) -> float | None:
    """The gain of one run over another that is beyond noise; None where noise is not known."""
    if at.sigma is None:
        return None
    quantile = student_t(doubt, len(at.values) - 1)
    return quantile * math.sqrt(2) * at.sigma


def _budget(at_budgets: Sequence[AtBudget], doubt: float) -> tuple[AtBudget, float] | None:
    """The shortest that starts quickly and shows a relevant gain; else the longest.

    With it comes the gain that it shows.
    """
    by_length = sorted(at_budgets, key=lambda at: at.budget_seconds)
    usable = [(at, gain) for at in by_length if (gain := findable(at, doubt)) is not None]
    for at, gain in usable:
        if at.start_share <= MAX_START_SHARE and gain <= RELEVANT_GAIN * abs(at.mean):
            return at, gain
    return usable[-1] if usable else None


def _seconds(at: AtBudget, gain: float) -> ProposedSetting:
    start = f"starting up takes {100 * at.start_share:.0f} % of it" if at.start_seconds else ""
    share = f"one run against one shows gains from {gain:.4f}, {100 * gain / abs(at.mean):.1f} %"
    return ProposedSetting(
        setting="[budget] seconds",
        value=f"{at.budget_seconds:g}",
        reason="; ".join(part for part in (start, f"{share} of the score") if part),
    )


def _repeats(at: AtBudget, gain: float) -> list[ProposedSetting]:
    """So many seeds of the baseline that a relevant gain is beyond noise, within reason."""
    relevant = RELEVANT_GAIN * abs(at.mean)
    # Noise of a mean falls with the root of its seeds: half of it takes four times as many.
    needed = math.ceil((gain / relevant) ** 2) if relevant else 1
    seeds = min(MAX_REPEATS, max(3, needed))
    why = (
        f"a gain of {100 * RELEVANT_GAIN:g} % ({relevant:.4f}) takes {needed} seed(s) on each side"
    )
    capped = f", more than {MAX_REPEATS} are not worth their hours" if needed > seeds else ""
    return [
        # From two scores a deviation is hardly known at all, and every verdict rests on it.
        ProposedSetting(setting="[noise] baseline_repeats", value=str(seeds), reason=why + capped)
    ]


def _batch(batches: Batches) -> list[ProposedSetting]:
    rates = {t.batch: t.tokens_per_second for t in batches.tried if t.tokens_per_second}
    if not rates:
        return []
    best = max(rates.values())
    smallest = min(batch for batch, rate in rates.items() if rate >= GOOD_ENOUGH_RATE * best)
    reason = (
        f"{rates[smallest]:,.0f} tokens a second, the smallest within a tenth of the best "
        f"({best:,.0f}); the largest that ran is {batches.largest} ({batches.ended})"
    )
    return [ProposedSetting(setting="BATCH in train.py", value=str(smallest), reason=reason)]
