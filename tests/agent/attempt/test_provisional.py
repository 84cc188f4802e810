"""A baseline beside passing load is provisional: taken again once the machine is quiet."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest

from agent.attempt.decide import retakes_due
from agent.attempt.disturbance import ReadMachine, Sample
from agent.attempt.lab import Lab
from agent.record.attempts import Attempt
from agent.record.chain import read_ledger
from agent.record.events import Noticed
from agent.record.history import History, find_settled, fold
from agent.record.repeats import Noise
from sandbox.contract.errors import SandboxError
from sandbox.contract.run import Outcome, RunResult, RunSpec
from tests.support import sessions
from tests.support.labs import SPEED, work
from tests.support.nights import Place

LOAD = 4.0 + 2 * (os.cpu_count() or 1)
"""Cores: more than any run leaves free here."""
LOST = 0.1
"""What others cost a run that they passed beside, and so much more each time."""


def beside(lab: Lab, place: Place, cores: Callable[[int], float]) -> Lab:
    """The same lab where others use so many cores, by how many trainings were begun."""
    used, last = 0.0, place.clock.seconds

    def read_load(read_machine: ReadMachine) -> Sample:
        nonlocal used, last
        used += (place.clock.seconds - last) * cores(place.boxes.trainings)
        last = place.clock.seconds
        return Sample(used, 0.0, at=last, speed=SPEED, state=read_machine())

    return replace(lab, worker=replace(lab.worker, read_load=read_load))


def place_of(tmp_path: Path, attempts: int) -> Place:
    changes: dict[str, dict[str, Any] | None] = {
        "session": {"attempts": attempts},
        "disturbance": {"max_repeats": 0, "max_other_cores": 0.06},
        "noise": {"baseline_repeats": 3},
        "economy": {"smoke": "off"},
    }
    return Place(tmp_path, changes=changes)


def night(tmp_path: Path, cores: Callable[[int], float], attempts: int = 3) -> Place:
    place = place_of(tmp_path, attempts)

    def luck(noise: float) -> float:
        begun = place.boxes.trainings
        return noise + (LOST * begun if cores(begun) else 0.0)

    place.boxes.luck = luck
    work(beside(place.begin("tpe"), place, cores), place.program)
    return place


def history_of(place: Place) -> History:
    return fold(read_ledger(place.directory))


def tries(baseline: Attempt) -> list[int]:
    """How often each of its own seeds was trained."""
    return [sum(r.seed == seed for r in baseline.trainings) for seed in baseline.started.seeds]


def noise_of(history: History) -> Noise:
    noise = history.repeats.noise()
    assert noise is not None
    return noise


def test_passing_load_blinds_nobody_once_it_is_over(tmp_path: Path) -> None:
    place = night(tmp_path, lambda begun: LOAD if begun <= 3 else 0.0)
    history, baseline = history_of(place), history_of(place).baseline
    assert baseline is not None
    assert baseline.finished is not None
    assert "3 of them beside other work" in baseline.finished.explanation
    assert set() == baseline.provisional
    assert [2, 2, 2] == tries(baseline)
    assert () == retakes_due(history)
    assert noise_of(history).sigma < 0.01 < LOST
    last = history.completed[-1].finished
    assert last is not None
    assert last.arithmetic is not None
    assert max(last.arithmetic.best_values) - min(last.arithmetic.best_values) < 0.01
    assert [] == sessions.found(place.directory)


def test_only_the_runs_beside_others_are_taken_again(tmp_path: Path) -> None:
    place = night(tmp_path, lambda begun: LOAD if begun == 2 else 0.0, attempts=1)
    baseline = history_of(place).baseline
    assert baseline is not None
    assert [1, 2, 1] == tries(baseline)


def test_noise_is_never_that_of_quiet_and_disturbed_runs_together(tmp_path: Path) -> None:
    # The second run alone, and afterwards again, so that nothing can be taken anew.
    place = night(tmp_path, lambda begun: LOAD if begun == 2 or begun > 3 else 0.0, attempts=1)
    history, baseline = history_of(place), history_of(place).baseline
    assert baseline is not None
    assert {baseline.started.seeds[1]} == baseline.provisional
    quiet = list(baseline.values().values())
    assert {*baseline.started.seeds} - baseline.provisional == {*baseline.values()}
    assert Noise(pytest.approx(stdev(quiet)), 1) == noise_of(history)  # type: ignore[arg-type]
    assert noise_of(history).sigma < 0.01 < stdev(s.value for s in baseline.scores if s.value)


def test_on_a_machine_that_is_never_quiet_the_baseline_stays_and_says_what_helps(
    tmp_path: Path,
) -> None:
    # Half of what there was is no quiet.
    place = night(tmp_path, lambda begun: LOAD if begun <= 3 else LOAD / 2)
    baseline = history_of(place).baseline
    assert baseline is not None
    assert baseline.finished is not None
    assert {1} == set(tries(baseline))
    assert '[budget] kind = "tokens"' in baseline.finished.explanation


def test_a_seed_is_not_taken_again_for_ever(tmp_path: Path) -> None:
    # Quiet whenever it is looked at, and never beside a training.
    place = place_of(tmp_path, 6)
    lab = place.begin("tpe")
    looks, last = 0.0, place.clock.seconds

    def read_load(read_machine: ReadMachine) -> Sample:
        nonlocal looks, last
        elapsed, last = place.clock.seconds - last, place.clock.seconds
        looks += LOAD * elapsed if elapsed > 10 else 0.0
        return Sample(looks, 0.0, at=last, speed=SPEED, state=read_machine())

    work(replace(lab, worker=replace(lab.worker, read_load=read_load)), place.program)
    history, baseline = history_of(place), history_of(place).baseline
    assert baseline is not None
    most = 2 * (1 + place.program.settings.disturbance.max_repeats)
    assert most == max(tries(baseline))
    assert () == retakes_due(history)


def test_a_fault_meanwhile_is_said_and_costs_nothing(tmp_path: Path) -> None:
    place = place_of(tmp_path, 2)

    def fault(spec: RunSpec) -> BaseException | None:
        is_retake = place.boxes.trainings == 4 and spec.run_id.startswith("night-0-")
        return SandboxError("the engine stumbled") if is_retake and spec.box == "train" else None

    place.boxes.fault = fault
    cores = lambda begun: LOAD if begun <= 3 else 0.0  # noqa: E731
    work(beside(place.begin("tpe"), place, cores), place.program)
    history = history_of(place)
    events = [entry.event for entry in read_ledger(place.directory)]
    notices = [e.kind for e in events if isinstance(e, Noticed)]
    assert "baseline_not_retaken" in notices
    assert history.ended is not None
    assert 2 == len(history.completed)
    assert [] == sessions.found(place.directory)


def test_the_same_files_are_not_run_a_third_time_when_they_were_disturbed_twice(
    tmp_path: Path,
) -> None:
    place = night(tmp_path, lambda begun: LOAD if begun > 3 else 0.0, attempts=4)
    history = history_of(place)
    assert {True} == {attempt.is_disturbed for attempt in history.completed}
    twice = replace(history.completed[0])
    again = replace(twice, started=twice.started.model_copy(update={"attempt": 99}))
    files = twice.started.files
    history.attempts = [a for a in history.attempts if a.started.files != files]
    assert find_settled(history, files) is None
    history.attempts += [twice]
    assert find_settled(history, files) is None
    history.attempts += [again]
    assert again is find_settled(history, files)


def test_a_run_of_the_baseline_beside_a_test_must_be_as_undisturbed_as_the_test(
    tmp_path: Path,
) -> None:
    place = place_of(tmp_path, 4)

    def cores(begun: int) -> float:
        trained = [spec.run_id for spec in place.boxes.runs if spec.box == "train"]
        return LOAD if begun > 3 and trained[-1].startswith("night-0-") else 0.0

    place.boxes.luck = lambda noise: noise + (10 if cores(place.boxes.trainings) else 0.0)
    work(beside(place.begin("tpe"), place, cores), place.program)
    history, baseline = history_of(place), history_of(place).baseline
    assert baseline is not None
    assert len(baseline.trainings) > 3
    assert max(baseline.values().values()) < 4
    events = [entry.event for entry in read_ledger(place.directory)]
    assert any(isinstance(e, Noticed) and e.kind == "best_failed" for e in events)
    # Nothing scored beside the test, so nothing may be kept by it.
    assert history.best is not None
    assert baseline.number == history.best.number
    assert [] == sessions.found(place.directory)


def test_a_retake_that_cannot_be_scored_takes_nothing_away(tmp_path: Path) -> None:
    place = place_of(tmp_path, 3)

    def outcome(spec: RunSpec, result: RunResult, _: Path | None) -> RunResult:
        is_retake = place.boxes.trainings > 4 and spec.run_id.startswith("night-0-")
        failed = {"outcome": Outcome.OUT_OF_MEMORY}
        return result.model_copy(update=failed if is_retake and spec.box == "model" else {})

    place.boxes.outcome = outcome
    lab = beside(place.begin("tpe"), place, lambda begun: LOAD if begun <= 3 else 0.0)
    work(lab, place.program)
    history, baseline = history_of(place), history_of(place).baseline
    assert baseline is not None
    assert max(tries(baseline)) > 1
    assert {*baseline.started.seeds} == {*baseline.values()} == baseline.provisional
    assert history.best is not None
    assert history.repeats.noise() is not None
