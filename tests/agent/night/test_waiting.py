"""Waits of a night: for the engine, for the service, for a GPU, and for the person."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent.attempt.lab import SessionOver
from agent.morning.audit import audit
from agent.morning.review import review
from agent.night.waiting import ask_to_continue, ask_to_pause, ask_to_stop, is_paused
from agent.record.chain import read_ledger
from agent.record.events import (
    Noticed,
    RetryWaited,
    SessionEnded,
    SmokeStarted,
    StopReason,
    Verdict,
)
from agent.record.history import TRIES, History, fold
from agent.report.activity import activity
from agent.report.summary import summary
from sandbox.contract.errors import BoxLost, SandboxError
from sandbox.contract.run import RunSpec
from tests.support.clock import Clock
from tests.support.executors import Outage
from tests.support.gpu_nights import GpuPlace
from tests.support.labs import in_directory, with_sleep, work
from tests.support.messages_server import MessagesServer, Status
from tests.support.minds import Scene, work_with_claude
from tests.support.nights import Place


@dataclass
class TroubledPlace(Place):
    """A toy session in such boxes."""

    @property
    def history(self) -> History:
        return fold(read_ledger(self.directory))

    def play(self) -> SessionEnded:
        return work(self.begin("tpe"), self.program)


def notices(place: Place) -> list[str]:
    events = [entry.event for entry in read_ledger(place.directory)]
    return [event.kind for event in events if isinstance(event, Noticed)]


def trouble(root: Path, **session: Any) -> TroubledPlace:
    return TroubledPlace(root, changes={"session": {"attempts": 4, "hours": 10.0} | session})


# --- the engine ---------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [1, 10, 14], ids=["baseline", "candidate", "later"])
def test_an_engine_that_is_away_for_hours_is_waited_for(tmp_path: Path, run: int) -> None:
    place = trouble(tmp_path)
    place.boxes.outage = Outage(run, 3 * 3600)
    assert place.play().reason is StopReason.ATTEMPTS
    assert ["engine_away", "engine_back"] == notices(place)
    history = place.history
    assert 1 == sum(attempt.interrupted is not None for attempt in history.attempts)
    assert 4 == len(history.completed)
    assert [] == audit(place.directory, read_ledger(place.directory))


def test_a_stop_is_heeded_while_the_engine_is_away(tmp_path: Path) -> None:
    place = trouble(tmp_path)
    place.boxes.outage = Outage(10, 9 * 3600)

    def sleep(seconds: float) -> None:
        place.clock.advance(seconds)
        if "engine_away" in notices(place):
            ask_to_stop(place.directory)

    place.sleep = sleep
    ended = place.play()
    assert (StopReason.STOPPED, "the person asked to stop") == (ended.reason, ended.explanation)
    assert place.clock.seconds < 3 * 3600


def test_the_hours_end_a_wait_for_an_engine_that_stays_away(tmp_path: Path) -> None:
    place = trouble(tmp_path, hours=2.0)
    place.boxes.outage = Outage(1, 1e9)
    ended = place.play()
    assert StopReason.HOURS is ended.reason
    assert place.clock.seconds == pytest.approx(2 * 3600, abs=30)
    assert "engine_away" in notices(place)


def test_who_watches_sees_what_is_waited_for(tmp_path: Path) -> None:
    place = trouble(tmp_path, hours=1.0)
    place.boxes.outage = Outage(1, 1e9)
    seen = set()

    def sleep(seconds: float) -> None:
        place.clock.advance(60 * seconds)
        entries = read_ledger(place.directory)
        seen.add(activity(place.directory, fold(entries), entries).text)

    place.sleep = sleep
    place.play()
    assert any(words.startswith("Waiting for the container engine") for words in seen), seen


def test_an_engine_that_answers_and_fails_ends_the_session(tmp_path: Path) -> None:
    place = trouble(tmp_path)
    place.boxes.fault = lambda _: SandboxError("the engine refused: no")
    ended = place.play()
    assert StopReason.SANDBOX_FAULT is ended.reason
    assert TRIES == len(place.history.attempts)
    assert [] == notices(place)


def test_a_holdout_that_cannot_be_scored_does_not_change_the_ending(tmp_path: Path) -> None:
    place = trouble(tmp_path, attempts=8)
    place.boxes.outage = Outage(36, 1e9)  # something was kept by then

    def sleep(seconds: float) -> None:
        place.clock.advance(seconds)
        if "engine_away" in notices(place):
            ask_to_stop(place.directory)

    place.sleep = sleep
    assert StopReason.STOPPED is place.play().reason
    assert place.history.best is not None
    assert place.history.best.started.kind == "candidate"
    assert ["engine_away", *["holdout_missing"] * TRIES] == notices(place)
    assert [] == audit(place.directory, read_ledger(place.directory))

    place.boxes.outage = place.sleep = None
    assert StopReason.ATTEMPTS is work(place.resume(), place.program).reason
    assert place.history.best is not None
    assert place.history.best.values("holdout")
    assert [] == audit(place.directory, read_ledger(place.directory))


@pytest.mark.parametrize("fault", [SandboxError("the engine refused"), BoxLost("gone")])
@pytest.mark.parametrize("tries", [1, TRIES])
def test_a_holdout_that_fails_is_tried_again_and_the_record_holds(
    tmp_path: Path, fault: SandboxError, tries: int
) -> None:
    place, faults = trouble(tmp_path, attempts=8), [fault] * tries

    def on_holdout(spec: RunSpec) -> SandboxError | None:
        is_over = spec.box == "model" and len(place.history.completed) == 8
        return faults.pop() if is_over and faults else None

    place.boxes.fault = on_holdout
    assert StopReason.ATTEMPTS is place.play().reason
    assert ["holdout_missing"] * tries == notices(place)
    assert [] == audit(place.directory, read_ledger(place.directory))
    assert StopReason.ATTEMPTS is work(place.resume(), place.program).reason
    entries = read_ledger(place.directory)
    assert fold(entries).best is not None
    assert [] == [a for a in summary(entries).attention if a.kind == "holdout_missing"]
    assert [] == audit(place.directory, entries)


def test_a_look_at_the_machine_heeds_a_stop(tmp_path: Path) -> None:
    """It works in a scratch directory, where nobody asks for anything."""
    lab = trouble(tmp_path).begin("tpe")
    ask_to_stop(lab.worker.directory)
    with lab.ledger, pytest.raises(SessionOver, match="asked to stop"):
        is_paused(in_directory(lab, tmp_path / "scratch"))


# --- boxes that are lost ------------------------------------------------------------------------


def test_a_candidate_whose_box_is_lost_each_time_fails_and_the_night_goes_on(
    tmp_path: Path,
) -> None:
    place = trouble(tmp_path)
    poison: list[bytes] = []

    def lost(spec: RunSpec) -> SandboxError | None:
        if spec.box != "train" or len(place.boxes.runs) < 9:
            return None
        source = next(m.source for m in spec.mounts if m.target == "/workspace") / "train.py"
        poison[:] = poison or [source.read_bytes()]
        return BoxLost("PID 1 is gone") if source.read_bytes() == poison[0] else None

    place.boxes.fault = lost
    assert place.play().reason is StopReason.ATTEMPTS
    failed = [a for a in place.history.completed if a.finished and a.finished.reason == "box_lost"]
    assert [Verdict.FAILED] == [a.finished.verdict for a in failed if a.finished]
    assert TRIES - 1 == sum(a.interrupted is not None for a in place.history.attempts)
    assert [] == audit(place.directory, read_ledger(place.directory))


def test_a_candidate_is_not_blamed_unless_its_box_was_lost_each_time(tmp_path: Path) -> None:
    place = trouble(tmp_path)
    faults = [SandboxError("the engine refused"), BoxLost("PID 1 is gone"), BoxLost("and again")]

    def faulty(spec: RunSpec) -> SandboxError | None:
        is_candidate = spec.box == "train" and len(place.boxes.runs) >= 9
        return faults.pop(0) if is_candidate and faults else None

    place.boxes.fault = faulty
    assert StopReason.SANDBOX_FAULT is place.play().reason
    assert "box_lost" not in {a.finished.reason for a in place.history.completed if a.finished}


def test_smokes_that_lose_their_box_come_to_an_end(tmp_path: Path) -> None:
    lab = trouble(tmp_path).begin("tpe")
    files = lab.workspace.candidate()
    with lab.ledger:
        for tries in range(1, 2 * TRIES + 1):
            lab.ledger.append(
                SmokeStarted(
                    smoke=tries - 1,
                    attempt=0,
                    asked_by="researcher",
                    files={name: lab.ledger.put_blob(data) for name, data in files.items()},
                )
            )
            assert tries // TRIES == lab.ledger.history.smokes_in_a_row


def test_a_baseline_whose_box_is_lost_each_time_ends_the_session(tmp_path: Path) -> None:
    place = trouble(tmp_path)
    place.boxes.fault = lambda _: BoxLost("PID 1 is gone")
    assert place.play().reason is StopReason.SANDBOX_FAULT


# --- the service --------------------------------------------------------------------------------


@dataclass
class Away:
    """A service that is overloaded, and what the person does meanwhile."""

    clock: Clock
    act: Callable[[int], object]
    waits: int = 0

    def wait(self, seconds: float) -> None:
        self.waits += 1
        self.act(self.waits)
        self.clock.advance(seconds)


def test_a_stop_is_heeded_while_the_service_is_away(tmp_path: Path) -> None:
    scene = Scene(tmp_path, session={"attempts": 1})
    away = Away(scene.place.clock, lambda _: ask_to_stop(scene.place.directory))
    lab = with_sleep(scene.place.begin("claude"), away.wait)
    with MessagesServer([Status(529, "overloaded_error")] * 99, endless=True) as server:
        ended = work_with_claude(lab, scene.place, server)
    assert StopReason.STOPPED is ended.reason
    assert away.waits <= 2
    assert 1 == len(server.requests)


def test_a_pause_is_heeded_while_the_service_is_away_and_costs_no_hours(tmp_path: Path) -> None:
    scene = Scene(tmp_path, session={"attempts": 1, "hours": 1.0})
    directory, clock = scene.place.directory, scene.place.clock

    def act(waits: int) -> None:
        if waits == 1:
            ask_to_pause(directory)
        if clock.seconds > 3 * 3600:
            ask_to_continue(directory)

    away = Away(clock, act)
    lab = with_sleep(scene.place.begin("claude"), away.wait)
    script = scene.then(Status(529, "overloaded_error"))
    with MessagesServer(script, clock=clock.monotonic, endless=True) as server:
        ended = work_with_claude(lab, scene.place, server)
    assert StopReason.ATTEMPTS is ended.reason
    kinds = [k for k in scene.notices() if k in ("paused", "continued")]
    assert ["paused", "continued"] == kinds
    assert 1 == len(scene.events(RetryWaited))
    assert away.waits < 4 * 3600  # once a second, and not more often
    assert scene.history.time.active_seconds < 3600 < 3 * 3600 < clock.seconds


# --- a GPU --------------------------------------------------------------------------------------


def test_a_review_waits_for_a_gpu_whatever_the_night_was_asked(tmp_path: Path) -> None:
    place = GpuPlace(tmp_path, changes={"session": {"attempts": 8, "hours": 10.0}})
    work(place.begin("tpe"), place.program)
    place.clock.advance(20 * 3600)
    ask_to_stop(place.directory)
    place.source.purposes.clear()  # so that the next run has to wait
    lab = place.open()
    worked = lab.ledger.history.time.active_seconds
    with lab.ledger:
        review(lab, 1, lambda _: None)
    assert [] == [k for k in notices(place) if k in ("paused", "continued")]
    assert 1 == notices(place).count("gpu_awaited")  # the night's own
    assert worked == fold(read_ledger(place.directory)).time.active_seconds  # hours are the night's


def test_a_stop_is_heeded_while_a_gpu_is_waited_for(tmp_path: Path) -> None:
    place = GpuPlace(tmp_path, changes={"session": {"attempts": 2}})
    lab = place.begin("tpe")
    ask_to_stop(place.directory)
    ended = work(lab, place.program)
    assert StopReason.STOPPED is ended.reason
    assert ["gpu_awaited"] == notices(place)
    history = fold(read_ledger(place.directory))
    assert [True] == [attempt.interrupted is not None for attempt in history.attempts]
