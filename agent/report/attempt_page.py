"""What the report shows of one attempt: diff, logs, curve.

What a model or a run wrote is made visible and cut to its share of the report before it comes near
a template: one attempt with endless logs must not cost the others their room.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

from agent.candidate.knobs import KnobValue, knob_values
from agent.record.attempts import Attempt
from agent.record.chain import GetBlob, LedgerError
from agent.record.curves import Curve, unpacked
from agent.record.events import (
    Arithmetic,
    AttemptFinished,
    AttemptInterrupted,
    AttemptStarted,
    Entry,
    MessageAdded,
    RunFinished,
)
from agent.record.logs import unpacked_log
from agent.report import charts
from agent.report.rendering import MAX_LINE_CHARS, MAX_ROWS
from agent.report.summary import describe, needed, value_of
from agent.text import one_line, visible
from sandbox.contract.run import Log, Outcome

_FILES_BYTES = 60_000
_NAMES = {"assistant": "researcher", "user": "nightlab"}
_TOLD, _UNREADABLE = "told", "record"
_HEARD = (_TOLD, "nightlab")
"""Not the researcher's own words."""


class Saying(NamedTuple):
    """One thing that was said, thought, asked of a tool or told to the researcher."""

    who: str
    lines: list[str]


def is_self_reported(attempt: Attempt) -> bool:
    """Whether the program's own word is all that stands behind its score."""
    return any(score.source == "reported" for score in attempt.scores)


@dataclass(frozen=True)
class AttemptPage:
    """One attempt as the report shows it; lines are visible and bounded, not yet escaped."""

    attempt: Attempt
    mark: str
    value: float | None
    is_self_reported: bool
    gain: float | None
    needed: float | None
    """The gain that it had to pass."""
    needs: str
    """The same in words."""
    arithmetic: str
    dethroned: str
    """How it stopped being the best; empty where it did not."""
    knobs: dict[str, KnobValue]
    """What they are set to; of all but the baseline only those that differ from it."""
    files: dict[str, list[str]]
    """A baseline's, by name, whole: what the changes of all others are applied to."""
    diff: list[str]
    is_diff_whole: bool
    chain: list[str]
    """The diff again, shorter, for the chain of kept changes."""
    logs: list[tuple[str, list[str]]]
    words: list[Saying]
    """What the researcher said and did for it, and was told meanwhile."""
    messages: int
    """How many messages those are from, shown or not."""
    curve: charts.LossCurve | None
    runs_left_out: int
    scores_left_out: int


class TextRoom(NamedTuple):
    """How many bytes of the page an attempt's texts may take."""

    text: int
    """Half of it for the diff and half for the logs."""
    words: int
    chain: int = 0


class Around(NamedTuple):
    """What an attempt's page needs of the rest of the night."""

    messages: Sequence[str] = ()
    parent: Attempt | None = None
    knobs: Mapping[str, KnobValue] = {}
    """The baseline's."""


def attempt_page(
    attempt: Attempt, get_blob: GetBlob, room: TextRoom, around: Around | None = None
) -> AttemptPage:
    """One attempt, its texts within their room."""
    around = around or Around()
    knobs = knob_values(attempt.started.files, get_blob)
    diff, is_diff_whole = _diff_lines(attempt, get_blob, room.text // 2)
    arithmetic = attempt.finished.arithmetic if attempt.finished else None
    return AttemptPage(
        attempt=attempt,
        mark=charts.mark_of(attempt),
        value=value_of(attempt),
        is_self_reported=is_self_reported(attempt),
        gain=arithmetic.gain if arithmetic else None,
        needed=arithmetic.required_gain if arithmetic else None,
        needs=needed(arithmetic) if arithmetic else "",
        arithmetic=_in_words(arithmetic) if arithmetic else "",
        dethroned=describe(attempt.dethroned) if attempt.dethroned else "",
        knobs={n: v for n, v in knobs.items() if around.knobs.get(n) != v},
        files=_files(attempt, get_blob) if attempt.started.kind == "baseline" else {},
        diff=diff,
        is_diff_whole=is_diff_whole,
        chain=_diff_lines(attempt, get_blob, room.chain)[0] if attempt.kept else [],
        logs=list(_logs(attempt, get_blob, room.text // 2)),
        words=spoken(around.messages, get_blob, room.words),
        messages=len(around.messages),
        curve=charts.loss_curve(
            _curves(attempt, get_blob),
            next(_curves(around.parent, get_blob), None) if around.parent else None,
        ),
        runs_left_out=max(0, len(attempt.runs) - MAX_ROWS),
        scores_left_out=max(0, len(attempt.scores) - MAX_ROWS),
    )


def _in_words(numbers: Arithmetic) -> str:
    """A verdict's arithmetic as a sentence that can be checked by hand."""
    direction = "better" if numbers.gain >= 0 else "worse"
    return (
        f"{_mean(numbers.candidate_mean, numbers.candidate_values)} against "
        f"{_mean(numbers.best_mean, numbers.best_values)} of the best so far: "
        f"{abs(numbers.gain):.4f} {direction}{_in_noise(numbers)}. "
        f"To be kept it had to be better by more than {numbers.required_gain:.4f}: "
        f"noise {numbers.noise:.4f} with {numbers.degrees_of_freedom} degrees of freedom; "
        f"{_own(numbers)}one look takes luck for a gain in {numbers.doubt_of_a_look:.1%} of cases."
    )


def _own(numbers: Arithmetic) -> str:
    return (
        "" if numbers.own_noise is None else f"its own scores spread by {numbers.own_noise:.4f}; "
    )


def _in_noise(numbers: Arithmetic) -> str:
    return f", {abs(numbers.gain) / numbers.noise:.1f} \u00d7 noise" if numbers.noise else ""


def _mean(mean: float, values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{mean:.4f}"
    return f"{mean:.4f} (mean of {', '.join(f'{value:.4f}' for value in values[:MAX_ROWS])})"


def _curves(attempt: Attempt, get_blob: GetBlob) -> Iterator[Curve]:
    """What the attempt's trainings reported of their loss; a lost or damaged curve is left out."""
    for run in attempt.runs:
        if run.curve is not None:
            with suppress(LedgerError, ValueError):
                yield unpacked(get_blob(run.curve))


def _diff_lines(attempt: Attempt, get_blob: GetBlob, limit_bytes: int) -> tuple[list[str], bool]:
    """The change as far as there is room for it, and whether that is all of it."""
    if attempt.started.diff is None:
        return [], attempt.started.kind == "baseline"
    try:
        text = get_blob(attempt.started.diff).decode(errors="replace")
    except LedgerError as error:
        return [f"(the diff cannot be shown: {one_line(str(error), 200)})"], False
    lines = _ends(text, limit_bytes, 0)
    return lines, "\n".join(lines) == visible(text).rstrip("\n")


def _files(attempt: Attempt, get_blob: GetBlob) -> dict[str, list[str]]:
    """The files as lines, as many as have room whole."""
    found, left = {}, _FILES_BYTES
    for name, sha in attempt.started.files.items():
        with suppress(LedgerError):
            text = visible(get_blob(sha).decode(errors="replace"))
            left -= len(escape(text).encode())
            if left >= 0:
                found[name] = text.split("\n")
    return found


def _whole_log(run: RunFinished, get_blob: GetBlob) -> Log:
    """The log from its blob; where that is lost or damaged, the excerpt."""
    try:
        return unpacked_log(get_blob(run.log))
    except (LedgerError, ValueError):
        return run.result.log


def _logs(attempt: Attempt, get_blob: GetBlob, limit_bytes: int) -> Iterator[tuple[str, list[str]]]:
    """The logs that explain an attempt: of runs that went wrong, or of the first training."""
    wrong = [run for run in attempt.telling_runs if run.result.outcome is not Outcome.OK]
    trained = attempt.trainings
    chosen = wrong[-2:] or trained[:1]
    for run in chosen:
        log, limit = _whole_log(run, get_blob), limit_bytes // len(chosen)
        gap = f"\n⋯ {log.omitted_bytes:,} bytes that the box did not keep ⋯\n"
        text = log.head + (gap if log.omitted_bytes else "") + log.tail
        # What went wrong stands at the end of a log, so that gets most of the room.
        if lines := _ends(text, limit // 4, limit - limit // 4):
            yield f"{run.result.box} box, seed {run.seed}", lines


def _ends(text: str, head_bytes: int, tail_bytes: int) -> list[str]:
    """First and last visible lines within so many bytes of HTML, with the gap named."""
    shown = visible(text).rstrip("\n")
    lines = shown.split("\n") if shown else []
    head = list(_within(lines, head_bytes))
    tail = list(_within(reversed(lines[len(head) :]), tail_bytes))[::-1]
    if len(head) + len(tail) == len(lines):
        return head + tail
    return [*head, "⋯ more of this is in the session's record ⋯", *tail]


def _within(lines: Iterable[str], limit_bytes: int) -> Iterator[str]:
    left = limit_bytes
    for line in lines:
        shown = line if len(line) <= MAX_LINE_CHARS else line[:MAX_LINE_CHARS] + " ⋯"
        left -= len(escape(shown).encode()) + 12  # a diff's line has a tag around it
        if left < 0:
            return
        yield shown


def messages_of(entries: Iterable[Entry]) -> dict[int, tuple[str, ...]]:
    """Of each attempt the messages between the end of the one before and its own end."""
    found: dict[int, tuple[str, ...]] = {}
    said: list[str] = []
    last: int | None = None
    for entry in entries:
        event = entry.event
        if isinstance(event, MessageAdded):
            said.append(event.message)
        elif isinstance(event, AttemptStarted):
            last = event.attempt
        elif isinstance(event, AttemptFinished | AttemptInterrupted):
            found[event.attempt], said, last = tuple(said), [], None
    return found | ({} if last is None else {last: tuple(said)})


def spoken(messages: Sequence[str], get_blob: GetBlob, limit_bytes: int) -> list[Saying]:
    """Words, reasoning and tool calls, bounded: the latest first choose their room.

    What a tool answered gets less of it than what the researcher said.
    """
    chosen: list[Saying] = []
    left = limit_bytes
    for who, text in reversed([block for sha in messages for block in _message(sha, get_blob)]):
        share = limit_bytes // (8 if who in _HEARD else 2)
        saying = Saying(who, _ends(text, share // 2, share // 2))
        left -= 60 + sum(len(escape(line).encode()) + 1 for line in saying.lines)
        if left < 0:
            break
        chosen.append(saying)
    return chosen[::-1]


def _message(sha: str, get_blob: GetBlob) -> list[tuple[str, str]]:
    try:
        message = json.loads(get_blob(sha))
        content, role = message["content"], message["role"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        return [_block(role, block) for block in blocks]
    except (LedgerError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [(_UNREADABLE, f"(a message cannot be shown: {type(error).__name__})")]


def _block(role: str, block: dict[str, Any]) -> tuple[str, str]:
    """One block of a message: who, and what; a tool's input is shown as the model wrote it."""
    who = _NAMES.get(role, role)
    match block["type"]:
        case "text":
            return who, block["text"]
        case "thinking":
            return f"{who} thinks", block["thinking"]
        case "tool_use":
            told = block["input"].items()
            return f"{who} calls {block['name']}", "\n".join(f"{n} = {v}" for n, v in told)
        case "tool_result" if isinstance(block["content"], list):
            return _TOLD, "\n".join(str(part.get("text", "")) for part in block["content"])
        case "tool_result":
            return _TOLD, str(block["content"])
        case other:
            return who, f"({other})"
