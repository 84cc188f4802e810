"""What each kept change is worth, folded from a review.

The judge of the night weighs here too, at fresh seeds: scores that chose a change cannot say what
it is worth. See docs/decisions/0005.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import fmean
from typing import Literal

from agent.attempt.judge import SINGLE_LOOK, Demands, judge
from agent.record.attempts import DISTURBED, Attempt
from agent.record.events import (
    Arithmetic,
    Entry,
    HumanDecided,
    ReviewFinished,
    ReviewStarted,
    VariantMeasured,
    VariantPlanned,
)
from agent.record.history import History, direction_of, gain, label_of
from agent.record.repeats import Noise, Spread, are_moved, pooled
from sandbox.contract.record import Record

BASELINE, BEST, SMALLER = "baseline", "best", "smaller"
WITHOUT, BEFORE, AFTER = "without-{}", "before-{}", "after-{}"
"""The best's files without an attempt's change; the files that the attempt built on; its own."""


class Effect(StrEnum):
    """What a kept change turned out to be."""

    REAL = "real"
    LUCK = "luck"
    HARMFUL = "harmful"
    NEEDED = "needed"
    UNTESTED = "untested"
    UNKNOWN = "unknown"


MEANING = {
    Effect.REAL: "worth it beyond noise",
    Effect.LUCK: "luck: not beyond noise",
    Effect.HARMFUL: "better without it",
    Effect.NEEDED: "needed: it does not run without it",
    Effect.UNTESTED: "cannot tell: not tested by seeds",
    Effect.UNKNOWN: "not measured",
}


class ChangeEffect(Record):
    """One kept change: what it gained when it was kept, and what it is worth today."""

    attempt: int
    hypothesis: str
    gain_then: float | None
    how: Literal["left_out", "step"]
    """Against the best without it; or, where it cannot be left out alone, against what was before
    it at the time."""
    arithmetic: Arithmetic | None
    """With the change as candidate, without it as best."""
    effect: Effect
    note: str


class SmallerModel(Record):
    """The best without the changes that were luck."""

    left_out: tuple[int, ...]
    arithmetic: Arithmetic | None
    """The best as candidate, the smaller model as best."""
    is_equal: bool
    """Not worse beyond noise."""
    note: str


class ReviewTable(Record):
    """All of a review, as far as it is measured."""

    review: int
    is_finished: bool
    metric: str
    seeds: tuple[int, ...]
    heeds_seeds: bool
    """Where the program gives its own, repeats are the same luck and prove nothing."""
    baseline: int
    best: int
    baseline_values: tuple[float, ...]
    best_values: tuple[float, ...]
    arithmetic: Arithmetic | None
    """The best as candidate, the baseline as best."""
    holdout_gain: float | None
    noise: float | None
    changes: tuple[ChangeEffect, ...]
    smaller: SmallerModel | None


@dataclass
class Review:
    """One review with everything that was recorded of it."""

    started: ReviewStarted
    variants: dict[str, VariantPlanned] = field(default_factory=dict)
    measured: list[VariantMeasured] = field(default_factory=list)
    is_finished: bool = False

    def scores(self, variant: VariantPlanned) -> list[VariantMeasured]:
        """What was measured of the variant's files, under whatever name."""
        same = {name for name, v in self.variants.items() if v.files == variant.files}
        return [m for m in self.measured if m.variant in same]

    def values(self, name: str, split: str = "val") -> list[float]:
        """The valid scores of a variant, in the order of the seeds; none if it was not planned."""
        if name not in self.variants:
            return []
        found = {
            m.seed: m.value if split == "val" else m.holdout
            for m in self.scores(self.variants[name])
        }
        ordered = [found.get(seed) for seed in self.started.seeds]
        return [value for value in ordered if value is not None]

    def failure(self, name: str) -> VariantMeasured | None:
        """Why a variant has no score at a seed, if that is so."""
        if name not in self.variants:
            return None
        return next((m for m in self.scores(self.variants[name]) if m.value is None), None)


def review_cost(history: History, repeats: int | None = None) -> tuple[int, float]:
    """How many trainings a review takes at most, and their seconds by what the baseline took.

    Baseline, best, the best without each kept change, and without all that were luck.
    """
    baseline, kept = history.baseline, len(kept_chain(history))
    seeds = repeats or history.in_force.noise.baseline_repeats
    trainings = (kept + 3) * seeds
    if baseline is None or baseline.finished is None:
        return trainings, 0.0
    return trainings, trainings * baseline.finished.seconds / max(1, len(baseline.values()))


def reviews(entries: Sequence[Entry]) -> list[Review]:
    """Every review of a session, oldest first."""
    found: list[Review] = []
    for entry in entries:
        match entry.event:
            case ReviewStarted():
                found.append(Review(entry.event))
            case VariantPlanned():
                found[-1].variants[entry.event.variant] = entry.event
            case VariantMeasured():
                found[-1].measured.append(entry.event)
            case ReviewFinished():
                found[-1].is_finished = True
            case _:
                pass
    return found


def decision(entries: Sequence[Entry]) -> HumanDecided | None:
    """The last word of a person, if there is one."""
    events = (entry.event for entry in reversed(entries))
    return next((event for event in events if isinstance(event, HumanDecided)), None)


def kept_chain(history: History) -> list[Attempt]:
    """The kept changes from the baseline to the best, oldest first."""
    chain: list[Attempt] = []
    attempt = history.best
    while attempt is not None and attempt.started.parent is not None:
        chain.append(attempt)
        attempt = history.attempt(attempt.started.parent)
    return chain[::-1]


def ablation(review: Review, history: History) -> ReviewTable:
    """The table of a review, with the judge's arithmetic."""
    direction, noise = direction_of(history), _noise(review, history)
    after, before = review.values(BEST, "holdout"), review.values(BASELINE, "holdout")
    changes = (a for a in history.attempts if WITHOUT.format(a.number) in review.variants)
    return ReviewTable(
        review=review.started.review,
        is_finished=review.is_finished,
        metric=label_of(history),
        seeds=review.started.seeds,
        heeds_seeds=review.started.heeds_seeds,
        baseline=review.started.baseline,
        best=review.started.best,
        baseline_values=tuple(review.values(BASELINE)),
        best_values=tuple(review.values(BEST)),
        arithmetic=_compare(review, history, BEST, BASELINE),
        holdout_gain=gain(direction, fmean(after), fmean(before)) if after and before else None,
        noise=noise.sigma if noise else None,
        changes=tuple(_change(attempt, review, history) for attempt in changes),
        smaller=_smaller(review, history),
    )


def dispensable(table: ReviewTable) -> tuple[int, ...]:
    """The changes that can be left out alone and were luck, or worse."""
    return tuple(
        change.attempt
        for change in table.changes
        if change.how == "left_out" and change.effect in (Effect.LUCK, Effect.HARMFUL)
    )


def _compare(review: Review, history: History, candidate: str, best: str) -> Arithmetic | None:
    """The arithmetic of one variant against another; none unless both are measured."""
    left, right, noise = review.values(candidate), review.values(best), _noise(review, history)
    if not left or not right or noise is None:
        return None
    terms = Demands(direction_of(history), SINGLE_LOOK, SINGLE_LOOK)
    return judge(left, right, noise, terms).arithmetic


def _is_tested(review: Review, *variants: str) -> bool:
    """Whether seeds move the scores of both: what pins its own has the same luck each time."""
    groups = [review.values(name) for name in variants]
    return review.started.heeds_seeds and all(are_moved(g) for g in groups if len(g) > 1)


def effect_of(numbers: Arithmetic) -> Effect:
    """What the difference that a change makes says about it."""
    if numbers.gain > numbers.required_gain:
        return Effect.REAL
    return Effect.HARMFUL if -numbers.gain > numbers.required_gain else Effect.LUCK


def _noise(review: Review, history: History) -> Noise | None:
    """Pooled over the night's repeats and the review's, each file set counted once."""
    names: dict[str, str] = {}
    for name, variant in review.variants.items():
        if variant.files is not None:
            names.setdefault(repr(sorted(variant.files.items())), name)
    measured = [review.values(name) for name in names.values()]
    repeated = [Spread.of(group) for group in measured if len(group) > 1]
    groups = [*history.repeats.spreads, *repeated]
    return pooled(groups) if groups else None


def _change(attempt: Attempt, review: Review, history: History) -> ChangeEffect:
    number = attempt.number
    planned = review.variants[WITHOUT.format(number)]
    is_step = planned.files is None
    with_it, without_it = BEST, WITHOUT.format(number)
    if is_step:
        with_it, without_it = AFTER.format(number), BEFORE.format(number)
    numbers = _compare(review, history, with_it, without_it)
    failed = None if is_step else review.failure(without_it)
    note = f"cannot be left out alone ({planned.problem}); measured as the step it was"
    effect = Effect.UNKNOWN if numbers is None else effect_of(numbers)
    if numbers is not None and not _is_tested(review, with_it, without_it):
        effect = Effect.UNTESTED
    if failed is not None:
        effect = Effect.UNKNOWN if failed.reason == DISTURBED else Effect.NEEDED
    then = attempt.finished.arithmetic if attempt.finished else None
    return ChangeEffect(
        attempt=number,
        hypothesis=attempt.started.hypothesis,
        gain_then=then.gain if then else None,
        how="step" if is_step else "left_out",
        arithmetic=None if failed else numbers,
        effect=effect,
        note=note if is_step else _why(failed),
    )


def _why(failed: VariantMeasured | None) -> str:
    return "" if failed is None else f"{failed.reason}: {failed.explanation}"


def _smaller(review: Review, history: History) -> SmallerModel | None:
    planned = review.variants.get(SMALLER)
    if planned is None:
        return None
    failed = review.failure(SMALLER)
    # One that failed at a seed has scores at the others: a mean of those would flatter it.
    numbers = None if failed else _compare(review, history, BEST, SMALLER)
    is_tested = _is_tested(review, BEST, SMALLER)
    is_equal = numbers is not None and is_tested and effect_of(numbers) is not Effect.REAL
    note = _why(failed) or planned.problem
    return SmallerModel(left_out=planned.left_out, arithmetic=numbers, is_equal=is_equal, note=note)
