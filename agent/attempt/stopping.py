"""Stops trainings that can no longer win, by their curves.

What a program says of its loss is its own word. It can only get its run stopped, or keep it from
being stopped: a run that was stopped is never kept, and one that was not is scored like any other.
Losses are compared at the same share of the budget, each as a mean over a quarter of it, since the
loss of one batch is mostly the luck of that batch. (Decision 0012.)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from agent.record.attempts import Attempt
from agent.record.chain import GetBlob
from agent.record.curves import Curve, unpacked
from agent.record.events import EarlyStop, RunFinished
from agent.record.history import History
from agent.record.repeats import Noise, pooled_noise
from agent.settings import Budget, Settings
from sandbox.contract.run import Outcome

WINDOW = 0.25
"""Share of the budget over which a loss is averaged."""
MIN_STEP = 0.01
"""Share of the budget between two checks: a flood of progress lines costs no more than a few."""

Progress = tuple[tuple[float, float], ...]
"""Share of the budget and loss, in the order in which they were reported."""
Past = tuple[tuple[Progress, ...], ...]
"""The runs of each kept attempt of this session, the baseline's first, the best's last."""


@dataclass(frozen=True)
class Rule:
    """What decides, made once for a run."""

    settings: Settings
    past: Past

    def __call__(self, curve: Curve) -> EarlyStop | None:
        """Why the run should end now; none as long as it may still win."""
        own = progress(curve, self.settings.budget)
        economy = self.settings.economy
        is_early = not own or own[-1][0] < economy.stop_after
        return None if is_early or economy.early_stopping == "off" else by_median(own, self.past)


@dataclass
class Watch:
    """Follows one run, and remembers why it should end."""

    curve: Callable[[], Curve]
    """What the run has reported so far."""
    rule: Rule
    budget: Budget
    found: EarlyStop | None = None
    seen: Curve = field(default_factory=list)
    """The curve when that was found: what is reported later did not count."""
    checked_at: float = 0.0

    def __call__(self) -> bool:
        """Whether the run should end now."""
        if self.found is None:
            curve = self.curve()
            at = share(curve[-1], self.budget) if curve else None
            if at is not None and at >= self.checked_at + MIN_STEP:
                self.checked_at = at
                self.found, self.seen = self.rule(curve), curve
        return self.found is not None


def past(history: History, get_blob: GetBlob, budget: Budget) -> Past | None:
    """The kept runs of a session so far; none before there is a best.

    Raises:
        LedgerError: a curve is lost.
        ValueError: a curve is damaged.
    """
    if history.best is None or not history.best.values():
        return None
    return tuple(
        tuple(_runs(attempt, get_blob, budget)) for attempt in history.attempts if attempt.kept
    )


def by_median(own: Progress, past: Past) -> EarlyStop | None:
    """Stop what is behind the median of the best's runs by more than the noise of one loss.

    To be kept it would have to end ahead of them, by more than noise.
    """
    at = own[-1][0]
    loss = smoothed(own, at)
    best = _smoothed_all(past[-1], at) if past else []
    noise = noise_of_loss(past, at)
    if loss is None or not best or noise is None:
        return None
    # The median and not the best of them, whose luck would stop its equals; one deviation and no
    # test at the judge's confidence, since the night's few curves would then stop nothing.
    expected = median(best)
    bound = expected + noise.sigma
    if loss <= bound:
        return None
    return EarlyStop(
        share=at,
        loss=loss,
        expected=expected,
        bound=bound,
        noise=noise.sigma,
        degrees_of_freedom=noise.degrees_of_freedom,
        compared=len(best),
    )


def describe_stop(stop: EarlyStop) -> str:
    """The decision in a sentence."""
    return (
        f"stopped at {stop.share:.0%} of the budget: loss {stop.loss:.4f}, where the best had "
        f"{stop.expected:.4f} and noise is {stop.noise:.4f}; to be kept it would have to end ahead"
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


def _runs(attempt: Attempt, get_blob: GetBlob, budget: Budget) -> Iterator[Progress]:
    """Progress at each seed that has a score, of runs that count on the machine as it is now."""
    is_baseline = attempt.started.kind == "baseline"  # measured on the machine as it is
    # Curves from before the machine changed are another machine's.
    runs = attempt.runs[attempt.curves_from :]
    trainings = {run.seed: run for run in runs if _is_whole(run, may_be_noisy=is_baseline)}
    for seed in attempt.values():
        run = trainings.get(seed)
        if run is not None and run.curve is not None:
            yield progress(unpacked(get_blob(run.curve)), budget)


def _is_whole(run: RunFinished, *, may_be_noisy: bool) -> bool:
    is_quiet = may_be_noisy or run.disturbance is None or not run.disturbance.disturbed
    return is_quiet and run.result.box == "train" and run.result.outcome is Outcome.OK
