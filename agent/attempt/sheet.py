"""Reads a score: the sheet that the scorer wrote.

What a program says of itself is read in `agent/record/reported.py`. See docs/decisions/0015.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from agent.record.curves import is_storable
from agent.record.events import RunFinished
from agent.record.history import History
from agent.record.reported import Reading
from agent.settings import Budget
from sandbox.contract.errors import SandboxError
from sandbox.contract.record import Record
from sandbox.contract.run import Outcome

SHEET_NAME = "score.json"
MAX_SHEET_BYTES = 256 * 1024
MODEL_BOX = "model_box_"
"""How a reason begins that a model box is to blame for; the rest is its outcome."""
FREE_SECONDS, FREE_TIMES = 10.0, 3.0
"""What a model box may take for nothing: so many seconds, or so many times the baseline's."""


class ScoreSheet(Record):
    """What the scorer wrote: a value, or the reason why there is none."""

    metric: str = Field(min_length=1, max_length=64)
    value: float | None
    valid: bool
    reason: str | None = Field(max_length=64)
    explanation: str = Field(max_length=2000)
    details: dict[str, Any]

    @model_validator(mode="after")
    def _one_of_value_and_reason(self) -> Self:
        if self.valid != (self.value is not None) or self.valid != (self.reason is None):
            raise ValueError("a valid score has a value and no reason, an invalid one the reverse")
        return self


@dataclass(frozen=True)
class Pace:
    """Seconds of a model box, on the scorer's clock: until it answers at its usual pace; in all."""

    loading: float
    in_all: float


def pace_of(details: Mapping[str, Any]) -> Pace | None:
    """What a sheet's details say of it; None from a scorer that does not say."""
    loading, in_all = details.get("load_seconds"), details.get("model_seconds")
    return Pace(loading, in_all) if is_storable(loading) and is_storable(in_all) else None


def free_pace_of(history: History) -> Pace | None:
    """What a model box may take for nothing; None for the baseline, which sets it.

    Ten seconds, or three times what the baseline took: other models load and answer more slowly,
    and machines have neighbours.
    """
    scores = history.baseline.scores if history.baseline else []
    details = (score.details for score in scores if score.split == "val")
    paces = [pace for one in details if (pace := pace_of(one)) is not None]
    if not paces:
        return None
    # The median: a single score beside others would give every candidate a long time for nothing.
    loading = median(pace.loading for pace in paces)
    in_all = median(pace.in_all for pace in paces)
    return Pace(max(FREE_SECONDS, FREE_TIMES * loading), max(FREE_SECONDS, FREE_TIMES * in_all))


def left_seconds_of(training: RunFinished | None, budget: Budget) -> float:
    """What a training left of its budget, for loading; nothing of one that counts tokens."""
    if training is None or budget.kind == "tokens":
        return 0.0
    return max(0.0, budget.seconds - training.result.wall_seconds)


def over_pace(details: Mapping[str, Any], free: Pace | None, left_seconds: float) -> str:
    """Why a model box took longer than it may, in words; empty where it did not.

    What is beyond the free seconds must fit into what the training left of its budget: a checkpoint
    may carry text, and whoever trains on while it is loaded would have two budgets.
    """
    took = pace_of(details)
    if took is None or free is None:
        return ""
    beyond = max(took.loading - free.loading, took.in_all - free.in_all)
    if beyond <= left_seconds:
        return ""
    return (
        f"loading took {took.loading:.1f} s (free: {free.loading:.1f} s) and all answers with it "
        f"{took.in_all:.1f} s (free: {free.in_all:.1f} s), which is {beyond:.1f} s too long; the "
        f"training had left {left_seconds:.1f} s of its budget"
    )


def read_score(sheet: ScoreSheet | None, models: Sequence[Outcome]) -> Reading:
    """Read a measurement: what the scorer found, or else how a model box ended.

    A value counts only when every model box ended well: one that answers all and then dies or hangs
    has something to hide. What the scorer found wrong is the better reason, but that a box hung up:
    how it ended then tells more.
    """
    details = {} if sheet is None else sheet.details
    bad = next((outcome for outcome in models if outcome is not Outcome.OK), None)
    if bad is not None and (sheet is None or sheet.reason in (None, "hung_up")):
        return Reading(None, MODEL_BOX + bad.value, "", details)
    if sheet is None:  # its own time was over: it does nothing but wait for answers
        explanation = "the score took longer than wall_seconds in [scoring] allows"
        return Reading(None, "too_slow", explanation, details)
    return Reading(sheet.value, sheet.reason, sheet.explanation, details)


def read_sheet(directory: Path) -> bytes | None:
    """The valid score sheet in `directory`; none when the file is missing.

    Raises:
        SandboxError: there is one, but it is no valid sheet.
    """
    path = directory / SHEET_NAME
    if not path.is_file() or path.is_symlink():
        return None
    if path.stat().st_size > MAX_SHEET_BYTES:
        raise SandboxError("the score sheet is too large", "look at evaluate.py")
    raw = path.read_bytes()
    try:
        parse_sheet(raw)
    except ValueError as error:
        raise SandboxError(str(error), "look at evaluate.py") from error
    return raw


def parse_sheet(raw: bytes) -> ScoreSheet:
    """Read a score sheet.

    Raises:
        ValueError: it is none.
    """
    try:
        content = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
        return ScoreSheet.model_validate(content)
    except (ValueError, ValidationError, RecursionError) as error:
        raise ValueError(f"the score sheet is not valid: {error}") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")
