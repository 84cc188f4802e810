"""Stops trainings that can no longer win, by their curves.

What a program says of its loss is its own word. It can only get its run stopped, or keep it from
being stopped: a run that was stopped is never kept, and one that was not is scored like any other.
Losses are compared at the same share of the budget, each as a mean over a quarter of it, since the
loss of one batch is mostly the luck of that batch. And only where they are the same word: of files
that compute and print it alike, and as long as no scored run gave it the lie. (Decision 0012.)
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from agent.record.attempts import Attempt
from agent.record.chain import GetBlob
from agent.record.curves import Curve, unpacked
from agent.record.events import EarlyStop, RunFinished
from agent.record.history import History, gain
from agent.record.repeats import Noise, pooled_noise
from agent.settings import Budget, Settings
from sandbox.contract.run import Outcome

WINDOW = 0.25
"""Share of the budget over which a loss is averaged."""
LOSS = re.compile(rb"loss|nll|entropy|print|json|\blog", re.IGNORECASE)
"""What a line says that computes a loss or prints it."""
WITNESSES = 3
"""Scored runs of other files, before any run is stopped: do losses foretell scores here?"""
FAR = 3.0
"""In standard deviations of a loss: so far behind the best no luck brings a run."""
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


def past(history: History, number: int, get_blob: GetBlob, budget: Budget) -> Past | None:
    """The kept runs of a session so far, where an attempt's own may be held against them.

    None where they may not: before there is a best; where the attempt computes or prints its loss
    otherwise than the best does; as long as it is not known that losses foretell scores; and where
    the same files were stopped before, which says that somebody believes in them.

    Raises:
        LedgerError: a curve or a file is lost.
        ValueError: a curve is damaged.
    """
    best, own = history.best, history.attempt(number)
    if best is None or not best.values():
        return None
    earlier = (a for a in history.completed if a.number < number and a.was_stopped)
    if any(a.started.files == own.started.files for a in earlier):
        return None
    if _loss_lines(own, get_blob) != _loss_lines(best, get_blob):
        return None
    ended = [attempt for attempt in history.attempts if not attempt.open]
    scored = [(attempt, list(_scored_runs(attempt, get_blob, budget))) for attempt in ended]
    kept = tuple(tuple(run for run, _ in runs) for attempt, runs in scored if attempt.kept)
    others = [pair for attempt, runs in scored if attempt is not best for pair in runs]
    return kept if _foretell_scores(history, best, kept, others) else None


def _loss_lines(attempt: Attempt, get_blob: GetBlob) -> list[bytes]:
    """The lines that compute or print a loss, without what only moves them about."""
    files = attempt.started.files
    texts = (get_blob(files[name]) for name in sorted(files) if name.endswith(".py"))
    lines = (line.strip() for text in texts for line in text.splitlines())
    return [line for line in lines if LOSS.search(line)]


def _foretell_scores(
    history: History, best: Attempt, kept: Past, others: Sequence[tuple[Progress, float]]
) -> bool:
    """Whether no scored run was far behind the best by its loss, and ahead of it by its score."""
    best_score, direction = fmean(best.values().values()), history.in_force.goal.direction
    return len(others) >= WITNESSES and not any(
        gain(direction, score, best_score) > 0 and by_median(run, kept, FAR) is not None
        for run, score in others
    )


def by_median(own: Progress, past: Past, deviations: float = 1.0) -> EarlyStop | None:
    """Stop what is behind the median of the best's runs by more than the noise of one loss.

    To be kept it would have to end ahead of them, by more than noise.
    """
    if not own:
        return None
    at = own[-1][0]
    loss = smoothed(own, at)
    best = _smoothed_all(past[-1], at) if past else []
    noise = noise_of_loss(past, at)
    if loss is None or not best or noise is None:
        return None
    # The median and not the best of them, whose luck would stop its equals; one deviation and no
    # test at the judge's confidence, since the night's few curves would then stop nothing.
    expected = median(best)
    bound = expected + deviations * noise.sigma
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
        f"{stop.expected:.4f} and noise is {stop.noise:.4f}; to be kept it would have to end ahead "
        "(run the same files again to have them run whole)"
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


def _scored_runs(
    attempt: Attempt, get_blob: GetBlob, budget: Budget
) -> Iterator[tuple[Progress, float]]:
    """Progress and score at each seed that has one, of runs that count on the machine as it is."""
    is_baseline = attempt.started.kind == "baseline"  # measured on the machine as it is
    # Curves from before the machine changed are another machine's.
    runs = attempt.runs[attempt.curves_from :]
    trainings = {run.seed: run for run in runs if _is_whole(run, may_be_noisy=is_baseline)}
    for seed, score in attempt.values().items():
        run = trainings.get(seed)
        if run is not None and run.curve is not None:
            yield progress(unpacked(get_blob(run.curve)), budget), score


def _is_whole(run: RunFinished, *, may_be_noisy: bool) -> bool:
    is_quiet = may_be_noisy or run.disturbance is None or not run.disturbance.disturbed
    return is_quiet and run.result.box == "train" and run.result.outcome is Outcome.OK
