"""Nights with servers of other habits: each ends by itself, with a reason and the right spend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from agent.morning.audit import audit
from agent.record.chain import read_ledger
from agent.record.events import ModelCalled, Noticed, RetryWaited
from tests.support.habits import all_habits
from tests.support.minds import Scene

HABITS = all_habits(Path(__file__).parent / "habits")


Line = tuple[str, ...]


@pytest.mark.parametrize("name", HABITS)
def test_a_night_with_this_habit_ends_as_it_should(name: str, tmp_path: Path) -> None:
    habit = HABITS[name]
    settings = {key: dict(values) for key, values in habit.settings.items()}
    settings.get("researcher", {}).pop("then", None)
    scene = Scene(tmp_path, **settings)
    ended = scene.play(habit.script(scene.mind.answer))
    words = [ended.explanation, *(e.error for e in scene.events(RetryWaited))]
    words += [e.explanation for e in scene.events(Noticed)]
    assert habit.ends == ended.reason.value, words
    assert set(habit.notices) <= set(scene.notices()), words
    assert habit.says in "\n".join(words)
    assert "not-a-real-key" not in "\n".join(words)
    assert [] == scene.server.unplanned
    assert [] == audit(scene.place.directory, read_ledger(scene.place.directory))
    spend, calls = scene.history.spend, len(scene.server.requests)
    assert (habit.calls, habit.unpriced) == (calls, bool(spend.unpriced_calls))
    if (
        all(call.stop_reason != "lost" for call in scene.events(ModelCalled))
        and not habit.miscounts
    ):
        assert spend.unpriced_calls or spend.usd == pytest.approx(scene.server.billed_usd)


def test_there_are_sixty_habits_and_more_and_the_table_of_them_is_kept(
    golden: Callable[[str, str], None],
) -> None:
    assert 60 < len(HABITS)
    lines = [
        f"| {habit.does} | {habit.ends} | {habit.calls} | {'no' if habit.unpriced else 'yes'} |"
        for habit in HABITS.values()
    ]
    head = ["| the server | the night ends with | calls | money is known |", "|---|---|---|---|"]
    golden("habits.md", "\n".join([*head, *lines]) + "\n")
