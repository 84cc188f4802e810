"""Checks what a person did by daylight: reviews, replays, decisions.

See docs/decisions/0005.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from agent.morning.derive import is_same
from agent.record.attempts import TrialKey
from agent.record.events import Event, HumanDecided, ReplayFinished, VariantMeasured, VariantPlanned
from agent.record.history import History


@dataclass
class MorningChecks:
    """Every variant that was planned so far, and what is wrong with the next event."""

    history: History
    """As it was before each event."""
    _variants: dict[tuple[int, str], VariantPlanned] = field(default_factory=dict)

    def check(self, event: Event) -> Iterator[str]:
        """What is wrong with an event, if it is one of the morning."""
        match event:
            case VariantPlanned():
                self._variants[event.review, event.variant] = event
            case VariantMeasured():
                yield from self._variant(event)
            case ReplayFinished():
                yield from self._replay(event)
            case HumanDecided():
                yield from self._decision(event)
            case _:
                pass

    def _variant(self, event: VariantMeasured) -> Iterator[str]:
        planned = self._variants.get((event.review, event.variant))
        if planned is None:
            yield f"variant {event.variant} was never planned"
            return
        purpose = f"review-{event.review} {event.variant}"
        trial = self.history.trial(TrialKey(purpose, planned.attempt, event.seed))
        if (event.value, event.holdout) != (trial.value("val"), trial.value("holdout")):
            yield f"its scores are not those of the runs of {event.variant}"

    def _replay(self, event: ReplayFinished) -> Iterator[str]:
        recorded = self.history.attempt(event.attempt).values()
        for score in event.scores:
            key = TrialKey(f"replay-{event.attempt}", event.attempt, score.seed)
            if score.today is not None and score.today != self.history.trial(key).value("val"):
                yield f"today's score at seed {score.seed} is not that of its runs"
            if score.recorded != recorded.get(score.seed):
                yield f"the recorded score at seed {score.seed} is not the one on record"
        apart = [
            abs(score.today - score.recorded)
            for score in event.scores
            if score.today is not None and score.recorded is not None
        ]
        if not is_same(max(apart, default=None), event.largest_difference):
            yield "its largest difference is not that of its scores"
        if event.agrees and not event.is_comparable:
            yield "it agrees, and cannot be compared"
        if event.agrees and event.outcome != event.recorded_outcome:
            yield f"it agrees, and {event.recorded_outcome} is not {event.outcome}"

    def _decision(self, event: HumanDecided) -> Iterator[str]:
        best = self.history.best
        if best is None or best.number != event.attempt:
            yield f"it is about attempt {event.attempt}, which was not the best"
            return
        planned = [v for (_, name), v in self._variants.items() if name == event.variant]
        due = [v.files for v in planned if v.files is not None]
        if event.files not in (due if event.variant != "best" else [best.started.files]):
            yield f"its files are not those of {event.variant}"
