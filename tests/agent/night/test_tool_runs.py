"""What a researcher's runs, smoke runs and sweeps come to, in a session on pretended boxes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from agent.night.assemble import assemble
from agent.record.attempts import Attempt
from tests.support.labs import play
from tests.support.nights import Place
from tests.support.tool_calls import Tools

RUN_KEYS = [
    *("attempt", "repeated", "verdict", "reason", "explanation", "value", "best", "gain"),
    *("noise", "required_gain", "runs", "seeds", "over_budget_seconds", "load_seconds"),
    *("attempts_done", "workspace"),
]


@dataclass
class Session(Tools):
    """The tools of a session whose baseline is measured."""

    attempts: list[Attempt]
    """On record, and growing."""

    def move(self, x: float) -> str:
        """Change the point, of which no two values cost the same; what train.py holds then."""
        line = re.search(r"^X = .*$", self.train, re.MULTILINE)
        assert line is not None
        self.told("edit", file_path="train.py", old_string=line[0], new_string=f"X = {x}")
        return self.train


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    changes = {"session": {"attempts": 1}, "economy": {"max_smokes": 2}}
    place = Place(tmp_path, changes=changes)
    lab = place.begin("random")
    with lab.ledger:
        play(lab, place.program, "random")
    more = place.program.settings.with_overrides(attempts=4)
    place.program = replace(place.program, settings=more)
    lab = place.resume()
    with lab.ledger:
        tools = assemble(lab, place.program, []).toolbox
        yield Session(place.directory / "workspace", tools, lab.ledger.history.attempts)


def test_run_answers_with_stable_keys_and_is_the_researchers(session: Session) -> None:
    session.move(2.0)
    answer = session.told("run", hypothesis="closer to the middle")

    assert RUN_KEYS == [key for key in answer if key != "log_tail"]
    started = session.attempts[-1].started
    assert ("closer to the middle", "claude") == (started.hypothesis, started.researcher)
    assert (started.attempt, "holds the best files") == (answer["attempt"], answer["workspace"])


def test_a_known_candidate_is_not_run_again(session: Session) -> None:
    session.move(2.0)
    files = session.train
    first = session.told("run", hypothesis="closer to the middle")
    (session.root / "train.py").write_text(files)

    answer = session.told("run", hypothesis="again")

    assert (True, first["attempt"]) == (answer["repeated"], answer["attempt"])
    assert first["attempt"] == session.attempts[-1].number


def test_what_a_run_put_back_is_not_stale(session: Session) -> None:
    session.call("read", file_path="train.py")
    before = session.train
    session.move(0.6)
    assert "discarded" == session.told("run", hypothesis="too far")["verdict"]
    assert before == session.train

    session.move(0.7)


def test_a_smoke_run_leaves_the_workspace_and_is_no_attempt(session: Session) -> None:
    source, attempts = session.move(2.0), len(session.attempts)

    answer = session.told("run", hypothesis="does it run?", smoke=True)

    assert (True, True, False, 1) == tuple(
        answer[key] for key in ("smoke", "passed", "repeated", "smokes_left")
    )
    assert "log_tail" not in answer
    assert (source, attempts) == (session.train, len(session.attempts))


def test_a_smoke_run_that_failed_shows_the_end_of_its_log(session: Session) -> None:
    session.move(4.9)  # where the toy runs out of memory

    answer = session.told("run", hypothesis="does it run?", smoke=True)

    assert (False, "out_of_memory") == (answer["passed"], answer["reason"])
    assert "Killed" in answer["log_tail"]


def test_equal_files_are_smoked_once_and_the_number_of_smokes_is_bounded(
    session: Session,
) -> None:
    for x in (2.0, 2.1):
        session.move(x)
        assert not session.told("run", hypothesis="does it run?", smoke=True)["repeated"]
        assert session.told("run", hypothesis="does it run?", smoke=True)["repeated"]
    session.move(2.2)

    assert "too_many_smokes" == session.refused("run", hypothesis="again?", smoke=True)["error"]


def test_a_sweep_hands_knobs_and_attempts_over_and_tells_every_verdict(session: Session) -> None:
    answer = session.told("sweep", attempts=2, knobs=["X"])

    swept = session.attempts[-2:]
    assert ("all done", 2) == (answer["ended"], len(answer["attempts"]))
    assert [attempt.number for attempt in swept] == [row["attempt"] for row in answer["attempts"]]
    assert {"tpe"} == {attempt.started.researcher for attempt in swept}
    assert all("X " in attempt.started.hypothesis for attempt in swept)


def test_a_sweep_ends_where_the_session_has_to_stop(session: Session) -> None:
    assert "the session has to stop" == session.told("sweep", attempts=8)["ended"]
    answer = session.refused("sweep", attempts=8)

    assert ("nothing_to_sweep", "the session has to stop") == (answer["error"], answer["message"])


def test_a_sweep_that_tried_nothing_says_why(session: Session) -> None:
    answer = session.refused("sweep", attempts=8, knobs=["NO_SUCH_KNOB"])

    assert "nothing_to_sweep" == answer["error"]
    assert "no point is left to try with these knobs" == answer["message"]
