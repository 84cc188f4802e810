from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent.attempt.decide import DID_NOT_HOLD, Decision, Measure, Rescore, checks_due, next_step
from agent.attempt.experiment import run_attempt
from agent.attempt.lab import fresh_seeds
from agent.morning.audit import audit
from agent.night.waiting import for_the_night
from agent.record.chain import read_ledger
from agent.record.events import AttemptStarted, Noticed, Scored, Verdict
from agent.record.history import fold
from tests.support import histories
from tests.support.histories import Night
from tests.support.labs import work
from tests.support.nights import TOY, Place

FRESH = tuple(range(11, 19))
HIDDEN = [0.05, 0.02, 0.01, 0.004, 0.003, 0.002, 0.0015, 0.001]
"""What could hide behind so many checks, as a scorer says it."""


def score(made: Night, attempt: int, seed: int, value: float, checks: int = 0) -> Scored:
    scored = histories.scored(attempt, seed, value, put_blob=made.put_blob)
    return scored.model_copy(update={"checks": checks})


def tried(
    center: float,
    *,
    noise: float = histories.NOISE,
    best_now: float = 2.35,
    hidden: list[float] | None = None,
    refuses: Callable[[Rescore], bool] = lambda _: False,
) -> tuple[Night, list[Measure | Rescore], Decision]:
    """A night's first attempt, whose scores lie about a center: what it needed, what became of it.

    Args:
        center: its mean; the baseline's was 2.35.
        noise: its own.
        best_now: what the best scores beside it.
        hidden: what the baseline's sheet says could hide.
        refuses: whether a check finds something.
    """
    made, chance = Night(), random.Random(1)
    histories.start(made)
    histories.baseline(made, chance)
    if hidden:
        for scored in made.history.attempts[0].scores:
            scored.details["hidden_gain"] = hidden
    made.add(
        AttemptStarted(
            attempt=1, kind="candidate", hypothesis="h", researcher="tpe",
            files={"train.py": made.put_blob(b"DEPTH = 5\n")}, diff=made.put_blob(b""),
            parent=0, seeds=(1, *FRESH),
        )
    )  # fmt: skip
    steps: list[Measure | Rescore] = []
    while not isinstance(step := next_step(made.history, 1, made.get_blob), Decision):
        steps.append(step)
        if isinstance(step, Rescore):
            value = made.history.attempts[1].tested[step.seed].value
            assert value is not None
            again = score(made, 1, step.seed, value, step.checks)
            if refuses(step):
                again = again.model_copy(update={"value": None, "reason": "looks_ahead"})
            made.add(again)
            continue
        about, spread = (center, noise) if step.attempt else (best_now, histories.NOISE)
        histories.boxes(made, attempt=step.attempt, seed=step.seed)
        made.add(score(made, step.attempt, step.seed, about + chance.gauss(0, spread)))
    return made, steps, step


def test_what_is_no_better_is_trained_once() -> None:
    _, steps, decision = tried(2.36)

    assert [Measure(1, 1)] == steps
    assert (Verdict.DISCARDED, "not_better") == (decision.verdict, decision.reason)


def test_a_keep_takes_three_fresh_seeds_and_the_best_twice_beside_it() -> None:
    made, steps, decision = tried(2.2)
    own = [step.seed for step in steps if step.attempt == 1]
    beside = [step.seed for step in steps if step.attempt == 0]

    assert Verdict.KEPT is decision.verdict
    assert [1, 11, 12, 13] == own[:4]
    assert [11, 12] == beside[:2]
    assert decision.arithmetic is not None
    assert len(own) - 1 == len(decision.arithmetic.candidate_values), "the first run counts no more"
    assert made.history.attempts[1].confirmation in decision.explanation
    assert f"confirmed: {len(own) - 1} seeds" == made.history.attempts[1].confirmation


def test_each_score_that_counts_is_checked_as_often_as_the_gain_is_small() -> None:
    _, steps, decision = tried(2.2, hidden=HIDDEN)
    again = [step for step in steps if isinstance(step, Rescore)]
    assert decision.arithmetic is not None
    checks = next(n for n, g in enumerate(HIDDEN, 1) if g < decision.arithmetic.required_gain)

    assert Verdict.KEPT is decision.verdict
    assert {checks} == {step.checks for step in again}
    assert len(decision.arithmetic.candidate_values) == len(again)
    assert f"{checks * len(again)} checks" in decision.explanation


def test_one_check_that_finds_something_is_the_end() -> None:
    _, steps, decision = tried(2.2, hidden=HIDDEN, refuses=lambda step: step.seed == 12)

    assert (Verdict.INVALID, "looks_ahead") == (decision.verdict, decision.reason)
    assert isinstance(steps[-1], Rescore)


def test_what_could_hide_behind_all_checks_must_be_gained_as_well() -> None:
    _, _, kept = tried(2.2, hidden=[0.12] * 8)
    _, steps, refused = tried(2.2, hidden=[0.2] * 8)

    assert kept.arithmetic is not None
    assert (Verdict.KEPT, 0.12) == (kept.verdict, kept.arithmetic.required_gain)
    assert Verdict.DISCARDED is refused.verdict
    assert not [step for step in steps if isinstance(step, Rescore)]


def test_a_scorer_that_says_nothing_of_what_hides_is_asked_once() -> None:
    made, steps, _ = tried(2.2)

    assert not [step for step in steps if isinstance(step, Rescore)]
    assert (0, 0.0) == checks_due(made.history, 0.01)


def test_a_machine_that_became_faster_meanwhile_keeps_nothing() -> None:
    _, _, decision = tried(2.2, best_now=2.2)

    assert Verdict.DISCARDED is decision.verdict
    assert decision.reason in (DID_NOT_HOLD, "unproven")


def test_a_noisy_candidate_of_the_same_gain_is_not_kept() -> None:
    _, steps, decision = tried(2.33, noise=0.08)

    assert Verdict.DISCARDED is decision.verdict
    assert len(steps) <= 1 + len(FRESH) + 8


@pytest.mark.parametrize("used", [(), (1, 2, 3)])
def test_fresh_seeds_are_none_that_were_used_and_never_the_same_twice(
    used: tuple[int, ...],
) -> None:
    drawn = [fresh_seeds(8, used) for _ in range(20)]

    assert 160 == len({seed for seeds in drawn for seed in seeds} - {*used})
    assert all(0 < seed < 2**31 for seeds in drawn for seed in seeds)


def played(directory: Path, **noise: Any) -> Place:
    """A night of a program whose seed changes nothing."""
    place = Place(directory, changes={"session": {"attempts": 6}, "noise": noise})
    place.boxes.luck = lambda _: 0.0
    work(place.begin("tpe"), place.program)
    assert [] == audit(place.directory, read_ledger(place.directory))
    return place


def test_nothing_is_kept_where_repeats_do_not_show_what_luck_does(tmp_path: Path) -> None:
    history = fold(read_ledger(played(tmp_path).directory))
    reasons = {a.finished.reason for a in history.completed if a.finished and a.values()}

    assert {"noise_unknown"} == reasons
    assert history.best is history.baseline
    assert history.baseline is not None
    assert history.baseline.finished is not None
    assert "does not heed NIGHTLAB_SEED" in history.baseline.finished.explanation


def test_that_seeds_do_nothing_is_said_after_the_second_run(tmp_path: Path) -> None:
    events = [entry.event for entry in read_ledger(played(tmp_path).directory)]
    said = next(n for n, e in enumerate(events) if isinstance(e, Noticed))
    before = [e for e in events[:said] if isinstance(e, Scored)]
    assert 2 == len(before)
    assert "noise_unknown" == events[said].kind  # type: ignore[union-attr]


PINS = "import random\n\nrandom.seed(1337)\nX = 1.0  # [0.5..5.0]\nY = 4  # {2, 4, 8, 16}\n"


def pinned(directory: Path) -> Place:
    """A session whose program gives its own seed, with its first attempt made."""
    workspace = directory / "workspace"
    shutil.copytree(TOY / "workspace", workspace)
    (workspace / "train.py").write_text(PINS)
    return Place(directory / "runs", workspace=workspace)


def test_a_program_that_gives_its_own_seed_is_told_so_after_its_first_run(tmp_path: Path) -> None:
    place = pinned(tmp_path)
    with (lab := for_the_night(place.begin("tpe"))).ledger:
        run_attempt(lab, "baseline", "as it is", "nightlab")
        events = [entry.event for entry in lab.ledger.entries]
    said = next(n for n, e in enumerate(events) if isinstance(e, Noticed))
    assert 1 == sum(isinstance(e, Scored) for e in events[:said])


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("1337", "1338", "only_a_seed"),
        ("random.seed(1337)\n", "", "only_a_seed"),
        ("X = 1.0", "X = 2.0", "noise_unknown"),
    ],
)
def test_another_seed_is_no_attempt_whoever_proposes_it(
    old: str, new: str, reason: str, tmp_path: Path
) -> None:
    place = pinned(tmp_path)
    with (lab := place.begin("claude")).ledger:
        run_attempt(lab, "baseline", "as it is", "nightlab")
        lab.workspace.write("train.py", PINS.replace(old, new).encode())
        trained = place.boxes.trainings
        attempt = run_attempt(lab, "candidate", "a better seed", "claude")
        assert attempt.finished is not None
        assert reason == attempt.finished.reason
        assert (reason == "only_a_seed") == (trained == place.boxes.trainings)
        assert PINS == lab.workspace.read_text("train.py")
    assert [] == audit(place.directory, read_ledger(place.directory))


def test_there_a_gain_as_large_as_the_person_says_is_kept(tmp_path: Path) -> None:
    history = fold(read_ledger(played(tmp_path, smallest_gain=0.05).directory))

    assert history.best is not history.baseline
