from __future__ import annotations

import io
import os
from itertools import count
from pathlib import Path
from statistics import median

import pytest
from rich.console import Console

from agent.attempt.disturbance import (
    Sample,
    Usual,
    busy_core_seconds,
    disturbance,
    idle_cores,
    is_crowded,
    is_slow,
    reasons,
    speed,
    usual_of,
)
from agent.program import load_program
from agent.record.attempts import TrialKey
from agent.record.events import Disturbance
from agent.record.history import History
from agent.report.activity import RunNotes
from agent.report.console import NightConsole
from agent.settings import DisturbanceSettings
from sandbox.contract.run import Outcome
from tests.support.histories import STATE, night, run_result

NO_TRIAL = TrialKey("", -1, 0)
NOTHING_USUAL = Usual(cores=0.0, speed=None)


def at(busy_seconds: float, own_seconds: float, at: float, speed: float = 500.0) -> Sample:
    return Sample(busy_seconds, own_seconds, at, speed, STATE)


def found(
    before: Sample,
    after: Sample,
    run_cpu_seconds: float,
    limit_cores: float,
    *,
    idle: float = 0.0,
    usual: Usual = NOTHING_USUAL,
) -> Disturbance:
    limits = DisturbanceSettings(max_other_cores=limit_cores)
    return disturbance(before, after, run_cpu_seconds, limits, idle=idle, usual=usual)


PROC_STAT = "cpu  100 20 30 5000 40 5 6 7 50 2\ncpu0 50 10 15 2500 20 3 3 4 25 1\n"


def test_busy_time_counts_stolen_time_and_neither_idle_nor_guests_twice() -> None:
    assert (100 + 20 + 30 + 5 + 6 + 7) / 100 == busy_core_seconds(PROC_STAT, 100)


def test_the_run_and_nightlab_itself_disturb_nobody() -> None:
    noise = found(at(10.0, 1.0, 0.0), at(31.0, 2.0, 10.0), 20.0, 0.1)

    assert (0.0, False) == (noise.other_cores, noise.disturbed)


def test_others_are_measured_in_cores() -> None:
    noise = found(at(0.0, 0.0, 0.0), at(25.0, 0.0, 10.0), 20.0, 0.25)

    assert (0.5, True) == (noise.other_cores, noise.disturbed)


@pytest.mark.parametrize(
    ("idle", "usual", "disturbed"),
    [(0.0, 0.0, True), (0.5, 0.0, False), (0.0, 0.5, False), (0.2, 0.2, True), (0.2, 0.3, False)],
)
def test_others_may_use_what_a_run_leaves_free_and_what_they_used_before(
    idle: float, usual: float, disturbed: bool
) -> None:
    before, after = at(0.0, 0.0, 0.0), at(25.0, 0.0, 10.0)
    noise = found(before, after, 20.0, 0.06, idle=idle, usual=Usual(usual, None))

    assert (0.5, disturbed) == (noise.other_cores, noise.disturbed)
    assert disturbed == is_crowded(noise) == bool(reasons(noise))


def test_a_run_leaves_the_cores_free_that_it_may_not_use() -> None:
    cores = os.cpu_count()
    assert cores is not None
    assert (cores - 0.5, 0.0) == (idle_cores(0.5), idle_cores(cores + 1.0))


def test_what_others_usually_use_is_what_they_used_beside_the_baseline() -> None:
    made = night(2)
    assert Usual(0.0, None) == usual_of(History(), NO_TRIAL)
    runs = [run for run in made.history.attempts[0].runs if run.disturbance]
    assert runs
    for run, cores in zip(runs, (0.1, 0.9, 0.2), strict=False):
        assert run.disturbance is not None
        told = run.disturbance.model_copy(update={"other_cores": cores})
        place = made.history.attempts[0].runs.index(run)
        made.history.attempts[0].runs[place] = run.model_copy(update={"disturbance": told})
    seen = sorted(r.disturbance.other_cores for r in made.history.attempts[0].runs if r.disturbance)
    assert median(seen) == usual_of(made.history, NO_TRIAL).cores


def test_a_clock_that_did_not_move_is_no_division_by_zero() -> None:
    assert found(at(0.0, 0.0, 5.0), at(0.0, 0.0, 5.0), 0.0, 0.25).disturbed is False


@pytest.mark.parametrize(
    ("before", "after", "usual", "slow"),
    [
        (500.0, 500.0, 500.0, False),
        (500.0, 350.0, 500.0, False),
        (380.0, 380.0, 500.0, True),
        (500.0, 250.0, 500.0, True),
        (100.0, 100.0, None, False),
    ],
)
def test_a_core_that_lost_a_fifth_of_its_usual_speed_disturbs_the_run(
    before: float, after: float, usual: float | None, slow: bool
) -> None:
    noise = found(
        at(0.0, 0.0, 0.0, before), at(20.0, 0.0, 10.0, after), 20.0, 0.25, usual=Usual(0.0, usual)
    )

    assert (slow, slow) == (noise.disturbed, is_slow(noise))


def test_speed_is_the_best_of_a_few_slices_of_equal_work() -> None:
    ticks = count()
    pauses = {5: 10.0, 6: 10.0}  # somebody else had the core meanwhile

    def clock() -> float:
        now = next(ticks)
        return now * 0.001 + sum(pause for at, pause in pauses.items() if now >= at)

    assert pytest.approx(speed(clock), rel=0.2) == 64 * 1024 / 1e6 / 0.001


def test_speed_is_measured_in_no_time() -> None:
    import time

    began = time.monotonic()
    assert speed() > 0
    assert time.monotonic() - began < 1


def test_a_person_reads_what_disturbed_a_run_and_where_the_limit_stands(tmp_path: Path) -> None:
    noise = Disturbance(
        other_cores=0.1,
        limit_cores=0.25,
        disturbed=True,
        idle_cores=0.0,
        usual_cores=0.0,
        before=STATE,
        after=STATE,
        speed=350.0,
        usual_speed=500.0,
        min_speed=0.8,
        held_back=("it was too hot",),
    )
    written = io.StringIO()
    settings = load_program(Path("program.md")).settings
    notes = RunNotes(tmp_path, lambda: 0.0)
    console = NightConsole(notes, Console(file=written, width=200), settings, History)
    console.run_finished(run_result("a0", "train", log="", outcome=Outcome.FAILED), noise)
    assert "" == written.getvalue()  # what others did explains no crash
    console.run_finished(run_result("a0", "train", log=""), noise)

    assert (
        "disturbed: a core had 70% of its usual speed; it was too hot; see [disturbance] in "
        "program.md" == written.getvalue().strip()
    )
    others = noise.model_copy(update={"other_cores": 1.5, "speed": 500.0, "held_back": ()})
    assert ["others used 1.50 cores (limit 0.25)"] == reasons(others)
