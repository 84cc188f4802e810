"""Reads a metric that a program printed of itself.

With `[goal] source = "reported"` a score is the program's own word: the last complete line
`name: number` of its log. The log is hostile text and may have lost its middle, so only what was
received for certain counts:

- a line ends with a newline (a carriage return begins it anew, as progress bars do), and nothing
  stands before the name but blanks;
- where the middle was dropped, the last of several could be in it: then only a line of the tail
  counts, and not the tail's first one, whose beginning is missing;
- the last line that names the metric decides. Is its value no finite number, there is no score: an
  earlier line does not stand in for it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from agent.text import one_line
from sandbox.contract.run import Log

MAX_NUMBER_CHARACTERS = 64
MISSING, UNCERTAIN, NOT_A_NUMBER, NOT_FINITE = (
    "not_reported",
    "report_lost",
    "reported_no_number",
    "reported_not_finite",
)
REASONS = frozenset({MISSING, UNCERTAIN, NOT_A_NUMBER, NOT_FINITE})

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")
_NOT_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)
_BLANKS = " \t"


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
    said = [value for line in lines if (value := _value_of(line, metric)) is not None]
    return _read(said[-1], len(said)) if said else _missing(log, metric)


def _lines(text: str, *, is_cut: bool) -> list[str]:
    """Complete lines of what was received, what a carriage return wiped out left away."""
    complete = text.split("\n")[1 if is_cut else 0 : -1]
    return [line.rstrip("\r").rpartition("\r")[2] for line in complete]


def _value_of(line: str, metric: str) -> str | None:
    """What stands after `metric:`; none for a line about something else."""
    name, colon, value = line.strip(_BLANKS).partition(":")
    return value.strip(_BLANKS) if colon and name.rstrip(_BLANKS) == metric else None


def _read(said: str, times: int) -> Reported:
    shown = one_line(said, MAX_NUMBER_CHARACTERS) or "nothing"
    details = {"said": shown, "times": times}
    if _NOT_FINITE.fullmatch(said):
        return Reported(None, NOT_FINITE, f"the program reported {shown}", details)
    if len(said) > MAX_NUMBER_CHARACTERS or not _NUMBER.fullmatch(said):
        text = f"the program reported {shown}, which is not a plain decimal number"
        return Reported(None, NOT_A_NUMBER, text, details)
    value = float(said)
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
