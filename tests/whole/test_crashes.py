"""Killed at any moment, a night resumed is worth what an unbroken one is.

One unbroken night, its review, a replay and an approval are watched: before and after every event
that is written, and before every change of the session's directory, the directory is copied as a
kill would leave it. Each copy is then brought back and worked to its end, and compared.

"Equal" means: the same verdicts from the same files with the same arithmetic, the same best and
holdout scores. Money is held against the service's own account: every call whose end is on record
costs what the service billed, and a call that was cut off without a word is charged at its reserve.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from agent.attempt.lab import Lab
from agent.candidate.git import Git
from agent.morning.audit import audit
from agent.morning.export import Person, approve
from agent.morning.replay import replay
from agent.morning.review import review
from agent.night.waiting import ask_to_continue, ask_to_pause
from agent.record.chain import LEDGER_NAME, read_blob, read_ledger
from agent.record.events import (
    EVENT_TYPES,
    AttemptFinished,
    AttemptInterrupted,
    AttemptStarted,
    Entry,
    Event,
    HumanDecided,
    MessageAdded,
    ModelAsked,
    ModelCalled,
    ReplayFinished,
    ReviewFinished,
    SessionEnded,
    SessionResumed,
    StopReason,
    ToolCalled,
    ToolReturned,
)
from agent.record.history import fold
from agent.report.report import write_report
from tests.support.clock import Clock
from tests.support.labs import play, with_sleep
from tests.support.messages_server import (
    Cut,
    MessagesServer,
    Request,
    Status,
    Turn,
    say,
    text,
    thinking,
    tool,
)
from tests.support.minds import DETAILS, Mind, work_with_claude
from tests.support.nights import TOY, Crash, CrashingLedger, Place
from tests.support.sessions import verdicts_of

pytestmark = pytest.mark.slow

TRAIN = (TOY / "workspace" / "train.py").read_text()
PERSON = Person("Somebody", "somebody@example.org")
CALL_SECONDS = 15.0
RANDOM_KILLS = 200
KILLS_A_NIGHT = 8
ATTEMPTS = {("tpe", False): 3, ("tpe", True): 5, ("claude", False): 9, ("claude", True): 9}
"""Most attempts of a short and of a long night; claude says itself when it has enough."""
ELSEWHERE = frozenset({"drift_checked", "dethroned"})
"""What these nights do not come to; `test_drift.py` and `test_dethroned.py` have it."""
AFTER_A_KILL = frozenset({"session_resumed", "attempt_interrupted"})
SIDE_EFFECTS = frozenset(
    {
        *("open blobs", "os.rename blobs", "os.mkdir blobs"),
        *("open workspace file", "os.rename workspace file"),
        *("os.mkdir boxes", "os.rmdir boxes", "os.mkdir checkpoints"),
        *("os.rename boxes", "os.rmdir checkpoints"),
        *("open .report.html", "os.rename .report.html", "os.rename .progress.png"),
        *("os.mkdir approved", "open approved", "os.mkdir review"),
    }
)
"""What a night changes beside its ledger; there may be more."""
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.link")


@dataclass
class Stage:
    """A session at work somewhere, and the service that it talks to."""

    place: Place
    researcher: str
    server: MessagesServer
    reports: bool = False
    lab: Lab | None = None

    def live(self, crash_at: int | None = None, *, after_writing: bool = True) -> None:
        """One life of our process: what is left of the night, or else of the morning."""
        if not self.place.directory.exists():
            self.lab = self.place.begin(self.researcher)
            assert isinstance(self.lab.ledger, CrashingLedger)
            self.lab.ledger.crash_at = crash_at
        elif any(isinstance(e.event, SessionEnded) for e in read_ledger(self.place.directory)):
            self.lab = self.place.open(crash_at)
        else:
            self.lab = self.place.resume(crash_at)
        assert isinstance(self.lab.ledger, CrashingLedger)
        self.lab.ledger.crash_after_writing = after_writing
        with self.lab.ledger:
            if self.lab.ledger.history.ended is None:
                self._night(self.lab)
            else:
                _morning(self.lab)

    def _night(self, lab: Lab) -> None:
        environ = {"ANTHROPIC_API_KEY": "not-a-real-key", "ANTHROPIC_BASE_URL": self.server.url}

        def refresh() -> None:
            if self.reports:
                write_report(lab.worker.directory, lab.ledger.entries, lab.ledger.get_blob)

        play(
            lab,
            self.place.program,
            self.researcher,
            environ,
            refresh=refresh,
            clock=self.place.clock.monotonic,
        )


def _morning(lab: Lab) -> None:
    done = {type(entry.event) for entry in lab.ledger.entries}
    if ReviewFinished not in done:
        review(lab, 1, lambda _: None)
    if ReplayFinished not in done:
        assert lab.ledger.history.best is not None
        replay(lab, lab.ledger.history.best.number, lambda _: None)
    if HumanDecided not in done:
        approve(lab.ledger, PERSON, "it is good", Git(lab.worker.directory, {}))


# ---- the researcher and what goes wrong on the way to it --------------------------------------


@dataclass
class Service:
    """Answers whoever is on stage; the idea follows from the verdicts, the weather from the count.

    So a night that is cut and goes on has the same ideas as one that is not.
    """

    long: bool
    stage: Stage | None = None

    def script(self) -> Iterator[Any]:
        for call in itertools.count():
            if call % 7 == 2:
                yield Status(529, "overloaded_error")
            if call % 13 == 4:
                yield self._cut
            elif call % 13 == 6:
                yield Turn((text("I"),), "refusal", DETAILS)
            elif call % 13 == 9:
                yield say(text("Shall I go on?"))
            else:
                yield self._answered

    def _cut(self, request: Request) -> Turn:
        return Turn(self._answered(request).blocks, cut=Cut(5, "reset"))

    def _answered(self, request: Request) -> Turn:
        assert self.stage is not None
        assert self.stage.lab is not None
        self.stage.place.clock.advance(CALL_SECONDS)
        judged = len(self.stage.lab.ledger.history.completed)
        return idea(judged, self.stage.place.directory, long=self.long)


def idea(judged: int, directory: Path, *, long: bool) -> Turn:
    """What the researcher does once so many attempts are judged."""
    match judged:
        case 0:
            ask_to_pause(directory)
            return _try(2.9, 16, tool("suggest"), tool("read", file_path="train.py"))
        case 1:
            return _try(2.90017, 16, tool("history"), smoke=True)  # too close to call
        case 2:
            return say(thinking("The sampler may know."), tool("sweep", attempts=1, knobs=["X"]))
        case 3 if long:
            return _try(4.9, 8)  # runs out of memory
        case 4 if long:
            return _try(2.99, 16)
        case 5 if long:
            return _try(0.6, 4)  # can no longer win after half of its training
        case _:
            return say(text("Enough."), tool("finish", reason="nothing is left"))


def _try(x: float, y: int, *first: dict[str, Any], smoke: bool = False) -> Turn:
    source = "# rewritten\n" * smoke + TRAIN.replace("X = 1.0 ", f"X = {x} ").replace(
        "Y = 4 ", f"Y = {y} "
    )
    write = tool("write", file_path="train.py", content=source)
    words = {"hypothesis": f"the point at {x}, {y}"}
    runs = [*([tool("run", **words, smoke=True)] if smoke else []), tool("run", **words)]
    return say(thinking("Where next?"), *first, write, *runs)


# ---- what a kill would leave -----------------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    """A session's directory as it was at one moment, and what the world outside knew then."""

    moment: str
    directory: Path
    events: int
    seconds: float
    bills: int
    asked: int | None
    """Where in the ledger the call stands that was begun and of whose end nothing is on record."""


@dataclass
class Witness:
    """Copies the directory of the session on stage at chosen moments.

    Those are every event, and the first and the last change of each kind; of a rehearsal, which
    tells which change is the last, nothing is copied.
    """

    stage: Stage
    root: Path
    rehearsed: Counter[str] | None = None
    """How often each kind of change comes; None while that is found out."""
    kills: list[Kill] = field(default_factory=list)
    changes: Counter[str] = field(default_factory=Counter)
    """Of the directory, until now."""
    _last: tuple[int, int] = (-1, -1)
    _is_copying: bool = False
    _lock: threading.RLock = field(default_factory=threading.RLock)
    """Boxes work in threads of their own, and each change is seen whole."""

    def see_event(self, event: Event) -> None:
        """Before and after each write of an event; what is before one was seen after another."""
        with self._lock:
            if self.stage.lab is not None and len(self.stage.lab.ledger.entries) != self._last[0]:
                self._copy(f"event {event.type}")

    def see_change(self, place: str) -> None:
        """Before a change of a file or directory."""
        with self._lock:
            if self._is_copying:
                return
            self.changes[place] += 1
            if self.rehearsed and self.changes[place] in (1, self.rehearsed[place]):
                self._copy(place)

    def _copy(self, moment: str) -> None:
        lab = self.stage.lab
        if lab is None or self.rehearsed is None:
            return
        now = (len(lab.ledger.entries), self.changes.total())
        if now == self._last:
            return
        self._last, self._is_copying = now, True
        try:
            target = self.root / f"{len(self.kills)}" / "night"
            shutil.copytree(self.stage.place.directory, target, copy_function=_copy_or_link)
        finally:
            self._is_copying = False
        asked = _open_call(lab.ledger.entries)
        seconds, bills = self.stage.place.clock.seconds, len(self.stage.server.bills)
        self.kills.append(Kill(moment, target, now[0], seconds, bills, asked))


def _copy_or_link(source: str, target: str) -> None:
    """Blobs never change, so a second name is a copy; workspaces refuse second names."""
    os.link(source, target) if "/blobs/" in source else shutil.copyfile(source, target)


class Watched:
    """Where the interpreter tells of changes of files; a hook cannot be taken away again."""

    root: str | None = None
    tell: Callable[[str], None] = staticmethod(lambda _: None)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if Watched.root is None:
        return
    if event == "open":
        path, _, flags = arguments
        if not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
    elif event in CHANGES:
        path = arguments[0]
    else:
        return
    if not isinstance(path, str | os.PathLike):
        return
    name = os.fspath(path)
    if isinstance(name, str) and (name.startswith(Watched.root) or not name.startswith("/")):
        Watched.tell(f"{event} {_kind_of(name)}")


def _kind_of(name: str) -> str:
    """The part of a session's directory, without names that are made by chance."""
    assert Watched.root is not None
    if not name.startswith(Watched.root):
        return "workspace file"  # opened relative to the workspace's descriptor
    first = name.removeprefix(Watched.root).strip("/").split("/")[0]
    return first.split(".tmp")[0].rsplit(".", 1)[0] if first.endswith(".tmp") else first


sys.addaudithook(_hook)


@contextmanager
def watched(stage: Stage, root: Path, rehearsed: Counter[str] | None = None) -> Iterator[Witness]:
    """Everything that `stage` writes is seen by the witness."""
    witness = Witness(stage, root, rehearsed)
    Watched.root, Watched.tell = f"{stage.place.directory}", witness.see_change
    CrashingLedger.witness = staticmethod(witness.see_event)
    try:
        yield witness
    finally:
        Watched.root = None
        CrashingLedger.witness = staticmethod(lambda _: None)


# ---- what must be true afterwards --------------------------------------------------------------


@dataclass(frozen=True)
class Twin:
    """The unbroken night and its kills."""

    stage: Stage
    service: Service
    kills: list[Kill]
    entries: list[Entry]

    def carry_on(self, kill: Kill) -> None:
        """Bring what a kill left back, work to the end, and hold it against the twin."""
        stage = self._stage_after(kill)
        before = len(self.stage.server.bills)
        stage.live()
        bills = [*range(1, kill.bills + 1), *range(before + 1, len(self.stage.server.bills) + 1)]
        _check(stage, self, bills, set() if kill.asked is None else {kill.asked})

    def _stage_after(self, kill: Kill) -> Stage:
        attempts = ATTEMPTS[self.stage.researcher, self.service.long]
        place = _place(kill.directory.parent, Clock(kill.seconds), attempts)
        stage = Stage(place, self.stage.researcher, self.stage.server)
        self.service.stage = stage
        return stage


def _place(root: Path, clock: Clock, attempts: int) -> Place:
    def sleep(seconds: float) -> None:
        clock.advance(seconds)
        ask_to_continue(root / "night")

    session = {"attempts": attempts, "hours": 10.0, "max_failures_in_a_row": 10}
    place = Place(root, clock, {"session": session}, sleep=sleep)
    place.boxes.shows_progress = True  # so that a training can be stopped early
    return place


def _check(stage: Stage, twin: Twin, bills: list[int], open_calls: set[int]) -> None:
    directory = stage.place.directory
    entries = read_ledger(directory)
    assert [] == audit(directory, entries)
    assert verdicts_of(twin.entries) == verdicts_of(entries)
    assert _best(twin.entries) == _best(entries)
    assert _end(twin.entries) == _end(entries)
    if any(isinstance(entry.event, HumanDecided) for entry in entries):
        assert _morning_of(twin.entries) == _morning_of(entries)
    _check_attempts(entries)
    _check_tool_calls(directory, entries)
    _check_money(stage, entries, bills, len(open_calls))
    _check_files(stage, entries)
    assert fold(entries).time.active_seconds <= stage.place.clock.seconds


def _best(entries: list[Entry]) -> Any:
    best = fold(entries).best
    assert best is not None
    assert best.finished is not None
    return best.started.files, best.finished.value, best.values("holdout")


def _end(entries: list[Entry]) -> list[SessionEnded]:
    return [entry.event for entry in entries if isinstance(entry.event, SessionEnded)]


def _morning_of(entries: list[Entry]) -> list[Any]:
    replayed = [e.event.scores for e in entries if isinstance(e.event, ReplayFinished)]
    decided = [e.event.files for e in entries if isinstance(e.event, HumanDecided)]
    return [replayed, decided]


def _check_attempts(entries: list[Entry]) -> None:
    started = [e.event.attempt for e in entries if isinstance(e.event, AttemptStarted)]
    closing = (AttemptFinished, AttemptInterrupted)
    assert list(range(len(started))) == started
    assert started == sorted(e.event.attempt for e in entries if isinstance(e.event, closing))


def _check_tool_calls(directory: Path, entries: list[Entry]) -> None:
    """Each call of a reply that was acted on is answered once, in the message after it."""
    conversations: dict[int, list[dict[str, Any]]] = {}
    for entry in entries:
        if isinstance(entry.event, MessageAdded):
            message = json.loads(read_blob(directory, entry.event.message))
            conversations.setdefault(entry.event.conversation, []).append(message)
    for messages in conversations.values():
        assert "user" == messages[-1]["role"]
        for asked, answered in itertools.pairwise(messages):
            assert asked["role"] != answered["role"]
            if asked["role"] == "assistant":
                calls = [b["id"] for b in asked["content"] if b["type"] == "tool_use"]
                assert calls == [
                    b["tool_use_id"] for b in answered["content"] if b["type"] == "tool_result"
                ]
    called = Counter(e.event.call_id for e in entries if isinstance(e.event, ToolCalled))
    returned = Counter(e.event.call_id for e in entries if isinstance(e.event, ToolReturned))
    assert returned <= called
    finishes = [e for e in entries if isinstance(e.event, ToolCalled) and e.event.name == "finish"]
    assert len(finishes) <= 1  # who said that it was enough is not asked again


def _check_money(stage: Stage, entries: list[Entry], bills: list[int], cut_off: int) -> None:
    calls = [e.event for e in entries if isinstance(e.event, ModelCalled)]
    billed = {f"req_{n:06d}": stage.server.bills[n - 1].usd for n in bills}
    recorded = {call.request_id: call.cost_usd for call in calls if call.request_id}
    assert pytest.approx({name: billed[name] for name in recorded}) == recorded
    charged = _charged_at_the_reserve(entries)
    assert cut_off == len(charged)
    unrecorded = [usd for name, usd in billed.items() if name not in recorded]
    assert len(unrecorded) <= len(charged)
    assert all(usd <= max(charged) for usd in unrecorded)
    spent = fold(entries).spend.usd
    assert pytest.approx(sum(billed.values()) - sum(unrecorded) + sum(charged)) == spent


def _charged_at_the_reserve(entries: list[Entry]) -> list[float]:
    """Charges for calls of which nobody knows the end."""
    charged, asked = [], None
    for entry in entries:
        event = entry.event
        if isinstance(event, ModelAsked):
            asked = event
        elif (
            isinstance(event, ModelCalled) and event.stop_reason == "lost" and not event.request_id
        ):
            assert asked is not None
            assert asked.reserve.usd == event.cost_usd
            charged.append(event.cost_usd or 0.0)
    return charged


def _check_files(stage: Stage, entries: list[Entry]) -> None:
    directory, history = stage.place.directory, fold(entries)
    best, baseline = history.best, history.baseline
    assert best is not None
    assert baseline is not None
    for name, sha in best.started.files.items():
        assert read_blob(directory, sha) == (directory / "workspace" / name).read_bytes()
    numbers = {int(p.name.split("-")[0]) for p in (directory / "checkpoints").iterdir()}
    kept = [attempt.number for attempt in history.attempts if attempt.kept]
    assert {baseline.number, *kept[-3:]} == numbers
    if not _is_over(directory):  # the morning's commands leave what a night's resume removes
        assert [] == [p for p in directory.rglob("*.tmp") if p.is_file()]
    assert [] == list(directory.glob("boxes/*"))


# ---- kills everywhere --------------------------------------------------------------------------


def make_twin(root: Path, researcher: str, *, long: bool, watch: bool) -> Iterator[Twin]:
    """An unbroken night and its morning; with all kills that it could have met, if watched."""
    rehearsed = None
    if watch:
        with unbroken(root / "rehearsal", researcher, long=long, reports=True) as (stage, _):
            with watched(stage, root / "nothing") as witness:
                stage.live()
                stage.live()
            rehearsed = witness.changes
    with unbroken(root / "twin", researcher, long=long, reports=watch) as (stage, service):
        with watched(stage, root / "kills", rehearsed) as witness:
            stage.live()
            stage.live()
        assert rehearsed is None or rehearsed == witness.changes
        yield Twin(stage, service, witness.kills, read_ledger(stage.place.directory))


@contextmanager
def unbroken(
    root: Path, researcher: str, *, long: bool, reports: bool
) -> Iterator[tuple[Stage, Service]]:
    """A night that is about to begin, and its service."""
    service = Service(long=long)
    place = _place(root, Clock(), attempts=ATTEMPTS[researcher, long])
    with MessagesServer(service.script(), endless=True) as server:
        service.stage = Stage(place, researcher, server, reports=reports)
        yield service.stage, service
        assert [] == server.unplanned


@pytest.fixture(scope="module")
def quick_root() -> Iterator[Path]:
    """A directory in memory where there is one: thousands of syncs need no real disk here."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture(scope="module", params=["claude", "tpe"])
def twin(request: pytest.FixtureRequest, quick_root: Path) -> Iterator[Twin]:
    yield from make_twin(quick_root / request.param, request.param, long=False, watch=True)


def test_a_night_killed_at_any_event_is_worth_an_unbroken_one(twin: Twin) -> None:
    kills = [kill for kill in twin.kills if kill.moment.startswith("event")]
    assert set(range(1, len(twin.entries) + 1)) == {kill.events for kill in twin.kills}
    for kill in kills:
        twin.carry_on(kill)


def test_a_night_killed_at_any_kind_of_change_of_its_directory_is_worth_an_unbroken_one(
    twin: Twin,
) -> None:
    kills = [kill for kill in twin.kills if not kill.moment.startswith("event")]
    assert set() == SIDE_EFFECTS - {kill.moment for kill in kills}
    for kill in kills:
        twin.carry_on(kill)


@pytest.fixture(scope="module", params=["claude", "tpe"])
def long_twin(request: pytest.FixtureRequest, quick_root: Path) -> Iterator[Twin]:
    root = quick_root / f"long-{request.param}"
    yield from make_twin(root, request.param, long=True, watch=False)


@dataclass
class Executioner:
    """Kills one process after the other, at random."""

    chance: random.Random
    kinds: Counter[str] = field(default_factory=Counter)
    open_calls: set[int] = field(default_factory=set)

    def kill_often(self, stage: Stage, times: int) -> None:
        for _ in range(times):
            if _is_over(stage.place.directory):
                return
            # Every third life ends while the one before is still being cleared away.
            reach = self.chance.choice([4, 40, 80])
            at = _events(stage.place.directory) + self.chance.randrange(reach)
            try:
                stage.live(max(1, at), after_writing=self.chance.random() < 0.5)
            except Crash as crash:
                self.kinds[crash.args[0]] += 1
            asked = _open_call(read_ledger(stage.place.directory))
            self.open_calls |= set() if asked is None else {asked}


def test_hundreds_of_random_kills_lose_and_double_nothing(
    long_twin: Twin, quick_root: Path
) -> None:
    researcher = long_twin.stage.researcher
    killed: Counter[str] = Counter()
    for number in itertools.count():
        executioner = Executioner(random.Random(f"{researcher} {number}"))
        root = quick_root / f"random-{researcher}-{number}"
        place = _place(root, Clock(), attempts=ATTEMPTS[researcher, True])
        stage = Stage(place, researcher, long_twin.stage.server)
        long_twin.service.stage = stage
        before = len(stage.server.bills)
        executioner.kill_often(stage, KILLS_A_NIGHT)
        while not _is_over(place.directory):
            stage.live()
        bills = list(range(before + 1, len(stage.server.bills) + 1))
        _check(stage, long_twin, bills, executioner.open_calls)
        killed += executioner.kinds
        shutil.rmtree(root)
        if killed.total() >= RANDOM_KILLS / 2:  # the other half is the other researcher's
            break
    assert AFTER_A_KILL <= killed.keys()


def test_the_unbroken_nights_hold_every_kind_of_event(quick_root: Path) -> None:
    kinds = set(AFTER_A_KILL)
    for twin in make_twin(quick_root / "kinds", "claude", long=False, watch=False):
        kinds |= {entry.event.type for entry in twin.entries}
        history = fold(twin.entries)
    assert kinds == set(EVENT_TYPES) - ELSEWHERE
    # A would-be keep measured the best again, while it was open itself.
    assert history.baseline is not None
    assert len(history.baseline.values()) > history.in_force.noise.baseline_repeats
    assert history.candidates[0].kept


def _events(directory: Path) -> int:
    path = directory / LEDGER_NAME
    return path.read_bytes().count(b"\n") if path.exists() else 1


def _is_over(directory: Path) -> bool:
    return directory.exists() and any(
        isinstance(entry.event, HumanDecided) for entry in read_ledger(directory)
    )


def _open_call(entries: Sequence[Entry]) -> int | None:
    """Where the call stands that a kill now would cut off."""
    for entry in reversed(entries):
        if isinstance(entry.event, ModelAsked):
            return entry.seq
        if not isinstance(entry.event, SessionResumed):
            return None
    return None


# ---- money while nothing is asked --------------------------------------------------------------


@pytest.mark.parametrize("kill", [KeyboardInterrupt, Crash])
def test_a_stop_while_waiting_for_the_service_is_not_billed(
    tmp_path: Path, kill: type[BaseException]
) -> None:
    place = _place(tmp_path, Clock(), attempts=1)
    chance = random.Random(1)

    def stop(seconds: float) -> None:
        raise kill

    mind = itertools.repeat(Mind(chance).answer)
    script: Iterator[Any] = itertools.chain([Status(529, "overloaded_error")], mind)
    with MessagesServer(script, endless=True) as server:
        with pytest.raises(kill):
            work_with_claude(with_sleep(place.begin("claude"), stop), place, server)
        assert _kinds(place)[-2:] == ["model_asked", "retry_waited"]
        work_with_claude(place.resume(), place, server)
    history = fold(read_ledger(place.directory))
    assert pytest.approx(server.billed_usd) == history.spend.usd
    assert len(server.bills) == history.spend.calls


def test_every_try_of_a_call_is_announced_before_it_is_sent(tmp_path: Path) -> None:
    place = _place(tmp_path, Clock(), attempts=1)
    refused = [Status(529, "overloaded_error")] * 2
    cut = say(text("half of it " * 50), cut=Cut(5, "fin"))
    mind = itertools.repeat(Mind(random.Random(1)).answer)
    with MessagesServer(itertools.chain(refused, [cut], mind), endless=True) as server:
        work_with_claude(place.begin("claude"), place, server)
    kinds = [k for k in _kinds(place) if k.startswith(("model_", "retry_"))]
    assert ["model_asked", "retry_waited"] * 2 == kinds[:4]
    assert ["model_asked", "model_called", "retry_waited", "model_asked"] == kinds[4:8]
    history = fold(read_ledger(place.directory))
    assert pytest.approx(server.billed_usd) == history.spend.usd


def test_a_stop_in_the_middle_of_a_reply_is_billed_once(tmp_path: Path) -> None:
    place = _place(tmp_path, Clock(), attempts=1)
    hangs = say(text("half of it " * 50), cut=Cut(5, "stall"))
    mind = itertools.repeat(Mind(random.Random(1)).answer)
    with MessagesServer(itertools.chain([hangs], mind), endless=True) as server:
        main = threading.get_ident()

        def interrupt() -> None:
            assert server.waiting.wait(20)
            signal.pthread_kill(main, signal.SIGINT)

        stopper = threading.Thread(target=interrupt)
        stopper.start()
        with pytest.raises(KeyboardInterrupt):
            work_with_claude(place.begin("claude"), place, server)
        stopper.join()
        work_with_claude(place.resume(), place, server)
    calls = [e.event for e in read_ledger(place.directory) if isinstance(e.event, ModelCalled)]
    assert 1 == sum(call.stop_reason == "lost" for call in calls)
    assert len(server.bills) == len(calls)


def test_hours_between_a_kill_and_the_resume_are_not_the_nights(tmp_path: Path) -> None:
    place = _place(tmp_path, Clock(), attempts=2)
    with MessagesServer(Service(long=False).script(), endless=True) as server:
        stage = Stage(place, "tpe", server)
        with pytest.raises(Crash):
            stage.live(12)
        place.clock.advance(48 * 3600.0)
        stage.live()
    history = fold(read_ledger(place.directory))
    assert history.ended is not None
    assert StopReason.ATTEMPTS is history.ended.reason
    assert history.time.active_seconds < 2 * 3600


def _kinds(place: Place) -> list[str]:
    return [entry.event.type for entry in read_ledger(place.directory)]
