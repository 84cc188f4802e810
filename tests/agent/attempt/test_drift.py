"""A machine that changes during the night is found, said, and no longer compared with."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path
from statistics import median

import pytest

from agent.attempt.disturbance import held_back, machine_state, usual_of
from agent.attempt.drift import is_due
from agent.attempt.judge import drift_tolerance, has_drifted
from agent.morning.replay import replay
from agent.night.session import machine
from agent.record.attempts import TrialKey
from agent.record.chain import read_blob, read_ledger
from agent.record.events import DRIFT, Entry, Event, MachineState, RunFinished, SessionResumed
from agent.record.history import History, find_settled, fold
from agent.record.repeats import Noise
from agent.report.summary import summary
from tests.support import sessions
from tests.support.labs import with_machine, work
from tests.support.nights import Place
from tests.support.reports import render_markdown

SLOW_AFTER_RUNS = 8
LOSS = 0.5
"""What the slow machine costs, far beyond the toy's noise of 0.001."""

NO_TRIAL = TrialKey("", -1, 0)
COOL = MachineState(
    load=0.5,
    memory_available_bytes=2**30,
    cpu_mhz=2000,
    cpu_max_mhz=3000,
    governor="performance",
    temperature_celsius=50.0,
    throttle_events=3,
)


# --- one look ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("today", "expected"),
    [
        ([], False),
        ([1.05], False),
        ([1.5], False),  # once may be luck
        ([1.5, 1.05], False),
        ([1.5, 0.5], False),  # beyond noise, but not one way
        ([1.5, 1.4], True),
        ([0.5, 0.6], True),
    ],
)
def test_the_machine_changed_when_two_looks_say_so(today: list[float], expected: bool) -> None:
    assert expected == has_drifted(1.0, today, 0.1)


def test_two_scores_of_the_same_files_differ_by_the_noise_of_both() -> None:
    assert drift_tolerance(Noise(0.01, 10_000)) == pytest.approx(0.01 * 2**0.5 * 1.645, 1e-3)


# --- the machine's state ----------------------------------------------------------------------


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_the_state_is_what_the_kernel_says(tmp_path: Path) -> None:
    cpus = "sys/devices/system/cpu"
    write(tmp_path, "proc/meminfo", "MemTotal: 9 kB\nMemAvailable:   2048 kB\n")
    for cpu, clock in ((0, 1_000_000), (1, 3_000_000)):
        write(tmp_path, f"{cpus}/cpu{cpu}/cpufreq/scaling_cur_freq", f"{clock}\n")
        write(tmp_path, f"{cpus}/cpu{cpu}/cpufreq/cpuinfo_max_freq", "3500000\n")
        write(tmp_path, f"{cpus}/cpu{cpu}/cpufreq/scaling_governor", "powersave\n")
        write(tmp_path, f"{cpus}/cpu{cpu}/thermal_throttle/core_throttle_count", "2\n")
    write(tmp_path, "sys/class/thermal/thermal_zone0/temp", "41000\n")
    write(tmp_path, "sys/class/thermal/thermal_zone1/temp", "broken\n")

    state = machine_state(root=tmp_path)

    assert (2000, 3500, "powersave") == (state.cpu_mhz, state.cpu_max_mhz, state.governor)
    assert (41.0, 4, 2 * 2**20) == (
        state.temperature_celsius,
        state.throttle_events,
        state.memory_available_bytes,
    )


def test_what_a_machine_does_not_tell_is_not_made_up(tmp_path: Path) -> None:
    state = machine_state(root=tmp_path)

    assert {None} == {
        state.cpu_mhz,
        state.governor,
        state.temperature_celsius,
        state.throttle_events,
        state.memory_available_bytes,
    }


def test_a_run_is_held_back_when_heat_was_counted_meanwhile() -> None:
    hot = COOL.model_copy(update={"throttle_events": 5})
    silent = COOL.model_copy(update={"throttle_events": None})

    assert held_back(COOL, COOL) == ()
    assert held_back(silent, hot) == ()
    assert held_back(COOL, hot) == ("the processor was held back by heat (2 times)",)


# --- a night on a machine that slows down -----------------------------------------------------


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(
        tmp_path_factory.mktemp("slowing"),
        changes={"session": {"attempts": 12, "hours": 6.0}, "noise": {"check_best_every": 3}},
    )

    def slower(noise: float) -> float:
        return noise + (LOSS if place.boxes.trainings > SLOW_AFTER_RUNS else 0.0)

    place.boxes.luck = slower
    work(place.begin("tpe"), place.program)
    return place


@pytest.fixture
def entries(night: Place) -> list[Entry]:
    return list(read_ledger(night.directory))


@pytest.fixture
def history(entries: list[Entry]) -> History:
    return fold(entries)


def test_the_change_is_noticed_once_and_the_machine_before_it_was_steady(history: History) -> None:
    changes = [check.changed for check in history.drift.checks]

    assert changes.count(True) == 1
    changed = history.drift.checks[changes.index(True)]
    assert changed.today[0] - changed.recorded == pytest.approx(LOSS, abs=0.02)
    assert len(changed.today) == 2
    assert all(len(check.today) == 1 for check in history.drift.checks if not check.changed)
    assert len(changes) >= 3


def test_later_candidates_are_compared_with_what_the_best_is_worth_now(
    entries: list[Entry], history: History
) -> None:
    changed = next(check for check in history.drift.checks if check.changed)
    seq = next(e.seq for e in entries if e.event == changed)
    later = [a for a in history.completed if a.started_at >= entries[seq].at]
    judged = [a.finished.arithmetic for a in later if a.finished and a.finished.arithmetic]

    assert judged
    assert sum(changed.today) / 2 in judged[0].best_values
    assert changed.recorded not in judged[0].best_values


def test_the_person_is_told(night: Place, entries: list[Entry], history: History) -> None:
    kinds = [item.kind for item in summary(entries).attention]
    text = render_markdown(entries, lambda sha: read_blob(night.directory, sha))

    assert "drift" in kinds
    assert "The machine changed during the session" in text
    assert "checks of the machine" in text


def test_a_look_leaves_the_bests_checkpoints_alone(night: Place, history: History) -> None:
    assert history.best is not None
    kept = [path.name for path in (night.directory / "checkpoints").iterdir()]

    assert any(name.startswith(f"{history.best.number}-") for name in kept)
    assert not (night.directory / "drift").exists()


def test_the_audit_agrees_with_every_look(night: Place) -> None:
    assert sessions.found(night.directory) == []


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("changed", False, "its changed is not what the record comes to: False, not True"),
        ("today", [2.0, 2.0], "its today is not what the record comes to: (2.0, 2.0), not"),
        ("recorded", 0.0, "its recorded is not what the record comes to: 0.0, not"),
        ("tolerance", 9.0, "its tolerance is not what the record comes to: 9.0, not"),
    ],
)
def test_a_forged_look_is_found(night: Place, field: str, value: object, said: str) -> None:
    def forge(lines: sessions.Lines) -> None:
        sessions.only(lines, "drift_checked", changed=True)[field] = value

    with sessions.restored(night.directory / "ledger.jsonl"):
        sessions.forge(night.directory, forge)
        found = sessions.found(night.directory)

    assert any(said in what for what in found)


def test_a_session_that_goes_on_elsewhere_looks_at_once(history: History) -> None:
    assert history.session is not None
    here = history.session.machine
    resumed = SessionResumed(
        nightlab_version="test",
        settings=history.session.settings,
        interrupted_attempts=(),
        removed_containers=(),
        engine={},
        machine=here,
    )
    entry = Entry(seq=0, at=history.time.last_at, previous="0" * 64, hash="0" * 64, event=resumed)

    history.apply(entry)
    assert not history.drift.is_on_another_machine
    assert usual_of(history, NO_TRIAL).speed is not None
    elsewhere = resumed.model_copy(update={"machine": here | {"cores": here["cores"] + 1}})
    history.apply(entry.model_copy(update={"event": elsewhere}))
    assert history.drift.is_on_another_machine
    assert usual_of(history, NO_TRIAL).speed is None  # that of the machine before says nothing here


def test_after_a_move_a_look_says_how_fast_the_machine_is(tmp_path: Path) -> None:
    place = Place(tmp_path, changes={"session": {"attempts": 1}})
    work(place.begin("tpe"), place.program)
    sessions.forge(
        place.directory, lambda lines: lines[0]["event"]["machine"].update(cpu="another one")
    )
    place = replace(place, changes={"session": {"attempts": 3}})
    work(place.resume(), place.program)

    entries = read_ledger(place.directory)
    moved = next(e.seq for e in entries if isinstance(e.event, SessionResumed))
    events = [entry.event for entry in entries[moved:]]
    runs = [e for e in events if isinstance(e, RunFinished) and e.disturbance]
    checks = [run for run in runs if run.purpose.startswith(DRIFT)]
    speeds = [run.disturbance.speed for run in checks if run.disturbance]
    assert speeds
    later = [run.disturbance for run in runs if run not in checks and run.disturbance]
    assert later[0].usual_speed == median(speeds)
    assert sessions.found(place.directory) == []


def test_a_look_without_a_result_is_repeated_after_a_few_attempts(
    night: Place, history: History
) -> None:
    settings = night.program.settings
    noise = settings.noise.model_copy(update={"check_best_every": 25})
    settings = settings.model_copy(update={"noise": noise})
    found, judged = history.drift.checks[-1], history.completed[-1].finished
    assert history.session is not None
    assert judged is not None

    def goes_on(event: Event) -> None:
        history.apply(
            Entry(seq=0, at=history.time.last_at, previous="0" * 64, hash="0" * 64, event=event)
        )

    def attempts_until_it_is_due() -> int:
        for attempts in range(100):
            if is_due(history, settings):
                return attempts
            goes_on(judged)
        raise AssertionError("never")

    here = history.session.machine
    goes_on(
        SessionResumed(
            nightlab_version="test",
            settings=history.session.settings,
            interrupted_attempts=(),
            removed_containers=(),
            engine={},
            machine=here | {"cores": here["cores"] + 1},
        )
    )
    waited = [attempts_until_it_is_due()]
    for _ in range(10):
        goes_on(found.model_copy(update={"today": (), "changed": False}))
        assert history.drift.is_on_another_machine
        waited.append(attempts_until_it_is_due())
    assert [0, 3, 6, 9, 12, 15, 18, 21, 24, 25, 25] == waited
    goes_on(found)
    assert not history.drift.is_on_another_machine
    assert 25 == attempts_until_it_is_due()


# --- a machine that is held back --------------------------------------------------------------


def test_a_run_that_was_held_back_is_repeated_and_never_judged(tmp_path: Path) -> None:
    place = Place(
        tmp_path,
        changes={
            "session": {"attempts": 2},
            "disturbance": {"max_repeats": 1},
            "noise": {"check_best_every": 1},
        },
    )
    heat = count()
    lab = with_machine(
        place.begin("tpe"), lambda: COOL.model_copy(update={"throttle_events": next(heat)})
    )
    work(lab, place.program)

    history = fold(read_ledger(place.directory))
    assert history.baseline is not None  # measured all the same: its noise then shows it
    first = history.completed[0]
    assert first.finished is not None
    assert first.finished.reason == "disturbed"
    assert "held back by heat" in first.finished.explanation
    assert len(first.runs) == 2
    assert [((), False)] == [(look.today, look.changed) for look in history.drift.checks]
    with (lab := place.open()).ledger:
        # Proposed again since nobody had judged it, and disturbed again: that was the last time.
        settled = find_settled(lab.history, first.started.files)
        assert settled is not None
        assert [1, 2] == [first.number, settled.number]
        assert find_settled(lab.history, history.baseline.started.files) is not None
        replayed = replay(lab, first.number, lambda _: None)
    assert ("disturbed", "measured") == (replayed.recorded_outcome, replayed.outcome)
    assert not replayed.is_comparable
    assert sessions.found(place.directory) == []


def test_a_run_that_hides_what_held_it_back_is_found(night: Place) -> None:
    def forge(lines: sessions.Lines) -> None:
        run = sessions.only(lines, "run_finished", attempt=1)
        trainings = [e["event"] for e in lines if e["event"].get("disturbance")]
        assert run
        trainings[0]["disturbance"]["before"]["throttle_events"] = 1
        trainings[0]["disturbance"]["after"]["throttle_events"] = 2

    with sessions.restored(night.directory / "ledger.jsonl"):
        sessions.forge(night.directory, forge)
        found = sessions.found(night.directory)

    assert any(
        "its disturbance is not what the record comes to: disturbed False, not True; held_back"
        in what
        for what in found
    )


def test_a_session_records_the_state_it_began_in() -> None:
    assert MachineState.model_validate(machine()["state"]).load >= 0
