"""What a session copies of a person's repository: all that git tracks, and nothing in silence."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from agent.attempt.lab import hashes_of
from agent.candidate.own_files import copy_workspace, files_of, is_named
from agent.candidate.workspace import MAX_FILES, Workspace, WorkspaceError, may_be_written
from agent.settings import WorkspaceSettings
from sandbox.contract.errors import UsageError
from tests.support.labs import play
from tests.support.nights import TOY, Place
from tests.support.sessions import found

MANY = 3000


def git(place: Path, *words: str) -> None:
    me = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", *me, "-C", str(place), *words], check=True, capture_output=True)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A repository with a tracked hidden file, and with what no session should have."""
    place = tmp_path / "mine"
    (place / "conf" / ".defaults").mkdir(parents=True)
    for name in ("train.py", "conf/.defaults/a.yaml", ".flags"):
        (place / name).write_text("x = 1\n")
    (place / ".gitignore").write_text("ignored/\n")
    git(place, "init", "-q")
    git(place, "add", "-A")
    git(place, "commit", "-qm", "mine")
    (place / ".env").write_text("secret")
    (place / "ignored").mkdir()
    (place / "ignored" / "key").write_text("secret")
    return place


def copied(mine: Path, **bounds: Any) -> tuple[set[str], str]:
    folder = mine.parent / "copy"
    left = copy_workspace(mine, folder, mine.parent / "runs", **bounds)
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}, left


def test_hidden_files_come_along_where_git_tracks_them_and_no_others(mine: Path) -> None:
    names, left = copied(mine)

    assert {"train.py", "conf/.defaults/a.yaml", ".flags", ".gitignore"} == names
    assert "1 hidden files that git does not track (.env)" == left


def test_what_else_is_not_copied_is_said_by_kind(mine: Path, tmp_path: Path) -> None:
    (mine / ".env").unlink()
    git(mine, "init", "-q", "inner")
    (mine / "inner" / "a.py").write_text("secret\n")
    (tmp_path / "elsewhere").mkdir()
    (mine / "data").symlink_to(tmp_path / "elsewhere")
    git(mine, "add", "data")

    names, left = copied(mine)

    assert not any(name.startswith(("inner", "data")) for name in names)
    assert "links to folders elsewhere (data)" in left
    assert "repositories inside, or submodules not fetched (inner)" in left
    again = copy_workspace(mine, mine.parent / "two", mine.parent / "runs", ("data", "inner"))
    assert "" == again


@pytest.mark.parametrize("is_repository", [True, False])
def test_a_link_to_a_folder_inside_brings_what_it_leads_to(
    mine: Path, *, is_repository: bool
) -> None:
    (mine / "src").mkdir()
    (mine / "src" / "a.py").write_text("a = 1\n")
    (mine / "src" / ".key").write_text("secret")
    (mine / "same").symlink_to("src")
    (mine / "all").symlink_to(".")
    if not is_repository:
        (mine / ".git").rename(mine.parent / "git")

    names, left = copied(mine)

    assert {"src/a.py", "same/a.py"} <= names
    assert not any(name.startswith("all/") or name.endswith(".key") for name in names)
    assert "links to folders elsewhere (all)" in left


def test_it_is_measured_before_anything_is_copied(mine: Path) -> None:
    (mine / "assets").mkdir()
    for number in range(20):
        (mine / "assets" / f"{number}.bin").write_bytes(bytes(2**16))

    bounds: dict[str, Any]
    for bounds in ({"max_files": 10}, {"max_bytes": 2**20}):
        with pytest.raises(UsageError, match="holds 24 files of 1 MiB") as caught:
            copied(mine, **bounds)
        assert "assets (20 files, 1.2 MiB)" in caught.value.hint
        assert "leave_out" in caught.value.hint
        assert not (mine.parent / "copy").exists()
    assert copied(mine, max_files=24, max_bytes=2**21)


def test_a_variable_that_names_another_repository_is_no_way_to_copy_secrets(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for dot files under a bare repository: without its .git we would know of no ignoring."""
    elsewhere = mine.parent / "elsewhere.git"
    (mine / ".git").rename(elsewhere)
    monkeypatch.setenv("GIT_DIR", str(elsewhere))

    with pytest.raises(UsageError, match="GIT_DIR is set") as caught:
        files_of(mine)

    assert "unset GIT_DIR" in caught.value.hint


def test_a_directory_reached_by_a_link_is_in_its_repository(mine: Path) -> None:
    (mine / "sub").mkdir()
    (mine / "sub" / "train.py").write_text("x = 1\n")
    (mine / "sub" / "ignored").mkdir()
    (mine / "sub" / "ignored" / "key").write_text("secret")
    link = mine.parent / "link"
    link.symlink_to(mine / "sub")

    assert ["train.py"] == files_of(link)


def test_a_worktree_is_a_repository_too(mine: Path) -> None:
    git(mine, "worktree", "add", "-q", str(mine.parent / "tree"))
    (mine.parent / "tree" / "ignored").mkdir()
    (mine.parent / "tree" / "ignored" / "key").write_text("secret")

    assert files_of(mine.parent / "tree") == files_of(mine)
    git(mine, "worktree", "prune")
    (mine / ".git" / "worktrees").rename(mine.parent / "gone")
    with pytest.raises(UsageError, match="git refuses"):
        files_of(mine.parent / "tree")


@pytest.mark.parametrize(
    ("path", "pattern", "is_one"),
    [
        ("a.py", "**/*.py", True),
        ("src/a.py", "**/*.py", True),
        ("src/b/c/a.py", "src/**/*.py", True),
        ("src/a.py", "src/**/*.py", True),
        ("src/a.py", "src/**", True),
        ("src", "src/**", False),
        ("lib/a.py", "src/**", False),
        ("src/a.txt", "src/**/*.py", False),
        ("src/b/a.py", "src/*.py", False),
        ("/".join("a" * 32), "/".join(["**"] * 30) + "/b", False),
        (".env", "*", False),
        (".env", "**", False),
        ("src/.git/config", "src/**", False),
        ("src/prepare.py", "**", False),
    ],
)
def test_two_stars_stand_for_folders(path: str, pattern: str, *, is_one: bool) -> None:
    assert is_one == may_be_written(path.split("/"), (pattern,))


def test_patterns_leave_folders_and_files_out() -> None:
    for name in ("docs/a/b.md", "x/y/b.mp4", "b.mp4", "a/cache/z"):
        assert is_named(name, ("docs", "**/*.mp4", "**/cache"))
    assert not is_named("src/docs/a.py", ("docs", "docs/**"))
    WorkspaceSettings(editable=("src/**/*.py",))
    with pytest.raises(ValueError, match="inside a name"):
        WorkspaceSettings(editable=("src/a**.py",))


def test_the_box_sees_hidden_files_and_the_researcher_does_not(mine: Path) -> None:
    copied(mine)
    workspace = Workspace(mine.parent / "copy", ("**",))

    assert ".flags" in workspace.candidate()
    assert ["train.py"] == [entry.path for entry in workspace.list_files()]
    with pytest.raises(WorkspaceError):
        workspace.read(".flags")
    best = workspace.candidate()
    workspace.write("train.py", b"x = 3\n")
    workspace.restore(best)
    assert best == workspace.candidate()
    # Nothing is taken from memory that is another file by now.
    (mine.parent / "copy" / ".flags").write_text("y = 2\n")
    assert b"y = 2\n" == workspace.candidate()[".flags"]


def test_only_what_may_be_written_is_held_to_a_candidate_s_bounds(tmp_path: Path) -> None:
    for number in range(MAX_FILES + 1):
        (tmp_path / f"{number}.txt").touch()
    assert MAX_FILES + 1 == len(Workspace(tmp_path, ("0.txt",)).candidate())
    with pytest.raises(WorkspaceError, match="may be edited"):
        Workspace(tmp_path, ("*.txt",)).candidate()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_night_on_thousands_of_files(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    for name in ("train.py", "prepare.py", "evaluate.py"):
        (mine / name).parent.mkdir(exist_ok=True)
        (mine / name).write_bytes((TOY / "workspace" / name).read_bytes())
    for number in range(MANY):
        path = mine / "lib" / f"{number % 40}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{number}\n" * 50)
    place = Place(tmp_path / "runs", workspace=mine, changes={"session": {"attempts": 1}})
    lab = place.begin("random")
    with lab.ledger:
        play(lab, place.program, "random")

    assert MANY + 1 == len(lab.history.attempts[-1].started.files)
    assert lab.workspace.candidate().keys() == lab.history.attempts[-1].started.files.keys()
    assert hashes_of(lab.workspace.candidate())
    assert [] == found(place.directory)
