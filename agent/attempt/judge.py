"""Decides keep or discard by arithmetic alone.

A score is a measurement with noise. The first run of a candidate only opens the door: who is lucky
there is looked at again. What decides are scores at seeds that nobody knew before, the candidate's
and the best's. Their means must lie further apart than two tests allow: Student's, by the noise
that the session has measured so far, and Welch's, by the candidate's own spread, since a change can
make scores noisier. How sure they must be follows from the rate of false keeps that a whole night
may have, of which each test spends a part of what is left. (Decision 0022.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from statistics import fmean, stdev, variance

from agent.record.events import DRIFT, Arithmetic
from agent.record.history import gain
from agent.record.repeats import Noise, Spread, are_moved, is_far_below
from agent.settings import Direction

DOUBT_AT_THE_DOOR = 0.1
"""How many of the candidates that are no better than the best are tested."""
SHARE_OF_A_TEST = 0.125
"""What a test spends of the doubt that is left: the sum of all is the night's, however many."""
LEAST_DOUBT = 1e-9
"""Of a test after hundreds of others: a gain that is sure beyond that is kept in any night."""
DOUBT_PER_LOOK = 1.0
"""How much more doubt every look gets rid of, for each e-fold of looks; found by simulation."""
WORTH_REPEATING = 0.5
"""Share of the gain that all repeats together could prove, from which it is worth going on."""
MIN_SCORES = 3
"""Of a candidate, before it is kept: fewer say too little of its own spread."""
MIN_SCORES_BESIDE = 2
"""Of the best beside the candidate, before that is kept."""
MIN_SCORES_OF_BEST = 4
"""Before a test is decided: they serve every later test as well."""
SINGLE_LOOK = 0.05
"""Doubt of what is compared once: beside a keep, in reviews, replays and checks of the machine."""


class Ruling(StrEnum):
    """What to do with a measured candidate."""

    KEEP = "keep"
    DISCARD = "discard"
    REPEAT = "repeat"


@dataclass(frozen=True)
class Demands:
    """What a test is held to."""

    direction: Direction
    rate: float
    """Of nights that keep something that is no better: what `doubt` is a part of."""
    doubt: float
    """How likely this test may keep what is no better, all looks together."""
    max_repeats: int = 1
    """Scores that a candidate may get before it must be settled."""
    smallest_gain: float = 0.0
    """What a gain must be worth at least, however sure it is."""
    against: int = 0
    """The attempt that the best's scores are of, for the record."""

    @property
    def level(self) -> float:
        """The doubt of each look. Looks at growing data are alike: it is more than a share each."""
        looks = max(1, self.max_repeats - MIN_SCORES + 1)
        return self.doubt / (1 + DOUBT_PER_LOOK * math.log(looks))


@dataclass(frozen=True)
class Judgement:
    """A ruling with its reason and its numbers."""

    ruling: Ruling
    reason: str
    explanation: str
    arithmetic: Arithmetic


@lru_cache(maxsize=1024)
def student_t(doubt: float, degrees_of_freedom: float) -> float:
    """The `t` that Student's distribution exceeds with a probability of `doubt`.

    Raises:
        ValueError: `doubt` lies outside (0, 0.5] or there are no degrees of freedom.
    """
    # Imported here, since no command but a night and its audit should wait for it; and not
    # scipy.stats, which wraps the same function and takes more than twice as long to import.
    from scipy.special import stdtrit

    if not 0 < doubt <= 0.5 or degrees_of_freedom < 1:
        raise ValueError("needs 0 < doubt <= 0.5 and at least one degree of freedom")
    return -float(stdtrit(degrees_of_freedom, doubt))  # 1 - doubt would be 1 in a long night


def doubt_of_a_test(rate: float, tests_before: int) -> float:
    """How likely the next test of a night may keep what is no better.

    Args:
        rate: of nights that keep something that is no better.
        tests_before: how many candidates were tested in this night.
    """
    return max(LEAST_DOUBT, rate * SHARE_OF_A_TEST * (1 - SHARE_OF_A_TEST) ** tests_before)


def independent(scores: Sequence[float], noise: Noise) -> int:
    """How many scores there are of their own: one, of a file that pins its seed.

    Such scores are equal, or lie closer together than noise does: a wall budget moves them a bit.
    """
    if not are_moved(scores) or is_far_below(Spread.of(scores), noise):
        return 1
    return len(scores)


def lacks_scores(of_best: int, of_candidate: int) -> bool:
    """Whether the best must be measured before a test looks at so many scores of a candidate."""
    return of_best < max(MIN_SCORES_OF_BEST, of_candidate)


def at_the_door(first: float, best: Sequence[float], noise: Noise, terms: Demands) -> Judgement:
    """Whether a candidate's first score makes it worth a test: a repeat, or a discard.

    Args:
        first: valid score of its first run.
        best: valid scores of the best, one a seed; at least one.
        noise: of one score, see `pooled_noise`.
        terms: of the test that would follow.
    """
    bound = _by_noise(noise, 1, independent(best, noise), DOUBT_AT_THE_DOOR)
    bound = max(bound, WORTH_REPEATING * terms.smallest_gain)
    arithmetic = _arithmetic([first], best, noise, terms, DOUBT_AT_THE_DOOR, bound)
    if arithmetic.gain > bound:
        text = f"worth a test: gain {arithmetic.gain:+.4f} in the first run"
        return Judgement(Ruling.REPEAT, "close_call", text, arithmetic)
    numbers = f"gain {arithmetic.gain:+.4f} in the first run, worth a test from {bound:.4f}"
    return _discard(numbers, arithmetic)


def judge(
    candidate: Sequence[float],
    best: Sequence[float],
    noise: Noise,
    terms: Demands,
    at_the_door: Sequence[float] = (),
) -> Judgement:
    """Rule on a candidate from its scores and those of the best.

    Args:
        candidate: valid scores that nothing was chosen by, one a seed; at least one.
        best: valid scores of the best, one a seed; at least one.
        noise: of one score, see `pooled_noise`.
        terms: what it is held to.
        at_the_door: the candidate's score that it was chosen by, if it was: for its spread alone.
    """
    level, of_best = terms.level, independent(best, noise)
    is_pinned = independent([*at_the_door, *candidate], noise) == 1
    count = 1 if is_pinned else len(candidate)
    # The luck of a pinned seed is the one that opened the door: it must be as rare as both.
    by_noise = _by_noise(
        noise, count, of_best, level * (DOUBT_AT_THE_DOOR if is_pinned and at_the_door else 1)
    )
    own = _by_own_spread(candidate, noise, of_best, level)
    required = max(by_noise, own, terms.smallest_gain)
    arithmetic = _arithmetic(candidate, best, noise, terms, level, required)
    improvement, most = arithmetic.gain, max(terms.max_repeats, count)
    numbers = f"gain {improvement:+.4f}, needed {required:.4f}"
    if improvement > required and len(candidate) >= min(MIN_SCORES, terms.max_repeats):
        return Judgement(Ruling.KEEP, "better", f"better beyond noise: {numbers}", arithmetic)
    # The best is measured as often as the candidate before it is settled, so both means get surer.
    provable = max(_by_noise(noise, most, max(most, of_best), level), terms.smallest_gain)
    # More scores of a file that pins its seed are the same score: repeating it proves nothing.
    may_repeat = len(candidate) < terms.max_repeats and (
        len(candidate) < MIN_SCORES or are_moved(candidate)
    )
    if improvement > WORTH_REPEATING * provable and may_repeat:
        return Judgement(Ruling.REPEAT, "close_call", f"too close to call: {numbers}", arithmetic)
    return _discard(numbers, arithmetic)


def holds_beside(
    candidate: Sequence[float], beside: Sequence[float], noise: Noise, direction: Direction
) -> bool:
    """Whether a gain holds against those scores alone that the best got beside the candidate.

    Where the machine became faster meanwhile, everything looks better than the best's old scores.
    """
    bound = _by_noise(noise, independent(candidate, noise), len(beside), SINGLE_LOOK)
    return gain(direction, fmean(candidate), fmean(beside)) > bound


def _by_noise(noise: Noise, count: int, of_best: int, doubt: float) -> float:
    """The gain that luck passes with so much doubt, where both scores have the session's noise."""
    if noise.sigma == 0:
        return 0.0
    t = student_t(doubt, noise.degrees_of_freedom)
    return t * noise.sigma * math.sqrt(1 / count + 1 / of_best)


def _by_own_spread(candidate: Sequence[float], noise: Noise, of_best: int, doubt: float) -> float:
    """The same where the candidate has its own noise, known from its own scores alone.

    B. L. Welch, "The generalization of Student's problem when several different population
    variances are involved", Biometrika 34 (1947).
    """
    if len(candidate) < 2 or not are_moved(candidate):
        return 0.0
    own, bests = variance(candidate) / len(candidate), noise.sigma**2 / of_best
    parts = own**2 / (len(candidate) - 1)
    parts += bests**2 / noise.degrees_of_freedom if bests else 0.0
    # Never below those of the candidate: where its spread is all there is, rounding would be.
    degrees = max(1.0, (own + bests) ** 2 / parts)
    return student_t(doubt, degrees) * math.sqrt(own + bests)


def _arithmetic(
    candidate: Sequence[float],
    best: Sequence[float],
    noise: Noise,
    terms: Demands,
    doubt: float,
    required: float,
) -> Arithmetic:
    return Arithmetic(
        candidate_mean=fmean(candidate),
        candidate_values=tuple(candidate),
        against=terms.against,
        best_mean=fmean(best),
        best_values=tuple(best),
        gain=gain(terms.direction, fmean(candidate), fmean(best)),
        noise=noise.sigma,
        degrees_of_freedom=noise.degrees_of_freedom,
        own_noise=stdev(candidate) if len(candidate) > 1 else None,
        required_gain=required,
        false_keep_rate_per_night=terms.rate,
        doubt_of_a_look=doubt,
    )


def _discard(numbers: str, arithmetic: Arithmetic) -> Judgement:
    if arithmetic.gain > 0:
        return Judgement(Ruling.DISCARD, "unproven", f"better, but unproven: {numbers}", arithmetic)
    return Judgement(Ruling.DISCARD, "not_better", f"not better: {numbers}", arithmetic)


def drift_tolerance(noise: Noise) -> float:
    """How far two scores of the same files may lie apart before it is more than noise."""
    return _by_noise(noise, 1, 1, SINGLE_LOOK)


def is_beyond(recorded: float, today: float, tolerance: float) -> bool:
    """Whether a score of the same files differs by more than noise."""
    return abs(today - recorded) > tolerance


def has_drifted(recorded: float, today: Sequence[float], tolerance: float) -> bool:
    """Whether two looks in a row were beyond noise, and on the same side."""
    beyond = [value - recorded for value in today if is_beyond(recorded, value, tolerance)]
    return len(beyond) == len(today) == 2 and (beyond[0] > 0) == (beyond[1] > 0)


def drift_purposes(check: int) -> tuple[str, str]:
    """What the runs of a look, and of the second one where it is needed, are for."""
    return f"{DRIFT}{check}", f"{DRIFT}{check} again"
