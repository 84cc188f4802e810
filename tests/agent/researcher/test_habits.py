"""Nights with servers of other habits: each ends by itself, with a reason and the right spend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from agent.morning.audit import audit
from agent.night.assemble import check_models
from agent.record.chain import read_ledger
from agent.record.events import ModelCalled, Noticed, RetryWaited
from agent.record.usage import Spend
from sandbox.contract.errors import UsageError
from tests.support.habits import all_habits
from tests.support.messages_server import MessagesServer, say, tool
from tests.support.minds import Scene

HABITS = all_habits(Path(__file__).parent / "habits")


Line = tuple[str, ...]


@pytest.mark.parametrize("name", HABITS)
def test_a_night_with_this_habit_ends_as_it_should(name: str, tmp_path: Path) -> None:
    habit = HABITS[name]
    settings = {key: dict(values) for key, values in habit.settings.items()}
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
    whole = [call for call in scene.events(ModelCalled) if call.stop_reason != "lost"]
    if len(whole) == len(scene.server.bills) and not (habit.miscounts or habit.unpriced):
        assert spend.usd == pytest.approx(scene.server.billed_usd)


@pytest.mark.parametrize("name", HABITS)
def test_the_call_before_the_night_finds_what_could_not_work(name: str, tmp_path: Path) -> None:
    habit = HABITS[name]
    settings = {key: dict(values) for key, values in habit.settings.items()}
    program = Scene(tmp_path, **settings).place.program
    script = habit.script(lambda _: say(tool("list")))
    with MessagesServer(script, helpful=False, endless=True) as server:
        environ = {"ANTHROPIC_API_KEY": "not-a-real-key", "ANTHROPIC_BASE_URL": server.url}
        try:
            check_models(program, environ, [], Spend(), sleep=lambda _: None)
            said = None
        except UsageError as error:
            said = f"{error.message} {error.hint}"
    assert said is None if habit.begins is None else habit.begins in str(said), said


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
