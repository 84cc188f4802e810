"""Checks a session's record against itself: blobs, order, decisions.

Every event is read with the history as it was before it. What was decided is decided again by the
night's own functions (`derive.py`); what must fit together is checked by the modules beside this
one. The audit does not know whether a run told the truth: that is what the boxes are for.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agent.attempt.decide import dethroned
from agent.candidate.diffs import patch, unified_diff
from agent.candidate.merge import Files
from agent.candidate.workspace import may_be_written
from agent.morning.blob_checks import BlobChecks
from agent.morning.derive import Decided, derive, differences, is_same
from agent.morning.file_checks import file_differences
from agent.morning.run_checks import RunChecks
from agent.morning.talk_checks import TalkChecks
from agent.night.budget import money_is_out, work_is_done
from agent.record.attempts import TrialKey
from agent.record.chain import LedgerError, torn_bytes
from agent.record.events import (
    ATTEMPT,
    DRIFT,
    SMOKE,
    AttemptFinished,
    AttemptInterrupted,
    AttemptStarted,
    DriftChecked,
    Entry,
    Event,
    FileChanged,
    HumanDecided,
    ModelAsked,
    ModelCalled,
    Noticed,
    ReviewStarted,
    RunFinished,
    RunStarted,
    Scored,
    SessionEnded,
    SessionResumed,
    SessionStarted,
    SmokeFinished,
    SmokeStarted,
    StopReason,
    VariantMeasured,
    VariantPlanned,
)
from agent.record.history import BOX_LOST, History
from agent.settings import Settings
from sandbox.contract.record import Record

MAY_CHANGE_ON_RESUME = ("session", "record", "researcher")
"""Sections of the settings that decide nothing about a verdict."""


COUNTED = (StopReason.ATTEMPTS, StopReason.FAILURES_IN_A_ROW, StopReason.DISCARDS_IN_A_ROW)
"""Ends that follow from counts."""


class Difference(Record):
    """Where the record contradicts itself."""

    seq: int | None
    """The event that it is about; None for what no event names."""
    what: str


@dataclass
class _Auditor:
    """Walks the ledger once, with the history as it was before each event."""

    directory: Path
    history: History = field(default_factory=History)
    last_call: int | None = None
    variants: dict[tuple[int, str], VariantPlanned] = field(default_factory=dict)
    """What reviews planned so far, by review and name."""

    def __post_init__(self) -> None:
        self.blobs = BlobChecks(self.directory)
        self.runs = RunChecks(self.history)
        self.talk = TalkChecks(self.history)

    def check(self, entry: Entry) -> Iterator[str]:
        """What is wrong with one event."""
        event = entry.event
        yield from self.blobs.check(event)
        history = self.history
        if not history.takes(event):
            yield f"{event.type} names an attempt that was never started"
            return
        if isinstance(event, AttemptFinished | AttemptInterrupted) and (
            not history.attempt(event.attempt).open
        ):
            yield "an attempt is closed for the second time"
        match event:
            case ModelCalled():
                self.last_call = entry.seq
            case ReviewStarted() | AttemptStarted():
                self.runs.seeds |= frozenset(event.seeds)
            case VariantPlanned():
                self.variants[event.review, event.variant] = event
            case _:
                pass
        yield from self._check(event)
        yield from self.talk.check(event)
        if isinstance(event, Decided):
            yield from self._decided(event)
        self.history.apply(entry)

    def at_the_end(self) -> Iterator[Difference]:
        """What is wrong with the record as a whole."""
        spent_usd, usage_usd = self.history.spend.usd, self.talk.usage_usd
        if not is_same(usage_usd, spent_usd):
            what = f"the session says ${spent_usd:.6f}; the usage of its calls comes to "
            yield Difference(seq=self.last_call, what=f"{what}${usage_usd:.6f}")
        yield from (Difference(seq=None, what=what) for what in self.blobs.unnamed())

    def _check(self, event: Event) -> Iterator[str]:
        match event:
            case SessionStarted() | SessionResumed():
                yield from self._begin(event)
            case AttemptStarted():
                yield from self._start(event)
            case RunStarted() | RunFinished() | Scored():
                yield from self.runs.check(event)
            case SmokeStarted():
                yield from self._smoke(event)
            case SmokeFinished() | AttemptFinished() | DriftChecked():
                yield from self._all_runs_ended(event)
            case AttemptInterrupted() | Noticed(kind="holdout_missing" | "baseline_not_retaken"):
                self.runs.forget_open(self._are_over(event))
            case SessionEnded():
                yield from self._end(event)
            case FileChanged():
                before, after = (
                    {} if sha is None else {event.path: sha} for sha in (event.before, event.after)
                )
                yield from self.blobs.shown(unified_diff, event.diff, before, after)
            case ModelAsked():
                yield from self._money(event)
            case VariantMeasured():
                yield from self._variant(event)
            case HumanDecided():
                yield from self._decision(event)
            case _:
                pass

    def _decided(self, event: Decided) -> Iterator[str]:
        """Decide it again, and compare."""
        if self.history.session is None:
            yield "it was decided before a session began"
            return
        try:
            due = derive(self.history, event, self.blobs.read)
        except LedgerError:
            return  # named where blobs are checked
        except ValueError as error:
            yield str(error)
            return
        assert due is not None
        yield from differences(event, due)

    def _all_runs_ended(
        self, event: SmokeFinished | AttemptFinished | DriftChecked
    ) -> Iterator[str]:
        """What is decided stands on whole runs; what the sandbox failed may have left some open."""
        is_lost = isinstance(event, AttemptFinished) and event.reason == BOX_LOST
        if is_lost or (isinstance(event, DriftChecked) and event.problem):
            self.runs.forget_open(self._are_over(event))
        yield from self.runs.all_ended(self._are_over(event))

    def _are_over(self, event: Event) -> Callable[[RunStarted], bool]:
        """Which runs must have ended, or broke off, with an event: others may go on beside it."""
        match event:
            case SmokeFinished():
                return lambda run: run.purpose == f"{SMOKE}{event.smoke}"
            case DriftChecked():
                return lambda run: run.purpose.startswith(DRIFT)
            case AttemptFinished() | AttemptInterrupted():
                return lambda run: self.runs.attempt_of(run) == event.attempt
            case SessionEnded():
                return lambda run: not self.runs.is_of_a_broken_smoke(run)
            case Noticed():
                return lambda run: run.purpose == ATTEMPT and self.runs.attempt_of(run) is None
            case _:
                return lambda _: True

    def _begin(self, event: SessionStarted | SessionResumed) -> Iterator[str]:
        self.runs.forget_open(self._are_over(event))
        before = self.history.settings
        if isinstance(event, SessionStarted):
            self.runs.seeds = frozenset(event.seeds)
        elif before is not None:
            for name in Settings.model_fields:
                is_equal = getattr(before, name) == getattr(event.settings, name)
                if name not in MAY_CHANGE_ON_RESUME and not is_equal:
                    yield f"the resume changed [{name}], which decides what a verdict means"

    def _start(self, event: AttemptStarted) -> Iterator[str]:
        history = self.history
        session = history.session.seeds if history.session else ()
        if event.kind == "baseline" and event.seeds != session:
            yield "the baseline's seeds are not the session's"
        elif event.kind == "candidate" and event.seeds[:1] != session[:1]:
            yield "its first seed is not the session's"
        if event.attempt != len(history.attempts):
            yield f"attempt {event.attempt} comes where {len(history.attempts)} was due"
        settings = history.settings
        if history.open:
            yield f"attempt {event.attempt} starts while the one before is open"
        done = len(history.completed) + len(history.open)
        if settings and event.kind == "candidate" and done >= settings.session.attempts:
            yield (
                f"attempt {event.attempt} starts although {settings.session.attempts} attempts are "
                "done, the limit"
            )
        yield from self._untouched(event)
        yield from self._still_best()
        best, parent = history.best.number if history.best else None, event.parent
        if parent != best:
            yield f"its parent is {parent}, the best was {best}"
        elif parent is not None:
            before = history.attempt(parent).started.files
            yield from self.blobs.shown(unified_diff, event.diff, before, event.files)

    def _end(self, event: SessionEnded) -> Iterator[str]:
        """Ends that follow from counts must be what the counts come to."""
        yield from self._still_best()
        if event.reason is not StopReason.SANDBOX_FAULT:
            yield from self.runs.all_ended(self._are_over(event))
        if self.history.settings is not None and event.reason in COUNTED:
            due = work_is_done(self.history, self.history.settings.session)
            if due is None or due[0] is not event.reason:
                yield f"it says that it ended for {event.reason.value}, and the record does not"

    def _still_best(self) -> Iterator[str]:
        """Whoever was refused is the best no more, before anything is built on it."""
        if (due := dethroned(self.history)) is not None:
            yield f"attempt {due.attempt} is the best, and was refused ({due.reason}) before"

    def _money(self, event: ModelAsked) -> Iterator[str]:
        settings = self.history.settings
        if settings is None:
            return
        if ending := money_is_out(self.history, settings.session.usd, event.reserve.usd):
            yield f"it was asked although {ending[1]}"
        proposes, worst = settings.researcher, event.reserve.usage
        if event.model not in (proposes.model, *proposes.then):
            yield f"{event.model} was asked, which the settings in force do not name"
        if worst is not None and worst.output_tokens > proposes.max_output_tokens:
            yield (
                f"its reply could have {worst.output_tokens} tokens, and the limit in force is "
                f"{proposes.max_output_tokens}"
            )

    def _untouched(self, event: AttemptStarted) -> Iterator[str]:
        """What nobody may write is in every candidate as it was when the session began."""
        if self.history.settings is None or self.history.session is None:
            return
        editable = self.history.settings.workspace.editable
        begun = self.history.session.files
        for name in sorted(event.files.keys() | begun.keys()):
            is_equal = event.files.get(name) == begun.get(name)
            if not is_equal and not may_be_written(name.split("/"), editable):
                yield f"its {name} is not the one that the session began with"

    def _smoke(self, event: SmokeStarted) -> Iterator[str]:
        history = self.history
        attempts, smokes = history.attempts, history.smokes
        is_ours = event.asked_by == "nightlab"
        due = [a.number for a in history.open] if is_ours else [len(attempts)]
        if event.smoke != len(smokes) or event.attempt not in due:
            yield f"smoke run {event.smoke} comes where another one was due"
        if is_ours and history.attempt(event.attempt).started.files != event.files:
            yield "its files are not those of the attempt"
        most = history.settings.economy.max_smokes if history.settings else 0
        if event.asked_by == "researcher" and history.smokes_in_a_row >= most:
            yield f"a smoke run more than the {most} that are allowed between two attempts"

    def _variant(self, event: VariantMeasured) -> Iterator[str]:
        planned = self.variants.get((event.review, event.variant))
        if planned is None:
            yield f"variant {event.variant} was never planned"
            return
        purpose = f"review-{event.review} {event.variant}"
        trial = self.history.trial(TrialKey(purpose, planned.attempt, event.seed))
        if (event.value, event.holdout) != (trial.value("val"), trial.value("holdout")):
            yield f"its scores are not those of the runs of {event.variant}"

    def _decision(self, event: HumanDecided) -> Iterator[str]:
        """It is about what stands, and its patch is what changed since the session began."""
        best, taken = self.history.best, self.history.attempt(event.attempt)
        refusal = self.history.refusals.of(event.attempt)
        if taken is not best and (
            event.decision == "reject" or not taken.kept or taken is self.history.baseline
        ):
            yield f"it is about attempt {event.attempt}, which was not the best"
            return
        if event.decision == "approve" and refusal is not None:
            yield f"it takes attempt {event.attempt}, which was refused ({refusal.reason})"
        due = [v.files for (_, name), v in self.variants.items() if name == event.variant]
        if event.files not in (due if event.variant != "best" else [taken.started.files]):
            yield f"its files are not those of {event.variant}"
        session, settings = self.history.session, self.history.settings
        if event.decision == "approve" and session is not None and settings is not None:
            folder = settings.workspace.path

            def as_patch(old: Files, new: Files) -> bytes:
                return patch(old, new, folder)

            yield from self.blobs.shown(as_patch, event.patch, session.files, event.files)


def audit(directory: Path, entries: Sequence[Entry], heard: Sequence[str] = ()) -> list[Difference]:
    """Every place where a ledger contradicts itself, its blobs, the prices or others (`heard`).

    The entries are those that `read_ledger` returned, so their chain is verified.
    """
    auditor = _Auditor(directory)
    found = [
        Difference(seq=entry.seq, what=what) for entry in entries for what in auditor.check(entry)
    ]
    found += auditor.at_the_end()
    beside = file_differences(directory, auditor.history, entries)
    heard = [*beside, *heard]
    if not entries:
        found.append(Difference(seq=None, what="the ledger is empty"))
    if torn := torn_bytes(directory):
        what = (
            f"{torn} bytes of a torn line follow; a session that is at work may be writing them, "
            "else nightlab resume sets them aside"
        )
        found.append(Difference(seq=len(entries), what=what))
    return [*found, *(Difference(seq=None, what=what) for what in heard)]
