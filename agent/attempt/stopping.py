"""Stops trainings that can no longer win, by their curves.

What a program says of its loss is its own word. It can only get its run stopped, or keep it from
being stopped: a run that was stopped is never kept, and one that was not is scored like any other.
Losses are compared at the same share of the budget, each as a mean over a quarter of it, since the
loss of one batch is mostly the luck of that batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from agent.attempt.judge import Noise, pooled_noise, student_t_quantile
from agent.record.curves import Curve, unpacked
from agent.record.events import EarlyStop, RunFinished
from agent.record.history import Attempt, History
from agent.settings import Budget, Direction, Settings
from sandbox.contract.run import Outcome

WINDOW = 0.25
"""Share of the budget over which a loss is averaged."""
MIN_SCORED = 6
"""Runs that a line from loss to score needs at least."""
MIN_STEP = 0.01
"""Share of the budget between two looks: a flood of progress lines costs no more than a few."""

Progress = tuple[tuple[float, float], ...]
"""Share of the budget and loss, in the order in which they were said."""


@dataclass(frozen=True)
class Past:
    """What this session's earlier runs said on their way, and what they came to."""

    kept: tuple[tuple[Progress, ...], ...]
    """The runs of each kept attempt, the baseline's first, the best's last."""
    scored: tuple[tuple[Progress, float], ...]
    """Every measured run with its score."""
    best: float
    """Mean score of the best."""


@dataclass(frozen=True)
class Rule:
    """What decides, made once for a run."""

    settings: Settings
    past: Past

    def __call__(self, curve: Curve) -> EarlyStop | None:
        """Why the run should end now; none as long as it may still win."""
        own = progress(curve, self.settings.budget)
        economy = self.settings.economy
        if not own or own[-1][0] < economy.stop_after:
            return None
        match economy.early_stopping:
            case "off":
                return None
            case "median":
                return by_median(own, self.past)
            case "predictive":
                return by_prediction(
                    own, self.past, self.settings.noise.confidence, self.settings.goal.direction
                )


class Watch:
    """Follows one run, and remembers why it should end.

    Args:
        curve: what the run has said so far.
        rule: what decides.
        budget: of the run.
    """

    def __init__(self, curve: Callable[[], Curve], rule: Rule, budget: Budget) -> None:
        self._curve = curve
        self._rule = rule
        self._budget = budget
        self._looked_at = 0.0
        self.found: EarlyStop | None = None
        self.seen: Curve = []
        """The curve at that time: what is said later did not count."""

    def __call__(self) -> bool:
        """Whether the run should end now."""
        if self.found is None:
            curve = self._curve()
            at = share(curve[-1], self._budget) if curve else None
            if at is not None and at >= self._looked_at + MIN_STEP:
                self._looked_at = at
                self.found, self.seen = self._rule(curve), curve
        return self.found is not None


def past(history: History, get_blob: Callable[[str], bytes], budget: Budget) -> Past | None:
    """The runs of a session so far; none before there is a best.

    Raises:
        LedgerError: a curve is lost.
        ValueError: a curve is damaged.
    """
    best = None if history.best is None else list(history.best.values().values())
    if not best:
        return None
    kept: list[tuple[Progress, ...]] = []
    scored: list[tuple[Progress, float]] = []
    for attempt in history.attempts:
        pairs = list(_runs(attempt, get_blob, budget))
        scored += pairs
        if attempt.kept:
            kept.append(tuple(run for run, _ in pairs))
    return Past(tuple(kept), tuple(scored), fmean(best))


def by_median(own: Progress, past: Past) -> EarlyStop | None:
    """Stop what is behind the median of the best's runs by more than the noise of one loss.

    To be kept it would have to end ahead of them, by more than noise.
    """
    at = own[-1][0]
    loss = smoothed(own, at)
    best = _smoothed_all(past.kept[-1], at) if past.kept else []
    noise = noise_of_loss(past.kept, at)
    if loss is None or not best or noise is None:
        return None
    expected = median(best)
    bound = expected + noise.sigma
    if loss <= bound:
        return None
    return EarlyStop(
        rule="median",
        share=at,
        loss=loss,
        expected=expected,
        bound=bound,
        best=None,
        noise=noise.sigma,
        degrees_of_freedom=noise.degrees_of_freedom,
        confidence=None,
        compared=len(best),
    )


def by_prediction(
    own: Progress, past: Past, confidence: float, direction: Direction
) -> EarlyStop | None:
    """Stop what would not beat the best, says a line from loss to score through all earlier runs.

    The score must be out of reach for the hopeful end of the prediction's interval.
    """
    at = own[-1][0]
    loss = smoothed(own, at)
    seen = [(smoothed(run, at), score) for run, score in past.scored]
    pairs = [(x, score) for x, score in seen if x is not None]
    if loss is None or len(pairs) < MIN_SCORED:
        return None
    line = _line(pairs, loss)
    if line is None:
        return None
    degrees = len(pairs) - 2
    sign = 1 if direction == "minimize" else -1
    reach = student_t_quantile(confidence, degrees) * line.error
    bound = line.expected - sign * reach
    if sign * (bound - past.best) < 0:
        return None
    return EarlyStop(
        rule="predictive",
        share=at,
        loss=loss,
        expected=line.expected,
        bound=bound,
        best=past.best,
        noise=line.error,
        degrees_of_freedom=degrees,
        confidence=confidence,
        compared=len(pairs),
    )


def told(found: EarlyStop) -> str:
    """The decision in a sentence."""
    begin = f"stopped at {found.share:.0%} of the budget: loss {found.loss:.4f}"
    if found.best is None or found.confidence is None:
        return (
            f"{begin}, where the best had {found.expected:.4f} and noise is {found.noise:.4f}; "
            "to be kept it would have to end ahead"
        )
    return (
        f"{begin} means a score of {found.expected:.4f}, {found.bound:.4f} with luck at "
        f"{found.confidence:.0%} confidence; the best has {found.best:.4f}"
    )


def progress(curve: Curve, budget: Budget) -> Progress:
    """Shares of the budget and losses of a curve."""
    pairs = ((share(point, budget), point["loss"]) for point in curve)
    return tuple((at, loss) for at, loss in pairs if at is not None)


def share(point: dict[str, float], budget: Budget) -> float | None:
    """The share of the budget that was used at a point; none where it does not say."""
    if budget.tokens is None:
        return point["seconds"] / budget.seconds
    return point["tokens"] / budget.tokens if "tokens" in point else None


def smoothed(run: Progress, at: float) -> float | None:
    """Mean loss over the window that ends at a share; none when nothing was said in it."""
    losses = [loss for share, loss in run if at - WINDOW < share <= at]
    return fmean(losses) if losses else None


def noise_of_loss(kept: Sequence[Sequence[Progress]], at: float) -> Noise | None:
    """How far losses of equal files lie apart at a share; none when none was run twice."""
    groups = [group for runs in kept if len(group := _smoothed_all(runs, at)) > 1]
    return pooled_noise(groups) if groups else None


def _smoothed_all(runs: Sequence[Progress], at: float) -> list[float]:
    return [loss for run in runs if (loss := smoothed(run, at)) is not None]


@dataclass(frozen=True)
class _Line:
    expected: float
    error: float
    """Standard error of one new score about the line, at that place."""


def _line(pairs: Sequence[tuple[float, float]], at: float) -> _Line | None:
    """The least squares line at a place; none where it has no direction."""
    x_mean, y_mean = fmean(x for x, _ in pairs), fmean(y for _, y in pairs)
    spread = math.fsum((x - x_mean) ** 2 for x, _ in pairs)
    if spread <= 0:
        return None
    slope = math.fsum((x - x_mean) * (y - y_mean) for x, y in pairs) / spread
    residual = math.fsum((y - y_mean - slope * (x - x_mean)) ** 2 for x, y in pairs)
    variance = residual / (len(pairs) - 2)
    distance = 1 + 1 / len(pairs) + (at - x_mean) ** 2 / spread
    return _Line(y_mean + slope * (at - x_mean), math.sqrt(variance * distance))


def _runs(
    attempt: Attempt, get_blob: Callable[[str], bytes], budget: Budget
) -> Iterator[tuple[Progress, float]]:
    """Progress and score at each seed, of runs that count on the machine as it is now."""
    is_baseline = attempt.started.kind == "baseline"  # measured on the machine as it is
    runs = attempt.runs[attempt.curves_from :]
    trainings = {run.seed: run for run in runs if _is_whole(run, may_be_noisy=is_baseline)}
    for seed, value in attempt.values().items():
        run = trainings.get(seed)
        if run is not None and run.curve is not None:
            yield progress(unpacked(get_blob(run.curve)), budget), value


def _is_whole(run: RunFinished, *, may_be_noisy: bool) -> bool:
    is_quiet = run.disturbance is None or not run.disturbance.disturbed
    is_done = run.result.box == "train" and run.result.outcome is Outcome.OK
    return is_done and (is_quiet or may_be_noisy)
