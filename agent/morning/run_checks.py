"""Checks runs on record: what was asked, what came back.

A run is asked for by `run_started`, ends with `run_finished`, and a score stands on several of
them. What follows from the settings in force, such as limits and seconds over budget, is computed
anew, and so is what the scorer's sheet comes to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import get_args

from pydantic import ValidationError

from agent.attempt.disturbance import allowed_cores, is_crowded, is_slow
from agent.attempt.machine_state import held_back
from agent.attempt.reported import read_reported
from agent.attempt.sheet import finding, parse_sheet
from agent.record.curves import unpacked
from agent.record.events import RunFinished, RunStarted, Scored, SessionStarted, SmokeRun, Split
from agent.record.ledger import LedgerError
from agent.record.logs import excerpt, unpacked_log
from agent.record.mfu import mfu_of
from agent.settings import Settings
from sandbox.contract.gpu import MemoryBound
from sandbox.contract.run import Box, Limits, Outcome, RunResult

ROUNDING_CORES = 1e-4
"""Cores used by others are recorded with four digits, and compared with more."""

ROUNDING_SHARE = 1e-5
"""Curves are stored with seven digits."""

_Measurement = tuple[str, int, int]
"""Purpose (empty for the night), attempt and seed."""


@dataclass
class RunChecks:
    """Every run of a session so far, and what is wrong with the next event about one."""

    read: Callable[[str], bytes]
    """Gives a blob's bytes."""
    session: SessionStarted | None = None
    settings: Settings | None = None
    """In force now."""
    seeds: frozenset[int] = frozenset()
    """Those that the session or a review announced."""
    scores: dict[tuple[_Measurement, Split], float | None] = field(default_factory=dict)
    _open: dict[str, RunStarted] = field(default_factory=dict)
    _run_ids: set[str] = field(default_factory=set)
    _ends: dict[_Measurement, dict[Box, Outcome]] = field(default_factory=dict)
    _trainings: dict[_Measurement, RunFinished] = field(default_factory=dict)
    """The last training of each measurement: what a reported score is read from."""
    _models: dict[_Measurement, list[Outcome]] = field(default_factory=dict)
    """How the model boxes ended since the last score."""

    def look(self, event: RunStarted | RunFinished | Scored, purpose: str = "") -> Iterator[str]:
        """What is wrong with an event; the purpose is that of a run after the night."""
        match event:
            case RunStarted():
                yield from self._start(event)
                yield from self._limits(event)
            case RunFinished():
                yield from self._finish(event, purpose)
            case Scored():
                yield from self._score(event, purpose)

    def look_at_smoke(self, event: SmokeRun) -> Iterator[str]:
        """What is wrong with an event of a smoke run, whose limits are its own."""
        purpose = f"smoke-{event.smoke}"
        if isinstance(event.run, RunFinished):
            yield from self._finish(event.run, purpose)
            return
        yield from self._start(event.run)
        is_train = event.run.box == "train"
        if self.settings is not None and is_train:
            yield from _otherwise(event.run, self.settings.smoke_limits())
        else:
            yield from self._limits(event.run)

    def all_ended(self) -> Iterator[str]:
        """Name the runs that have no end although what they belong to has one."""
        for run_id in self._open:
            yield f"run {run_id} has no end"
        self._open.clear()

    def forget_open(self) -> None:
        """What broke off may have left runs without an end, and boxes without a score."""
        self._open.clear()
        self._models.clear()
        for ends in self._ends.values():  # a score is made of boxes that ran for it
            ends.pop("model", None)
            ends.pop("scorer", None)

    def _start(self, event: RunStarted) -> Iterator[str]:
        spec = event.spec
        if event.run_id in self._run_ids:
            yield f"run {event.run_id} starts for the second time"
        self._run_ids.add(event.run_id)
        self._open[event.run_id] = event
        if (spec.get("run_id"), spec.get("box")) != (event.run_id, event.box):
            yield "its spec is that of another run"
        if event.seed not in self.seeds:
            yield f"seed {event.seed} is none that was announced"
        told = (spec.get("environment") or {}).get("NIGHTLAB_SEED")
        if event.box == "train" and told != str(event.seed):
            yield f"the program was told seed {told}, the record says {event.seed}"
        command = self.settings.workspace.command if self.settings else None
        if event.box == "train" and command != tuple(spec.get("argv", command or ())):
            yield "its command is not the one in the settings"
        image = self.session.image.get("image_id") if self.session else None
        if image is not None and spec.get("image") != image:
            yield "its image is not the session's"
        yield from self._gpus(event)

    def _gpus(self, event: RunStarted) -> Iterator[str]:
        """Compare the GPUs asked for with profile and settings; older ledgers name no kind."""
        if self.session is None or self.settings is None:
            return
        hardware, spec = self.settings.hardware, event.spec
        devices = self.session.image.get("devices") or "none"
        has_some = devices != "none" and event.box != "scorer"
        due = hardware.gpus_per_run if has_some else 0
        asked = len(spec.get("gpus") or ())
        if asked != due:
            yield f"it asks for {asked} GPUs, profile and settings say {due}"
        bound = hardware.gpu_memory("") if has_some else None
        told = spec.get("gpu_memory") or {}
        if (told.get("bytes"), told.get("at_least")) != (
            (None, None) if bound is None else (bound.bytes, bound.at_least)
        ):
            yield "its bound on GPU memory is not the one in the settings"

    def _limits(self, event: RunStarted) -> Iterator[str]:
        if self.settings is not None:
            is_train = event.box == "train"
            due = self.settings.train_limits() if is_train else self.settings.scoring_limits()
            yield from _otherwise(event, due)

    def _finish(self, event: RunFinished, purpose: str) -> Iterator[str]:
        result = event.result
        key = (purpose, event.attempt, event.seed)
        ends = self._ends.get(key, {})
        if result.box == "train":  # whatever was measured before counts no more
            ends = {}
            self._trainings[key] = event
            self._models.pop(key, None)
            for split in get_args(Split):
                self.scores.pop((key, split), None)
        if ends.get(result.box, Outcome.OK) is Outcome.OK:  # of several boxes the bad one counts
            ends = {**ends, result.box: result.outcome}
        self._ends[key] = ends
        if result.box == "model":
            self._models.setdefault(key, []).append(result.outcome)
        started = self._open.pop(result.run_id, None)
        if started is None:
            yield f"run {result.run_id} ends without having started"
            return
        asked = (started.attempt, started.seed, started.box)
        if (event.attempt, event.seed, result.box) != asked:
            yield f"run {result.run_id} was started for another attempt, seed or box"
        limits = _limits_of(started)
        for name in _different(limits, result.limits) if limits else ():
            yield f"its limit {name} is not the one that was asked for"
        if started.spec.get("image") != result.image_digest:
            yield "its image is not the one that was asked for"
        yield from _gpu_differences(started, result)
        yield from self._numbers(event, purpose)
        if self.session and (problem := difference_in_mfu(self.session, event, self.read)):
            yield problem
        yield from self._log(event)

    def _numbers(self, event: RunFinished, purpose: str) -> Iterator[str]:
        is_smoke = purpose.startswith("smoke-")
        over_seconds = 0.0 if is_smoke else self._over_budget_seconds(event)
        if over_seconds is not None and abs(over_seconds - event.over_budget_seconds) > 1e-6:
            yield (
                f"it says {event.over_budget_seconds:g} s over budget; "
                f"its wall clock says {over_seconds:g}"
            )
        noise = event.disturbance
        if noise is None:
            return
        if noise.before is not None and noise.after is not None:
            held = held_back(noise.before, noise.after)
            if held != noise.held_back:
                yield "what held it back is not what the machine's states say"
        is_near = abs(noise.other_cores - allowed_cores(noise)) <= ROUNDING_CORES
        is_held = is_slow(noise) or bool(noise.held_back)
        due = is_crowded(noise) or is_held
        if noise.disturbed != due and not (is_near and not is_held):
            yield f"its mark `disturbed` is not what {noise.other_cores:g} cores come to"

    def _over_budget_seconds(self, event: RunFinished) -> float | None:
        if self.settings is None:
            return None
        budget = self.settings.budget
        if event.result.box != "train" or budget.kind == "tokens":
            return 0.0
        return max(0.0, event.result.wall_seconds - budget.seconds)

    def _log(self, event: RunFinished) -> Iterator[str]:
        try:
            kept = excerpt(unpacked_log(self.read(event.log)))
        except LedgerError:
            return  # named where blobs are checked
        except ValueError:
            yield "its log is no log"
            return
        if kept != event.result.log:
            yield "the excerpt in the line is not from its log"

    def _score(self, event: Scored, purpose: str) -> Iterator[str]:
        key = (purpose, event.attempt, event.seed)
        self.scores[key, event.split] = event.value
        if (event.value is None) == (event.reason is None):
            yield "a score has a value or a reason, and this one has both or neither"
        if self.settings is not None and event.source != self.settings.goal.source:
            yield f"the score is {event.source}, the settings say {self.settings.goal.source}"
        ends = self._ends.setdefault(key, {})
        boxes: tuple[Box, ...] = ("train", "model", "scorer")
        if event.source == "reported":
            boxes = ("train",)
            yield from self._own_word(event, self._trainings.get(key))
        bad = [box for box in boxes if ends.get(box) is not Outcome.OK]
        models = self._models.pop(key, [])
        due = self.settings.model_boxes if self.settings else len(models)
        if event.value is not None and bad:
            yield f"a value without a good end of: {', '.join(bad)}"
        elif len(models) != due:
            yield f"it stands on {len(models)} model boxes; the settings say {due}"
        for box in ("model", "scorer"):  # the next score needs boxes of its own
            ends.pop(box, None)
        yield from self._sheet(event, models)

    def _sheet(self, event: Scored, models: list[Outcome]) -> Iterator[str]:
        """Read the score from what the scorer wrote, and compare."""
        if event.sheet is None:
            if event.value is not None and event.source == "scored" and self._keeps_sheets():
                yield "a value without the scorer's sheet"
            return
        try:
            sheet = parse_sheet(self.read(event.sheet))
        except LedgerError:
            return  # named where blobs are checked
        except ValueError:
            yield "its sheet is no score sheet"
            return
        found = finding(sheet, models)
        if (found.value, found.reason) != (event.value, event.reason):
            yield (
                f"the score is {event.value} ({event.reason}); "
                f"its sheet says {found.value} ({found.reason})"
            )
        if event.details != sheet.details:
            yield "its details are not those of its sheet"

    def _keeps_sheets(self) -> bool:
        """Ledgers from before sheets were kept do not know how many model boxes there are."""
        scoring = self.session.settings.get("scoring") if self.session else None
        return scoring is not None and "model_boxes" in scoring

    def _own_word(self, event: Scored, training: RunFinished | None) -> Iterator[str]:
        """A reported score is what the stored log says, read anew."""
        if training is None or self.settings is None:
            yield "it was reported without a training"
            return
        try:
            log = unpacked_log(self.read(training.log))
        except (LedgerError, ValueError):
            return  # named where blobs and logs are checked
        said = read_reported(log, self.settings.goal.metric)
        if (said.value, said.reason) != (event.value, event.reason):
            told = said.reason if said.value is None else f"{said.value:g}"
            yield f"the score is {event.value}; the training's log says {told}"


def _otherwise(event: RunStarted, due: Limits) -> Iterator[str]:
    """Name the limits that are not those in the settings."""
    asked = _limits_of(event)
    if asked is None:
        yield "its spec has no valid limits"
    else:
        for name in _different(asked, due):
            yield f"its limit {name} is not the one in the settings"


def _limits_of(event: RunStarted) -> Limits | None:
    try:
        return Limits.model_validate(event.spec.get("limits"))
    except ValidationError:
        return None


def _gpu_differences(started: RunStarted, result: RunResult) -> Iterator[str]:
    """Compare the GPUs that a run asked for with those that it had, and what bounded them."""
    asked = tuple(started.spec.get("gpus") or ())
    if asked != result.gpus:
        yield "its GPUs are not those that were asked for"
    if asked != tuple(use.uuid for use in result.gpu):
        yield "not each of its GPUs was watched"
    at_least = (started.spec.get("gpu_memory") or {}).get("at_least", "none")
    order: tuple[str, ...] = get_args(MemoryBound)
    weakest = min((order.index(use.memory_bound) for use in result.gpu), default=len(order))
    if at_least not in order or weakest < order.index(at_least):
        yield "its GPU memory was bounded by less than was asked for"


def _different(one: Limits, other: Limits) -> list[str]:
    return [name for name in Limits.model_fields if getattr(one, name) != getattr(other, name)]


def difference_in_mfu(
    session: SessionStarted, event: RunFinished, read: Callable[[str], bytes]
) -> str | None:
    """What is wrong with a training's share of the peak; a curve that is lost is told of elsewhere.

    Ledgers from before it was recorded have none.
    """
    if event.mfu is None:
        return None
    try:
        curve = unpacked(read(event.curve)) if event.curve else []
    except (LedgerError, ValueError):
        return None
    due = mfu_of(session, event.result, curve)
    if due is not None and abs(due - event.mfu) <= ROUNDING_SHARE * due:
        return None
    return f"its share of the peak is {event.mfu:.4g}, its curve and profile say {due}"
