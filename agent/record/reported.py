"""Reads the metric that a program printed or wrote itself.

By `[goal]` it is the last line `name: number`, the last match of a pattern anywhere in a line, or a
key of a file. All of it is hostile text, and a log may have lost its middle, so only what was
received for certain counts:

- colours are no part of a line, and a carriage return begins it anew, as progress bars do;
- where the middle was dropped, the last of several could be in it: then only a line of the tail
  counts, and not the tail's first one, whose beginning is missing;
- the last value decides. Is it no finite number, there is no score: an earlier one does not stand
  in for it, and `take = "best"` chooses only where the run came to a good end.

See docs/decisions/0009.
"""

import csv
import json
import math
import re
import select
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Self

from agent.settings import Goal
from agent.text import one_line
from sandbox.contract.run import Log

MAX_FILE_BYTES = 4 * 2**20
MAX_NUMBER_CHARACTERS = 64
MATCH_SECONDS = 10
"""Of a processor, for a pattern over a whole log: some take longer than the night has hours."""
MISSING, UNCERTAIN = "not_reported", "report_lost"
NOT_A_NUMBER, NOT_FINITE = "reported_no_number", "reported_not_finite"
TOO_SLOW = "pattern_too_slow"
TIME_IS_OVER = "nightlab: time is over"
"""Stands in the log of a program that its budget cut; see `attempt.boxes`."""
MAX_PROPOSALS = 5
LINES_LOOKED_AT = 500
"""From a log's end, for what looks like a score: milliseconds each, where a candidate wrote it."""

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")
_THOUSANDS = re.compile(r"[+-]?[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]*)?")
_NOT_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)
_BLANKS = " \t"
_WIPED = re.compile(r"\x1b\[2K|\x08+")
_DRESS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]{0,200}(?:\x07|\x1b\\)|\x1b[()].")
"""Colours, moves of a terminal's cursor, its title: what is left is what a person reads."""
_LIKE_A_SCORE = re.compile(
    r"((?:[A-Za-z][A-Za-z0-9_/.@-]{0,20} ){0,2})"
    r"\b([A-Za-z0-9_/.@-]{0,30}(?:loss|acc|accuracy|bpb|bpc|ppl|perplexity|f1|auc|rmse|mae|mse|r2"
    r"|bleu|score|error|reward|speedup|elapsed|latency|throughput|flops|bandwidth)"
    r"[A-Za-z0-9_@]{0,12})([\"']?[ \t]{0,20}[:=(|\u2502][ \t]{0,20}|[ \t]{1,20})"
    r"([+-]?[0-9](?:[0-9.,]{0,20}[0-9])?(?:[eE][+-]?[0-9]{1,3})?)",
    re.IGNORECASE,
)
_FINDER = """
import json, re, resource, sys
pattern, seconds = json.loads(sys.argv[1])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
find = re.compile(pattern).finditer
for asked in sys.stdin:
    found = [match for line in json.loads(asked) for match in find(line)]
    print(json.dumps([[match[1] or "", match.groupdict()] for match in found]), flush=True)
"""
_LIKE_PROGRESS = re.compile(
    r"\b(iter|iteration|step|epoch|batch|update)s?['\"]?[ \t:=#\[]{1,3}(\d{1,12})(?=\D).{0,100}?"
    r"((?:train(?:ing)?[ _/])?loss)[ \t:='\"]{1,4}[0-9][0-9.eE+-]{0,20}",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Reading:
    """What a sheet, a log or a file comes to: a value, or the reason why there is none."""

    value: float | None
    reason: str | None
    explanation: str
    details: dict[str, Any]


@dataclass(frozen=True)
class LikelyScore:
    """A line that looks like a score, and the pattern that would read it."""

    line: str
    name: str
    value: str
    pattern: str

    @property
    def setting(self) -> str:
        """The pattern as a line of program.md; a literal of toml can hold no apostrophe."""
        quoted = json.dumps(self.pattern) if "'" in self.pattern else f"'{self.pattern}'"
        return f"pattern = {quoted}"


def read_reported(log: Log, goal: Goal, content: bytes | None = None) -> Reading:
    """The metric as a training that ended well said it; see the module.

    Args:
        log: what the box kept, not the excerpt of it that stands in the ledger's line.
        goal: says where it stands.
        content: of the file that `goal` names, see `reported_file`.
    """
    if goal.file is not None:
        return _read_file(goal, content)
    if goal.take == "best" and log.omitted_bytes:
        return _lost(log, goal)
    lines = lines_of(log)
    if goal.pattern is None:
        named = (line.rstrip("\r").rpartition("\r")[2].partition(":") for line in lines)
        values = [
            value for name, colon, value in named if colon and name.strip(_BLANKS) == goal.metric
        ]
    else:
        found = _matches(goal.pattern, [part for line in lines for part in line.split("\r")])
        if found is None:
            text = f"[goal] pattern took over {MATCH_SECONDS} s on this log: make it simpler"
            return Reading(None, TOO_SLOW, text, {"times": 0})
        values = found
    return _taken(values, goal) if values else _missing(log, goal)


def lines_of(log: Log) -> list[str]:
    """A log's whole lines without their dress; those of the end where the middle was dropped."""
    text = log.tail.partition("\n")[2] if log.omitted_bytes else log.head + log.tail
    # A training that ended well has said its last line to the end, with a newline or without.
    return undressed(text).split("\n")


def undressed(text: str) -> str:
    """A log without colours and moves of a cursor."""
    return _DRESS.sub("", _WIPED.sub("\r ", text))


def reported_file(folder: Path, goal: Goal) -> bytes | None:
    """The file among a training's output that holds the metric; None for none that is read."""
    if goal.file is None:
        return None
    path = folder / goal.file
    # Names came through the box's own rules, and what lies here are plain files of the host's.
    if not path.is_file() or path.is_symlink() or path.stat().st_size > MAX_FILE_BYTES:
        return None
    return path.read_bytes()


def likely_scores(lines: Iterable[str]) -> list[LikelyScore]:
    """What looks like a score in a log, the last line of each name; at most five."""
    found: dict[str, LikelyScore] = {}
    for line in lines:
        shown = line.rpartition("\r")[2][:500]
        for match in _LIKE_A_SCORE.finditer(shown):
            before, name, sign, value = match.groups()
            words = f"{before}{name}{sign}"
            # Blanks differ from line to line where numbers are aligned.
            pattern = r"\s*".join(re.escape(part) for part in words.split())
            pattern += r"\s*([-+\d.,eE]*\d)"
            title = f"{before}{name}"
            found.pop(title, None)
            found[title] = LikelyScore(one_line(shown, 100), title, value, pattern)
    # A validation's number before a training's: it is what a night should be after.
    held_out, trained = (re.compile(words, re.IGNORECASE).search for words in ("val|test", "train"))
    ranked = sorted(
        found.values(),
        key=lambda one: (not held_out(one.name), bool(trained(one.name)), not held_out(one.line)),
    )
    return ranked[:MAX_PROPOSALS]


class Finder:
    """Finds a pattern in lines, in a process of its own: a candidate writes what is looked through.

    Nothing can interrupt `re`. The process has `MATCH_SECONDS` of a processor for all its lines.
    """

    def __init__(self, pattern: str) -> None:
        asked = json.dumps([pattern, MATCH_SECONDS])
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _FINDER, asked],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        with suppress(OSError):  # what it was not given to the end is of no use any more
            self._process.communicate()

    def __call__(
        self, lines: Sequence[str], seconds: float
    ) -> list[tuple[str, dict[str, str | None]]] | None:
        """First group and named groups of each match; None where that took too long."""
        asked, said = self._process.stdin, self._process.stdout
        assert asked is not None
        assert said is not None
        try:
            asked.write(json.dumps(list(lines)).encode() + b"\n")
            asked.flush()
            is_there, _, _ = select.select([said], [], [], seconds)
            return (
                [(one, named) for one, named in json.loads(said.readline())] if is_there else None
            )
        except (OSError, ValueError):
            return None


def _matches(pattern: str, lines: Sequence[str]) -> list[str] | None:
    """What the pattern's group holds wherever it matches; None where that took too long."""
    with Finder(pattern) as find:
        found = find(lines, 6 * MATCH_SECONDS)
    return None if found is None else [first for first, _ in found]


def likely_progress(lines: Iterable[str]) -> tuple[str, str] | None:
    """A line that looks like a step of progress among others, and the pattern that reads it."""
    found: dict[str, dict[str, str]] = {}
    for line in lines:
        for match in _LIKE_PROGRESS.finditer(line[:500]):
            name, step, loss = match.groups()
            words = r"\s*".join(map(re.escape, loss.split()))
            pattern = rf"{name}\W+(?P<step>\d+).*?{words}\W+(?P<loss>[\d.eE+-]+)"
            found.setdefault(pattern, {})[step] = line
    several = [(steps, pattern) for pattern, steps in found.items() if len(steps) > 1]
    if not several:
        return None
    steps, pattern = max(several, key=lambda one: len(one[0]))
    return one_line(list(steps.values())[-1], 100), pattern


def _taken(values: Sequence[str], goal: Goal) -> Reading:
    """The one of several that counts."""
    last = _read(values[-1], len(values))
    if goal.take == "last" or last.value is None:
        return last
    readings = (_read(value, len(values)) for value in values)
    better = min if goal.direction == "minimize" else max
    return better((r for r in readings if r.value is not None), key=lambda r: r.value or 0.0)


def _read(given: str, times: int) -> Reading:
    text = given.strip(_BLANKS)
    shown = one_line(text, MAX_NUMBER_CHARACTERS) or "nothing"
    details = {"said": shown, "times": times}
    if _NOT_FINITE.fullmatch(text):
        return Reading(None, NOT_FINITE, f"the program reported {shown}", details)
    if len(text) <= MAX_NUMBER_CHARACTERS and _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if len(text) > MAX_NUMBER_CHARACTERS or not _NUMBER.fullmatch(text):
        problem = f"the program reported {shown}, which is not a plain decimal number"
        return Reading(None, NOT_A_NUMBER, problem, details)
    value = float(text)
    if not math.isfinite(value):
        return Reading(None, NOT_FINITE, f"the program reported {shown}: out of range", details)
    return Reading(value, None, "", details)


def _missing(log: Log, goal: Goal) -> Reading:
    if log.omitted_bytes:
        return _lost(log, goal)
    text = f"{goal.expected} was not there in what the program printed"
    if TIME_IS_OVER in log.tail or TIME_IS_OVER in log.head:
        text += " until time ended it: raise seconds under [budget], or let it measure more often"
    if like := likely_scores(lines_of(log)[-LINES_LOOKED_AT:]):
        shown = "; ".join(f"`{one.line}`, by {one.setting}" for one in like)
        text += f". What looks like a score: {shown}"
    return Reading(None, MISSING, text, {"times": 0})


def _lost(log: Log, goal: Goal) -> Reading:
    text = (
        f"{goal.expected} may stand in the middle of the log ({log.omitted_bytes:,} bytes), which "
        "was dropped: print it last, print less, or raise [limits] log"
    )
    return Reading(None, UNCERTAIN, text, {"times": 0})


def _read_file(goal: Goal, content: bytes | None) -> Reading:
    assert goal.file is not None
    if content is None:
        text = f"the training left no file {goal.file} of at most {MAX_FILE_BYTES // 2**20} MiB"
        return Reading(None, MISSING, text, {"times": 0})
    try:
        values = list(_values(PurePath(goal.file).suffix, content, goal.key or goal.metric))
    except (ValueError, RecursionError, csv.Error) as error:
        text = f"{goal.file} cannot be read: {one_line(str(error), 200)}"
        return Reading(None, NOT_A_NUMBER, text, {"times": 0})
    if not values:
        return Reading(None, MISSING, f"{goal.expected} was not there", {"times": 0})
    return _taken(values, goal)


def _values(suffix: str, content: bytes, key: str) -> Iterable[str]:
    """What a file says under a key, from its first row to its last."""
    text = content.decode("utf-8-sig")
    if suffix in (".csv", ".tsv"):
        # Of a table, those rows that have the column filled: some are written between two scores.
        table = csv.DictReader(text.splitlines(), delimiter="\t" if suffix == ".tsv" else ",")
        return [value for row in table if (value := row.get(key)) and value.strip()]
    if suffix == ".json":
        found = json.loads(text)
        rows = found if isinstance(found, list) else [found]
    else:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    return [_as_text(value) for row in rows if (value := _below(row, key)) is not None]


def _below(row: Any, key: str) -> Any:
    """The value of a key, or of a path of keys with a slash or a dot between."""
    if not isinstance(row, dict) or key in row:
        return row.get(key) if isinstance(row, dict) else None
    for part in re.split(r"[/.]", key):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
