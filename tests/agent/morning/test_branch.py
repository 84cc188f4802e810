"""A branch holds what was measured, and says what of it was not; all with real git."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.attempt.lab import hashes_of
from agent.candidate.git import Git, repository_of
from agent.morning.export import Person, approve, branch_notes
from agent.night.session import begin
from agent.record.events import HumanDecided, Repository
from sandbox.contract.errors import UsageError
from tests.support.labs import play, quiet_lab
from tests.support.nights import TOY, CrashingLedger, Place

ENVIRON = {
    "PATH": "/usr/bin:/bin",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_AUTHOR_NAME": "Ada",
    "GIT_AUTHOR_EMAIL": "ada@example.org",
    "GIT_COMMITTER_NAME": "Ada",
    "GIT_COMMITTER_EMAIL": "ada@example.org",
}
ADA = Person("Ada", "ada@example.org")


@dataclass
class Mine:
    """A person's repository with the toy's workspace, and a night in it."""

    root: Path

    def __post_init__(self) -> None:
        self.root.mkdir()
        shutil.copytree(TOY / "workspace", self.workspace)
        self("init", "-q", "-b", "main")
        self("config", "user.name", "Ada")

    @property
    def workspace(self) -> Path:
        return self.root / "workspace"

    @property
    def git(self) -> Git:
        return Git(self.root, ENVIRON)

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=self.root, env=ENVIRON, capture_output=True, check=True
        )
        return done.stdout.decode()

    def commit(self) -> None:
        self("add", "-A")
        self("commit", "-qm", "mine")

    def write(self, name: str, text: str) -> None:
        (self.workspace / name).write_bytes(text.encode())

    def change(self, old: str, new: str, name: str = "train.py") -> None:
        text = (self.workspace / name).read_bytes().decode()
        assert old in text
        self.write(name, text.replace(old, new))

    def shown(self, name: str, branch: str = "night-1") -> bytes:
        return subprocess.run(
            ["git", "show", f"{branch}:workspace/{name}"],
            cwd=self.root, env=ENVIRON, capture_output=True, check=True,
        ).stdout  # fmt: skip

    def checked_out(self, branch: str = "night-1") -> dict[str, bytes]:
        """The branch's workspace as a work tree has it."""
        place = self.root.parent / "checked-out"
        self("worktree", "add", "-q", str(place), branch)
        return {path.name: path.read_bytes() for path in (place / "workspace").iterdir()}


@pytest.fixture
def mine(tmp_path: Path) -> Mine:
    return Mine(tmp_path / "mine")


def night(mine: Mine) -> Place:
    """A night on the repository's workspace as it lies there."""
    runs = mine.root.parent / "runs"
    place = Place(runs, changes={"session": {"attempts": 5}}, workspace=mine.workspace)
    begin(
        place.directory, place.program, place.program.settings, mine.workspace, place.runtime,
        researcher="tpe", seed=7, git=Git(mine.workspace, ENVIRON), now=place.clock.now,
    ).close()  # fmt: skip
    ledger = CrashingLedger.open(place.directory, place.clock.now)
    with ledger:
        lab = quiet_lab(ledger, place.program.settings, place.runtime, place.clock)
        play(lab, place.program)
        assert ledger.history.best is not ledger.history.baseline
    return place


def branch(mine: Mine, place: Place) -> tuple[HumanDecided, list[str]]:
    with place.open().ledger as ledger:
        decided = approve(ledger, ADA, "good", mine.git, branch="night-1")
        return decided, list(branch_notes(ledger.history, decided))


def measured(place: Place) -> dict[str, str]:
    with place.open().ledger as ledger:
        assert ledger.history.best is not None
        return ledger.history.best.started.files


def begun_at(place: Place) -> Repository | None:
    with place.open().ledger as ledger:
        assert ledger.history.session is not None
        return ledger.history.session.repository


# --- what is on record at the start -----------------------------------------------------------


def test_a_clean_tree_is_on_record_as_its_commit(mine: Mine) -> None:
    mine.commit()
    head = mine("rev-parse", "HEAD").strip()
    assert Repository(head=head, changed=()) == begun_at(night(mine))


def test_what_is_not_committed_is_on_record(mine: Mine) -> None:
    mine.write("gone.py", "A = 1\n")
    mine.commit()
    mine.change("PAUSE_SECONDS = 0.0", "PAUSE_SECONDS = 0.00")
    mine.write("helper.py", "A = 1\n")
    (mine.workspace / "gone.py").unlink()
    found = begun_at(night(mine))
    assert found is not None
    assert ("gone.py", "helper.py", "train.py") == found.changed


def test_outside_a_repository_there_is_nothing_to_record(tmp_path: Path) -> None:
    (tmp_path / "workspace").mkdir()
    environ = ENVIRON | {"GIT_CEILING_DIRECTORIES": str(tmp_path)}
    assert repository_of(Git(tmp_path / "workspace", environ), {"train.py": b""}) is None


# --- what a branch holds ----------------------------------------------------------------------


def test_of_a_clean_tree_the_branch_holds_what_was_measured(mine: Mine) -> None:
    mine.commit()
    place = night(mine)
    decided, notes = branch(mine, place)
    assert ((), []) == (decided.unmeasured, notes)
    assert measured(place).items() <= hashes_of(mine.checked_out()).items()


def test_of_a_dirty_tree_the_branch_holds_what_was_measured_edits_and_helpers_too(
    mine: Mine,
) -> None:
    mine.commit()
    mine.change('"""Leaves a point', '"""Always leaves a point')
    mine.write("helper.py", "A = 1\n")
    place = night(mine)
    decided, notes = branch(mine, place)
    assert () == decided.unmeasured
    assert [
        "not committed when the session began, and measured as it was: helper.py, train.py"
    ] == (notes)
    assert measured(place).items() <= hashes_of(mine.checked_out()).items()
    assert b'"""Always leaves a point' in mine.shown("train.py")
    assert "helper.py" in mine("diff", "--name-only", "main", "night-1")


def test_edits_that_were_committed_meanwhile_are_no_conflict(mine: Mine) -> None:
    mine.commit()
    mine.change('"""Leaves a point', '"""Always leaves a point')
    mine.write("helper.py", "A = 1\n")
    place = night(mine)
    mine.commit()
    decided, _ = branch(mine, place)
    assert () == decided.unmeasured
    assert measured(place).items() <= hashes_of(mine.checked_out()).items()


def test_what_was_committed_since_is_merged_and_said_to_be_unmeasured(mine: Mine) -> None:
    mine.write("helper.py", "A = 1\n")
    mine.commit()
    place = night(mine)
    mine.change('"""Leaves a point', '"""Always leaves a point')
    mine.write("helper.py", "A = 2\n")
    mine.write("later.py", "B = 1\n")
    mine.commit()
    decided, notes = branch(mine, place)
    names = ("helper.py", "later.py", "train.py")
    assert tuple(f"workspace/{name}" for name in names) == decided.unmeasured
    assert [f"merged, not measured: {', '.join(decided.unmeasured)}"] == notes
    assert b'"""Always leaves a point' in mine.shown("train.py")
    assert b"A = 2\n" == mine.shown("helper.py")


def test_another_scorer_at_head_is_said(mine: Mine) -> None:
    mine.commit()
    mine.change("import", "# mine\nimport", "evaluate.py")
    place = night(mine)
    decided, _ = branch(mine, place)
    assert ("workspace/evaluate.py",) == decided.unmeasured


def test_the_same_line_changed_on_both_sides_decides_nothing(mine: Mine) -> None:
    mine.commit()
    place = night(mine)
    lines = (mine.workspace / "train.py").read_text().splitlines()
    knobs = [line for line in lines if line.startswith(("X =", "Y ="))]
    for line in knobs:
        mine.change(line, f"{line.split('=')[0]}= 1.5")
    mine.commit()
    with pytest.raises(UsageError, match="at the same place"):
        branch(mine, place)
    assert "night-1" not in mine("branch")


@pytest.mark.parametrize("rule", ["*.py text eol=crlf\n", "*.py text=auto\n"])
def test_line_ends_are_those_that_git_makes(mine: Mine, rule: str) -> None:
    (mine.root / ".gitattributes").write_text(rule)
    if "crlf" not in rule:
        mine("config", "core.autocrlf", "true")
    mine.commit()
    for name in ("train.py", "evaluate.py", "prepare.py"):  # as git checks them out
        (mine.workspace / name).unlink()
    mine("checkout", "--", ".")
    assert b"\r\n" in (mine.workspace / "train.py").read_bytes()
    place = night(mine)
    assert begun_at(place) == Repository(head=mine("rev-parse", "HEAD").strip(), changed=())
    decided, notes = branch(mine, place)
    assert ((), []) == (decided.unmeasured, notes)
    assert b"\r" not in mine.shown("train.py")
    assert measured(place).items() <= hashes_of(mine.checked_out()).items()
    changed = mine("diff", "--stat", "main", "night-1").splitlines()
    assert " 1 file changed" in changed[-1]
    assert len(mine("diff", "--unified=0", "main", "night-1").splitlines()) < 20


def test_a_filter_of_the_repository_is_not_run(mine: Mine) -> None:
    marker = mine.root.parent / "ran"
    mine.commit()
    (mine.root / ".git" / "info" / "attributes").write_text("*.py filter=evil text\n")
    for key in ("clean", "smudge", "process"):
        mine("config", f"filter.evil.{key}", f"touch {marker}; cat")
    mine("config", "filter.evil.required", "true")
    place = night(mine)
    decided, _ = branch(mine, place)
    assert not marker.exists()
    assert () == decided.unmeasured
    mine("config", "--unset", "filter.evil.process")  # without the wall git runs it
    blob = "hash-object", "--path=workspace/train.py", "workspace/train.py"
    subprocess.run(["git", *blob], cwd=mine.root, env=ENVIRON, check=False, capture_output=True)
    assert marker.exists()


def test_a_filter_with_an_odd_name_is_refused(mine: Mine) -> None:
    (mine.root / ".gitattributes").write_text("*.py filter=a=b\n")
    with pytest.raises(UsageError, match="cannot be turned off"):
        mine.git.cleaned({"workspace/train.py": b""}, {})


def test_another_repository_needs_the_files_and_gets_the_change_alone(
    mine: Mine, tmp_path: Path
) -> None:
    mine.commit()
    place = night(mine)
    other = Mine(tmp_path / "other")
    other.root.joinpath("README").write_text("other")  # or it may be the same commit
    other.commit()
    decided, _ = branch(other, place)
    assert () == decided.unmeasured
    assert ["workspace/train.py"] == other("diff", "--name-only", "main", "night-1").split()
    other("rm", "-qr", "workspace")
    other.root.joinpath("README").write_text("")
    other("add", "-A")
    other("commit", "-qm", "gone")
    other("branch", "-D", "night-1")
    with pytest.raises(UsageError, match=r"HEAD has no workspace/train\.py"):
        branch(other, place)


def test_neither_work_tree_nor_index_is_touched(mine: Mine) -> None:
    mine.commit()
    place = night(mine)
    mine.write("train.py", "# not committed\n")
    index = (mine.root / ".git" / "index").read_bytes()
    branch(mine, place)
    assert index == (mine.root / ".git" / "index").read_bytes()
    assert b"# not committed\n" == (mine.workspace / "train.py").read_bytes()
