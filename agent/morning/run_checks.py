"""Checks runs on record: what was asked, what came back.

What follows from a run is derived elsewhere (`derive.py`); here is what must fit together.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import get_args

from agent.attempt.boxes import MODEL_RUN, Terms, terms_of
from agent.record.attempts import TrialKey
from agent.record.events import ATTEMPT, SMOKE, RunFinished, RunStarted, Scored
from agent.record.history import History
from sandbox.contract.gpu import MemoryBound
from sandbox.contract.run import Limits, Outcome


@dataclass
class RunChecks:
    """Every run of a session so far, and what is wrong with the next event about one."""

    history: History
    """As it was before each event."""
    seeds: frozenset[int] = frozenset()
    """Those that the session or a review announced."""
    _open: dict[str, RunStarted] = field(default_factory=dict)
    _run_ids: set[str] = field(default_factory=set)

    def check(self, event: RunStarted | RunFinished | Scored) -> Iterator[str]:
        """What is wrong with an event."""
        match event:
            case RunStarted():
                yield from self._start(event)
            case RunFinished():
                yield from self._finish(event)
            case Scored():
                yield from self._score(event)

    def all_ended(self, are_over: Callable[[RunStarted], bool]) -> Iterator[str]:
        """Name the runs that have no end although what they belong to has one."""
        for run_id in self.forget_open(are_over):
            yield f"run {run_id} has no end"

    def forget_open(self, are_over: Callable[[RunStarted], bool]) -> list[str]:
        """What broke off may have left runs without an end: those that were left so."""
        left = [run_id for run_id, run in self._open.items() if are_over(run)]
        for run_id in left:
            del self._open[run_id]
        return left

    def attempt_of(self, run: RunStarted) -> int | None:
        """The open attempt that a run is for; None for one of no attempt, or between two."""
        if run.purpose.startswith(SMOKE):
            smoke = self.history.smokes[int(run.purpose.removeprefix(SMOKE))].started
            return smoke.attempt if smoke.asked_by == "nightlab" else None
        asker = self.history.asker(run.attempt, run.seed) if run.purpose == ATTEMPT else None
        return None if asker is None else asker.number

    def is_of_a_broken_smoke(self, run: RunStarted) -> bool:
        """A smoke run without an end was a fault: it was tried again, or given up."""
        number = run.purpose.removeprefix(SMOKE)
        return number != run.purpose and self.history.smokes[int(number)].finished is None

    def _start(self, event: RunStarted) -> Iterator[str]:
        if event.run_id in self._run_ids:
            yield f"run {event.run_id} starts for the second time"
        self._run_ids.add(event.run_id)
        # Of one score: what a kill cut off elsewhere has no end on record, and is long gone.
        score = MODEL_RUN.fullmatch(event.run_id)
        alive = (MODEL_RUN.fullmatch(run_id) for run_id in self._open)
        if score and any(other and other[1] == score[1] for other in alive):
            yield "it starts while another model box is alive: the two could speak to each other"
        self._open[event.run_id] = event
        if event.seed not in self.seeds:
            yield f"seed {event.seed} is none that was announced"
        session, settings = self.history.session, self.history.settings
        if session is not None and settings is not None:
            terms = terms_of(event.box, event.run_id, event.purpose, event.seed, settings, session)
            yield from _otherwise(event, terms)

    def _finish(self, event: RunFinished) -> Iterator[str]:
        result = event.result
        started = self._open.pop(result.run_id, None)
        if started is None:
            yield f"run {result.run_id} ends without having started"
            return
        asked = (started.purpose, started.attempt, started.seed, started.box)
        if (event.purpose, event.attempt, event.seed, result.box) != asked:
            yield f"run {result.run_id} was started for another attempt, seed or box"
        for name in _different(started.spec.limits, result.limits):
            yield f"its limit {name} is not the one that was asked for"
        if started.spec.image != result.image_digest:
            yield "its image is not the one that was asked for"
        yield from _gpu_differences(started, event)
        is_measured = result.box == "train" and not event.purpose.startswith(SMOKE)
        # Beside a score it is measured only where that took too long.
        if is_measured != (event.disturbance is not None) and result.box != "scorer":
            yield "what others did meanwhile is measured for each training, and for no model box"

    def _score(self, event: Scored) -> Iterator[str]:
        """A value stands on boxes of its own that all ended well."""
        settings = self.history.settings
        if (event.value is None) == (event.reason is None):
            yield "a score has a value or a reason, and this one has both or neither"
        if settings is None:
            return
        if event.source != settings.goal.source:
            yield f"the score is {event.source}, the settings say {settings.goal.source}"
        trial = self.history.trial(TrialKey(event.purpose, event.attempt, event.seed))
        runs = [*([trial.training] if trial.training else []), *trial.boxes_of_score]
        boxes = ("train",) if settings.goal.is_reported else ("train", "model", "scorer")
        good = {run.result.box for run in runs if run.result.outcome is Outcome.OK}
        good -= {run.result.box for run in runs if run.result.outcome is not Outcome.OK}
        models = sum(run.result.box == "model" for run in trial.boxes_of_score)
        if event.value is not None and (bad := [box for box in boxes if box not in good]):
            yield f"a value without a good end of: {', '.join(bad)}"
        elif models > 1 and settings.model_boxes == 1:
            yield f"it stands on {models} model boxes; the settings say 1"
        if event.value is not None and event.sheet is None and not settings.goal.is_reported:
            yield "a value without the scorer's sheet"


def _otherwise(event: RunStarted, terms: Terms) -> Iterator[str]:
    """Name what settings and session demand of the box and it was not asked for."""
    spec = event.spec
    for name in _different(spec.limits, terms.limits):
        yield f"its limit {name} is not the one in the settings"
    if spec.image != terms.image:
        yield "its image is not the session's"
    if terms.argv is not None and spec.argv != terms.argv:
        yield "its command is not the one in the settings"
    seed = spec.environment.get("NIGHTLAB_SEED")
    if terms.seed is not None and seed != str(terms.seed):
        yield f"the program was given seed {seed}, the record says {terms.seed}"
    if len(spec.gpus) != terms.gpus:
        yield f"it asks for {len(spec.gpus)} GPUs, profile and settings say {terms.gpus}"
    asked = spec.gpu_memory and (spec.gpu_memory.bytes, spec.gpu_memory.at_least)
    if asked != (terms.gpu_memory and (terms.gpu_memory.bytes, terms.gpu_memory.at_least)):
        yield "its bound on GPU memory is not the one in the settings"


def _gpu_differences(started: RunStarted, event: RunFinished) -> Iterator[str]:
    """Compare the GPUs that a run asked for with those that it had, and what bounded them."""
    spec, result = started.spec, event.result
    if spec.gpus != result.gpus:
        yield "its GPUs are not those that were asked for"
    if spec.gpus != tuple(use.uuid for use in result.gpu):
        yield "not each of its GPUs was watched"
    order: tuple[str, ...] = get_args(MemoryBound)
    at_least = order.index(spec.gpu_memory.at_least) if spec.gpu_memory else 0
    if any(order.index(use.memory_bound) < at_least for use in result.gpu):
        yield "its GPU memory was bounded by less than was asked for"


def _different(one: Limits, other: Limits) -> list[str]:
    return [name for name in Limits.model_fields if getattr(one, name) != getattr(other, name)]
