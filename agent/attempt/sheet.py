"""Reads a score: the scorer's sheet, or the program's word.

A sheet is what the scorer box wrote, and nothing else decides. With `[goal] source = "reported"` a
score is the last complete line `name: number` of the training's log. The log is hostile text and
may have lost its middle, so only what was received for certain counts:

- a line ends with a newline (a carriage return begins it anew, as progress bars do), and nothing
  stands before the name but blanks;
- where the middle was dropped, the last of several could be in it: then only a line of the tail
  counts, and not the tail's first one, whose beginning is missing;
- the last line that names the metric decides. Is its value no finite number, there is no score: an
  earlier line does not stand in for it.

See docs/decisions/0009 and 0015.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from agent.text import one_line
from sandbox.contract.errors import SandboxError
from sandbox.contract.record import Record
from sandbox.contract.run import Log, Outcome

SHEET_NAME = "score.json"
MAX_SHEET_BYTES = 256 * 1024
MAX_NUMBER_CHARACTERS = 64
MISSING, UNCERTAIN, NOT_A_NUMBER, NOT_FINITE = (
    "not_reported",
    "report_lost",
    "reported_no_number",
    "reported_not_finite",
)

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")
_NOT_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)
_BLANKS = " \t"


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
class Reading:
    """What a measurement comes to: a value, or the reason why there is none."""

    value: float | None
    reason: str | None
    explanation: str
    model_failed: bool
    """Whether the reason is how a model box ended, and not what the scorer found."""


HUNG_UP = "hung_up"
"""A scorer's reason when a model box is gone; how the box ended then tells more."""
TOO_SLOW = "too_slow"
"""The reason when the scorer's own time was over: it does nothing but wait for answers."""


def read_score(sheet: ScoreSheet | None, models: Sequence[Outcome]) -> Reading:
    """Read a measurement: what the scorer found, or else how a model box ended.

    A value counts only when every model box ended well: one that answers all and then dies or hangs
    has something to hide. What the scorer found wrong is the better reason.

    Args:
        sheet: what the scorer wrote; none when it came to no end within its time.
        models: how the model boxes ended.
    """
    bad = next((outcome for outcome in models if outcome is not Outcome.OK), None)
    if bad is not None and (sheet is None or sheet.reason in (None, HUNG_UP)):
        return Reading(None, f"model_box_{bad.value}", "", model_failed=True)
    if sheet is None:
        explanation = "the score took longer than wall_seconds in [scoring] allows"
        return Reading(None, TOO_SLOW, explanation, model_failed=False)
    return Reading(sheet.value, sheet.reason, sheet.explanation, model_failed=False)


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


@dataclass(frozen=True)
class Reported:
    """What a log says of the metric: a value, or the reason why there is none."""

    value: float | None
    reason: str | None
    explanation: str
    details: dict[str, Any]


def read_reported(log: Log, metric: str) -> Reported:
    """The metric as the log's last complete line about it says; see the module.

    Args:
        log: as the box kept it, not the excerpt of it that stands in the ledger's line.
        metric: the name that the line begins with.
    """
    text = log.tail if log.omitted_bytes else log.head + log.tail
    lines = _lines(text, is_cut=log.omitted_bytes > 0)
    values = [value for line in lines if (value := _value_of(line, metric)) is not None]
    return _read(values[-1], len(values)) if values else _missing(log, metric)


def _lines(text: str, *, is_cut: bool) -> list[str]:
    """Complete lines of what was received, what a carriage return wiped out left away."""
    complete = text.split("\n")[1 if is_cut else 0 : -1]
    return [line.rstrip("\r").rpartition("\r")[2] for line in complete]


def _value_of(line: str, metric: str) -> str | None:
    """What stands after `metric:`; none for a line about something else."""
    name, colon, value = line.strip(_BLANKS).partition(":")
    return value.strip(_BLANKS) if colon and name.rstrip(_BLANKS) == metric else None


def _read(text: str, times: int) -> Reported:
    shown = one_line(text, MAX_NUMBER_CHARACTERS) or "nothing"
    details = {"said": shown, "times": times}
    if _NOT_FINITE.fullmatch(text):
        return Reported(None, NOT_FINITE, f"the program reported {shown}", details)
    if len(text) > MAX_NUMBER_CHARACTERS or not _NUMBER.fullmatch(text):
        problem = f"the program reported {shown}, which is not a plain decimal number"
        return Reported(None, NOT_A_NUMBER, problem, details)
    value = float(text)
    if not math.isfinite(value):
        return Reported(None, NOT_FINITE, f"the program reported {shown}: out of range", details)
    return Reported(value, None, "", details)


def _missing(log: Log, metric: str) -> Reported:
    if log.omitted_bytes:
        text = (
            f"no complete line `{metric}: number` among the last of the log, whose middle "
            f"({log.omitted_bytes:,} bytes) was dropped: print it last, print less, or raise "
            "[limits] log"
        )
        return Reported(None, UNCERTAIN, text, {"times": 0})
    text = f"the program printed no complete line `{metric}: number`"
    return Reported(None, MISSING, text, {"times": 0})
