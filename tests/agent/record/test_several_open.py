"""Ledgers in which several attempts are open: folded, resumed, decided again."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from agent.attempt.decide import Decision, Measure, Rescore, next_step
from agent.candidate.workspace import Workspace
from agent.morning.derive import derive, differences
from agent.night.session import recover
from agent.record.events import (
    AttemptFinished,
    AttemptInterrupted,
    AttemptStarted,
    Event,
    SessionResumed,
    Verdict,
)
from agent.record.history import fold
from tests.support import histories
from tests.support.histories import Night
from tests.support.labs import in_directory, lab_in_memory

MEANS = {0: 2.35, 1: 2.40, 2: 2.20, 3: 2.28, 4: 2.15}
"""What each attempt's files score: 3 beats its parent and not 2, which is kept before it."""
OPEN = (1, 2, 3, 4)


@dataclass
class Lane:
    """What one attempt would put on record, until it is its turn."""

    made: Night
    waiting: deque[Event] = field(default_factory=deque)

    def add(self, event: Event, _after_seconds: float = 0.0) -> None:
        self.waiting.append(event)

    def put_blob(self, body: bytes) -> str:
        return self.made.put_blob(body)


def begun() -> Night:
    """A baseline, and four attempts that were made from it and are open."""
    made = Night()
    histories.start(made)
    histories.baseline(made, random.Random(0))
    for number in OPEN:
        event = AttemptStarted(
            attempt=number,
            kind="candidate",
            hypothesis=f"idea {number}",
            researcher="tpe",
            files={"train.py": made.put_blob(f"DEPTH = {number}\n".encode())},
            diff=made.put_blob(b""),
            parent=0,
            seeds=(1, *(100 * number + n for n in range(8))),
        )
        made.add(event)
    return made


def measured(made: Night, lane: Lane, step: Measure) -> None:
    """The events of one trial, as they will come."""
    chance = random.Random(f"{step.attempt} {step.seed}")
    value = MEANS[step.attempt] + chance.gauss(0, histories.NOISE)
    histories.boxes(cast(Night, lane), attempt=step.attempt, seed=step.seed)
    event = histories.scored(step.attempt, step.seed, round(value, 6), put_blob=made.put_blob)
    lane.add(event)


def decided_between_others(turns: random.Random) -> Night:
    """Four attempts to their ends, their events as mixed as chance has it."""
    made = begun()
    lanes = {number: Lane(made) for number in OPEN}
    while lanes:
        number = turns.choice(sorted(lanes))
        lane = lanes[number]
        if lane.waiting:
            made.add(lane.waiting.popleft())
            continue
        step = next_step(made.history, number, made.get_blob)
        if isinstance(step, Decision):
            made.add(step.finished(number, 10.0))
            del lanes[number]
        else:
            assert not isinstance(step, Rescore)
            measured(made, lane, step)
    return made


@pytest.fixture(scope="module", params=range(3))
def night(request: pytest.FixtureRequest) -> Night:
    return decided_between_others(random.Random(request.param))


def verdicts(night: Night) -> Iterator[tuple[int, AttemptFinished]]:
    events = ((place, entry.event) for place, entry in enumerate(night.entries))
    yield from ((n, e) for n, e in events if isinstance(e, AttemptFinished) and e.attempt)


def test_each_verdict_is_against_the_best_of_that_moment(night: Night) -> None:
    for place, event in verdicts(night):
        best = fold(night.entries[:place]).best
        assert best is not None
        assert event.arithmetic is not None
        assert event.arithmetic.against == best.number
    assert night.history.best is night.history.attempt(4)
    kept = [a.number for a in night.history.standing]
    assert kept == sorted(kept, key=lambda number: -MEANS[number])


def test_each_verdict_is_decided_again_from_the_record_alone(night: Night) -> None:
    for place, event in verdicts(night):
        due = derive(fold(night.entries[:place]), event, night.get_blob)
        assert due is not None
        assert [] == list(differences(event, due))


def test_a_test_has_only_what_was_measured_beside_it(night: Night) -> None:
    for number in OPEN:
        attempt = night.history.attempt(number)
        assert {key.seed for key in attempt.beside} <= set(attempt.started.seeds[1:])


def test_each_test_spends_a_share_of_doubt_of_its_own(night: Night) -> None:
    spent = [night.history.tests_before(attempt) for attempt in night.history.tests]
    assert spent == list(range(len(spent)))


def test_a_resume_closes_every_attempt_that_was_open_whenever_it_was_killed(
    night: Night, tmp_path: Path
) -> None:
    (tmp_path / "workspace").mkdir()
    first = next(n for n, e in enumerate(night.entries) if getattr(e.event, "attempt", 0) == 4)
    for killed in range(first + 1, len(night.entries), 3):
        cut = Night(night.now, night.entries[:killed], dict(night.blobs))
        before = fold(cut.entries)
        lab = lab_in_memory(cut, Workspace(tmp_path / "workspace", ("train.py",)))

        recover(in_directory(lab, tmp_path), removed_containers=(), engine={})

        going_on = tuple(attempt.number for attempt in before.open)
        events = [entry.event for entry in cut.entries[killed:]]
        resumed = next(e for e in events if isinstance(e, SessionResumed))
        closed = [e.attempt for e in events if isinstance(e, AttemptInterrupted)]
        assert going_on == resumed.interrupted_attempts == tuple(closed)
        after = cut.history
        assert [] == after.open
        assert [a.number for a in before.standing] == [a.number for a in after.standing]
        assert after.best is not None
        # What a cut-off test asked of the best is forgotten with it, and nothing else.
        fresh = {seed for n in going_on for seed in before.attempt(n).started.seeds[1:]}
        assert not fresh & after.best.values().keys()


def test_a_candidate_of_a_refused_parent_is_not_judged_by_another_best() -> None:
    made = begun()
    refused = histories.scored(0, 100, None, "looks_ahead", made.put_blob)
    histories.boxes(made, attempt=0, seed=100)
    made.add(refused)
    history = made.history
    assert history.attempt(1).beside == [history.attempt(0).key(100)]
    step = next_step(history, 1, made.get_blob)
    assert isinstance(step, Decision)
    assert (step.verdict, step.reason) == (Verdict.DISCARDED, "parent_dethroned")
