"""What a person sees while the night goes on."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from agent.attempt.disturbance import reasons
from agent.night.budget import seconds_left
from agent.record.attempts import Attempt
from agent.record.events import (
    ATTEMPT,
    SAMPLERS,
    Arithmetic,
    AttemptKind,
    Dethroned,
    DriftChecked,
    RunFinished,
    RunStarted,
    StopReason,
    Verdict,
)
from agent.record.history import History
from agent.report.activity import DOING, RunNotes
from agent.report.plan import outlook, run_in_words
from agent.report.summary import (
    LONGEST_REASON,
    Summary,
    describe,
    needed,
    noise_of,
    result_in_words,
)
from agent.settings import Settings
from agent.text import in_words, one_line
from sandbox.contract.run import Outcome

STYLES = {
    Verdict.KEPT: "bold green",
    Verdict.DISCARDED: "default",
    Verdict.FAILED: "red",
    Verdict.INVALID: "magenta",
}
MORE = {
    StopReason.ATTEMPTS: "--attempts N",
    StopReason.HOURS: "--hours H",
    StopReason.MONEY: "--usd X",
}
"""What a session that reached a limit is allowed more of."""
ON = MORE | {
    StopReason.TOKENS: "--researcher tpe, or a new session with more tokens under [session]",
    StopReason.CALLS: "--researcher tpe, or a new session with more calls under [session]",
    StopReason.FAILURES_IN_A_ROW: None,
    StopReason.DISCARDS_IN_A_ROW: None,
    StopReason.BASELINE_FAILED: None,
    StopReason.REFUSED_SCORES: "--researcher tpe, once you know why its scores were refused",
    StopReason.AGENT_IDLE: "--model OTHER, or --researcher tpe",
    StopReason.STUCK: "--model OTHER, or --researcher tpe",
    StopReason.REFUSED: "--model OTHER, or --researcher tpe",
    StopReason.API_REFUSED: "--researcher claude, once that is mended; or --researcher tpe",
    StopReason.API_OUTAGE: "once the service answers again; or --researcher tpe",
    StopReason.SANDBOX_FAULT: "once nightlab check passes",
    StopReason.EXHAUSTED: "--researcher claude, which may change more than knobs",
}
"""How each ending goes on, after `nightlab resume NAME`; None where a resume ends at once."""
JSON_SCHEMA = 1
"""Of what `--json` prints; a name that goes or changes its meaning makes it the next number."""
IDEA_CHARACTERS = 70
STAND_IN = "stand_in"


class NightConsole:
    """One line an attempt, and a bar for the running one where there is a terminal."""

    def __init__(
        self, notes: RunNotes, out: Console, settings: Settings, history: Callable[[], History]
    ) -> None:
        self._notes = notes
        self._out = out
        self._settings = settings
        self._history = history
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._disturbed = 0
        """Runs in a row that others disturbed."""

    def attempt_started(self, number: int, kind: AttemptKind, hypothesis: str) -> None:
        """Show nothing: its runs say whose they are."""

    def run_started(self, event: RunStarted, budget_seconds: float) -> None:
        """Show a fresh bar for the run."""
        box, history = event.box, self._history()
        self._notes.begin(box, event.seed)
        kinds = {attempt.number: attempt.started.kind for attempt in history.attempts}
        title = "baseline" if kinds.get(event.attempt) == "baseline" else f"#{event.attempt}"
        words = f"{title} {DOING[box].lower()}"
        is_own = event.purpose == ATTEMPT
        if place := run_in_words(history, event.attempt, event.seed) if is_own else event.purpose:
            words += f", {place}"
        if not self._out.is_terminal:
            # In a log file every step of a bar would be a line; a night without any looks dead.
            if box == "train" and history.baseline is None:
                self._print(f"      {_clock()} {words}", "dim")
            return
        self._stop_bar()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._out,
            transient=True,
        )
        self._task = self._progress.add_task(
            words,
            total=budget_seconds if box == "train" else None,
            note=self._status(),
        )
        self._progress.start()

    def log(self, piece: bytes) -> None:
        """Move the bar by the run's own progress lines; they are evidence, no more."""
        self._notes.log(piece)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=self._notes.seconds)

    def run_finished(self, event: RunFinished) -> None:
        """Take the bar away; say so when the machine was not quiet."""
        result, disturbance = event.result, event.disturbance
        self._notes.end()
        self._stop_bar()
        # What others did explains no crash: the log does.
        if disturbance is None:
            return
        is_spoilt = disturbance.disturbed and result.outcome is Outcome.OK
        self._disturbed = self._disturbed + 1 if is_spoilt else 0
        if is_spoilt:
            why = "; ".join(reasons(disturbance))
            is_again = self._disturbed <= self._settings.disturbance.max_repeats
            then = "; waiting for a quiet machine, then again" if is_again else ""
            text = f"disturbed: {why}{then}; see [disturbance] in program.md"
            self._print(f"      {_clock()} {text}", "yellow")

    def attempt_finished(self, attempt: Attempt) -> None:
        """Print its line; an interrupted attempt has one too."""
        line = attempt_line(attempt, self._history(), self._settings)
        self._print(line, STYLES[attempt.finished.verdict] if attempt.finished else "yellow")
        if attempt.cause is not None:
            self._print(f"      {attempt.cause.sentence}", "dim")
        if attempt.started.kind == "baseline" and (words := outlook(self._history(), _now())):
            self._print(f"      {words}", "dim")

    def drift_checked(self, found: DriftChecked) -> None:
        style = "bold yellow" if found.changed else "dim"
        self._print(f"      {one_line(found.explanation, 300)}", style)

    def dethroned(self, event: Dethroned) -> None:
        self._print(f"      attempt {event.attempt} {one_line(describe(event), 300)}", "bold red")

    def waiting(self, words: str) -> None:
        self._print(f"      {_clock()} {one_line(words, 300)}", "yellow")

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._notes.end()
        self._stop_bar()

    def _status(self) -> str:
        history = self._history()
        pieces = []
        if history.best is not None and history.best.finished is not None:
            pieces.append(f"best {history.best.finished.value:.4f}")
        session = self._settings.session
        pieces.append(f"{len(history.completed)}/{session.attempts} attempts")
        pieces.append(f"{seconds_left(history, session) / 3600:.1f} h left")
        if session.usd is not None and history.researcher not in SAMPLERS:
            pieces.append(f"${max(0.0, session.usd - history.spend.usd):.2f} left")
        return " · ".join(pieces)

    def _print(self, line: str, style: str) -> None:
        self._stop_bar()  # one that is drawn anew would overwrite the line
        self._out.print(Text(line, style=style), soft_wrap=True)

    def _stop_bar(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress, self._task = None, None


def _now() -> datetime:
    return datetime.now().astimezone()


def _clock() -> str:
    """Since when what a line says is so."""
    return f"{_now():%H:%M}"


class JsonConsole:
    """One JSON object a line, for scripts; logs are left to the ledger."""

    def __init__(self, notes: RunNotes, write: Callable[[str], None]) -> None:
        self._notes = notes
        self._write = write

    def attempt_started(self, number: int, kind: AttemptKind, hypothesis: str) -> None:
        self._say("attempt_started", attempt=number, kind=kind, hypothesis=hypothesis)

    def run_started(self, event: RunStarted, budget_seconds: float) -> None:
        self._notes.begin(event.box, event.seed)
        run = {"attempt": event.attempt, "purpose": event.purpose, "box": event.box}
        self._say("run_started", **run, seed=event.seed, budget_seconds=budget_seconds)

    def log(self, piece: bytes) -> None:
        self._notes.log(piece)

    def run_finished(self, event: RunFinished) -> None:
        result, disturbance = event.result, event.disturbance
        self._notes.end()
        self._say(
            "run_finished",
            attempt=event.attempt,
            purpose=event.purpose,
            run_id=result.run_id,
            box=result.box,
            outcome=result.outcome.value,
            wall_seconds=result.wall_seconds,
            other_cores=None if disturbance is None else disturbance.other_cores,
        )

    def attempt_finished(self, attempt: Attempt) -> None:
        if attempt.finished is None:
            assert attempt.interrupted is not None
            end = attempt.interrupted.model_dump(mode="json", exclude={"type"})
            self._say("attempt_interrupted", **end)
            return
        finished = attempt.finished.model_dump(mode="json", exclude={"type"})
        source = attempt.scores[-1].source if attempt.scores else None
        self._say("attempt_finished", **finished, source=source, cost_usd=attempt.cost_usd)

    def drift_checked(self, found: DriftChecked) -> None:
        self._say("drift_checked", **found.model_dump(mode="json", exclude={"type"}))

    def dethroned(self, event: Dethroned) -> None:
        self._say("dethroned", **event.model_dump(mode="json", exclude={"type"}))

    def waiting(self, words: str) -> None:
        self._say("waiting", words=words)

    def close(self) -> None:
        self._notes.end()

    def _say(self, event: str, **fields: Any) -> None:
        self._write(json_line(event, **fields))


def json_line(event: str, **facts: Any) -> str:
    """One line for scripts, see docs/json-lines.schema.json: always the same first three names."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"schema": JSON_SCHEMA, "at": now, "event": event} | facts)


def attempt_line(attempt: Attempt, history: History, settings: Settings) -> str:
    """Number, verdict, score, gain and the gain it needed, seconds, money, idea."""
    finished, hypothesis = attempt.finished, one_line(attempt.started.hypothesis, IDEA_CHARACTERS)
    if finished is None:
        why = one_line(attempt.interrupted.reason if attempt.interrupted else "", 300)
        return f"#{attempt.number:<4} {attempt.standing:<9} {why}; {hypothesis}"
    if finished.value is None:
        score = f"{'':<8}  {in_words(finished.reason):<21}"
    else:
        score = f"{finished.value:<8.4f}  {_difference(finished.arithmetic, history):<21}"
    if settings.goal.is_reported and finished.value is not None:
        score += " self-reported"
    cost = f"  ${attempt.cost_usd:.3f}" if attempt.cost_usd else ""
    if attempt.kept and attempt.tested:
        cost += f"  {attempt.confirmation}"
    return (
        f"#{attempt.number:<4} {finished.verdict.value:<9} {score} "
        f"{finished.seconds:>5.0f} s{cost}  {hypothesis}"
    )


def _difference(numbers: Arithmetic | None, history: History) -> str:
    if numbers is None:
        noise = noise_of(history)
        return f"noise {noise:.4f}" if noise is not None else ""
    return f"{numbers.gain:+.4f} needs {needed(numbers)}"


def counts_in_words(numbers: Summary) -> str:
    """How many attempts became what; what seldom happens is named where it did."""
    names = ("kept", "discarded", "failed", "invalid", "dethroned", "interrupted")
    counts = [(name, getattr(numbers, name)) for name in names]
    told = ", ".join(f"{n} {name}" for name, n in counts if n or name not in names[4:])
    return f"attempts {numbers.attempts}: {told}"


def next_lines(numbers: Summary) -> list[str]:
    """What the person does next."""
    return [f"next     {step}" for step in numbers.next_steps]


def closing_lines(numbers: Summary, directory: Path) -> list[str]:
    """What a person reads when a session is over: result, honesty, cost, where to look."""
    ended = in_words(numbers.ended or "")
    lines = [f"ended: {ended} ({one_line(numbers.ended_explanation, LONGEST_REASON)})"]
    lines += result_in_words(numbers)
    if numbers.is_self_reported and not numbers.baseline_failure:
        lines.append("holdout  none: the program printed these scores, and nothing checked them")
    if not numbers.baseline_failure:
        lines.append(counts_in_words(numbers))
    if numbers.stopped_early:
        lines.append(
            f"saved    {numbers.saved_seconds:.0f} s of training: "
            f"{numbers.stopped_early} stopped early"
        )
    if numbers.asked_a_model:
        lines.append(f"model    {numbers.calls} calls, ${numbers.spent_usd:.2f}")
    told = ("dethroned",)  # stands above, with the result
    lines += [f"look at  {item.text}" for item in numbers.attention if item.kind not in told]
    lines += [
        f"report   {directory / 'report.html'}",
        f"ledger   {directory / 'ledger.jsonl'}",
        f"head     {numbers.head} after {numbers.events} events; keep it to find a cut tail",
        f"files    {directory / 'workspace'}",
        *next_lines(numbers),
    ]
    if numbers.ended is not None and (how := ON.get(numbers.ended, "")) is not None:
        # Who was replaced for good stays so, unless the person says otherwise.
        is_replaced = any(item.kind == STAND_IN for item in numbers.attention)
        again = "; add --researcher claude to ask the model again"
        asks = again if is_replaced and "--researcher" not in how else ""
        lines.append(f"more     nightlab resume {directory.name} {how}".rstrip() + asks)
    return lines
