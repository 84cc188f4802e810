"""Per-step curves from a run's own progress lines, bounded.

A program may print one JSON object a line. What it says there is its own word: shown, never judged.
Only known names and finite numbers are taken, and a curve has an end whatever the program prints.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeGuard

from agent.record.chain import canonical
from agent.record.reported import Finder, undressed
from sandbox.contract.log import log
from sandbox.contract.run import RunResult

NAMES = (
    "step",
    "seconds",
    "loss",
    "tokens",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "flops_per_token",
)
MAX_POINTS = 500
MAX_LINES = 500_000
"""Progress lines that are read of one run; what comes after them costs nothing."""

SLOW_SECONDS = 1.0
"""For a pattern, on one piece of a log: where it takes longer it is not asked again in this run."""

_REQUIRED = ("seconds", "loss")
_MAX_MAGNITUDE = 1e15
_MAX_LINE_BYTES = 1000

Point = dict[str, float]
Curve = list[Point]


@dataclass
class CurveCollector:
    """Takes a run's log as it comes and keeps at most `MAX_POINTS` points, evenly spread.

    When it is full every other point goes, and from then on only every second one comes in: so
    the memory is bounded, whatever the length of the run, and the first point always stays.
    """

    forward: Callable[[bytes], None]
    max_lines: int = MAX_LINES
    _partial: bytes = b""
    _is_line_too_long: bool = False
    _points: Curve = field(default_factory=list)
    _last: Point | None = None
    _stride: int = 1
    _seen: int = 0
    _lines: int = 0

    def __call__(self, piece: bytes) -> None:
        """Read one piece of the log, and hand it on."""
        self.forward(piece)
        for number, part in enumerate(piece.split(b"\n")):
            if number:
                self._end_line()
            self._is_line_too_long |= len(self._partial) + len(part) > _MAX_LINE_BYTES
            self._partial = b"" if self._is_line_too_long else self._partial + part

    def curve(self) -> Curve:
        """The points so far, the last one among them."""
        if self._last is None or (self._points and self._points[-1] is self._last):
            return list(self._points)
        return [*self._points[: MAX_POINTS - 1], self._last]

    def _end_line(self) -> None:
        line, self._partial = self._partial, b""
        if self._is_line_too_long:
            self._is_line_too_long = False
        elif line.startswith(b"{") and self._lines < self.max_lines:
            self._lines += 1
            if (point := read_point(line)) is not None:
                self._take(point)

    def _take(self, point: Point) -> None:
        self._last = point
        if self._seen % self._stride == 0:
            if len(self._points) == MAX_POINTS:
                self._points = self._points[::2]
                self._stride *= 2
            if self._seen % self._stride == 0:
                self._points.append(point)
        self._seen += 1


@dataclass
class PatternReader:
    """Makes progress lines of those that a pattern reads, with the host's seconds, for `take`."""

    take: Callable[[bytes], None]
    find: Finder
    clock: Callable[[], float]
    began: float
    _partial: bytes = b""
    _is_over: bool = False
    _lines: int = 0

    def __call__(self, piece: bytes) -> None:
        """Read one piece of the log."""
        if self._is_over:
            return
        # A progress bar ends its lines with a carriage return.
        *parts, self._partial = re.split(rb"[\r\n]", self._partial[-_MAX_LINE_BYTES - 1 :] + piece)
        whole = [part for part in parts if 0 < len(part) <= _MAX_LINE_BYTES]
        self._lines += len(whole)
        texts = [undressed(part.decode(errors="replace")) for part in whole]
        found = self.find(texts, SLOW_SECONDS) if texts else []
        self._is_over = found is None or self._lines > MAX_LINES
        if found is None:
            log.warning("progress_too_slow", seconds=SLOW_SECONDS)
        for _, named in found or ():
            point = {"seconds": round(self.clock() - self.began, 3)}
            for name, text in named.items():
                with suppress(ValueError):
                    point[name] = float((text or "").replace(",", ""))
            self.take(json.dumps(point).encode() + b"\n")


@contextmanager
def progress_read(
    pattern: str | None,
    take: Callable[[bytes], None],
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[bytes], None]]:
    """Who a log goes to, so that `take` gets progress lines whatever form they have."""
    if pattern is None:
        yield take
        return
    with Finder(pattern) as find:
        yield PatternReader(take, find, clock, clock())


def curve_of(text: str) -> Curve:
    """The curve of a whole log."""
    collector = CurveCollector(lambda _piece: None)
    collector(text.encode(errors="replace") + b"\n")
    return collector.curve()


def read_point(line: bytes) -> Point | None:
    """What one progress line says; none unless it names finite seconds and a finite loss."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    known = {name: float(row[name]) for name in NAMES if is_storable(row.get(name))}
    # Seven digits are stored: what is decided from a curve can be decided from it again.
    point = {name: float(f"{number:.7g}") for name, number in known.items()}
    return point if _is_point(point) else None


def packed(curve: Curve) -> bytes:
    """A curve as it is stored: names once, then rows; a number that a row lacks is null."""
    names = [name for name in NAMES if any(name in point for point in curve)]
    rows = [[point.get(name) for name in names] for point in curve]
    return canonical({"names": names, "rows": rows}).encode()


def unpacked(stored: bytes) -> Curve:
    """The curve that `packed` stored.

    Raises:
        ValueError: the bytes are no curve.
    """
    content = json.loads(stored)
    try:
        curve = [_row(content["names"], row) for row in content["rows"][:MAX_POINTS]]
    except (TypeError, KeyError) as error:
        raise ValueError("not a stored curve") from error
    if not all(_is_point(point) for point in curve):
        raise ValueError("not a stored curve: a point is not what a run can have said")
    return curve


def _row(names: Iterable[str], row: Iterable[float | None]) -> Point:
    pairs = zip(names, row, strict=True)
    return {name: float(number) for name, number in pairs if number is not None}


def _is_point(point: Point) -> bool:
    known = all(name in NAMES and is_storable(number) for name, number in point.items())
    return known and all(name in point for name in _REQUIRED) and point["seconds"] >= 0


def is_storable(value: object) -> TypeGuard[int | float]:
    """Whether it is a number that can be stored and drawn; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= _MAX_MAGNITUDE  # NaN is not, and infinity is not


def said_tokens(curve: Curve) -> int | None:
    """How many tokens a training's last progress line counts; None where none does."""
    counts = [point["tokens"] for point in curve if point.get("tokens", -1) >= 0]
    return int(counts[-1]) if counts else None


def mfu_of(
    peaks: Mapping[str, object], cpu: str | None, result: RunResult, curve: Curve
) -> float | None:
    """Share of its device's peak arithmetic that a training used, by the training's own word.

    None where the program named no operations per token, the profile knows no peak for a device of
    exactly that name, several devices were used, or the share would be more than all of it. `peaks`
    are in operations per second; `cpu` names the device of a run without GPUs.
    """
    device = cpu
    if result.gpus:
        device = result.gpu[0].name if len(result.gpu) == len(result.gpus) == 1 else None
    peak = peak_of(peaks, device)
    last = next((point for point in reversed(curve) if "flops_per_token" in point), {})
    flops = last.get("flops_per_token", 0.0) * last.get("tokens_per_second", 0.0)
    if peak is None or not 0 < flops <= peak:
        return None
    return flops / peak


def peak_of(peaks: Mapping[str, object], device: str | None) -> float | None:
    """The peak that a recorded table knows for the device of that name."""
    peak = peaks.get(device) if device is not None else None
    return float(peak) if is_storable(peak) and peak > 0 else None
