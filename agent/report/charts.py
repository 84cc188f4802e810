"""Geometry of the report's charts, and the progress picture.

The HTML report draws its charts as SVG from the numbers made here; `progress_png` draws the same
facts with matplotlib.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

from agent.record.attempts import Attempt
from agent.record.curves import Curve
from agent.record.events import Split, Verdict
from agent.record.history import History, direction_of, gain, label_of
from agent.report.summary import noise_of, split_gain, value_of
from agent.text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_CURVE_POINTS = 60
_RAIL_STEP = 14
_DRAWN_LAST = (
    *("discarded", "failed", "interrupted", "invalid", "dethroned"),
    *("running", "kept", "baseline"),
)
_MAX_CURVES = 5
_MAX_LABELS = 18


@dataclass(frozen=True)
class Frame:
    """A drawing's size and its margins, in SVG units."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float


WIDE = Frame(width=960, height=410, left=66, right=16, top=14, bottom=76)
NARROW = Frame(width=400, height=370, left=62, right=10, top=12, bottom=72)


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Dot:
    """One attempt on the chart."""

    number: int
    x: float
    y: float
    mark: str
    score: str
    """In words; empty where there is none."""
    is_off_scale: bool


@dataclass(frozen=True)
class ProgressChart:
    """All attempts with the running best and the noise around it."""

    frame: Frame
    dots: tuple[Dot, ...]
    best_line: str
    noise_band: str
    needed: str
    """What each attempt had to pass, a dash for each."""
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class LossCurve:
    """Training loss over time, one line a run."""

    lines: tuple[str, ...]
    beside: str
    """The line of what was the best; empty where that is not known."""
    low: float
    high: float
    last_seconds: float


@dataclass(frozen=True)
class Scale:
    """A linear map from values to places."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def mark_of(attempt: Attempt) -> str:
    """What an attempt is to a reader: the baseline, or what became of it."""
    return "baseline" if attempt.started.kind == "baseline" and attempt.kept else attempt.standing


def best_steps(history: History) -> list[tuple[int, float]]:
    """Number and score of each attempt that is the best or led to it, the baseline first."""
    return [
        (attempt.number, attempt.finished.value)
        for attempt in history.attempts
        if attempt.kept and attempt.finished is not None and attempt.finished.value is not None
    ]


def needed_scores(history: History) -> list[tuple[int, float]]:
    """Number of each judged attempt, and the score that it had to pass to be kept or tested."""
    sign = -1.0 if direction_of(history) == "minimize" else 1.0
    return [
        (attempt.number, numbers.best_mean + sign * numbers.required_gain)
        for attempt in history.attempts
        if attempt.finished is not None and (numbers := attempt.finished.arithmetic) is not None
    ]


def progress_chart(history: History, frame: Frame) -> ProgressChart | None:
    """The chart's geometry; none while nothing has been measured."""
    steps, noise = best_steps(history), noise_of(history) or 0.0
    if not steps:
        return None
    numbers = [attempt.number for attempt in history.attempts]
    last = max(numbers)
    low, high = _value_range(history, noise)
    x = Scale(min(numbers), max(last, min(numbers) + 1), frame.left + 8, frame.width - frame.right)
    y = Scale(low, high, frame.height - frame.bottom, frame.top)
    rail_y = frame.height - frame.bottom + 14
    dots = [_dot(attempt, x, y, rail_y) for attempt in history.attempts]
    return ProgressChart(
        frame=frame,
        dots=tuple(sorted(dots, key=lambda dot: _DRAWN_LAST.index(dot.mark))),
        best_line="M" + "L".join(_staircase(steps, last, 0.0, x, y)),
        noise_band=_band(steps, last, noise, x, y),
        needed="".join(
            f"M{x(n - 0.5):g} {y(value):g}H{x(min(n + 0.5, last)):g}"
            for n, value in needed_scores(history)
            if low < value < high
        ),
        x_ticks=tuple(Tick(x(n), str(n)) for n in _whole_numbers(min(numbers), last, frame.width)),
        y_ticks=tuple(Tick(y(value), label) for value, label in axis_ticks(low, high)),
    )


def _value_range(history: History, noise: float) -> tuple[float, float]:
    """Lowest and highest value to draw.

    Attempts far worse than the baseline would flatten all the rest: they are drawn at the edge.
    """
    steps, direction = best_steps(history), direction_of(history)
    first, best = steps[0][1], steps[-1][1]
    values = [v for a in history.attempts if (v := value_of(a)) is not None]
    # Never so close that noise fills the picture, nor a range of nothing.
    span = max(abs(gain(direction, best, first)), 6 * noise, 1e-3 * abs(first), 1e-9)
    worse = min(max(gain(direction, first, value) for value in values), span)
    better = max(gain(direction, value, first) for value in values)
    down, up = (better, worse) if direction == "minimize" else (worse, better)
    pad = max(0.06 * span, 1.5 * noise)
    return first - max(down, 0.0) - pad, first + max(up, 0.0) + pad


def axis_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """About five round values between two numbers, with their labels."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))  # log10 may fall just short
    first = math.ceil(low / step)
    ticks = range(first, math.floor(high / step) + 1)
    return [(n * step, f"{n * step:.{decimals}f}") for n in ticks]


def loss_curve(curves: Iterable[Curve], beside: Curve | None = None) -> LossCurve | None:
    """The loss that runs reported: evidence, drawn and never judged."""
    shown = islice(curves, _MAX_CURVES)
    runs = [points for curve in shown if len(points := _thinned(curve)) > 1]
    if not runs:
        return None
    other = _thinned(beside) if beside and len(beside) > 1 else []
    losses = [loss for points in (*runs, other) for _, loss in points]
    low, high = min(losses), max(losses)
    last = max(seconds for points in (*runs, other) for seconds, _ in points)
    x = Scale(0, last or 1, 0, 300)
    y = Scale(low, high if high > low else low + 1, 78, 2)
    *lines, best = (" ".join(f"{x(s):g},{y(v):g}" for s, v in points) for points in (*runs, other))
    return LossCurve(tuple(lines), best, low, high if high > low else low + 1, last or 1)


def progress_png(history: History) -> bytes:
    """The night as a picture: dots, running best, noise band."""
    # Half a second to import, which a command that draws nothing need not pay; and without
    # pyplot, whose global figures would never be freed in a long night.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    # Who has no score stands on a rail: on the axis it would look better or worse than others.
    axes, rail = figure.subplots(2, sharex=True, height_ratios=(12, 1))
    is_falling = direction_of(history) == "minimize"
    axes.set_ylabel(f"{label_of(history)} ({'lower' if is_falling else 'higher'} is better)")
    axes.grid(visible=True, alpha=0.25)
    for part in (axes, rail):
        part.spines[["top", "right"]].set_visible(False)
    rail.set(xlabel="attempt", yticks=[0], yticklabels=["no score"], ylim=(-1, 1))
    steps, noise = best_steps(history), noise_of(history) or 0.0
    if steps:
        axes.set_ylim(_value_range(history, noise))
        _plot_best(axes, history, steps, noise)
    if history.attempts:
        rail.set_xlim(history.attempts[0].number - 1, history.attempts[-1].number + 1)
        _plot_dots(axes, rail, history)
        _plot_labels(axes, history)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    axes.set_title(title_of(history), loc="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "nightlab"})
    return buffer.getvalue()


def title_of(history: History) -> str:
    """The session, what it gained, and what of that came back on holdout."""
    session = one_line(history.session.session, 64) if history.session else "a session"
    pieces = [f"{len(history.completed)} attempts, {history.count(Verdict.KEPT)} kept"]
    names: dict[Split, str] = {"val": "gain", "holdout": "on holdout"}
    for split, name in names.items():
        if (found := split_gain(history, split)) and history.best is not history.baseline:
            pieces.append(f"{name} {found.gain:+.4f}")
    return _label(f"{session}: {', '.join(pieces)}", 200)


_STYLES = {
    "baseline": ("s", "#2b5f9e", 52),
    "kept": ("o", "#1a7f4b", 52),
    "discarded": ("o", "#9aa3ab", 20),
    "failed": ("x", "#b3382c", 30),
    "invalid": ("D", "#a86500", 24),
    "dethroned": ("X", "#b3382c", 52),
    "interrupted": ("|", "#6d7680", 40),
}


def _plot_best(
    axes: Axes, history: History, steps: Sequence[tuple[int, float]], noise: float
) -> None:
    numbers = [*(number for number, _ in steps), history.attempts[-1].number + 0.5]
    values = [*(value for _, value in steps), steps[-1][1]]
    low, high = [v - noise for v in values], [v + noise for v in values]
    style: dict[str, Any] = {"step": "post", "color": "#1a7f4b", "alpha": 0.15, "linewidth": 0}
    axes.fill_between(numbers, low, high, **style, label=f"noise of one score ±{noise:.4f}")
    axes.step(numbers, values, where="post", color="#1a7f4b", linewidth=1.8, label="best so far")
    if needed := needed_scores(history):
        places, to_pass = zip(*needed, strict=True)
        left, right = [n - 0.5 for n in places], [n + 0.5 for n in places]
        axes.hlines(to_pass, left, right, color="#c2571a", linewidth=1.2, label="had to pass this")


def _plot_dots(axes: Axes, rail: Axes, history: History) -> None:
    low, high = axes.get_ylim()
    for mark, (shape, color, size) in _STYLES.items():
        attempts = [a for a in history.attempts if mark_of(a) == mark]
        style: dict[str, Any] = {"marker": shape, "color": color, "s": size, "zorder": 3}
        shown = [
            (a.number, min(max(value, low), high))
            for a in attempts
            if (value := value_of(a)) is not None
        ]
        bare = [(a.number, 0.0) for a in attempts if value_of(a) is None]
        for part, points in ((axes, shown), (rail, bare)):
            if points:
                part.scatter(*zip(*points, strict=True), clip_on=False, **style)
        if attempts:
            axes.scatter([], [], label=f"{mark} ({len(attempts)})", **style)


def _plot_labels(axes: Axes, history: History) -> None:
    """Number what was kept, and name the numbers beside the picture, where no two can collide."""
    kept = [(a, v) for a in history.candidates if a.kept and (v := value_of(a)) is not None]
    style: dict[str, Any] = {"xytext": (5, 5), "textcoords": "offset points", "fontsize": 7}
    for attempt, value in kept:
        place = (attempt.number, value)
        axes.annotate(f"#{attempt.number}", place, color="#12633a", **style)
    if len(kept) > _MAX_LABELS:
        text = f"{len(kept) - _MAX_LABELS} kept before: see the report"
        axes.plot([], [], " ", label=text)
    for attempt, _ in kept[-_MAX_LABELS:]:
        assert attempt.finished is not None
        numbers = attempt.finished.arithmetic
        gained = f"{numbers.gain:+.4f} " if numbers else ""
        text = _label(f"#{attempt.number} {gained}{attempt.started.hypothesis}", 44)
        axes.plot([], [], " ", label=text)


def _label(text: str, characters: int) -> str:
    """What the picture's font can show of a text; dollar signs would begin a formula."""
    text = one_line(text, characters)
    shown = "".join(c if ord(c) < 0x100 or c == "…" else "?" for c in text)
    return shown.replace("$", r"\$")


def _dot(attempt: Attempt, x: Scale, y: Scale, rail_y: float) -> Dot:
    value, mark = value_of(attempt), mark_of(attempt)
    shown = None if value is None else min(max(value, y.low), y.high)
    rail = rail_y if mark == "failed" else rail_y + _RAIL_STEP
    place = rail if shown is None else y(shown)
    score = "" if value is None else f", {value:.4f}"
    return Dot(attempt.number, x(attempt.number), place, mark, score, is_off_scale=shown != value)


def _staircase(
    steps: Sequence[tuple[int, float]], last: int, offset: float, x: Scale, y: Scale
) -> list[str]:
    """Corners of the running best, moved by `offset`, up to the last attempt."""
    corners = [f"{x(steps[0][0]):g} {y(steps[0][1] + offset):g}"]
    for (_, before), (number, value) in pairwise(steps):
        corners.append(f"{x(number):g} {y(before + offset):g}")
        corners.append(f"{x(number):g} {y(value + offset):g}")
    return [*corners, f"{x(max(last, steps[0][0] + 1)):g} {y(steps[-1][1] + offset):g}"]


def _band(steps: Sequence[tuple[int, float]], last: int, noise: float, x: Scale, y: Scale) -> str:
    upper = _staircase(steps, last, noise, x, y)
    lower = _staircase(steps, last, -noise, x, y)
    return "M" + "L".join([*upper, *reversed(lower)]) + "Z"


def _whole_numbers(first: int, last: int, width: float) -> list[int]:
    room = max(2, int(width // 90))
    step = max(1, math.ceil((last - first) / room))
    step = next(n for p in range(9) for n in (10**p, 2 * 10**p, 5 * 10**p) if n >= step)
    return [n for n in range(first, last + 1) if n % step == 0]


def _thinned(curve: Curve) -> list[tuple[float, float]]:
    """Seconds and loss, thinned out to what a small chart can show; the last point stays."""
    stride = max(1, math.ceil(len(curve) / MAX_CURVE_POINTS))
    chosen = curve[::stride] + curve[-1:] if stride > 1 else curve
    return [(point["seconds"], point["loss"]) for point in chosen]
