"""What the ledger says, folded: attempts, best, noise, usage, drift."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby, takewhile
from statistics import fmean

from agent.record.attempts import NO_HONEST_MODELS, Attempt, Refusals, Smoke, TrialKey, TrialRecord
from agent.record.drift import Drift
from agent.record.events import (
    ATTEMPT,
    DRIFT,
    SMOKE,
    AttemptFinished,
    AttemptInterrupted,
    AttemptStarted,
    ConversationOpened,
    Dethroned,
    DriftChecked,
    Entry,
    Event,
    HumanDecided,
    LiteralsRead,
    ReplayFinished,
    ReviewFinished,
    ReviewStarted,
    RunFinished,
    RunStarted,
    Scored,
    SessionEnded,
    SessionResumed,
    SessionStarted,
    SmokeFinished,
    SmokeStarted,
    VariantMeasured,
    VariantPlanned,
    Verdict,
)
from agent.record.repeats import Repeats
from agent.record.usage import Spend, WorkingTime
from agent.settings import Direction, Settings
from sandbox.contract.errors import UsageError

TRIES = 3
"""How often the same files are tried while the sandbox fails."""
HOLDOUT_MISSING = "holdout_missing"
"""The notice of a try in vain to score a session's end on holdout."""
NOT_RETAKEN = "baseline_not_retaken"
"""The notice of a try in vain to measure the baseline again on a quiet machine."""
BOX_LOST = "box_lost"
"""Why a candidate failed whose boxes were lost again and again."""
OF_A_TRIAL = (RunStarted, RunFinished, Scored)
OF_AN_ATTEMPT = (*OF_A_TRIAL, LiteralsRead, AttemptFinished, AttemptInterrupted)
OF_THE_MORNING = (
    *(ReviewStarted, VariantPlanned, VariantMeasured, ReviewFinished),
    *(ReplayFinished, HumanDecided),
)


@dataclass
class Tried:
    """The attempts of a session: all, those that are open, those that have a verdict."""

    attempts: list[Attempt] = field(default_factory=list)
    open: list[Attempt] = field(default_factory=list)
    """Those that go on: one for each researcher at most."""
    tests: list[Attempt] = field(default_factory=list)
    """Candidates with a score at a fresh seed, in the order in which they got the first."""
    completed: list[Attempt] = field(default_factory=list)
    """Candidates that got a verdict, in the order in which they got it."""

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
        return next((a for a in self.attempts if a.was_kept and a.started.kind == "baseline"), None)

    def asker(self, attempt: int, seed: int) -> Attempt | None:
        """The open attempt that a trial of an attempt's files is for: that one, or one that tests.

        Fresh seeds are an attempt's alone, so they say which one has the best measured beside it.
        """
        mine = (a for a in self.open if a.number == attempt or seed in a.started.seeds[1:])
        return next(mine, None)

    def tests_before(self, attempt: Attempt) -> int:
        """How many tests of the night began before an attempt's own; of none of its own, all."""
        return sum(1 for _ in takewhile(lambda other: other is not attempt, self.tests))

    @property
    def standing(self) -> list[Attempt]:
        """The attempts that were kept and still stand, in the order in which they were kept."""
        baseline = [] if self.baseline is None else [self.baseline]
        return [attempt for attempt in (*baseline, *self.completed) if attempt.kept]

    def _find(self, number: int) -> Attempt | None:
        if 0 <= number < len(self.attempts) and self.attempts[number].number == number:
            return self.attempts[number]
        return next((a for a in reversed(self.attempts) if a.number == number), None)


@dataclass
class History(Tried):
    """The fold over one ledger. Read it, never write it: `apply` alone changes it."""

    session: SessionStarted | None = None
    settings: Settings | None = None
    """Those in force: of the start, or of the last resume."""
    researcher: str = ""
    """Who proposes, as named at the start or by a later resume."""
    is_newly_chosen: bool = False
    """Whether a resume named the researcher since the last conversation was opened."""
    conversation: int = 0
    """Number of the conversation that goes on; 0 before the first."""
    resumes: int = 0
    ended: SessionEnded | None = None
    best: Attempt | None = None
    """The last kept attempt that was not dethroned; the baseline until then."""
    refusals: Refusals = field(default_factory=Refusals)
    smokes: list[Smoke] = field(default_factory=list)
    trials: dict[TrialKey, TrialRecord] = field(default_factory=dict)
    """Every training with its scoring, whatever it was for."""
    repeats: Repeats = field(default_factory=Repeats)
    time: WorkingTime = field(default_factory=WorkingTime)
    spend: Spend = field(default_factory=Spend)
    drift: Drift = field(default_factory=Drift)

    def apply(self, entry: Entry) -> None:
        """Take one more event into account."""
        event = entry.event
        if isinstance(event, OF_A_TRIAL):
            self._measure(event)
        if not is_of_the_night(event):
            return
        self.time.apply(entry)
        self.spend.apply(event)
        match event:
            case SessionStarted() | SessionResumed():
                self._begin(event)
            case AttemptStarted():
                cost_usd = self.spend.take_since_attempt_usd()
                self.attempts.append(Attempt(event, entry.at, cost_usd=cost_usd))
                self.open.append(self.attempts[-1])
            case LiteralsRead() | SmokeStarted() | SmokeFinished():
                self._look_at(event)
            case AttemptFinished():
                self._finish(event)
            case AttemptInterrupted():
                self._interrupt(event)
            case DriftChecked():
                self._drift(event)
            case Dethroned():
                self._dethrone(event)
            case ConversationOpened():
                self.conversation, self.is_newly_chosen = event.conversation, False
            case SessionEnded():
                self.ended = event

    def takes(self, event: Event) -> bool:
        """Whether the event can be applied: what belongs to an attempt needs that attempt."""
        if isinstance(event, SmokeFinished):
            return event.smoke < len(self.smokes)
        if isinstance(event, OF_A_TRIAL) and event.purpose.startswith(SMOKE):
            return int(event.purpose.removeprefix(SMOKE)) < len(self.smokes)
        return all(self._find(number) is not None for number in _attempts_named(event))

    def trial(self, key: TrialKey) -> TrialRecord:
        """What is on record of a trial; an empty record where it was never begun."""
        return self.trials.get(key) or TrialRecord()

    @property
    def in_force(self) -> Settings:
        """The settings in force.

        Raises:
            UsageError: nothing on record begins a session.
        """
        if self.settings is None:
            raise UsageError("the ledger names no settings", "start a new session")
        return self.settings

    @property
    def is_self_reported(self) -> bool:
        """Whether every score is the program's own word, and nobody checked it."""
        return self.settings is not None and self.settings.goal.is_reported

    @property
    def candidates(self) -> list[Attempt]:
        """Attempts that came from a researcher, in order."""
        return [a for a in self.attempts if a.started.kind == "candidate"]

    @property
    def failures_in_a_row(self) -> int:
        """Failed or invalid attempts since the last one that was measured."""
        bad = (Verdict.FAILED, Verdict.INVALID)
        verdicts = (a.finished.verdict for a in reversed(self.completed) if a.finished)
        return sum(1 for _ in takewhile(bad.__contains__, verdicts))

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

    def count(self, verdict: Verdict) -> int:
        """How many candidates got that verdict."""
        return sum(attempt.standing == verdict.value for attempt in self.completed)

    def _measure(self, event: RunStarted | RunFinished | Scored) -> None:
        key = TrialKey(event.purpose, event.attempt, event.seed)
        trial = self.trials.setdefault(key, TrialRecord())
        if isinstance(event, RunStarted):
            # A score begins with its scorer box: what ended before was a score's that a kill cut.
            if event.box != "model":
                trial.boxes_of_score = []
        elif isinstance(event, RunFinished):
            trial.add_run(event)
            self.drift.trained(event)
        elif isinstance(event, Scored):
            trial.add_score(event)
            own = self._find(event.attempt)
            is_baseline = own is not None and own.started.kind == "baseline"
            self.refusals.note(key, event, is_baseline=is_baseline)
        if event.purpose.startswith(SMOKE) and isinstance(event, RunFinished):
            self.smokes[int(event.purpose.removeprefix(SMOKE))].runs.append(event)
        elif event.purpose == ATTEMPT:
            self._count(self.attempt(event.attempt), key, event)

    def _count(
        self, attempt: Attempt, key: TrialKey, event: RunStarted | RunFinished | Scored
    ) -> None:
        asker = self.asker(key.attempt, key.seed)
        if asker is not None and asker is not attempt and key not in asker.beside:
            asker.beside.append(key)
        if isinstance(event, RunFinished):
            attempt.runs.append(event)
        elif isinstance(event, Scored):
            attempt.scores.append(event)
            is_new = event.value is not None and event.split == "val"
            if attempt.started.kind == "baseline" and is_new:
                training = self.trials[key].training
                noise = None if training is None else training.disturbance
                is_clean = noise is None or not noise.is_beside_others
                (attempt.provisional.discard if is_clean else attempt.provisional.add)(event.seed)
            if attempt.open and attempt.tested and attempt not in self.tests:
                self.tests.append(attempt)
            self.repeats.update(attempt)

    def _look_at(self, event: LiteralsRead | SmokeStarted | SmokeFinished) -> None:
        if isinstance(event, LiteralsRead):
            self.attempt(event.attempt).literals = event
        elif isinstance(event, SmokeFinished):
            self.smokes[event.smoke].finished = event
        else:
            self.smokes.append(Smoke(event))
            if event.asked_by == "nightlab":
                self.attempt(event.attempt).smoke = self.smokes[-1]

    def _interrupt(self, event: AttemptInterrupted) -> None:
        """Forget what the attempt measured, so that its next try is judged as if it were the first.

        A test also measures the best again; one score more would change the arithmetic.
        """
        attempt = self.attempt(event.attempt)
        attempt.interrupted = event
        self._close(attempt)
        self.tests = [test for test in self.tests if test is not attempt]
        self.repeats.update(attempt)
        for key in attempt.beside:
            gone = list(self.trials.pop(key).scores.values())
            other = self.attempt(key.attempt)
            other.scores = [score for score in other.scores if all(score is not g for g in gone)]
            other.provisional.discard(key.seed)
            self.repeats.update(other)

    def _close(self, attempt: Attempt) -> None:
        self.open = [other for other in self.open if other is not attempt]

    def _finish(self, event: AttemptFinished) -> None:
        attempt = self.attempt(event.attempt)
        attempt.finished = event
        self._close(attempt)
        if attempt.started.kind == "candidate":
            self.completed.append(attempt)
            self.drift.judged()
        if event.verdict is Verdict.KEPT:
            self.best = attempt

    def _dethrone(self, event: Dethroned) -> None:
        attempt = self.attempt(event.attempt)
        attempt.dethroned = event
        self.repeats.update(attempt)
        self.best = None if event.best is None else self.attempt(event.best)
        self.drift.dethroned(event.best)

    def _begin(self, event: SessionStarted | SessionResumed) -> None:
        self.settings = event.settings
        if isinstance(event, SessionStarted):
            self.session, self.researcher = event, event.researcher
            self.drift.machine = event.machine
            return
        self.ended, self.resumes = None, self.resumes + 1
        self.researcher = event.researcher or self.researcher
        self.is_newly_chosen |= event.researcher is not None
        self.drift.resume_on(event.machine, self.best)
        # A check that was broken off is made anew; what it had measured belongs to no result.
        self.trials = {k: v for k, v in self.trials.items() if not k.purpose.startswith(DRIFT)}

    def _drift(self, event: DriftChecked) -> None:
        since = self.drift.judged_since_result
        self.drift.checked(event)
        if event.changed:
            best = self.attempt(event.attempt)
            doubtful = [*(self.completed[-since:] if since else ()), *self.open]
            self.repeats.shift(best, [attempt.number for attempt in doubtful])
            best.remeasured = {event.seed: fmean(event.today)}
            best.counted_from, best.curves_from = len(best.scores), len(best.runs)
            self.repeats.update(best)


def refused_scores(history: History, researcher: str) -> int:
    """How many of a researcher's attempts were refused for what no honest model does.

    At once, or later as the best: whoever is dethroned passed once.
    """
    mine = (a for a in history.completed if a.started.researcher == researcher)
    ends = ((a.finished, a.dethroned) for a in mine)
    return sum(any(e and e.reason in NO_HONEST_MODELS for e in pair) for pair in ends)


def settled(history: History) -> list[Attempt]:
    """Attempts whose files are run no more: judged, or disturbed for the second time.

    Each time anew would be a free ticket for whoever can have its own runs called disturbed.
    """
    found, disturbed = [], list[dict[str, str]]()
    for attempt in history.attempts:
        if attempt.is_judged or (attempt.is_disturbed and attempt.started.files in disturbed):
            found.append(attempt)
        elif attempt.is_disturbed:
            disturbed.append(attempt.started.files)
    return found


def find_settled(history: History, files: dict[str, str]) -> Attempt | None:
    """The settled attempt whose files had these hashes, if there is one.

    What was stopped early is run once more, and whole.
    """
    whole = (attempt for attempt in settled(history) if not attempt.was_stopped)
    return next((attempt for attempt in whole if attempt.started.files == files), None)


def fold(entries: Iterable[Entry]) -> History:
    """The history that `entries` tell, oldest first."""
    history = History()
    for entry in entries:
        history.apply(entry)
    return history


def is_of_the_night(event: Event) -> bool:
    """Whether an event changes attempts, best and noise, or uses hours of the session.

    A review does neither, and nor does a check of the machine until its result is there; see
    docs/decisions/0005.
    """
    if isinstance(event, OF_A_TRIAL):
        return event.purpose == ATTEMPT or event.purpose.startswith(SMOKE)
    return not isinstance(event, OF_THE_MORNING)


def gain(direction: Direction, candidate: float, reference: float) -> float:
    """How much better `candidate` is; positive when better, whatever the direction."""
    return reference - candidate if direction == "minimize" else candidate - reference


def direction_of(history: History) -> Direction:
    """Which way is better; `minimize` until a session says otherwise."""
    return history.settings.goal.direction if history.settings else "minimize"


def metric_of(history: History) -> str:
    """The name of what is measured."""
    return history.settings.goal.metric if history.settings else "val_bpb"


def label_of(history: History) -> str:
    """The same for a reader: it says whose word it is where nobody checked it."""
    return history.settings.goal.label if history.settings else metric_of(history)


def _attempts_named(event: Event) -> tuple[int, ...]:
    """The attempts that must be on record before the event can be."""
    match event:
        case ReviewStarted():
            return (event.baseline, event.best)
        case SmokeStarted(asked_by="nightlab"):
            return (event.attempt,)
        case Dethroned():
            return (event.attempt,) if event.best is None else (event.attempt, event.best)
        case DriftChecked() | VariantPlanned() | ReplayFinished() | HumanDecided():
            return (event.attempt,)
        case _:
            return (event.attempt,) if isinstance(event, OF_AN_ATTEMPT) else ()
