"""A budget of tokens: the program counts, and the seconds bound."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.attempt.decide import over_budget_seconds
from agent.morning.audit import audit
from agent.night.waiting import run_with_retries
from agent.record.curves import said_tokens
from agent.report.summary import summary
from agent.settings import Budget
from tests.support.histories import run_result
from tests.support.nights import Place

TOKENS = {"kind": "tokens", "tokens": 1000}


def counting(tokens: int) -> Callable[[bytes], bytes]:
    """Progress lines that count up to so many tokens in the pretended training's 20 steps."""

    def line(said: bytes) -> bytes:
        point = json.loads(said)
        return json.dumps(point | {"tokens": point["step"] * tokens // 20}).encode() + b"\n"

    return line


@pytest.mark.parametrize("kind", ["wall", "tokens"])
def test_the_seconds_are_a_limit_without_grace_in_both_kinds(kind: str) -> None:
    count = 1000 if kind == "tokens" else None
    budget = Budget.model_validate(
        {"kind": kind, "seconds": 100.0, "tokens": count, "grace_seconds": 60.0}
    )
    late, early = (run_result("r", "train", log="", wall_seconds=s) for s in (112.0, 99.0))
    assert 12.0 == over_budget_seconds("attempt", late, budget)
    assert 0.0 == over_budget_seconds("attempt", early, budget)
    assert 0.0 == over_budget_seconds("smoke-3", late, budget)


def test_a_program_behind_a_fence_ends_by_itself() -> None:
    given = {"kind": "fence", "seconds": 100.0, "grace_seconds": 60.0}
    late = run_result("r", "train", log="", wall_seconds=112.0)

    assert 0.0 == over_budget_seconds("attempt", late, Budget.model_validate(given))
    with pytest.raises(ValueError, match='has tokens but kind = "fence"'):
        Budget.model_validate(given | {"tokens": 9})


def test_a_curves_last_count_is_what_was_said() -> None:
    assert 90 == said_tokens([{"tokens": 40.0}, {"tokens": 90.0}, {"loss": 2.0}])
    assert said_tokens([{"loss": 2.0}]) is None


@pytest.mark.parametrize(
    ("said", "kinds"),
    [
        (1010, {"token_budget"}),
        (1100, {"token_budget", "tokens_over"}),
        (4000, {"token_budget", "tokens_over", "tokens_fast"}),
    ],
)
def test_what_is_said_beyond_the_budget_is_shown(
    tmp_path: Path, said: int, kinds: set[str]
) -> None:
    place = Place(tmp_path, changes={"budget": TOKENS, "economy": {"early_stopping": "off"}})
    place.boxes.shows_progress, place.boxes.log_line = True, counting(1000)
    with (lab := place.begin("tpe")).ledger:
        run_with_retries(lab, "baseline", "the files as they are", "nightlab")
        place.boxes.log_line = counting(said)
        text = lab.workspace.read_text("train.py")
        lab.workspace.write("train.py", text.replace("X = 1.0", "X = 0.5").encode())
        run_with_retries(lab, "candidate", "worse, so that it is trained once", "claude")
    entries = lab.ledger.entries
    shown = {one.kind: one.attempts for one in summary(entries).attention}
    assert kinds == {kind for kind in shown if kind.startswith("token")}
    assert all(shown[kind] == (1,) for kind in kinds - {"token_budget"})
    assert [] == audit(place.directory, entries)


def test_a_budget_of_seconds_says_nothing_of_tokens(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.boxes.shows_progress, place.boxes.log_line = True, counting(10**9)
    with (lab := place.begin("tpe")).ledger:
        run_with_retries(lab, "baseline", "the files as they are", "nightlab")
    assert not any(one.kind.startswith("token") for one in summary(lab.ledger.entries).attention)
