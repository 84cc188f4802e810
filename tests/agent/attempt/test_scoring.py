"""Tests of a score's boxes: one after another, and nothing that two of them see."""

from __future__ import annotations

import json
import random
import re
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agent.attempt.boxes import model_spec, scorer_spec, with_own_copies
from agent.attempt.decide import scored_by_boxes
from agent.attempt.disturbance import Sample, Usual
from agent.attempt.lab import Trial, Worker
from agent.attempt.scoring import ScoringBoxes
from agent.attempt.sheet import Pace, free_pace_of, left_seconds_of
from agent.attempt.trial import score_split
from agent.program import load_program
from agent.record.attempts import TrialKey
from agent.record.events import RunFinished, RunStarted, Scored
from agent.settings import Budget
from sandbox import DockerExecutor, Outcome, RunSpec, SandboxError
from sandbox.contract.run import RunResult
from tests.support.boxes import in_session, python_spec
from tests.support.clock import Clock
from tests.support.executors import FakeExecutor
from tests.support.histories import STATE, Night, baseline, scored, start
from tests.support.labs import scoring_lab

ROOT = Path(__file__).parents[3]
SHEET = {"metric": "m", "value": 1.0, "valid": True, "reason": None, "explanation": ""}
SLOW = {"value": None, "valid": False, "reason": "too_slow", "explanation": "no answer in time"}


@dataclass
class Watched:
    """An executor that takes down what its boxes see and who is there at the same time."""

    bad: str = ""
    """The end of the name of a model box that ends badly."""
    slow: int = 0
    """How many scores come to nothing because answers did not come in time."""
    scores: int = 0
    seen: dict[str, set[tuple[int, int, int]]] = field(default_factory=dict)
    alive: set[str] = field(default_factory=set)
    together: list[set[str]] = field(default_factory=list)
    well: FakeExecutor = field(default_factory=lambda: FakeExecutor(Clock(), prints={"": ""}))
    """Whose boxes all end well."""

    def answers(self) -> bool:
        return True

    def run(self, spec: RunSpec, *, channel: socket.socket, **how: Any) -> RunResult:
        name = re.sub(r"^scoring-\d+-", "", spec.run_id)
        self.seen[name] = {
            (found.st_dev, found.st_ino, found.st_ctime_ns)  # a number is used again
            for mount in spec.mounts
            for path in mount.source.rglob("*")
            if (found := path.stat()) and path.is_file()
        }
        self.alive.add(name)
        self.together.append(set(self.alive))
        if spec.box == "scorer":
            with suppress(ConnectionError):  # no more boxes come
                self._score(channel, int(spec.argv[spec.argv.index("--checks") + 1]))
            self.scores += 1
            sheet = SHEET | {"details": {}} | (SLOW if self.scores <= self.slow else {})
            (how["output_dir"] / "score.json").write_text(json.dumps(sheet))
        else:
            assert b"ask" == channel.recv(3)
        self.alive.discard(name)
        result = self.well.run(spec)
        failed = {"outcome": Outcome.FAILED, "exit_code": 1}
        is_bad = bool(self.bad) and name.endswith(self.bad)
        return result.model_copy(update=failed) if is_bad else result

    def _score(self, channel: socket.socket, checks: int) -> None:
        """Ask each box once: the next one is brought when it is wished for."""
        for number in range(1 + checks):
            if number:
                channel.sendall(b"next")
            _, handles, _, _ = socket.recv_fds(channel, 16, 1)
            for handle in handles:
                with socket.socket(fileno=handle) as box:
                    box.sendall(b"ask")


@dataclass
class Load:
    """A machine on which others keep some cores busy while a score is taken, try after try."""

    executor: Watched
    busy: Sequence[float]
    looks: int = 0

    def __call__(self, _: Any) -> Sample:
        self.looks += 1
        used = sum(100.0 * cores for cores in self.busy[: self.executor.scores])
        return Sample(used, 0.0, at=100.0 * self.looks, speed=1000.0, state=STATE)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with what the boxes of a score see."""
    for name in ("files/train.py", "checkpoint/model.pt", "fixed/evaluate.py", "data/val/tokens"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


def worker_at(place: Path, executor: Any) -> Worker:
    settings = load_program(ROOT / "program.md").settings
    image = "sha256:" + "0" * 64
    copies = {"model": image, "check": image}
    given = {"session": "scoring", "image_id": image, "copies": copies, "environment": {}}
    return scoring_lab(place, settings, executor, data_dir=place / "data", **given).worker


def trial_of(worker: Worker, checks: int) -> Trial:
    settings = worker.settings
    return Trial(
        id="scoring",
        purpose="attempt",
        attempt=0,
        seed=1,
        files={},
        budget=settings.budget,
        limits=settings.train_limits(),
        splits=("val",),
        checks=checks,
        free=None,
        left_seconds=0.0,
        usual=Usual(cores=0.0, speed=None),
        past=None,
        counts_when_disturbed=False,
        is_begun=True,
    )


def scored_by(executor: Watched, place: Path, checks: int, busy: Sequence[float] = ()) -> list[Any]:
    """What a score puts on record, while others keep so many cores busy during each try."""
    load = Load(executor, busy)
    given: dict[str, Any] = {"read_load": load, "sleep": lambda _: None}
    worker = replace(worker_at(place, executor), **given)
    names = (f"scoring-{number}" for number in count())
    steps = score_split(
        worker, trial_of(worker, checks), names, place / "files", place / "checkpoint", "val"
    )
    return [event for event, _ in steps]


@pytest.mark.parametrize("checks", [0, 1, 3])
def test_model_boxes_are_never_there_at_once_and_see_no_file_of_each_other(
    place: Path, checks: int
) -> None:
    executor = Watched()

    events = scored_by(executor, place, checks)

    names = ["model", *(f"check-{number + 1}" for number in range(checks))]
    assert {"scorer", *names} == set(executor.seen)
    assert all(len(there - {"scorer"}) <= 1 for there in executor.together)
    everything = [file for files in executor.seen.values() for file in files]
    assert len(everything) == len(set(everything)) == 2 + 3 * len(names)
    assert isinstance(events[-1], Scored)
    assert (1.0, checks) == (events[-1].value, events[-1].checks)
    assert [] == list((place / "boxes").iterdir())


def test_without_copies_of_their_own_the_boxes_would_meet(place: Path) -> None:
    worker = worker_at(place, Watched())
    first, second = (
        {mount.source for mount in spec.mounts}
        for spec in (
            model_spec(worker, name, place / "files", place / "checkpoint") for name in ("a", "b")
        )
    )
    assert first == second


def test_a_score_whose_boxes_would_meet_is_refused(place: Path) -> None:
    worker, output = worker_at(place, Watched()), place / "output"
    output.mkdir()
    scorer = scorer_spec(worker, "scoring-0-scorer", seed=1, split="val", checks=1)
    first, second = (
        model_spec(worker, f"scoring-0-{name}", place / "files", place / "checkpoint")
        for name in ("model", "check-1")
    )
    with ScoringBoxes(worker.run, scorer, output, brings_boxes=True) as scoring:
        scoring.ask(first)
        with pytest.raises(SandboxError, match="would see one file"):
            scoring.ask(second)


def test_a_box_is_asked_for_only_once_the_one_before_has_ended(place: Path) -> None:
    events = scored_by(Watched(), place, 2)

    told = [
        (event.spec.run_id if isinstance(event, RunStarted) else event.result.run_id)
        for event in events
        if isinstance(event, RunStarted | RunFinished)
    ]
    models = [name for name in told if not name.endswith("scorer")]
    assert [f"scoring-0-{name}" for name in ("model", "check-1", "check-2")] == models[::2]
    assert models[::2] == models[1::2]


def test_after_a_model_box_that_ends_badly_no_other_one_is_started(place: Path) -> None:
    executor = Watched(bad="model")

    events = scored_by(executor, place, 2)

    assert {"scorer", "model"} == set(executor.seen)
    assert "model_box_failed" == events[-1].reason


def test_before_each_check_box_and_no_other_its_images_pages_are_forgotten(place: Path) -> None:
    executor, check = Watched(), "sha256:" + "1" * 64
    told: list[tuple[str, set[str], set[str]]] = []
    worker = worker_at(place, executor)
    worker = replace(
        worker,
        copies={**worker.copies, "check": check},
        forget_pages=lambda image: told.append((image, set(executor.seen), set(executor.alive))),
    )
    files, checkpoint = place / "files", place / "checkpoint"
    names = iter(["scoring-0"])
    list(score_split(worker, trial_of(worker, 2), names, files, checkpoint, "val"))
    before = {"scorer", "model"}
    assert [(check, before, {"scorer"}), (check, before | {"check-1"}, {"scorer"})] == told


def test_copies_are_equal_and_gone_afterwards(place: Path) -> None:
    worker = worker_at(place, Watched())
    spec = model_spec(worker, "a", place / "files", place / "checkpoint")
    with with_own_copies(spec, place / "sees") as copied:
        texts = [next(mount.source.iterdir()).read_text() for mount in copied.mounts]
        assert [mount.target for mount in spec.mounts] == [mount.target for mount in copied.mounts]
        assert ["files/train.py", "checkpoint/model.pt", "fixed/evaluate.py"] == texts
    assert not (place / "sees").exists()


@pytest.mark.parametrize(
    ("slow", "busy", "tries"),
    [
        (0, [], 1),
        (1, [], 1),  # nobody else is to blame
        (1, [9.0], 2),
        (2, [9.0, 9.0], 3),
        (9, [9.0] * 9, 3),  # a machine that is never quiet
        (0, [9.0], 1),  # a score that came in time counts, and no other is tried for
    ],
)
def test_a_score_that_took_too_long_beside_others_is_taken_again(
    place: Path, slow: int, busy: list[float], tries: int
) -> None:
    executor = Watched(slow=slow)

    events = scored_by(executor, place, 0, busy)

    scores = [event for event in events if isinstance(event, Scored)]
    assert tries == len(scores) == executor.scores
    assert (None if slow < tries else "disturbed" if busy else "too_slow") == scores[-1].reason


# What two boxes that see one file can tell each other

OFFSET = 123_456_789_012
HOLDS = f"""
import fcntl, struct, time
file = open("/shared/evaluate.py")
fcntl.fcntl(file, fcntl.F_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, {OFFSET}, 1, 0))
print("held", flush=True)
time.sleep(60)
"""
READS = """
import fcntl, struct
with open("/shared/evaluate.py") as file:
    asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 1, 0, 0)
    kind, _, start, _, _ = struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, asked))
print("read", None if kind == fcntl.F_UNLCK else start)
"""


def read_beside(
    executor: DockerExecutor, image_id: str, folder: Path, copies: bool, place: Path
) -> str:
    """What one box reads of a number that another box, alive, has put into a lock."""
    done, held = threading.Event(), threading.Event()
    holder, reader = (
        in_session(python_spec(code, image=image_id, mounts={folder: "/shared"}), f"locks-{name}")
        for name, code in (("holds", HOLDS), ("reads", READS))
    )
    with ThreadPoolExecutor() as pool:
        one = pool.submit(
            executor.run, holder, on_log=lambda _: held.set(), should_stop=done.is_set
        )
        try:
            assert held.wait(60)
            with with_own_copies(reader, place / "copies") as separate:
                return executor.run(separate if copies else reader).log.head
        finally:
            done.set()
            one.result()


@pytest.mark.docker
def test_a_lock_carries_a_number_between_boxes_that_see_one_file_and_only_then(
    engine: Any, image: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "evaluate.py").write_text("")
    executor = DockerExecutor(engine.base_url, engine.api_version, tmp_path / "runs")

    assert f"read {OFFSET}\n" == read_beside(executor, image.image_id, folder, False, tmp_path)
    assert "read None\n" == read_beside(executor, image.image_id, folder, True, tmp_path)


# Whoever trains on while it is loaded


def sheet_of(load_seconds: float, model_seconds: float) -> bytes:
    details = {"load_seconds": load_seconds, "model_seconds": model_seconds}
    return json.dumps(SHEET | {"details": details}).encode()


FREE = Pace(loading=10.0, in_all=20.0)


@pytest.mark.parametrize(
    ("load_seconds", "model_seconds", "left_seconds", "reason"),
    [
        (9.0, 19.0, 0.0, None),
        (12.0, 15.0, 0.0, "over_budget"),  # before it is ready, or in its first answers
        (3.0, 25.0, 0.0, "over_budget"),  # a little in each answer
        (12.0, 15.0, 2.5, None),  # the training ended early
        (70.0, 75.0, 50.0, "over_budget"),
    ],
)
def test_loading_beyond_what_is_free_shares_the_budget_with_the_training(
    load_seconds: float, model_seconds: float, left_seconds: float, reason: str | None
) -> None:
    key, sheet = TrialKey("attempt", 1, 7), sheet_of(load_seconds, model_seconds)

    found = scored_by_boxes(key, "val", sheet, [], None, FREE, left_seconds)

    assert reason == found.reason
    assert (found.value is None) == (reason is not None)


def test_without_that_bound_two_budgets_make_a_score() -> None:
    key, sheet = TrialKey("attempt", 1, 7), sheet_of(70.0, 75.0)
    assert 1.0 == scored_by_boxes(key, "val", sheet, [], None, None, 0.0).value


def test_a_scorer_that_says_nothing_of_time_is_not_held_to_it() -> None:
    sheet = json.dumps(SHEET | {"details": {}}).encode()
    assert (
        1.0 == scored_by_boxes(TrialKey("attempt", 1, 7), "val", sheet, [], None, FREE, 0.0).value
    )


def test_what_is_free_is_three_times_the_baselines_and_ten_seconds_at_least() -> None:
    night = Night()
    start(night)
    assert free_pace_of(night.history) is None
    baseline(night, random.Random(1))
    [*scores] = night.history.attempt(0).scores
    for score, took in zip(scores, (2.0, 5.0, 4.0), strict=True):
        score.details.update({"load_seconds": took, "model_seconds": 2 * took})
    assert Pace(loading=12.0, in_all=24.0) == free_pace_of(night.history)
    for score in scores:
        score.details.update({"load_seconds": 1.0, "model_seconds": 3.0})
    assert Pace(loading=10.0, in_all=10.0) == free_pace_of(night.history)


def test_a_budget_of_tokens_leaves_no_seconds_for_loading() -> None:
    wall, tokens = (
        Budget(kind=kind, seconds=60, tokens=count, grace_seconds=5)  # type: ignore[arg-type]
        for kind, count in (("wall", None), ("tokens", 1000))
    )
    result = SimpleNamespace(result=SimpleNamespace(wall_seconds=45.0))
    assert 15.0 == left_seconds_of(cast(RunFinished, result), wall)
    assert 0.0 == left_seconds_of(cast(RunFinished, result), tokens)


# The newest score of a seed


def test_a_newer_score_takes_an_older_ones_place_also_without_a_value() -> None:
    made = Night()
    start(made)
    baseline(made, random.Random(1))
    before = made.history.attempt(0).values()

    made.add(scored(0, 1, before[1] - 0.5))
    assert before | {1: before[1] - 0.5} == made.history.attempt(0).values()
    made.add(scored(0, 2, None, "looks_ahead"))
    assert [1, 3] == sorted(made.history.attempt(0).values())
    assert made.history.trial(TrialKey("attempt", 0, 2)).value("val") is None
