"""Whatever machines, boxes and programs do, a night goes on by decisions and ends with a reason."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.attempt.disturbance import ReadMachine, Sample
from agent.attempt.lab import Lab
from agent.record.chain import read_ledger
from agent.record.events import MachineState
from agent.record.history import fold
from sandbox.contract.run import Outcome, RunResult, RunSpec
from tests.support import sessions
from tests.support.histories import STATE
from tests.support.labs import work
from tests.support.nights import Place

LUCK: dict[str, Callable[[random.Random, float], float]] = {
    "none": lambda _chance, _noise: 0.0,
    "the clock's": lambda chance, _noise: chance.gauss(0, 1e-6),
    "as ever": lambda _chance, noise: noise,
    "much": lambda chance, _noise: chance.gauss(0, 0.5),
    "with outliers": lambda chance, noise: noise + (5.0 if chance.random() < 0.1 else 0.0),
}
REFUSALS = ("looks_ahead", "answers_change", "not_finite", "too_slow")
ENDS = (Outcome.FAILED, Outcome.TIMED_OUT, Outcome.OUT_OF_MEMORY, Outcome.INTERRUPTED)


class Weather:
    """What happens to a night's machine and boxes, at random."""

    def __init__(self, seed: int, place: Place) -> None:
        self.chance, self.place = random.Random(seed), place
        self.luck = LUCK[self.chance.choice([*LUCK])]
        self.shift, self.rate = 0.0, self.chance.choice([0.0, 0.02, 0.1])
        self.used, self.last, self.cores, self.speed = 0.0, 0.0, 0.0, 1000.0

    def lucky(self, noise: float) -> float:
        if self.chance.random() < 0.05:  # from here on it is another machine
            self.shift += self.chance.choice([-0.3, 0.3])
        return self.luck(self.chance, noise) + self.shift

    def outcome(self, spec: RunSpec, result: RunResult, output: Path | None) -> RunResult:
        if self.chance.random() >= self.rate:
            return result
        if spec.box == "scorer" and output is not None and (output / "score.json").exists():
            told = json.loads((output / "score.json").read_text())
            told |= {"value": None, "valid": False, "reason": self.chance.choice(REFUSALS)}
            (output / "score.json").write_text(json.dumps(told))
            return result
        return result.model_copy(update={"outcome": self.chance.choice(ENDS)})

    def read_load(self, read_machine: ReadMachine) -> Sample:
        now = self.place.clock.seconds
        self.used += (now - self.last) * self.cores
        self.last = now
        if self.chance.random() < 0.1:  # somebody comes, or goes
            self.cores = self.chance.choice([0.0, 0.0, 2.0 + 2 * (os.cpu_count() or 1)])
            self.speed = self.chance.choice([1000.0, 1000.0, 300.0])
        return Sample(self.used, 0.0, at=now, speed=self.speed, state=read_machine())

    def machine(self) -> MachineState:
        heat = 1 if self.chance.random() < 0.05 else 0
        return STATE.model_copy(update={"throttle_events": self.chance.randrange(1 + heat)})


def stormy(lab: Lab, weather: Weather) -> Lab:
    worker = replace(lab.worker, read_load=weather.read_load, read_machine=weather.machine)
    return replace(lab, worker=worker)


@pytest.mark.parametrize("seed", range(8))
def test_no_history_is_one_that_the_night_cannot_go_on_from(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    changes: dict[str, dict[str, Any] | None] = {
        "session": {"attempts": 6, "max_failures_in_a_row": 50},
        "noise": {
            "baseline_repeats": chance.choice([2, 3]),
            "max_repeats": chance.choice([3, 4]),
            "check_best_every": chance.choice([1, 3]),
            "smallest_gain": chance.choice([None, 0.05]),
        },
        "disturbance": {
            "max_other_cores": 0.06,
            "min_speed": 0.8,
            "max_repeats": chance.choice([0, 1]),
        },
        "economy": {"early_stopping": "median", "stop_after": 0.33},
    }
    place = Place(tmp_path, changes=changes)
    weather = Weather(seed, place)
    place.boxes.luck, place.boxes.outcome = weather.lucky, weather.outcome
    place.boxes.shows_progress = True
    work(stormy(place.begin("tpe"), weather), place.program)
    ended = fold(read_ledger(place.directory))
    assert ended.ended is not None
    assert all(not attempt.open for attempt in ended.attempts)

    # The rest of it on another machine.
    sessions.forge(
        place.directory, lambda lines: lines[0]["event"]["machine"].update(cpu="another one")
    )
    later = replace(place, changes={**changes, "session": {"attempts": 9}})
    later.boxes.luck, later.boxes.outcome = weather.lucky, weather.outcome
    later.boxes.shows_progress = True
    if ended.baseline is not None:
        work(stormy(later.resume(), weather), later.program)
    assert [] == sessions.found(place.directory)
