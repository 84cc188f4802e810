"""What a review and a replay look like."""

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from agent.morning.ablation import MEANING, ChangeEffect, Effect, ReviewTable
from agent.record.events import Arithmetic, ReplayFinished
from agent.text import one_line

STYLES = {
    Effect.REAL: "bold green",
    Effect.LUCK: "yellow",
    Effect.HARMFUL: "red",
    Effect.NEEDED: "default",
    Effect.UNTESTED: "magenta",
    Effect.UNKNOWN: "magenta",
}
HYPOTHESIS_CHARACTERS = 70


def ablation_table(table: ReviewTable) -> Table:
    """One row a kept change: its gain when it was kept, what it is worth today, what it was."""
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("attempt", "kept for", "worth today", "in noise", "verdict", "change"):
        numeric = name in ("attempt", "kept for", "worth today", "in noise")
        shown.add_column(name, justify="right" if numeric else "left", no_wrap=numeric)
    for change in table.changes:
        shown.add_row(*_cells(change))
    return shown


def result_lines(table: ReviewTable) -> list[str]:
    """Best against baseline today, and what came back on holdout."""
    seeds = f"{len(table.seeds)} fresh seed" + ("" if len(table.seeds) == 1 else "s")
    lines = [f"review {table.review}: {seeds}" + ("" if table.is_finished else ", not finished")]
    if table.arithmetic is None:
        return [*lines, "best and baseline are not both measured yet"]
    numbers = table.arithmetic
    lines.append(
        f"baseline {table.metric} {numbers.best_mean:.4f}, best {numbers.candidate_mean:.4f}: "
        f"better by {difference(numbers)}"
    )
    if not table.heeds_seeds:
        lines.append(
            "not tested by seeds: the program gives its own, and has the same luck each time"
        )
    if table.holdout_gain is not None:
        lines.append(f"holdout  better by {table.holdout_gain:+.4f}")
    return lines


def notes(table: ReviewTable) -> Iterator[str]:
    """What stands behind the table: steps instead of ablations, failures, the smaller model."""
    for change in table.changes:
        if change.note:
            yield f"#{change.attempt}: {one_line(change.note, 300)}"
    smaller = table.smaller
    if smaller is None:
        return
    names = ", ".join(f"#{number}" for number in smaller.left_out)
    if smaller.is_equal:
        assert smaller.arithmetic is not None
        yield (
            f"Without {names} the result is as good (the best is better by "
            f"{difference(smaller.arithmetic)}): `nightlab approve --smaller` takes that model"
        )
    elif smaller.arithmetic is not None:
        yield f"Without {names} together it is worse by {difference(smaller.arithmetic)}"
    else:
        yield f"Without {names} together there is no model: {one_line(smaller.note, 300)}"


def difference(numbers: Arithmetic) -> str:
    """A gain with its noise and the line that it has to pass."""
    return f"{numbers.gain:+.4f} (beyond noise from {numbers.required_gain:.4f})"


def replay_lines(replayed: ReplayFinished, *, is_self_reported: bool) -> list[str]:
    """Recorded and today's scores side by side, and whether they agree, if that can be said."""
    whose = ", self-reported" if is_self_reported else ""
    lines = [
        f"seed {score.seed}{whose}: recorded {_score(score.recorded)}, today {_score(score.today)}"
        + _in_noise(score.recorded, score.today, replayed.noise)
        for score in replayed.scores
    ]
    word = "agrees" if replayed.agrees else "DOES NOT AGREE"
    if not replayed.is_comparable:
        word = "cannot be compared"
    return [*lines, f"attempt {replayed.attempt} {word}: {one_line(replayed.explanation, 300)}"]


def _cells(change: ChangeEffect) -> tuple[str | Text, ...]:
    numbers = change.arithmetic
    today = "" if numbers is None else f"{numbers.gain:+.4f}"
    mark = " (as a step)" if change.how == "step" else ""
    return (
        f"#{change.attempt}",
        "" if change.gain_then is None else f"{change.gain_then:+.4f}",
        today,
        f"{numbers.gain_in_noise:+.1f}" if numbers and numbers.gain_in_noise is not None else "",
        Text(MEANING[change.effect] + mark, style=STYLES[change.effect]),
        Text(one_line(change.hypothesis, HYPOTHESIS_CHARACTERS)),
    )


def _score(value: float | None) -> str:
    return "none" if value is None else f"{value:.5f}"


def _in_noise(recorded: float | None, today: float | None, noise: float | None) -> str:
    if recorded is None or today is None or not noise:
        return ""
    return f" ({(today - recorded) / noise:+.2f} x noise)"
