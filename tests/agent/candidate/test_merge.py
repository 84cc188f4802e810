"""Three-way merge: leaving a change out of a chain of changes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.candidate.merge import Conflict, first_broken_file, lines_of, merge_files, merge_texts

LINES = st.lists(st.sampled_from(["a\n", "b\n", "c\n", "X = 1\n", "\n", "d\x0c\n", "é\n"]))
ENDS = st.sampled_from(["", "end", "X = 2"])
TEXTS = st.builds(lambda lines, end: "".join(lines) + end, LINES, ENDS)
FILES = st.dictionaries(
    st.sampled_from(["train.py", "model.py"]), TEXTS.map(str.encode) | st.binary(max_size=20)
)

TABLE = "WIDTH = 1\nDEPTH = 1\nRATE = 1\n"


@given(TEXTS, TEXTS)
def test_leaving_out_nothing_changes_nothing(before: str, now: str) -> None:
    assert now == merge_texts(before, now, before)


@given(TEXTS, TEXTS)
def test_leaving_out_the_latest_change_gives_what_was_before(before: str, now: str) -> None:
    assert before == merge_texts(now, now, before)


@given(TEXTS, TEXTS)
def test_what_both_sides_did_is_done_once(base: str, both: str) -> None:
    assert both == merge_texts(base, both, both)


@given(st.lists(FILES, min_size=2, max_size=6))
def test_leaving_out_all_changes_gives_the_baseline(chain: list[dict[str, bytes]]) -> None:
    files = dict(chain[-1])
    for before, after in zip(chain[-2::-1], chain[:0:-1], strict=True):
        files = merge_files(after, files, before)

    assert chain[0] == files


@given(TEXTS, TEXTS, TEXTS)
def test_sides_can_be_swapped(base: str, ours: str, theirs: str) -> None:
    def merged(left: str, right: str) -> str | None:
        try:
            return merge_texts(base, left, right)
        except Conflict:
            return None

    assert merged(ours, theirs) == merged(theirs, ours)


@given(TEXTS)
def test_lines_hold_the_whole_text(text: str) -> None:
    assert text == "".join(lines_of(text))


def test_changes_far_apart_are_taken_from_both_sides() -> None:
    base = "one\n2\n3\n4\nfive\n"

    assert "ONE\n2\n3\n4\nFIVE\n" == merge_texts(
        base, base.replace("one", "ONE"), base.replace("five", "FIVE")
    )


def test_neighbouring_constants_are_taken_from_both_sides() -> None:
    merged = merge_texts(
        TABLE, TABLE.replace("WIDTH = 1", "WIDTH = 8"), TABLE.replace("DEPTH = 1", "DEPTH = 4")
    )

    assert "WIDTH = 8\nDEPTH = 4\nRATE = 1\n" == merged


def test_the_same_line_changed_twice_is_a_conflict_that_names_it() -> None:
    with pytest.raises(Conflict, match=r"train\.py.*WIDTH = 1"):
        merge_files(
            {"train.py": TABLE.encode()},
            {"train.py": TABLE.replace("WIDTH = 1", "WIDTH = 2").encode()},
            {"train.py": TABLE.replace("WIDTH = 1", "WIDTH = 3").encode()},
        )


def test_a_file_removed_here_and_changed_there_is_a_conflict() -> None:
    with pytest.raises(Conflict, match=r"train\.py"):
        merge_files({"train.py": b"a"}, {}, {"train.py": b"b"})


def test_a_new_file_of_a_change_goes_with_it() -> None:
    before, after = {"train.py": b"a\n"}, {"train.py": b"a\n", "extra.py": b"x\n"}
    now = {"train.py": b"b\n", "extra.py": b"x\n"}

    assert {"train.py": b"b\n"} == merge_files(after, now, before)


@pytest.mark.parametrize("content", [b"def f(:\n", b"x = '\x00'\n", b"(" * 5000, b"\xff\xfe\n"])
def test_python_that_does_not_parse_is_named(content: bytes) -> None:
    assert "model.py" == first_broken_file({"train.py": b"x = 1\n", "model.py": content})


def test_only_python_has_to_parse() -> None:
    assert first_broken_file({"notes.txt": b"def f(:", "train.py": b"x = 1\n"}) is None
