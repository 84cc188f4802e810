"""Decides keep or discard by arithmetic alone.

A score is a measurement with noise. Noise is the standard deviation of one score, pooled over
every group of repeats that the session has (same files, different seeds). A candidate is kept when
it beats the best by more than Student's t at the configured confidence times the standard error of
the difference of the two means. A gain that is too small as it stands, but that further repeats
could still prove, asks for repeats instead. Who may look several times is lucky more often, so
each look must be surer than the whole. (Decision 0003.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from statistics import fmean

from agent.record.events import DRIFT, Arithmetic
from agent.record.history import gain
from agent.record.repeats import Noise, are_moved
from agent.settings import Direction

DOUBT_PER_LOOK = 0.45
"""How much more doubt every look gets rid of, for each e-fold of looks; found by simulation."""


class Ruling(StrEnum):
    """What to do with a measured candidate."""

    KEEP = "keep"
    DISCARD = "discard"
    REPEAT = "repeat"


@dataclass(frozen=True)
class Judgement:
    """A ruling with its reason and its numbers."""

    ruling: Ruling
    reason: str
    explanation: str
    arithmetic: Arithmetic


@lru_cache(maxsize=256)
def student_t_quantile(probability: float, degrees_of_freedom: int) -> float:
    """The `t` with P(T <= t) = `probability` for Student's distribution.

    Raises:
        ValueError: `probability` lies outside [0.5, 1) or there are no degrees of freedom.
    """
    # Imported here, since no command but a night and its audit should wait for it; and not
    # scipy.stats, which wraps the same function and takes more than twice as long to import.
    from scipy.special import stdtrit

    if not 0.5 <= probability < 1.0 or degrees_of_freedom < 1:
        raise ValueError("needs 0.5 <= probability < 1 and at least one degree of freedom")
    return float(stdtrit(degrees_of_freedom, probability))


def confidence_of_a_look(confidence: float, looks: int) -> float:
    """How sure each of several looks must be, so that all together are as sure as configured.

    Looks at growing data are alike, so it is far less than a share for each. For up to ten looks,
    and noise known badly or well, equal files are then kept no more often than configured
    (`test_judge.py`); a single look is as sure as the whole.
    """
    return 1 - (1 - confidence) / (1 + DOUBT_PER_LOOK * math.log(looks))


def independent(scores: Sequence[float]) -> int:
    """How many scores there are of their own: equal ones are one, of a file that pins its seed."""
    return len(scores) if are_moved(scores) else 1


def judge(
    candidate: Sequence[float],
    best: Sequence[float],
    noise: Noise,
    *,
    direction: Direction,
    confidence: float,
    max_repeats: int,
) -> Judgement:
    """Rule on a candidate from its scores and those of the best, at least one each, one a seed.

    Args:
        candidate: valid scores.
        best: valid scores.
        noise: of one score, see `pooled_noise`.
        direction: of the metric.
        confidence: one-sided, 0.5 or more and less than 1; of all looks together.
        max_repeats: how many scores a candidate may get before it must be settled.
    """
    improvement = gain(direction, fmean(candidate), fmean(best))
    level = confidence_of_a_look(confidence, max_repeats)
    t = student_t_quantile(level, noise.degrees_of_freedom)
    count, of_best = independent(candidate), independent(best)
    required = t * noise.sigma * math.sqrt(1 / count + 1 / of_best)
    arithmetic = Arithmetic(
        candidate_mean=fmean(candidate),
        candidate_values=tuple(candidate),
        best_mean=fmean(best),
        best_values=tuple(best),
        gain=improvement,
        noise=noise.sigma,
        degrees_of_freedom=noise.degrees_of_freedom,
        confidence=confidence,
        required_gain=required,
        confidence_of_a_look=level,
    )
    # The best is measured as often as the candidate before it is settled, so both means get surer.
    repeats = max(max_repeats, count)
    provable = t * noise.sigma * math.sqrt(1 / repeats + 1 / max(repeats, of_best))
    # More scores of a file that pins its seed are the same score: repeating it proves nothing.
    may_repeat = len(candidate) < max_repeats and count == len(candidate)
    numbers = f"gain {improvement:+.4f}, needed {required:.4f} at {confidence:.0%} confidence"
    if improvement > required:
        return Judgement(Ruling.KEEP, "better", f"better beyond noise: {numbers}", arithmetic)
    if improvement > provable and may_repeat:
        return Judgement(Ruling.REPEAT, "close_call", f"too close to call: {numbers}", arithmetic)
    if improvement > 0:
        return Judgement(Ruling.DISCARD, "unproven", f"better, but unproven: {numbers}", arithmetic)
    return Judgement(Ruling.DISCARD, "not_better", f"not better: {numbers}", arithmetic)


def drift_tolerance(noise: Noise, confidence: float) -> float:
    """How far two scores of the same files may lie apart before it is more than noise."""
    return student_t_quantile(confidence, noise.degrees_of_freedom) * noise.sigma * math.sqrt(2)


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
