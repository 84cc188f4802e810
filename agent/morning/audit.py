"""Checks a session's record against itself: blobs, verdicts, spend, order."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agent.attempt.disturbance import idle_cores, usual_cores, usual_speed
from agent.attempt.judge import (
    Judgement,
    Noise,
    Ruling,
    drift_purposes,
    drift_tolerance,
    has_drifted,
    judge,
)
from agent.attempt.stopping import Rule, past
from agent.candidate.diffs import patch, unified_diff
from agent.candidate.merge import Files
from agent.candidate.workspace import may_be_written
from agent.morning.limit_checks import LimitChecks
from agent.morning.run_checks import RunChecks
from agent.record.curves import unpacked
from agent.record.events import (
    Arithmetic,
    AttemptFinished,
    AttemptInterrupted,
    AttemptStarted,
    ConversationOpened,
    Disturbance,
    DriftChecked,
    EarlyStop,
    Entry,
    Event,
    FileChanged,
    HumanDecided,
    LaterRun,
    MessageAdded,
    ModelCalled,
    Noticed,
    ReplayFinished,
    ReviewStarted,
    RunFinished,
    RunStarted,
    Scored,
    SessionEnded,
    SessionResumed,
    SessionStarted,
    SmokeFinished,
    SmokeRun,
    SmokeStarted,
    StopReason,
    ToolCalled,
    ToolReturned,
    VariantMeasured,
    VariantPlanned,
    Verdict,
)
from agent.record.history import (
    BOX_LOST,
    HOLDOUT_MISSING,
    OF_AN_ATTEMPT,
    TRIES,
    Attempt,
    History,
    are_moved,
)
from agent.record.ledger import BLOBS_NAME, LedgerError, read_blob, request_sha, torn_bytes
from agent.researcher.providers import cost_usd
from agent.settings import Settings
from sandbox.contract.record import Record
from sandbox.contract.run import Outcome

BLOB_FIELDS = (
    *("program", "diff", "log", "curve", "container", "system", "tools", "message"),
    *("reply", "input", "output", "before", "after", "patch", "sheet"),
)
BLOB_TABLES = ("files", "fixed_files")
MAY_CHANGE_ON_RESUME = ("session", "record", "researcher")
"""Sections of the settings that decide nothing about a verdict."""


class Difference(Record):
    """Where the record contradicts itself."""

    seq: int | None
    """The event that it is about; none for what no event names."""
    what: str


@dataclass(frozen=True)
class _Repeats:
    """What an attempt with repeats says of noise."""

    squares: float
    """About their mean."""
    degrees: int
    are_moved: bool


@dataclass
class _Auditor:
    """Walks the ledger once, with the history as it was before each event."""

    directory: Path
    history: History = field(default_factory=History)
    settings: Settings | None = None
    checked: set[str] = field(default_factory=set)
    """Blobs that were read."""
    bodies: dict[str, bytes] = field(default_factory=dict)
    """Those that the present event names for the first time."""
    repeats: dict[int, _Repeats] = field(default_factory=dict)
    """Of each attempt that has some."""
    conversations: dict[int, list[str]] = field(default_factory=dict)
    replies: dict[int, str] = field(default_factory=dict)
    called_tools: dict[str, str] = field(default_factory=dict)
    variants: dict[tuple[int, str], VariantPlanned] = field(default_factory=dict)
    shown: dict[tuple[Any, ...], str] = field(default_factory=dict)
    """Diffs that were found right, by what changed."""
    usage_usd: float = 0.0
    last_call: int | None = None

    def __post_init__(self) -> None:
        self.runs = RunChecks(self._body)
        self.limits = LimitChecks(self.history)

    def look(self, entry: Entry) -> Iterator[str]:
        """What is wrong with one event."""
        event = entry.event
        yield from self._blobs(event)
        if not self.history.takes(event):
            yield f"{event.type} names an attempt that was never started"
            return
        if isinstance(event, OF_AN_ATTEMPT) and not self.history.attempt(event.attempt).open:
            yield from self._after_the_end(event)
        yield from self._check(entry)
        self.history.apply(entry)
        if isinstance(event, Scored | DriftChecked):
            self._count_repeats(event.attempt)
        elif isinstance(event, AttemptInterrupted):  # what it measured may count no more
            for number in list(self.repeats):
                self._count_repeats(number)

    def at_the_end(self) -> Iterator[Difference]:
        """What is wrong with the record as a whole."""
        if not _same(self.usage_usd, self.history.spent_usd):
            told = f"the session says ${self.history.spent_usd:.6f}"
            what = f"{told}; the usage of its calls comes to ${self.usage_usd:.6f}"
            yield Difference(seq=self.last_call, what=what)
        for folder, _, names in os.walk(self.directory / BLOBS_NAME):
            begin = Path(folder).name
            for name in sorted(names):
                # A dot: half-written when nightlab was killed.
                if begin + name not in self.checked and not name.startswith("."):
                    yield from self._unnamed(begin, name)

    def _unnamed(self, begin: str, name: str) -> Iterator[Difference]:
        """A blob that no event names must still be what its name says."""
        try:
            read_blob(self.directory, begin + name)
        except LedgerError:
            what = f"{BLOBS_NAME}/{begin}/{name} is not the blob that it is named after"
            yield Difference(seq=None, what=what)

    def _check(self, entry: Entry) -> Iterator[str]:
        event = entry.event
        yield from self.limits.look(event)
        match event:
            case SessionStarted() | SessionResumed():
                yield from self._begin(event)
            case AttemptStarted():
                yield from self._start(event)
            case RunStarted() | RunFinished() | Scored():
                yield from self._run(event)
            case SmokeStarted() | SmokeRun() | SmokeFinished():
                yield from self._smoke(event)
            case AttemptFinished():
                yield from self._verdict(event)
            case AttemptInterrupted() | DriftChecked():
                yield from self._drift(event) if isinstance(event, DriftChecked) else ()
                self.runs.forget_open()
            case SessionEnded():
                self._forget_broken_smoke()
                if event.reason is not StopReason.SANDBOX_FAULT:
                    yield from self.runs.all_ended()
            case ConversationOpened() | MessageAdded() | ToolCalled() | ToolReturned():
                yield from self._talk(event)
            case FileChanged():
                before = {} if event.before is None else {event.path: event.before}
                yield from self._shown(unified_diff, event.diff, before, {event.path: event.after})
            case ModelCalled():
                self.last_call = entry.seq
                yield from self._call(event)
            case _:
                yield from self._morning(event)

    def _blobs(self, event: Event) -> Iterator[str]:
        self.bodies.clear()
        for sha in named_blobs(event):
            if sha in self.checked:
                continue
            self.checked.add(sha)
            try:
                self.bodies[sha] = read_blob(self.directory, sha)
            except LedgerError as error:
                yield error.message

    def _body(self, sha: str) -> bytes:
        return self.bodies[sha] if sha in self.bodies else read_blob(self.directory, sha)

    def _after_the_end(self, event: Event) -> Iterator[str]:
        """The best may be measured again, at more seeds or on holdout; nothing else may happen."""
        if not isinstance(event, RunStarted | RunFinished | Scored):
            yield "an attempt is closed for the second time"

    # --- session and attempts ---

    def _begin(self, event: SessionStarted | SessionResumed) -> Iterator[str]:
        self.runs.forget_open()
        before = self.settings
        try:
            self.settings = Settings.on_record(event.settings)
        except ValidationError as error:
            self.settings = None
            yield f"its settings are not valid: {error.error_count()} of them"
        self.runs.settings = self.limits.settings = self.settings
        if isinstance(event, SessionStarted):
            self.runs.session, self.runs.seeds = event, frozenset(event.seeds)
        elif before is not None and self.settings is not None:
            yield from _changed_on_resume(before, self.settings)

    def _start(self, event: AttemptStarted) -> Iterator[str]:
        self._forget_broken_smoke()
        if event.attempt != len(self.history.attempts):
            yield f"attempt {event.attempt} comes where {len(self.history.attempts)} was due"
        if self.history.attempts and self.history.attempts[-1].open:
            yield f"attempt {event.attempt} starts while the one before is open"
        yield from self._untouched(event)
        best = None if self.history.best is None else self.history.best.number
        if event.parent != best:
            yield f"its parent is {event.parent}, the best was {best}"
        if self.history.best is not None:
            files = self.history.best.started.files
            yield from self._shown(unified_diff, event.diff, files, event.files)

    # --- what a person reads ---

    def _shown(
        self,
        told: Callable[[Files, Files], bytes],
        sha: str | None,
        old: Mapping[str, str],
        new: Mapping[str, str],
    ) -> Iterator[str]:
        """Whether the diff that a person reads is what changed in the files."""
        names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        change = (told.__name__, *((name, old.get(name), new.get(name)) for name in names))
        if sha is not None and self.shown.get(change) == sha:
            return  # a file change and the attempt that tried it mostly have one diff
        try:
            before, after = (
                {name: self._body(files[name]) for name in names if name in files}
                for files in (old, new)
            )
            if sha is None or told(before, after) != self._body(sha):
                yield "its diff is not what changed in the files"
            else:
                self.shown[change] = sha
        except LedgerError:
            return  # named where blobs are checked

    def _untouched(self, event: AttemptStarted) -> Iterator[str]:
        """What nobody may write is in every candidate as it was when the session began."""
        if self.settings is None or self.history.session is None:
            return
        editable = self.settings.workspace.editable
        begun = self.history.session.files
        for name in sorted(event.files.keys() | begun.keys()):
            is_same = event.files.get(name) == begun.get(name)
            if not is_same and not may_be_written(name.split("/"), editable):
                yield f"its {name} is not the one that the session began with"

    def _count_repeats(self, number: int) -> None:
        values = list(self.history.attempt(number).values().values())
        self.repeats.pop(number, None)
        if len(values) > 1:
            mean = _mean(values)
            squares = sum((value - mean) ** 2 for value in values)
            self.repeats[number] = _Repeats(squares, len(values) - 1, are_moved(values))

    def _run(self, event: RunStarted | RunFinished | Scored) -> Iterator[str]:
        yield from self.runs.look(event)
        if isinstance(event, RunFinished) and event.disturbance is not None:
            yield from self._calibrated(event.disturbance)

    def _calibrated(self, noise: Disturbance) -> Iterator[str]:
        """What a run was held against must be what was measured and asked for before."""
        if noise.speed is None or self.settings is None:
            return
        limits = self.settings.disturbance
        if (noise.limit_cores, noise.min_speed) != (limits.max_other_cores, limits.min_speed):
            yield "its limits of disturbance are not those in the settings"
        if noise.usual_cores not in (0.0, usual_cores(self.history)):
            yield "what others usually use is not what they used beside the baseline's runs"
        if noise.idle_cores not in (0.0, idle_cores(self.settings.limits.cpus, self.history.cores)):
            yield "the cores that it leaves to others are not those that its limit leaves"
        due = {usual_speed(self.history, with_looks=looks) for looks in (True, False)}
        if noise.usual_speed not in due:
            yield "its usual speed is not that of the baseline's runs"

    def _forget_broken_smoke(self) -> None:
        """A smoke run without an end was a fault: it was tried again, or given up."""
        smokes = self.history.smokes
        if smokes and smokes[-1].finished is None:
            self.runs.forget_open()

    def _smoke(self, event: SmokeStarted | SmokeRun | SmokeFinished) -> Iterator[str]:
        match event:
            case SmokeStarted():
                self._forget_broken_smoke()
                smokes = self.history.smokes
                attempts = self.history.attempts
                due = len(attempts) - (event.asked_by == "nightlab")
                if (event.smoke, event.attempt) != (len(smokes), due):
                    yield f"smoke run {event.smoke} comes where another one was due"
                if event.asked_by == "nightlab" and attempts[-1].started.files != event.files:
                    yield "its files are not those of the attempt"
                most = self.settings.economy.max_smokes if self.settings else 0
                if event.asked_by == "researcher" and self.history.smokes_in_a_row >= most:
                    yield f"a smoke run more than the {most} that are allowed between two attempts"
            case SmokeRun():
                yield from self.runs.look_at_smoke(event)
            case SmokeFinished():
                yield from self.runs.all_ended()
                smoke = self.history.smokes[event.smoke]
                reported = self.settings is not None and self.settings.goal.is_reported
                told = smoke.reason(answered=event.answered, is_reported=reported)
                reason = told if smoke.runs else "none"
                if (event.passed, event.reason) != (reason is None, reason):
                    yield f"it says {event.reason or 'passed'}; its runs say {reason or 'passed'}"

    # --- verdicts ---

    def _verdict(self, event: AttemptFinished) -> Iterator[str]:
        if event.reason == BOX_LOST:
            self.runs.forget_open()
        yield from self.runs.all_ended()
        attempt = self.history.attempt(event.attempt)
        values = list(attempt.values().values())
        if event.arithmetic is not None:
            yield from self._arithmetic(event, attempt)
        elif event.early_stop is not None or event.reason == "stopped_early":
            yield from self._early_stop(event, attempt)
        elif event.verdict is not Verdict.KEPT:
            if not _is_backed(event, attempt, self.history):
                yield f"{event.verdict} ({event.reason}), and no run or score says so"
        elif attempt.started.kind != "baseline":
            yield "kept without arithmetic"
        elif not values or not _same(event.value, _mean(values)):
            yield f"its value {event.value} is not the mean of its scores"

    def _early_stop(self, event: AttemptFinished, attempt: Attempt) -> Iterator[str]:
        """A run that was stopped early is never kept, and its own curve must say why."""
        trainings = [run for run in attempt.runs if run.result.box == "train"]
        last = trainings[-1] if trainings else None
        if (event.verdict, event.reason) != (Verdict.DISCARDED, "stopped_early"):
            yield f"{event.verdict} ({event.reason}), and a training that was stopped early"
        if last is None or last.result.outcome is not Outcome.STOPPED:
            yield "its training was not stopped early"
            return
        try:
            due = self._due_stop(last)
        except LedgerError:
            return  # named where blobs are checked
        except ValueError:
            yield "a curve that it was stopped by is no curve"
            return
        if due is None or event.early_stop is None or not _equal(due, event.early_stop):
            yield "the curves on record do not say that it had to be stopped as it was"

    def _due_stop(self, run: RunFinished) -> EarlyStop | None:
        if self.settings is None or run.curve is None:
            return None
        seen = past(self.history, self._body, self.settings.budget)
        return None if seen is None else Rule(self.settings, seen)(unpacked(self._body(run.curve)))

    def _arithmetic(self, event: AttemptFinished, attempt: Attempt) -> Iterator[str]:
        values = list(attempt.values().values())
        best = self.history.best
        if best is None or not best.values() or not values or not self.repeats:
            yield "it was judged without scores of its own, of a best, or of repeats"
            return
        if self.settings is None:
            yield "it was judged without settings in force"
            return
        assert event.arithmetic is not None
        is_by_the_look = event.arithmetic.confidence_of_a_look is not None
        judgement = self._judge(attempt, best, self.settings, is_by_the_look=is_by_the_look)
        verdict = Verdict.KEPT if judgement.ruling is Ruling.KEEP else Verdict.DISCARDED
        if (verdict, judgement.reason) != (event.verdict, event.reason):
            yield (
                f"the verdict is {event.verdict} ({event.reason}); "
                f"the scores say {verdict} ({judgement.reason})"
            )
        right = _equal(judgement.arithmetic, event.arithmetic)
        if not right or not _same(event.value, _mean(values)):
            yield "its arithmetic is not what comes of the scores"

    def _judge(
        self, attempt: Attempt, best: Attempt, settings: Settings, *, is_by_the_look: bool
    ) -> Judgement:
        assert self.history.session is not None
        noise = settings.noise
        return judge(
            list(attempt.values().values()),
            list(best.values().values()),
            self._noise(attempt.number if is_by_the_look else None),
            direction=settings.goal.direction,
            confidence=noise.confidence,
            max_repeats=min(noise.max_repeats, len(self.history.session.seeds)),
            is_by_the_look=is_by_the_look,
        )

    def _noise(self, beside: int | None) -> Noise:
        """As `History.repeats_beside`, kept up to date; without a number of every repeat."""
        groups = self.repeats
        if beside is not None:
            baseline = self.history.baseline.number if self.history.baseline else None
            groups = {
                number: found
                for number, found in groups.items()
                if number != beside and (number == baseline or found.are_moved)
            }
        degrees = sum(found.degrees for found in groups.values())
        squares = math.fsum(found.squares for found in groups.values())
        return Noise(math.sqrt(squares / degrees) if degrees else 0.0, max(1, degrees))

    def _drift(self, event: DriftChecked) -> Iterator[str]:
        """A look at the machine: the best's recorded score, today's from the runs, the ruling."""
        if event.today:
            yield from self.runs.all_ended()
        if self.history.best is None or self.history.best.number != event.attempt:
            yield f"it is about attempt {event.attempt}, which was not the best"
        if self.history.attempt(event.attempt).values().get(event.seed) != event.recorded:
            yield f"{event.recorded} is not what counted as the score at seed {event.seed}"
        for purpose, value in zip(drift_purposes(event.check), event.today, strict=False):
            key = (purpose, event.attempt, event.seed)
            if self.runs.scores.get((key, "val")) != value:
                yield f"today's score {value} is not that of its runs"
        if self.settings is None or not self.repeats:
            yield "the machine was looked at without settings or noise"
            return
        tolerance = drift_tolerance(self._noise(None), self.settings.noise.confidence)
        if not _same(tolerance, event.tolerance):
            yield f"up to {event.tolerance:g} is noise, it says; the scores say {tolerance:g}"
        if event.changed != has_drifted(event.recorded, event.today, event.tolerance):
            yield "whether the machine changed is not what the scores say"

    # --- the researcher ---

    def _talk(
        self, event: ConversationOpened | MessageAdded | ToolCalled | ToolReturned
    ) -> Iterator[str]:
        match event:
            case ConversationOpened():
                self.conversations[event.conversation] = [event.system, event.tools]
            case MessageAdded():
                reply = self.replies.pop(event.conversation, event.message)
                if event.role == "assistant" and reply != event.message:
                    yield "the message is not the reply that the model gave"
                if event.conversation not in self.conversations:
                    yield f"conversation {event.conversation} was never opened"
                self.conversations.setdefault(event.conversation, []).append(event.message)
            case ToolCalled():
                self.called_tools[event.call_id] = event.name
            case ToolReturned():
                if self.called_tools.get(event.call_id) != event.name:
                    yield f"tool {event.name} answers a call that is not on record"

    def _call(self, event: ModelCalled) -> Iterator[str]:
        if event.reply is not None:
            self.replies[event.conversation] = event.reply
        said = self.conversations.get(event.conversation, [])
        if event.request is not None and event.request != request_sha(said):
            yield "what the model was asked is not the conversation on record"
        provider = self.settings.researcher.provider if self.settings else "anthropic"
        priced = cost_usd(event.model, event.usage, provider=provider)
        self.usage_usd += (event.cost_usd or 0.0) if priced is None else priced
        if priced is None or _same(priced, event.cost_usd):
            return
        told = "nothing" if event.cost_usd is None else f"${event.cost_usd:.6f}"
        yield (f"the call cost {told}; its usage comes to ${priced:.6f}{self._other_price_list()}")

    def _other_price_list(self) -> str:
        session = self.history.session
        then = (session.machine.get("packages") or {}).get("genai-prices") if session else None
        now = _price_list_version()
        return f" by today's price list {now}, then {then}" if then not in (None, now) else ""

    # --- the morning ---

    def _morning(self, event: Event) -> Iterator[str]:
        match event:
            case Noticed(kind=kind) if kind == HOLDOUT_MISSING:
                self.runs.forget_open()
            case ReviewStarted():
                self.runs.seeds |= frozenset(event.seeds)
            case LaterRun():
                yield from self.runs.look(event.run, event.purpose)
            case VariantPlanned():
                self.variants[event.review, event.variant] = event
            case VariantMeasured():
                yield from self._variant(event)
            case ReplayFinished():
                yield from self._replay(event)
            case HumanDecided():
                yield from self._decision(event)
            case _:
                pass

    def _variant(self, event: VariantMeasured) -> Iterator[str]:
        planned = self.variants.get((event.review, event.variant))
        if planned is None:
            yield f"variant {event.variant} was never planned"
            return
        key = (f"review-{event.review} {event.variant}", planned.attempt, event.seed)
        found = (self.runs.scores.get((key, "val")), self.runs.scores.get((key, "holdout")))
        if (event.value, event.holdout) != found:
            yield f"its scores are not those of the runs of {event.variant}"

    def _replay(self, event: ReplayFinished) -> Iterator[str]:
        recorded = self.history.attempt(event.attempt).values()
        for score in event.scores:
            key = (f"replay-{event.attempt}", event.attempt, score.seed)
            if score.today is not None and score.today != self.runs.scores.get((key, "val")):
                yield f"today's score at seed {score.seed} is not that of its runs"
            if score.recorded != recorded.get(score.seed):
                yield f"the recorded score at seed {score.seed} is not the one on record"
        apart = [
            abs(score.today - score.recorded)
            for score in event.scores
            if score.today is not None and score.recorded is not None
        ]
        if not _same(max(apart, default=None), event.largest_difference):
            yield "its largest difference is not that of its scores"
        if event.agrees and not event.is_comparable:
            yield "it agrees, and cannot be compared"
        if event.agrees and event.outcome != event.recorded_outcome:
            yield f"it agrees, and {event.recorded_outcome} is not {event.outcome}"

    def _decision(self, event: HumanDecided) -> Iterator[str]:
        if self.history.best is None or self.history.best.number != event.attempt:
            yield f"it is about attempt {event.attempt}, which was not the best"
            return
        due = [self.history.best.started.files]
        if event.variant != "best":
            planned = [v for (_, name), v in self.variants.items() if name == event.variant]
            due = [v.files for v in planned if v.files is not None]
        if event.files not in due:
            yield f"its files are not those of {event.variant}"
        if event.decision == "approve" and self.history.session and self.settings:
            folder = self.settings.workspace.path

            def as_patch(old: Files, new: Files) -> bytes:
                return patch(old, new, folder)

            began = self.history.session.files
            yield from self._shown(as_patch, event.patch, began, event.files)


def audit(directory: Path, entries: Sequence[Entry]) -> list[Difference]:
    """Every place where a verified ledger contradicts itself, its blobs or the prices.

    Args:
        directory: of the session.
        entries: as `read_ledger` returned them, so the chain is verified.
    """
    auditor = _Auditor(directory)
    found = [
        Difference(seq=entry.seq, what=what) for entry in entries for what in auditor.look(entry)
    ]
    return [*found, *auditor.at_the_end()]


def whole_audit(
    directory: Path, entries: Sequence[Entry], heard: Sequence[str] = ()
) -> list[Difference]:
    """What `audit` finds, what is torn off the end, and what others say.

    Args:
        directory: of the session.
        entries: as `read_ledger` returned them.
        heard: see `anchor.HeadCheck.differences`.
    """
    found = audit(directory, entries)
    if not entries:
        found.append(Difference(seq=None, what="the ledger is empty"))
    if torn := torn_bytes(directory):
        what = (
            f"{torn} bytes of a torn line follow; a session that is at work may be writing them, "
            "else nightlab resume sets them aside"
        )
        found.append(Difference(seq=len(entries), what=what))
    return [*found, *(Difference(seq=None, what=what) for what in heard)]


def named_blobs(event: Record) -> Iterator[str]:
    """SHA-256 of every blob that an event names."""
    if isinstance(event, LaterRun | SmokeRun):
        yield from named_blobs(event.run)
        return
    fields, tables = _blob_names(type(event))
    for name in fields:
        sha = getattr(event, name)
        if sha is not None:
            yield sha
    for name in tables:
        yield from (getattr(event, name) or {}).values()


@cache
def _blob_names(event: type[Record]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    names = event.model_fields.keys()
    return (
        tuple(name for name in BLOB_FIELDS if name in names),
        tuple(name for name in BLOB_TABLES if name in names),
    )


@lru_cache(maxsize=1)
def _price_list_version() -> str:
    return version("genai-prices")


def _changed_on_resume(before: Settings, after: Settings) -> Iterator[str]:
    for name in Settings.model_fields:
        if name not in MAY_CHANGE_ON_RESUME and getattr(before, name) != getattr(after, name):
            yield f"the resume changed [{name}], which decides what a verdict means"


def _is_backed(event: AttemptFinished, attempt: Attempt, history: History) -> bool:
    """Whether the runs or scores of an attempt say why it has no verdict by arithmetic."""
    reason, smoked = event.reason, attempt.smoke and attempt.smoke.finished
    if reason == BOX_LOST:
        tries = [a for a in history.attempts if a.started.files == attempt.started.files]
        lost = sum(one.interrupted is not None for one in tries)
        return event.verdict is Verdict.FAILED and lost >= TRIES - 1
    if smoked and not smoked.passed:
        return (event.verdict, reason) == (Verdict.FAILED, smoked.reason) and not attempt.runs
    if any(score.value is None and score.reason == reason for score in attempt.scores):
        return True
    trainings = [run for run in attempt.runs if run.result.box == "train"]
    if not trainings:
        return False
    last = trainings[-1]
    match reason:
        case "over_budget":
            return last.over_budget_seconds > 0
        case "disturbed":
            noisy = last.disturbance is not None and last.disturbance.disturbed
            return noisy or last.result.was_throttled
        case "no_checkpoint":
            return last.result.outcome is Outcome.OK and not last.result.output
        case _:
            return reason == last.result.outcome


def _equal(one: Arithmetic | EarlyStop, other: Arithmetic | EarlyStop) -> bool:
    """Equal but for the last digits, in which another machine's mathematics may differ."""
    return all(_close(getattr(one, name), getattr(other, name)) for name in type(one).model_fields)


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other if isinstance(one, str) else _same(one, other)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _same(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
