"""What a researcher can do, and what it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.candidate.workspace import Workspace
from agent.night.toolbox import Toolbox
from agent.researcher.answers import MAX_HISTORY_BYTES
from agent.researcher.arguments import TOOLS, schemas
from agent.researcher.tpe import TpeModel
from tests.support.histories import Night, night
from tests.support.labs import lab_in_memory
from tests.support.tool_calls import Tools

TRAIN = "import math\n\nLR = 0.1\nDEPTH = 4\n\n\ndef loss(x):\n    return math.log(x)\n"


def over(made: Night, root: Path, **goal: Any) -> Tools:
    """The tools of a night in memory; nothing can be run."""
    (root / "train.py").write_text(TRAIN)
    (root / "prepare.py").write_text("FIXED = 1\n")
    lab = lab_in_memory(made, Workspace(root, ("train.py", "notes.txt")), **goal)
    return Tools(root, Toolbox(lab, TpeModel(lab)))


@pytest.fixture
def bench(tmp_path: Path) -> Tools:
    return over(night(8), tmp_path)


def test_the_schemas_are_what_they_were(golden: Callable[[str, str], None]) -> None:
    golden("tool_schemas.json", json.dumps(schemas(), indent=2) + "\n")


def test_the_schemas_are_closed_and_valid() -> None:
    for tool in schemas():
        jsonschema.Draft202012Validator.check_schema(tool["input_schema"])
        assert tool["input_schema"]["additionalProperties"] is False
        assert set(tool["input_schema"]["required"]) <= set(tool["input_schema"]["properties"])


def test_read_numbers_lines_and_says_how_many(bench: Tools) -> None:
    head, *lines = bench.call("read", file_path="train.py").text.split("\n")

    assert head.startswith("train.py: 8 lines, sha ")
    assert [f"{n:6}\t{text}" for n, text in enumerate(TRAIN.splitlines(), 1)] == lines


def test_read_shows_a_range_within_bounds(bench: Tools) -> None:
    text = bench.call("read", file_path="train.py", view_range=[3, 4]).text

    assert "here 3 to 4; use view_range" in text
    assert text.endswith("     3\tLR = 0.1\n     4\tDEPTH = 4")
    assert "     8\t" in bench.call("read", file_path="train.py", view_range=[8, -1]).text
    for wrong in ([0, 3], [9, 9], [4, 3], [-1, -1]):
        assert "bad_range" == bench.refused("read", file_path="train.py", view_range=wrong)["error"]


def test_read_bounds_what_it_shows(bench: Tools) -> None:
    (bench.root / "long.txt").write_text("y" * 5000 + "\n" + "x\n" * 100_000)

    text = bench.call("read", file_path="long.txt").text

    assert len(text) < 50_000
    assert "[cut]" in text
    assert "use view_range for more" in text


def test_an_edit_replaces_the_one_place(bench: Tools) -> None:
    answer = bench.told(
        "edit", file_path="./train.py", old_string="LR = 0.1", new_string="LR = 0.2"
    )

    assert TRAIN.replace("0.1", "0.2") == bench.train
    assert (True, "train.py", 1, 1) == tuple(
        answer[key] for key in ("ok", "file", "lines_added", "lines_removed")
    )


def test_an_edit_without_a_match_shows_the_closest_lines(bench: Tools) -> None:
    answer = bench.refused("edit", file_path="train.py", old_string="LR = 0.10", new_string="x")

    assert "no_match" == answer["error"]
    assert "     3\tLR = 0.1" in answer["hint"]


def test_an_edit_with_several_matches_names_their_lines(bench: Tools) -> None:
    answer = bench.refused("edit", file_path="train.py", old_string="math", new_string="cmath")

    assert "ambiguous" == answer["error"]
    assert "2 times, on lines [1, 8]" in answer["message"]

    bench.told(
        "edit", file_path="train.py", old_string="math", new_string="cmath", replace_all=True
    )
    assert TRAIN.replace("math", "cmath") == bench.train


def test_an_edit_that_changes_nothing_is_refused(bench: Tools) -> None:
    same = {"old_string": "LR", "new_string": "LR"}

    assert "no_change" == bench.refused("edit", file_path="train.py", **same)["error"]
    assert "no_change" == bench.refused("write", file_path="train.py", content=TRAIN)["error"]


@pytest.mark.parametrize(
    "broken",
    [
        "def f(:\n",
        "return 1\n",
        "x = (\n",
        "\tx = 1\n  y = 2\n",
        "x = '\0'\n",
        "x = " + "(" * 5000 + ")" * 5000,
        "x = " + "-" * 100_000 + "1",
        "x = " + "9" * 5000,
    ],
)
def test_python_that_does_not_parse_is_not_written(bench: Tools, broken: str) -> None:
    answer = bench.refused("write", file_path="train.py", content=broken)

    assert "syntax_error" == answer["error"]
    assert bench.train == TRAIN


def test_a_syntax_error_shows_the_lines_around_it(bench: Tools) -> None:
    answer = bench.refused(
        "edit", file_path="train.py", old_string="def loss(x):", new_string="def loss(x:"
    )

    assert "line 7" in answer["message"]
    assert ">     7\tdef loss(x:" in answer["hint"]
    assert "      4\tDEPTH = 4" in answer["hint"]
    assert bench.train == TRAIN


def test_a_file_that_changed_since_it_was_read_is_not_written(bench: Tools) -> None:
    bench.call("read", file_path="train.py")
    (bench.root / "train.py").write_text(TRAIN + "# by the person\n")
    edit = {"file_path": "train.py", "old_string": "LR = 0.1", "new_string": "LR = 0.2"}

    answer = bench.refused("edit", **edit)
    assert "stale" == answer["error"]
    assert "read it again" in answer["hint"]
    assert "stale" == bench.refused("write", file_path="train.py", content="x = 1\n")["error"]

    bench.call("read", file_path="train.py")
    bench.told("edit", **edit)
    assert "by the person" in bench.train


def test_only_editable_files_are_written(bench: Tools) -> None:
    refused = bench.refused("write", file_path="prepare.py", content="x = 1\n")
    bench.told("write", file_path="notes.txt", content="not python (\n")

    assert "not_editable" == refused["error"]
    assert "FIXED = 1\n" == (bench.root / "prepare.py").read_text()


def test_list_says_what_is_editable(bench: Tools) -> None:
    files = bench.told("list")["files"]

    assert [("prepare.py", False), ("train.py", True)] == [
        (entry["file"], entry["editable"]) for entry in files
    ]


def test_search_finds_lines(bench: Tools) -> None:
    assert [{"file": "train.py", "line": 4, "text": "DEPTH = 4"}] == bench.told(
        "search", pattern="DEPTH"
    )["matches"]
    assert [] == bench.told("search", pattern="^DEPTH", path="train.py")["matches"]


@pytest.mark.parametrize(
    ("tool", "arguments", "said"),
    [
        ("read", {}, "file_path: field required"),
        ("read", {"file_path": 3}, "file_path: input should be a valid string"),
        ("read", {"file_path": "a", "lines": 3}, "lines: extra inputs"),
        ("read", {"file_path": "a", "view_range": [1]}, "view_range: list should have at least 2"),
        ("read", {"file_path": "a", "view_range": ["1", "2"]}, "view_range.0: input should be"),
        ("edit", {"file_path": "a", "old_string": "", "new_string": "b"}, "old_string: string"),
        ("run", {}, "hypothesis: field required"),
        ("run", {"hypothesis": " \n"}, "hypothesis: string should match"),
        ("run", {"hypothesis": "x" * 501}, "hypothesis: string should have at most 500"),
        ("run", {"hypothesis": "\ud800"}, "hypothesis: input should be a valid string"),
        ("history", {"select": "worst"}, "select: input should be 'best'"),
        ("history", {"limit": 0}, "limit: input should be greater"),
        ("finish", {}, "reason: field required"),
        ("suggest", {"x": 1}, "x: extra inputs"),
    ],
)
def test_wrong_arguments_are_named_one_by_one(
    bench: Tools, tool: str, arguments: dict[str, Any], said: str
) -> None:
    answer = bench.refused(tool, **arguments)

    assert "bad_arguments" == answer["error"]
    assert said in answer["message"].lower()
    assert answer["hint"].startswith(f"{tool} takes ")


def test_an_unknown_tool_is_an_error_that_names_the_tools(bench: Tools) -> None:
    answer = bench.refused("bash\x1b[2J", command="ls")

    assert "unknown_tool" == answer["error"]
    assert "\x1b" not in answer["message"]
    assert all(name in answer["hint"] for name in TOOLS)


def test_history_selects_best_recent_and_failed(bench: Tools) -> None:
    best = [row["value"] for row in bench.told("history", select="best")["attempts"]]
    recent = [row["attempt"] for row in bench.told("history", limit=3)["attempts"]]
    failed = {row["verdict"] for row in bench.told("history", select="failed")["attempts"]}

    assert sorted(best) == best
    assert [8, 7, 6] == recent
    assert {"failed", "invalid"} == failed


def test_best_is_the_highest_when_the_goal_is_to_maximise(tmp_path: Path) -> None:
    bench = over(night(8), tmp_path, metric="accuracy", direction="maximize")
    best = [row["value"] for row in bench.told("history", select="best")["attempts"]]

    assert sorted(best, reverse=True) == best


def test_history_shows_one_attempt_with_diff_and_log(bench: Tools) -> None:
    shown = bench.told("history", select="attempt", attempt=4)["attempt"]

    assert 4 == shown["attempt"]
    assert shown["diff"].startswith("```text\n")
    assert "from the run, not instructions:" in shown["log_tail"]


def test_history_refuses_what_does_not_fit_together(bench: Tools) -> None:
    assert "not_found" == bench.refused("history", select="attempt", attempt=99)["error"]
    assert "bad_arguments" == bench.refused("history", select="attempt")["error"]
    assert "bad_arguments" == bench.refused("history", attempt=3)["error"]


@pytest.mark.parametrize("hostile", [False, True])
def test_history_is_bounded(tmp_path: Path, hostile: bool) -> None:
    bench = over(night(60, hostile=hostile, log_lines=400), tmp_path)

    for select in ("best", "recent", "failed"):
        text = bench.call("history", select=select, limit=30).text
        assert len(text.encode()) <= MAX_HISTORY_BYTES
    for number in range(0, 60, 7):
        text = bench.call("history", select="attempt", attempt=number).text
        assert len(text.encode()) <= 2 * MAX_HISTORY_BYTES
        assert "\x1b" not in text


def test_finish_ends_the_session_with_its_reason(bench: Tools) -> None:
    result = bench.call("finish", reason="nothing left")

    assert ("nothing left", False) == (result.finished, result.is_error)
    assert bench.call("list").finished is None


@given(
    name=st.sampled_from([*TOOLS, "bash", ""]),
    arguments=st.dictionaries(
        st.one_of(
            st.sampled_from(["file_path", "path", "pattern", "content", "old_string", "reason"]),
            st.text(max_size=5),
        ),
        st.one_of(st.text(max_size=20), st.integers(), st.none(), st.lists(st.integers())),
        max_size=4,
    ),
)
@settings(max_examples=300, deadline=None)
def test_no_arguments_break_the_toolbox(
    tmp_path_factory: pytest.TempPathFactory, name: str, arguments: dict[str, Any]
) -> None:
    bench = over(EMPTY, tmp_path_factory.mktemp("w"))

    result = bench.tools.call(name, arguments, "claude")

    result.text.encode()
    assert str(bench.root) not in result.text


EMPTY = night(1)


def test_suggest_gives_the_samplers_point(bench: Tools) -> None:
    answer = bench.told("suggest")

    assert ["changes", "reason"] == list(answer)
    assert answer["changes"]
    for change in answer["changes"]:
        assert ["file", "knob", "from", "to"] == list(change)
        assert (change["knob"], change["from"]) in (("LR", "0.1"), ("DEPTH", "4"))
        assert change["from"] != change["to"]
    assert answer == bench.told("suggest")


def test_suggest_without_knobs_says_so(bench: Tools) -> None:
    (bench.root / "train.py").write_text("import math\n")

    assert "nothing_to_suggest" == bench.refused("suggest")["error"]


def test_a_sweep_is_refused_while_changes_lie_about(bench: Tools) -> None:
    assert "unsaved_changes" == bench.refused("sweep", attempts=2)["error"]


def test_a_file_is_deleted_on_record_and_what_may_not_be_written_is_not(bench: Tools) -> None:
    bench.call("read", file_path="train.py")
    assert {"ok": True, "file": "train.py", "deleted": True} == bench.told(
        "delete", file_path="./train.py"
    )
    assert not (bench.root / "train.py").exists()
    assert "not_found" == bench.refused("delete", file_path="train.py")["error"]
    assert "not_editable" == bench.refused("delete", file_path="prepare.py")["error"]
    assert (bench.root / "prepare.py").exists()


def test_a_file_is_renamed_where_nothing_lies_and_both_places_may_be_written(bench: Tools) -> None:
    assert "not_editable" == bench.refused("rename", file_path="train.py", new_path="b.py")["error"]
    assert (
        "not_editable"
        == bench.refused("rename", file_path="prepare.py", new_path="notes.txt")["error"]
    )
    bench.told("rename", file_path="train.py", new_path="notes.txt")
    assert TRAIN == (bench.root / "notes.txt").read_text()
    assert not (bench.root / "train.py").exists()

    bench.told("write", file_path="train.py", content="x = 1\n")
    answer = bench.refused("rename", file_path="train.py", new_path="notes.txt")
    assert "exists" == answer["error"]
    assert (TRAIN, "x = 1\n") == ((bench.root / "notes.txt").read_text(), bench.train)


def test_a_file_that_changed_meanwhile_is_neither_deleted_nor_renamed(bench: Tools) -> None:
    bench.call("read", file_path="train.py")
    (bench.root / "train.py").write_text("x = 5\n")

    assert "stale" == bench.refused("delete", file_path="train.py")["error"]
    moved = bench.refused("rename", file_path="train.py", new_path="notes.txt")
    assert ("stale", "x = 5\n") == (moved["error"], bench.train)


def test_text_that_is_not_python_does_not_become_it_by_a_name(bench: Tools) -> None:
    (bench.root / "train.py").unlink()
    bench.told("write", file_path="notes.txt", content="not python (\n")

    refused = bench.refused("rename", file_path="notes.txt", new_path="train.py")

    assert ("syntax_error", False) == (refused["error"], (bench.root / "train.py").exists())


@pytest.mark.parametrize(
    ("content", "edited"),
    [
        (b"a = 1\r\nb = 2\r\nc = 3\r\n", b"a = 1\r\nB = 2\r\nC = 3\r\nd = 4\r\n"),
        (b"a = 1\nb = 2\r\nc = 3\nz = 0\n", b"a = 1\nB = 2\nC = 3\nd = 4\nz = 0\n"),
        (b"\xef\xbb\xbfa = 1\nb = 2\nc = 3\n", b"\xef\xbb\xbfa = 1\nB = 2\nC = 3\nd = 4\n"),
        (
            b"# coding: latin-1\na = '\xe9'\nb = 2\nc = 3\n",
            b"# coding: latin-1\na = '\xe9'\nB = 2\nC = 3\nd = 4\n",
        ),
    ],
    ids=["crlf", "mixed", "bom", "coding line"],
)
def test_an_edit_keeps_a_file_s_line_ends_and_encoding(
    bench: Tools, content: bytes, edited: bytes
) -> None:
    (bench.root / "train.py").write_bytes(content)
    shown = bench.call("read", file_path="train.py").text
    assert "\r" not in shown
    assert "\ufeff" not in shown

    bench.told(
        "edit",
        file_path="train.py",
        old_string="b = 2\nc = 3\n",
        new_string="B = 2\nC = 3\r\nd = 4\n",
    )
    assert edited == (bench.root / "train.py").read_bytes()

    whole = bench.call("read", file_path="train.py").text.split("\n")[1:]
    text = "\n".join(line.partition("\t")[2] for line in whole) + "\n"
    bench.told("write", file_path="train.py", content=text.replace("d = 4", "d = 5"))
    assert edited.replace(b"d = 4", b"d = 5") == (bench.root / "train.py").read_bytes()


def test_what_an_encoding_does_not_have_is_refused(bench: Tools) -> None:
    (bench.root / "train.py").write_bytes(b"# coding: latin-1\na = '\xe9'\n")
    edit = {"file_path": "train.py", "old_string": "\xe9", "new_string": "\u65e5"}
    assert "not_text" == bench.refused("edit", **edit)["error"]
    for named in ("zip", "punycode", "nonsense"):
        content = f"# coding: {named}\n"
        assert bench.refused("write", file_path="train.py", content=content)["error"] in (
            "not_text",
            "syntax_error",
        )


@pytest.mark.parametrize(
    ("name", "whole", "broken", "line"),
    [
        ("c.json", '{"lr": 1}', '{\n"lr": }', 2),
        ("c.toml", "lr = 1\n", "lr = 1\nx = [\n", 1),
        ("c.yaml", "lr: 1\nx: !include a\n", "lr: 1\nb: [1\nc: 2\n", 3),
        ("c.yml", "lr: 1\n", "\tlr: 1\n", 1),
        ("c.json", "[]", "[" * 100_000, 1),
        ("c.toml", "", "a = " + "[" * 100_000, 1),
        ("c.yaml", "", "[" * 20_000, 1),
    ],
)
def test_configuration_that_breaks_is_refused_before_a_run(
    tmp_path: Path, name: str, whole: str, broken: str, line: int
) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    lab = lab_in_memory(night(1), Workspace(tmp_path, ("train.py", "c.*")))
    bench = Tools(tmp_path, Toolbox(lab, TpeModel(lab)))
    bench.told("write", file_path=name, content=whole)

    refused = bench.refused("write", file_path=name, content=broken)

    assert "syntax_error" == refused["error"]
    assert whole == (tmp_path / name).read_text()
    if len(broken) < 100:
        assert f"line {line}" in refused["message"]
    # What its reader took as it was, a template say, is edited as it is.
    (tmp_path / name).write_text("{% template %}: [\n")
    Tools(tmp_path, Toolbox(lab, TpeModel(lab))).told("write", file_path=name, content="{% b: [\n")


def test_syntax_is_that_of_the_image_s_python(tmp_path: Path) -> None:
    newer, older = "x = t'{a}'\n", "match x:\n    case 1:\n        pass\n"
    for python, allowed, refused in (("3.99.1", newer, None), ("3.9.2", "x = 1\n", older)):
        made = night(1)
        assert made.history.session is not None
        image = made.history.session.image | {"python": python}
        made.history.session = made.history.session.model_copy(update={"image": image})
        bench = over(made, tmp_path)
        bench.told("write", file_path="train.py", content=allowed)
        if refused:
            assert (
                "syntax_error"
                == bench.refused("write", file_path="train.py", content=refused)["error"]
            )
