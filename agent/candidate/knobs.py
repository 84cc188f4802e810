"""Finds a file's knobs, and turns one in place.

A knob is a module-level `NAME = literal` in capitals, alone on its line. The end of its comment may
say what to try: `[low..high]`, `[low..high log]` or `{a, b, c}`; a comment that begins or ends with
the word `fixed` keeps the knob out. Without a range, positive floats go ten times up and down and
positive whole numbers four times; truth values go both ways; texts, zero and negative numbers stay.
A file that has none in capitals has its numbers where people keep them: see `knob_places`.
"""

import ast
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from agent.candidate.knob_places import (
    CONFIGURATION,
    HUGE,
    MAX_LINE_BYTES,
    NUMBER,
    WITH_KNOBS,
    number_places,
    why_no_knob,
)
from agent.candidate.texts import encoding_of
from agent.record.chain import GetBlob, LedgerError
from agent.text import one_line

KnobValue = bool | int | float | str

NAME = re.compile(r"^[A-Z][A-Z0-9_]*$")
RANGE = re.compile(rf"\[\s*({NUMBER})\s*\.\.\s*({NUMBER})\s*(log\s*)?\]\s*$")
CHOICES = re.compile(r"\{([^{}]+)\}\s*$")
FIXED = re.compile(r"^#\s*fixed\b|\bfixed\s*(?:[.)\]]\s*)?$", re.IGNORECASE)

LARGEST = 1e6
"""What is more is a sentinel or a size of data; no usual domain leads there."""
FLOAT_FACTOR = 10.0
INT_FACTOR = 4
MAX_CHOICES = 64
"""More is a range in disguise, and the comment was written by a model."""


MAX_KNOBS = 60
MAX_VALUE_CHARACTERS = 250
_EXACT = 1e15  # whole numbers up to here survive the floats that trackers keep


@dataclass(frozen=True)
class Span:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    log: bool
    whole: bool


@dataclass(frozen=True)
class Choices:
    """A few values; numbers among them are in order."""

    values: tuple[KnobValue, ...]

    @property
    def ordered(self) -> bool:
        """Whether neighbours are alike, so that a step to one is a small step."""
        return all(type(value) in (int, float) for value in self.values)


Domain = Span | Choices


@dataclass(frozen=True)
class Knob:
    """One knob where it stands."""

    file: str
    name: str
    value: KnobValue
    domain: Domain
    from_comment: bool
    """Whether the file itself says what to try."""
    line: int
    start: int
    end: int
    """Bytes of the line between which the literal stands."""

    @property
    def key(self) -> str:
        return f"{self.file}:{self.name}"


def find_knobs(file: str, source: bytes) -> list[Knob]:
    """The knobs of one file, in its order; none when it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file's own deprecations are not ours
        capitals = [] if file.endswith(CONFIGURATION) else _in_capitals(file, source)
        return capitals or [knob for knob in _in_places(file, source) if isinstance(knob, Knob)]


def given_elsewhere(knobs: Sequence[Knob], command: Sequence[str]) -> set[str]:
    """Keys of the knobs that a command overrides, by an option or a file that it names later."""
    options = {word.lstrip("-").partition("=")[0] for word in command if word.startswith("-")}
    names = {option.replace("-", "_") for option in options}
    order = {word: place for place, word in enumerate(command)}
    last = {knob.name: -1 for knob in knobs}
    for knob in knobs:
        last[knob.name] = max(last[knob.name], order.get(knob.file, -1))
    return {
        knob.key
        for knob in knobs
        if knob.name in names or order.get(knob.file, last[knob.name]) < last[knob.name]
    }


def left_out(file: str, source: bytes) -> dict[str, str]:
    """The named numbers that are no knobs, each with the reason."""
    return dict(found for found in _in_places(file, source) if not isinstance(found, Knob))


def _in_places(file: str, source: bytes) -> Iterator[Knob | tuple[str, str]]:
    """The named numbers of a file: knobs, or why they are none."""
    for place in number_places(file, source):
        stated = _stated_domain(place.remark, place.value)
        domain = stated or _usual_domain(place.value)
        why = "" if stated else why_no_knob(place.name)
        if FIXED.search(place.remark):
            why = "its comment says fixed"
        elif domain is None or (not stated and abs(place.value) >= LARGEST):
            why = "zero, negative or huge: say in a comment what to try, such as [0.1..0.5]"
        if domain is None or why:
            yield place.name, why
            continue
        where = place.line, place.start, place.end
        yield Knob(file, place.name, place.value, domain, stated is not None, *where)


def _in_capitals(file: str, source: bytes) -> list[Knob]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    lines = source.splitlines()
    per_line: dict[int, int] = {}
    for statement in tree.body:
        for line in {statement.lineno, statement.end_lineno or statement.lineno}:
            per_line[line] = per_line.get(line, 0) + 1
    found = [
        _knob(file, statement, lines[statement.lineno - 1])
        for statement in tree.body
        if per_line[statement.lineno] == 1 and statement.lineno <= len(lines)
    ]
    knobs = [knob for knob in found if knob is not None]
    # Of a name that is assigned twice, turning the first literal would change nothing.
    times = Counter(name for statement in tree.body for name in _assigned(statement))
    return [knob for knob in knobs if times[knob.name] == 1]


def described(domain: Domain) -> str:
    """What is tried, in words."""
    if isinstance(domain, Choices):
        return "{" + ", ".join(map(literal, domain.values)) + "}"
    return f"[{domain.low:g}..{domain.high:g}{' log' if domain.log else ''}]"


def without_knobs(file: str, source: bytes) -> bytes:
    """The file without its knobs' literals: equal for files that differ in nothing else."""
    lines = source.splitlines(keepends=True)
    for knob in reversed(find_knobs(file, source)):  # from a line's end, where it has several
        line = lines[knob.line - 1]
        lines[knob.line - 1] = line[: knob.start] + line[knob.end :]
    return b"".join(lines)


def literal(value: KnobValue, file: str = "") -> str:
    """How a value is written into a file: three digits are enough to search with."""
    if isinstance(value, bool | int | str):
        return repr(value)
    text = f"{value:.3g}"
    if file.endswith(CONFIGURATION):  # to YAML 1e-05 is a text
        text = re.sub(r"^(-?[0-9]+)e", r"\1.0e", text)
    return text if re.search(r"[.e]", text) else f"{text}.0"


def current_literal(source: bytes, knob: Knob) -> str:
    """The knob's literal as it is written in `source` now."""
    knob = _there(source, knob)
    return source.splitlines()[knob.line - 1][knob.start : knob.end].decode()


def turn(source: bytes, knob: Knob, value: KnobValue) -> bytes:
    """The file with the knob's literal replaced, and every other byte as it was."""
    # In bytes and in place, not through the tree: comments and formatting are a person's.
    knob = _there(source, knob)
    lines = source.splitlines(keepends=True)
    line = lines[knob.line - 1]
    new = literal(value, knob.file).encode()
    lines[knob.line - 1] = line[: knob.start] + new + line[knob.end :]
    return b"".join(lines)


def _there(source: bytes, knob: Knob) -> Knob:
    """The knob where it stands now: another one of its line may have been turned before."""
    return next((one for one in find_knobs(knob.file, source) if one.key == knob.key), knob)


def replacement(source: bytes, knob: Knob, value: KnobValue) -> tuple[str, str]:
    """The edit that `turn` stands for, old text and new: as few lines as make the old unique."""
    old, new = (text.splitlines(keepends=True) for text in (source, turn(source, knob, value)))
    first, last = knob.line - 1, knob.line
    while source.count(b"".join(old[first:last])) > 1 and (first > 0 or last < len(old)):
        first, last = max(0, first - 1), min(len(old), last + 1)
    name = encoding_of(knob.file, source).removesuffix("-sig")
    return b"".join(old[first:last]).decode(name), b"".join(new[first:last]).decode(name)


def _assigned(statement: ast.stmt) -> list[str]:
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign | ast.AugAssign):
        targets = [statement.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _knob(file: str, statement: ast.stmt, line: bytes) -> Knob | None:
    if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
        return None
    names, node = _assigned(statement), statement.value
    if len(names) != 1 or not NAME.match(names[0]) or statement.end_lineno != statement.lineno:
        return None
    if len(line) > MAX_LINE_BYTES:
        return None
    value, end = _literal_at(line, node), node.end_col_offset or 0
    comment = line[end:].decode("utf-8", "replace").strip()
    if value is None or (comment and not comment.startswith("#")):
        return None
    stated = _stated_domain(comment, value)
    is_sentinel = isinstance(value, int | float) and abs(value) >= LARGEST
    is_none = FIXED.search(comment) or (not stated and (is_sentinel or why_no_knob(names[0])))
    domain = None if is_none else stated or _usual_domain(value)
    if domain is None:
        return None
    place = statement.lineno, node.col_offset, end
    return Knob(file, names[0], value, domain, stated is not None, *place)


def _literal_at(line: bytes, node: ast.expr) -> KnobValue | None:
    """The value that stands there, if it is one that can be turned."""
    if not isinstance(node, ast.Constant | ast.UnaryOp):
        return None
    try:
        value = ast.literal_eval(node)
        written = ast.literal_eval(line[node.col_offset : node.end_col_offset].decode())
    except (SyntaxError, ValueError):
        return None
    if written != value:  # offsets count UTF-8, and a file may be in another encoding
        return None
    # A truth value is a number to Python, and infinity one that no search ends at.
    is_number = isinstance(value, int | float) and abs(value) < HUGE
    return value if is_number or isinstance(value, str) else None


def _stated_domain(comment: str, value: KnobValue) -> Domain | None:
    if match := RANGE.search(comment):
        span = Span(float(match[1]), float(match[2]), match[3] is not None, isinstance(value, int))
        return _stated_range(span, value)
    if match := CHOICES.search(comment):
        return _stated_choices(match[1], value)
    return None


def _stated_range(span: Span, value: KnobValue) -> Domain | None:
    low, high = span.low, span.high
    if isinstance(value, bool | str) or max(abs(low), abs(high)) >= HUGE:
        return None
    if span.whole:
        low, high = math.ceil(low), math.floor(high)
    if not low < high or (span.log and low <= 0):
        return None
    if span.whole and span.log and all(_is_power_of_two(n) for n in (low, high, value)):
        return _powers_of_two(int(low), int(high))
    return Span(low, high, span.log, span.whole)


def _stated_choices(text: str, value: KnobValue) -> Domain | None:
    try:
        values = ast.literal_eval(f"({text},)")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    kinds = (int, float) if type(value) in (int, float) else (type(value),)
    if len(values) > MAX_CHOICES or any(type(choice) not in kinds for choice in values):
        return None
    if int in kinds and any(abs(choice) >= HUGE for choice in values):
        return None
    unique = tuple(dict.fromkeys((*values, value)))
    if Choices(unique).ordered:
        unique = tuple(sorted(unique))
    return Choices(unique) if len(unique) > 1 else None


def _usual_domain(value: KnobValue) -> Domain | None:
    if isinstance(value, bool):
        return Choices((False, True))
    if isinstance(value, str) or value <= 0:
        return None
    if isinstance(value, float):
        # Up to one it often is a share, a momentum or a probability, and more makes no sense.
        ceiling = 1.0 if value <= 1 else 0.99 * LARGEST
        return Span(value / FLOAT_FACTOR, min(value * FLOAT_FACTOR, ceiling), log=True, whole=False)
    low = max(1, value // INT_FACTOR)
    high = max(value, min(value * INT_FACTOR, int(LARGEST) - 1))
    if value > 1 and _is_power_of_two(value):
        return _powers_of_two(low, high)
    return Span(low, high, log=True, whole=True)


def _is_power_of_two(number: float) -> bool:
    return number >= 1 and number == int(number) and int(number) & (int(number) - 1) == 0


def _powers_of_two(low: int, high: int) -> Choices:
    return Choices(tuple(2**n for n in range(low.bit_length() - 1, high.bit_length())))


def knob_values(files: Mapping[str, str], get_blob: GetBlob) -> dict[str, KnobValue]:
    """What each knob of a candidate's files is set to, bounded; lost files have none."""
    found: dict[str, KnobValue] = {}
    for path, sha in files.items():
        if path.endswith(WITH_KNOBS):
            with suppress(LedgerError):
                for knob in find_knobs(path, get_blob(sha)):
                    name = knob.name if path == "train.py" else f"{path}/{knob.name}"
                    found[one_line(name, MAX_VALUE_CHARACTERS)] = _plain(knob.value)
    return dict(list(found.items())[:MAX_KNOBS])


def _plain(value: KnobValue) -> KnobValue:
    """A value that every tracker and page can hold; other numbers become text."""
    if isinstance(value, str):
        return one_line(value, MAX_VALUE_CHARACTERS)
    is_plain = abs(value) <= _EXACT
    return value if is_plain else one_line(f"{value:.6e}", MAX_VALUE_CHARACTERS)
