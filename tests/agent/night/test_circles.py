"""A researcher that goes in circles."""

from __future__ import annotations

from agent.night.circles import Act, CircleWatch, circle

READ = Act("read", {"file_path": "train.py"}, "1 X = 1", False)
LIST = Act("list", {}, "train.py", False)
BAD_EDIT = Act("edit", {"old_string": "a"}, "not there", True)


def other(number: int) -> Act:
    return Act("search", {"pattern": str(number)}, "", False)


def test_the_same_call_with_the_same_result_is_a_circle_the_fourth_time() -> None:
    acts = [READ, other(1), READ, other(2), READ, other(3)]
    assert circle(acts) is None
    assert "read was called 4 times" in str(circle([*acts, READ]))


def test_the_same_call_with_another_result_is_none() -> None:
    reads = [Act("read", {}, f"version {n}", False) for n in range(9)]
    assert circle(reads) is None


def test_a_failing_edit_is_a_circle_the_third_time_whatever_the_error_says() -> None:
    again = Act("edit", {"old_string": "a"}, "not there either", True)
    assert circle([BAD_EDIT, other(1), again]) is None
    assert "edit failed 3 times" in str(circle([BAD_EDIT, other(1), again, BAD_EDIT]))


def test_two_calls_that_take_turns_are_a_circle() -> None:
    assert circle([READ, LIST, READ]) is None
    assert "took turns" in str(circle([READ, LIST, READ, LIST]))


def test_an_attempt_ends_every_circle() -> None:
    watch = CircleWatch()
    assert watch.circle([READ, READ, READ], attempts=0) is None
    assert watch.circle([READ], attempts=1) is None
    assert watch.circle([READ, READ, READ], attempts=1) is None
    assert watch.circle([READ], attempts=1) is not None
    assert 1 == watch.warnings
