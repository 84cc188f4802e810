"""What the ledger says, folded: attempts, best, noise, spend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby
from statistics import fmean
from typing import Any

from agent.record.events import (
    AFTERWARDS,
    AttemptFinished,
    AttemptInterrupted,
    AttemptStarted,
    ConversationOpened,
    DriftChecked,
    Entry,
    Event,
    HumanDecided,
    LaterRun,
    ModelAsked,
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
    VariantPlanned,
    Verdict,
)
from agent.settings import Direction
from agent.text import labelled
from sandbox.contract.run import Outcome

FIVE_DIGITS = 5e-6
"""What scores differ by that are equal to five digits."""
LOOK = "drift-"
"""How the purpose of every run of a look at the machine begins."""
NOT_JUDGED = frozenset({"disturbed"})
"""Reasons for a missing score that say nothing about the files."""
TRIES = 3
"""How often the same files are tried while the sandbox fails."""
HOLDOUT_MISSING = "holdout_missing"
"""The notice of a try in vain to score a session's end on holdout."""
BOX_LOST = "box_lost"
"""Why a candidate failed whose boxes were lost again and again."""
WAITS = frozenset({"engine_away", "gpu_awaited"})
"""Kinds of notices that say what the session waits for until the next event."""
OF_AN_ATTEMPT = (RunStarted, RunFinished, Scored, AttemptFinished, AttemptInterrupted)


@dataclass
class Smoke:
    """One smoke run with everything that was recorded about it."""

    started: SmokeStarted
    runs: list[RunFinished] = field(default_factory=list)
    finished: SmokeFinished | None = None
    """None while it goes on, and when it was cut off."""

    def reason(self, *, answered: bool, is_reported: bool) -> str | None:
        """What its boxes showed to be wrong, as a verdict's reason.

        A training that ignores its budget is ended, which is no failure. A model box that said a
        word had loaded the checkpoint; that nobody then asked it anything may well end it badly.
        A program that reports its own score leaves no checkpoint.
        """
        for run in self.runs:
            outcome = run.result.outcome
            if run.result.box == "model":
                return None if outcome is Outcome.OK or answered else f"model_box_{outcome.value}"
            if outcome is Outcome.TIMED_OUT:
                return None
            if outcome is not Outcome.OK:
                return outcome.value
            if not run.result.output and not is_reported:
                return "no_checkpoint"
        return None


@dataclass
class Attempt:
    """One attempt with everything that was recorded about it."""

    started: AttemptStarted
    started_at: str
    runs: list[RunFinished] = field(default_factory=list)
    scores: list[Scored] = field(default_factory=list)
    """All that count: not those that an interrupted attempt asked of another one."""
    smoke: Smoke | None = None
    """The smoke run that came before its first training."""
    finished: AttemptFinished | None = None
    interrupted: AttemptInterrupted | None = None
    remeasured: dict[int, float] = field(default_factory=dict)
    """Scores on val from after the machine changed: they count instead of all before them."""
    counted_from: int = 0
    """How many scores there were when it was noticed that the machine had changed."""
    curves_from: int = 0
    """How many runs there were at that time: the curves of those are another machine's."""
    cost_usd: float = 0.0
    """What the model calls since the attempt before cost."""

    @property
    def number(self) -> int:
        return self.started.attempt

    @property
    def open(self) -> bool:
        return self.finished is None and self.interrupted is None

    @property
    def kept(self) -> bool:
        return self.finished is not None and self.finished.verdict is Verdict.KEPT

    @property
    def is_judged(self) -> bool:
        """Whether it has a verdict that its files are the reason for."""
        return self.finished is not None and self.finished.reason not in NOT_JUDGED

    @property
    def telling_runs(self) -> list[RunFinished]:
        """Its runs; of one that failed in its smoke run those, since there are no others."""
        return self.runs or (self.smoke.runs if self.smoke else [])

    def values(self, split: str = "val") -> dict[int, float]:
        """Valid scores by seed; none of an attempt that was interrupted."""
        if self.interrupted is not None:
            return {}
        begin, known = (self.counted_from, self.remeasured) if split == "val" else (0, {})
        scores = self.scores[begin:]
        return known | {s.seed: s.value for s in scores if s.split == split and s.value is not None}


@dataclass
class History:
    """The fold over one ledger. Read it, never write it: `apply` alone changes it."""

    session: SessionStarted | None = None
    started_at: str = ""
    researcher: str = ""
    """Who proposes, as named at the start or by a later resume."""
    is_newly_chosen: bool = False
    """Whether a resume named the researcher since the last conversation was opened."""
    last_at: str = ""
    attempts: list[Attempt] = field(default_factory=list)
    best: Attempt | None = None
    """The last kept attempt; the baseline until then."""
    smokes: list[Smoke] = field(default_factory=list)
    calls: int = 0
    spent_usd: float = 0.0
    unpriced_calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    active_seconds: float = 0.0
    """Time between events, without pauses and the gaps before a resume."""
    ended: SessionEnded | None = None
    resumes: int = 0
    moved: tuple[int, int] | None = None
    """The best when the session came to another machine, and how many runs it had by then."""
    looked_at_since: list[RunFinished] = field(default_factory=list)
    """Trainings of the looks at that other machine."""
    working_since: str = ""
    """When the session was started or last resumed."""
    asked: ModelAsked | None = None
    """The last call that was begun."""
    unanswered: ModelAsked | None = None
    """The same, while nothing on record tells how it ended."""
    drift_checks: list[DriftChecked] = field(default_factory=list)
    judged_since_check: int = 0
    """Candidates with a verdict since a look at the machine last had a result."""
    judged_since_look: int = 0
    """The same since the last look, be it in vain."""
    looks_in_vain: int = 0
    """Looks in a row, until now, that had no result."""
    is_on_another_machine: bool = False
    """Since a resume, until a look at the machine has a result."""
    conversation: int = 0
    """Number of the conversation that goes on; 0 before the first."""
    waits_for: str = ""
    """What the session waits for right now, in words."""
    is_paused: bool = False
    """Whether the person asked for a pause that goes on."""
    _machine: dict[str, Any] = field(default_factory=dict)
    _cost_since_attempt: float = 0.0
    _scored_meanwhile: list[Attempt] = field(default_factory=list)
    """Whose scores came while another attempt was open, one entry each."""
    _repeated: set[int] = field(default_factory=set)
    """Numbers of attempts that were scored more than once."""

    def apply(self, entry: Entry) -> None:
        """Take one more event into account."""
        event = entry.event
        if isinstance(event, AFTERWARDS):
            self._see(event)
            return
        self._pass_time(entry)
        match event:
            case SessionStarted() | SessionResumed():
                self._begin(event, entry.at)
            case AttemptStarted():
                attempt = Attempt(event, entry.at, cost_usd=self._cost_since_attempt)
                self._cost_since_attempt = 0.0
                self.attempts.append(attempt)
                self._scored_meanwhile = []
            case RunFinished():
                self.attempt(event.attempt).runs.append(event)
            case SmokeStarted() | SmokeRun() | SmokeFinished():
                self._smoke(event)
            case Scored():
                self._score(event)
            case AttemptFinished():
                self._finish(event)
            case AttemptInterrupted():
                self._interrupt(event)
            case DriftChecked():
                self._drift(event)
            case ConversationOpened() | ModelCalled():
                self._talk(event)
            case SessionEnded():
                self.ended = event
            case _:
                pass

    def takes(self, event: Event) -> bool:
        """Whether the event can be applied: what belongs to an attempt needs that attempt."""
        if isinstance(event, SmokeRun | SmokeFinished) and event.smoke >= len(self.smokes):
            return False
        return all(self._find(number) is not None for number in _attempts_named(event))

    def attempt(self, number: int) -> Attempt:
        """The attempt of that number.

        Raises:
            KeyError: there is none.
        """
        found = self._find(number)
        if found is None:
            raise KeyError(number)
        return found

    @property
    def baseline(self) -> Attempt | None:
        """The measured baseline, if there is one."""
        for attempt in self.attempts:
            if attempt.started.kind == "baseline" and attempt.kept:
                return attempt
        return None

    @property
    def cores(self) -> int:
        """Processor cores of the machine that the session is on; 0 where nobody wrote it down."""
        cores = self._machine.get("cores")
        return cores if isinstance(cores, int) else 0

    @property
    def is_self_reported(self) -> bool:
        """Whether every score is the program's own word, and nobody checked it."""
        goal = self.session.settings.get("goal") if self.session else None
        return isinstance(goal, dict) and goal.get("source") == "reported"

    @property
    def candidates(self) -> list[Attempt]:
        """Attempts that came from a researcher, in order."""
        return [a for a in self.attempts if a.started.kind == "candidate"]

    @property
    def completed(self) -> list[Attempt]:
        """Candidates that got a verdict."""
        return [a for a in self.candidates if a.finished is not None]

    @property
    def failures_in_a_row(self) -> int:
        """Failed or invalid attempts since the last one that was measured."""
        count = 0
        for attempt in reversed(self.completed):
            assert attempt.finished is not None
            if attempt.finished.verdict not in (Verdict.FAILED, Verdict.INVALID):
                break
            count += 1
        return count

    @property
    def discards_in_a_row(self) -> int:
        """Attempts since the last one that was kept."""
        completed = self.completed
        return next((n for n, a in enumerate(reversed(completed)) if a.kept), len(completed))

    @property
    def smokes_in_a_row(self) -> int:
        """Smoke runs that the researcher asked for since the last attempt.

        One that the sandbox failed counts once it was tried so often that it was given up.
        """
        due = (len(self.attempts), "researcher")
        mine = [s for s in self.smokes if (s.started.attempt, s.started.asked_by) == due]
        broken = [smoke.started.files for smoke in mine if smoke.finished is None]
        tries = [sum(1 for _ in group) for _, group in groupby(broken)]
        return len(mine) - len(broken) + sum(count // TRIES for count in tries)

    def find_smoke(self, files: dict[str, str]) -> Smoke | None:
        """The finished smoke run of files, by their hashes; the last if there are several."""
        done = (s for s in reversed(self.smokes) if s.finished is not None)
        return next((smoke for smoke in done if smoke.started.files == files), None)

    def repeats(self) -> list[list[float]]:
        """Scores on val, one group per attempt: what noise is estimated from."""
        groups = [list(self.attempt(n).values().values()) for n in sorted(self._repeated)]
        return [group for group in groups if len(group) > 1]

    def repeats_beside(self, number: int) -> list[list[float]]:
        """What noise an attempt is judged by: groups of repeats that it could not make small.

        A file that pins its seed has equal scores whatever the host's seeds are. So an attempt's
        own repeats do not count for it, and nobody's do, the baseline aside, that are all equal.
        """
        groups = [(n, list(self.attempt(n).values().values())) for n in sorted(self._repeated)]
        baseline = self.baseline.number if self.baseline else None
        return [
            group
            for n, group in groups
            if n != number and len(group) > 1 and (n == baseline or are_moved(group))
        ]

    def count(self, verdict: Verdict) -> int:
        """How many candidates got that verdict."""
        return sum(
            1 for a in self.completed if a.finished is not None and a.finished.verdict is verdict
        )

    def _find(self, number: int) -> Attempt | None:
        if 0 <= number < len(self.attempts) and self.attempts[number].number == number:
            return self.attempts[number]
        return next((a for a in reversed(self.attempts) if a.number == number), None)

    def _pass_time(self, entry: Entry) -> None:
        if self.last_at and self.ended is None and not _ends_a_pause(entry.event):
            self.active_seconds += max(0.0, _seconds_between(self.last_at, entry.at))
        self.last_at = entry.at
        if isinstance(entry.event, Noticed):
            self._notice(entry.event)
        else:
            self.waits_for = ""
        if isinstance(entry.event, ModelAsked):
            self.asked = self.unanswered = entry.event
        elif not isinstance(entry.event, SessionResumed):  # written before the call is charged
            self.unanswered = None

    def _notice(self, event: Noticed) -> None:
        if event.kind in ("paused", "continued"):
            self.is_paused = event.kind == "paused"
        else:
            self.waits_for = event.explanation if event.kind in WAITS else ""

    def _score(self, event: Scored) -> None:
        attempt = self.attempt(event.attempt)
        attempt.scores.append(event)
        if len(attempt.scores) > 1:
            self._repeated.add(attempt.number)
        if attempt is not self.attempts[-1] and self.attempts[-1].open:
            self._scored_meanwhile.append(attempt)

    def _smoke(self, event: SmokeStarted | SmokeRun | SmokeFinished) -> None:
        match event:
            case SmokeStarted():
                smoke = Smoke(event)
                self.smokes.append(smoke)
                if event.asked_by == "nightlab":
                    self.attempt(event.attempt).smoke = smoke
            case SmokeRun(run=RunFinished() as run):
                self.smokes[event.smoke].runs.append(run)
            case SmokeFinished():
                self.smokes[event.smoke].finished = event
            case _:
                pass

    def _interrupt(self, event: AttemptInterrupted) -> None:
        """Forget what the attempt measured, so that its next try is judged as if it were the first.

        A close call also measures the best again; one score more would change the arithmetic.
        """
        self.attempt(event.attempt).interrupted = event
        for attempt in self._scored_meanwhile:
            attempt.scores.pop()
        self._scored_meanwhile = []

    def _finish(self, event: AttemptFinished) -> None:
        attempt = self.attempt(event.attempt)
        attempt.finished = event
        self.judged_since_check += attempt.started.kind == "candidate"
        self.judged_since_look += attempt.started.kind == "candidate"
        if event.verdict is Verdict.KEPT:
            self.best = attempt

    def _begin(self, event: SessionStarted | SessionResumed, at: str) -> None:
        self.working_since, self.is_paused = at, False
        if isinstance(event, SessionStarted):
            self.session, self.started_at = event, at
            self.researcher = event.researcher
        else:
            self.ended, self.resumes = None, self.resumes + 1
            self.researcher = event.researcher or self.researcher
            self.is_newly_chosen |= event.researcher is not None
            if _is_another(self._machine, event.machine):
                self.is_on_another_machine, self.looks_in_vain = True, 0
                self.moved = None if self.best is None else (self.best.number, len(self.best.runs))
                self.looked_at_since = []
        self._machine = event.machine or self._machine

    def _drift(self, event: DriftChecked) -> None:
        self.drift_checks.append(event)
        self.judged_since_look = 0
        if not event.today:
            self.looks_in_vain += 1
            return
        self.judged_since_check, self.looks_in_vain, self.is_on_another_machine = 0, 0, False
        if event.changed:
            best = self.attempt(event.attempt)
            best.remeasured = {event.seed: fmean(event.today)}
            best.counted_from, best.curves_from = len(best.scores), len(best.runs)

    def _see(self, event: Event) -> None:
        """What a look's trainings say of a machine's speed; their scores are in its result."""
        if self.moved is None or not isinstance(event, LaterRun):
            return
        run = event.run
        if event.purpose.startswith(LOOK) and isinstance(run, RunFinished):
            self.looked_at_since += [run] if run.result.box == "train" else []

    def _talk(self, event: ConversationOpened | ModelCalled) -> None:
        if isinstance(event, ConversationOpened):
            self.conversation, self.is_newly_chosen = event.conversation, False
            return
        self.calls += 1
        self.input_tokens += (
            event.usage.input_tokens
            + event.usage.cache_read_tokens
            + event.usage.cache_write_tokens
        )
        self.output_tokens += event.usage.output_tokens
        if event.cost_usd is None:
            self.unpriced_calls += 1
        else:
            self.spent_usd += event.cost_usd
            self._cost_since_attempt += event.cost_usd


def are_moved(scores: Sequence[float]) -> bool:
    """Whether a seed makes any difference to a file's scores: not to one that pins its own."""
    return max(scores) - min(scores) >= FIVE_DIGITS


def fold(entries: Iterable[Entry]) -> History:
    """The history that `entries` tell, oldest first."""
    history = History()
    for entry in entries:
        history.apply(entry)
    return history


def gain(direction: Direction, candidate: float, reference: float) -> float:
    """How much better `candidate` is; positive when better, whatever the direction."""
    return reference - candidate if direction == "minimize" else candidate - reference


def _attempts_named(event: Event) -> tuple[int, ...]:
    """The attempts that must be on record before the event can be."""
    match event:
        case LaterRun():
            return (event.run.attempt,)
        case ReviewStarted():
            return (event.baseline, event.best)
        case SmokeStarted(asked_by="nightlab"):
            return (event.attempt,)
        case DriftChecked() | VariantPlanned() | ReplayFinished() | HumanDecided():
            return (event.attempt,)
        case _:
            return (event.attempt,) if isinstance(event, OF_AN_ATTEMPT) else ()


def _is_another(machine: dict[str, Any], now: dict[str, Any] | None) -> bool:
    """Whether a session goes on elsewhere, as far as both records tell."""
    return now is not None and any(
        machine.get(fact) is not None and machine[fact] != now.get(fact)
        for fact in ("cpu", "cores", "memory_bytes", "kernel")
    )


def _ends_a_pause(event: Event) -> bool:
    return isinstance(event, SessionResumed) or (
        isinstance(event, Noticed) and event.kind == "continued"
    )


def _seconds_between(earlier: str, later: str) -> float:
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()


def direction_of(history: History) -> Direction:
    """Which way is better; `minimize` until a session says otherwise."""
    stated = section_of(history.session, "goal").get("direction")
    return "maximize" if stated == "maximize" else "minimize"


def metric_of(history: History) -> str:
    """The name of what is measured."""
    return str(section_of(history.session, "goal").get("metric", "val_bpb"))


def label_of(history: History) -> str:
    """The same for a reader: it says whose word it is where nobody checked it."""
    return labelled(metric_of(history), is_self_reported=history.is_self_reported)


def section_of(session: SessionStarted | None, section: str) -> dict[str, Any]:
    """The settings of one section as the session began; empty when there are none."""
    found = session.settings.get(section) if session else None
    return found if isinstance(found, dict) else {}
