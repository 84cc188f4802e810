"""What a review and a replay make of a night, without an engine."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from agent.morning.ablation import Effect, ReviewTable, dispensable
from agent.morning.replay import replay
from agent.morning.review import review
from agent.record.events import ReplayFinished
from agent.report.ablation_table import notes, replay_lines
from sandbox.contract.errors import NightlabError
from sandbox.contract.run import Outcome, RunResult, RunSpec
from tests.support.labs import work
from tests.support.messages_server import Block, MessagesServer, Turn, say, tool
from tests.support.nights import Place

TOKENS = {"kind": "tokens", "tokens": 1000}


def night_of(root: Path, *changes: tuple[str, str], **settings: dict[str, Any]) -> Place:
    """A session whose researcher makes exactly these changes."""
    place = Place(root, changes=settings)
    turns = [*(_turn(*change) for change in changes), say(tool("finish", reason="enough"))]
    with MessagesServer(turns) as server:
        environ = {"ANTHROPIC_API_KEY": "not-a-real-key", "ANTHROPIC_BASE_URL": server.url}
        work(place.begin("claude"), place.program, "claude", environ=environ)
    return place


def _turn(old: str, new: str) -> Turn:
    edit: Block = tool("edit", file_path="train.py", old_string=old, new_string=new)
    return say(edit, tool("run", hypothesis=f"{old} to {new}"))


def reviewed(place: Place, seeds: int = 1) -> ReviewTable:
    lab = place.open()
    with lab.ledger:
        return review(lab, seeds, lambda _line: None)


def replayed(place: Place, attempt: int) -> ReplayFinished:
    lab = place.open()
    with lab.ledger:
        return replay(lab, attempt, lambda _line: None)


def test_a_change_that_was_built_over_is_measured_as_a_step(tmp_path: Path) -> None:
    table = reviewed(night_of(tmp_path, ("X = 1.0", "X = 2.0"), ("X = 2.0", "X = 3.0")))

    first, second = table.changes
    assert ("step", Effect.REAL) == (first.how, first.effect)
    assert ("left_out", Effect.REAL) == (second.how, second.effect)
    assert "X = 2.0" in first.note
    assert "cannot be left out alone" in next(notes(table))


def test_a_change_that_others_need_is_called_needed(tmp_path: Path) -> None:
    place = night_of(tmp_path, ("X = 1.0", "X = 2.0"), ("Y = 4", "Y = 16"))

    def fail_without_the_first(
        spec: RunSpec, result: RunResult, _output_dir: Path | None
    ) -> RunResult:
        files = [mount.source / "train.py" for mount in spec.mounts if mount.target == "/workspace"]
        is_broken = any("X = 1.0" in f.read_text() and "Y = 16" in f.read_text() for f in files)
        return result.model_copy(update={"outcome": Outcome.FAILED} if is_broken else {})

    place.boxes.outcome = fail_without_the_first
    first, second = reviewed(place).changes
    assert (Effect.NEEDED, Effect.REAL) == (first.effect, second.effect)


def test_where_seeds_do_nothing_a_review_cannot_tell(tmp_path: Path) -> None:
    place = night_of(tmp_path, ("X = 1.0", "X = 2.0"), ("Y = 4", "Y = 16"))
    place.boxes.luck = lambda _noise: 0.0
    table = reviewed(place, 2)

    assert {Effect.UNTESTED} == {change.effect for change in table.changes}
    assert () == dispensable(table)


def test_a_night_that_kept_nothing_has_nothing_to_review(tmp_path: Path) -> None:
    with pytest.raises(NightlabError, match="kept no change"):
        reviewed(night_of(tmp_path))


def test_with_a_token_budget_a_replay_is_equal_to_five_digits(tmp_path: Path) -> None:
    found = replayed(night_of(tmp_path, ("X = 1.0", "X = 3.0"), budget=TOKENS), 1)

    assert (True, "the same score to five digits") == (found.agrees, found.explanation)


def test_a_replay_that_differs_says_by_how_much(tmp_path: Path) -> None:
    place = night_of(tmp_path, budget=TOKENS)
    place.boxes.luck = lambda _noise: random.random()

    found = replayed(place, 0)

    assert not found.agrees
    assert "scores differ by up to 0." in found.explanation
    assert "DOES NOT AGREE" in replay_lines(found, is_self_reported=False)[-1]
