"""Files that a researcher removed or moved: kept, undone, handed over and audited."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from agent.candidate.git import Git
from agent.morning.export import Person, approve
from agent.morning.replay import replay
from agent.night.assemble import assemble
from agent.record.events import FileChanged
from tests.support.labs import play
from tests.support.nights import TOY, Place
from tests.support.sessions import Lines, forge, found
from tests.support.tool_calls import Tools

EDITABLE = {"editable": ("train.py", "lib/*.py")}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A night whose one kept attempt removed one file and moved another, and one that lost."""
    mine = tmp_path / "mine"
    shutil.copytree(TOY / "workspace", mine)
    (mine / "lib").mkdir()
    for name in ("old", "moved", "stays"):
        (mine / "lib" / f"{name}.py").write_text(f"NAME = '{name}'\r\n")
    changes: dict[str, Any] = {"session": {"attempts": 1}, "workspace": EDITABLE}
    place = Place(tmp_path / "runs", workspace=mine, changes=changes)
    lab = place.begin("random")
    with lab.ledger:
        play(lab, place.program, "random")
    place.program = type(place.program)(
        place.program.prose, place.program.settings.with_overrides(attempts=5), place.program.source
    )
    lab = place.resume()
    with lab.ledger:
        tools = Tools(place.directory / "workspace", assemble(lab, place.program, []).toolbox)
        line = next(line for line in tools.train.splitlines() if line.startswith("X = "))
        tools.told("edit", file_path="train.py", old_string=line, new_string="X = 2.9")
        tools.told("delete", file_path="lib/old.py")
        tools.told("rename", file_path="lib/moved.py", new_path="lib/fresh.py")
        answer = tools.told("run", hypothesis="fewer files")
        assert "kept" == answer["verdict"]
        tools.told("edit", file_path="train.py", old_string="X = 2.9", new_string="X = 90.0")
        tools.told("delete", file_path="lib/stays.py")
        tools.told("rename", file_path="lib/fresh.py", new_path="lib/lost.py")
        assert "kept" != tools.told("run", hypothesis="worse")["verdict"]
    return place


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "lib").iterdir())


def test_what_was_removed_stays_away_where_it_was_kept_and_comes_back_where_not(
    place: Place,
) -> None:
    assert ["fresh.py", "stays.py"] == names(place.directory / "workspace")
    assert [] == found(place.directory)


def test_it_is_in_the_patch_the_files_and_a_replay(place: Place) -> None:
    with (lab := place.open()).ledger:
        decided = approve(lab.ledger, Person("A", "a@example.org"), "good", Git(place.root, {}))
        assert decided.patch is not None
        diff = lab.ledger.get_blob(decided.patch).decode()
        replay(lab, lab.history.best.number if lab.history.best else 0, lambda _: None)

    assert "deleted file mode 100644\n--- a/workspace/lib/old.py\n+++ /dev/null" in diff
    assert "+++ b/workspace/lib/fresh.py" in diff
    assert ["fresh.py", "stays.py"] == names(place.directory / "approved" / "workspace")
    assert [] == found(place.directory)


def test_the_audit_knows_a_removal_from_a_change(place: Place) -> None:
    with (lab := place.open()).ledger:
        (removed, *_) = (
            entry.event
            for entry in lab.ledger.entries
            if isinstance(entry.event, FileChanged) and entry.event.after is None
        )
    assert ("lib/old.py", None) == (removed.path, removed.after)

    def unsaid(lines: Lines) -> None:
        line = next(
            line["event"] for line in lines
            if line["event"]["type"] == "file_changed" and line["event"]["after"] is None
        )  # fmt: skip
        line["after"] = line["before"]

    forge(place.directory, unsaid)
    assert any("diff" in what for what in found(place.directory))
