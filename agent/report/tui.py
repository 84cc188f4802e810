"""A session while it runs, in the terminal."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from agent.record.attempts import Attempt
from agent.record.chain import Follower
from agent.record.history import History
from agent.report.activity import Activity, activity
from agent.report.charts import best_steps, mark_of
from agent.report.console import STYLES, counts_in_words
from agent.report.rendering import duration
from agent.report.summary import Summary, result_in_words, summary, value_of
from agent.text import one_line

SECONDS_BETWEEN_UPDATES = 1.0
STATE_STYLES = {
    "waiting": "dim",
    "working": "bold",
    "paused": "yellow",
    "cut_off": "bold yellow",
    "ended": "bold green",
}

_BARS = "▁▂▃▄▅▆▇█"
_LEAST_ROWS = 3
_MAX_ATTENTION_LINES = 3


def show(directory: Path, out: Console, now: Callable[[], datetime]) -> None:
    """Show a session until Ctrl-C; once, where there is no terminal. `now` tells UTC."""
    ledger = Follower(directory)
    if not out.is_terminal:
        out.print(screen(directory, ledger, now(), out.width, None), soft_wrap=False)
        return
    with Live(console=out, screen=True, auto_refresh=False) as live:
        while True:
            live.update(screen(directory, ledger, now(), out.width, out.height), refresh=True)
            time.sleep(SECONDS_BETWEEN_UPDATES)


def screen(
    directory: Path, ledger: Follower, now: datetime, width: int, height: int | None
) -> Group:
    """Everything at a glance, in so many lines; all attempts where there is no such bound."""
    ledger.poll()
    history, entries = ledger.history, ledger.entries
    numbers = summary(entries, history)
    present = activity(directory, history, entries)
    above = [
        *_title(directory, ledger, numbers),
        *_result(numbers),
        *_limits(numbers, width),
        *_trend(history, width),
        *_present(present, now, width),
        *_attention(numbers),
    ]
    lines = [_cut(line, width) if isinstance(line, Text) else line for line in above]
    count = None if height is None else max(_LEAST_ROWS, height - len(lines) - 2)
    return Group(*lines, Text(""), _table(history, count, width))


def sparkline(values: Sequence[float], width: int) -> str:
    """Bars as high as the values, at most `width` of them."""
    if not values:
        return ""
    stride = math.ceil(len(values) / width)
    shown = values[::-1][::stride][::-1]  # from the end, so that the last one is there
    low, high = min(shown), max(shown)
    top = len(_BARS) - 1
    if high == low:
        return _BARS[top] * len(shown)
    return "".join(_BARS[round(top * (value - low) / (high - low))] for value in shown)


def _title(directory: Path, ledger: Follower, numbers: Summary) -> Iterator[Text]:
    title = Text(one_line(directory.name, 64), style="bold")
    if numbers.session:
        began = numbers.started_at[:16].replace("T", " ")
        title.append(f"  {one_line(numbers.researcher, 40)}, began {began} UTC", style="dim")
    yield title
    if ledger.problem is not None:
        yield Text(f"The record cannot be read to its end: {ledger.problem.message}", "bold red")


def _result(numbers: Summary) -> Iterator[Text]:
    if numbers.best is None and not numbers.baseline_failure:
        yield Text("The baseline is still being measured.", style="dim")
        return
    failed = "bold red" if numbers.baseline_failure else "dim"
    for line in result_in_words(numbers):
        style = {"best": "bold", "refused": "bold red", "baseline": failed}.get(
            line.split(" ", 1)[0], "dim"
        )
        yield Text(line, style=style)  # as it is: its columns stand below each other


def _limits(numbers: Summary, width: int) -> Iterator[RenderableType]:
    """What is used of each limit, a bar a line."""
    used: list[tuple[str, float, float | None, str]] = [
        ("attempts", numbers.attempts, numbers.attempts_limit, "{:.0f}"),
        ("hours", numbers.hours, numbers.hours_limit, "{:.1f}"),
        ("money", numbers.spent_usd, numbers.asked_a_model and numbers.usd_limit, "${:.2f}"),
    ]
    for name, amount, limit, form in used:
        if limit:
            words = f"{form.format(amount)} of {form.format(limit)}"
            yield _bar(name, amount, limit, words, width)
    yield Text(counts_in_words(numbers))


def _trend(history: History, width: int) -> Iterator[Text]:
    best = [value for _, value in best_steps(history)]
    if len(best) > 1:
        line = Text("best so far  ", style="dim")
        line.append(sparkline(best, width - 30), style="green")
        line.append(f"  {best[0]:.4f} to {best[-1]:.4f}", style="dim")
        yield line


def _present(present: Activity, now: datetime, width: int) -> Iterator[RenderableType]:
    yield Text("")
    line = Text(present.text, style=STATE_STYLES[present.state])
    if present.attempt_since is not None:
        # It may have begun after `now` was read.
        seconds = max(0.0, (now - present.attempt_since).total_seconds())
        line.append(f"  {duration(seconds)}", style="dim")
    yield line
    if present.hypothesis:
        yield Text(present.hypothesis)
    if present.run_since is not None and present.budget_seconds:
        seconds = (now - present.run_since).total_seconds()
        total = present.budget_seconds
        words = f"{seconds:.0f} of {total:.0f} s, seed {present.seed}"
        yield _bar("run", seconds, total, words, width)
    losses = [point["loss"] for point in present.curve]
    if len(losses) > 1:
        line = Text("loss  ", style="dim")
        line.append(sparkline(losses, width - 30))
        line.append(f"  {losses[0]:.3g} to {losses[-1]:.3g}", style="dim")
        yield line


def _attention(numbers: Summary) -> Iterator[Text]:
    """What needs the person; whether the session is at work stands above."""
    items = [item for item in numbers.attention if item.kind not in ("not_ended", "dethroned")]
    for item in items[:_MAX_ATTENTION_LINES]:
        attempts = " ".join(f"#{number}" for number in item.attempts[:6])
        yield Text(f"! {item.text} {attempts}".rstrip(), style="yellow")
    if len(items) > _MAX_ATTENTION_LINES:
        more = len(items) - _MAX_ATTENTION_LINES
        yield Text(f"! and {more} more in the report", style="yellow")


def _table(history: History, count: int | None, width: int) -> Table:
    """The last attempts, the latest first, each one line."""
    table = Table.grid(padding=(0, 1), expand=False)
    judged = [attempt for attempt in reversed(history.attempts) if not attempt.open]
    for attempt in judged[:count]:
        table.add_row(*_cells(attempt, max(10, width - 47)))
    return table


def _cells(attempt: Attempt, width: int) -> tuple[Text, ...]:
    value = value_of(attempt)
    arithmetic = attempt.finished.arithmetic if attempt.finished else None
    style = STYLES[attempt.finished.verdict] if attempt.finished else "dim"
    if attempt.dethroned is not None:
        style = "red"
    return (
        Text(f"#{attempt.number}", style="dim"),
        Text(mark_of(attempt), style=style),
        Text("" if value is None else f"{value:.4f}"),
        Text(f"{arithmetic.gain:+.4f}" if arithmetic else "", style="dim"),
        Text(f"needs {arithmetic.required_gain:.4f}" if arithmetic else "", style="dim"),
        Text(one_line(attempt.started.hypothesis, width)),
    )


def _bar(name: str, used: float, limit: float, words: str, width: int) -> Table:
    """One line: what it is about, how much of the limit is used, and the two numbers."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=8)
    bar = ProgressBar(total=limit, completed=min(used, limit), width=max(10, width // 3))
    grid.add_row(Text(name, style="dim"), bar, Text(words))
    return grid


def _cut(line: Text, width: int) -> Text:
    line.truncate(width, overflow="ellipsis")
    line.no_wrap = True
    return line
