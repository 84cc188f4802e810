"""No path leads out of the workspace, whatever lies in it."""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.candidate.confinement import (
    OpenBeneath,
    choose_opener,
    open_by_kernel,
    open_by_walking,
)
from agent.candidate.workspace import MAX_FILE_BYTES, MAX_MATCHES, Workspace, WorkspaceError

SECRET = "the host's own secret"
EDITABLE = ("train.py", "src/*.py", "fifo", "device", "leak*", "hard.py", "dir/*", "deep/*/*")
AT_FDCWD, EXCHANGE = -100, 2
MINE = "inside\n"
RACE_SECONDS, PATIENCE_SECONDS = 0.8, 10.0
OPENERS = (open_by_kernel, open_by_walking)


@pytest.fixture(params=OPENERS, ids=["openat2", "walk"])
def opener(request: pytest.FixtureRequest) -> OpenBeneath:
    chosen: OpenBeneath = request.param
    return chosen


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What must stay untouched; also the working directory, for the trap that leads to it."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret.txt").write_text(SECRET)
    (folder / "a.py").write_text(SECRET)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def magic(outside: Path) -> Iterator[str]:
    """A magic link of the kernel's. It leads outside as /proc/self/root would, but no further:
    a wall that breaks under these tests must not let them write over the machine."""
    descriptor = os.open(outside, os.O_PATH | os.O_DIRECTORY)
    yield f"/proc/self/fd/{descriptor}"
    os.close(descriptor)


@pytest.fixture
def root(tmp_path: Path, outside: Path, magic: str) -> Path:
    """A workspace full of traps, none of which leads out of `tmp_path`."""
    folder = tmp_path / "workspace"
    for name in ("src", "dir", ".git", "__pycache__"):
        (folder / name).mkdir(parents=True)
    for name in ("train.py", "prepare.py", "evaluate.py", "src/model.py", ".git/config"):
        (folder / name).write_text("x = 1\n")
    (folder / "__pycache__" / "train.pyc").write_bytes(b"\0")
    (folder / "leak").symlink_to(outside / "secret.txt")
    (folder / "leak-a").symlink_to(outside / "a.py")  # which has one name only
    (folder / "leak.py").symlink_to("../outside/secret.txt")
    (folder / "leakdir").symlink_to(outside)
    (folder / "src" / "up").symlink_to("../..")
    (folder / "inside").symlink_to("train.py")
    (folder / "dangling").symlink_to(outside / "new.txt")
    (folder / "leak-new").symlink_to(outside / "new.txt")
    (folder / "magic").symlink_to(magic)
    (folder / "cwd").symlink_to("/proc/self/cwd")
    (folder / "loop").symlink_to("loop")
    (folder / "hard.py").hardlink_to(outside / "secret.txt")
    os.mkfifo(folder / "fifo")
    (folder / "device").symlink_to("/dev/zero")
    return folder


@pytest.fixture
def workspace(root: Path, opener: OpenBeneath) -> Workspace:
    return Workspace(root, EDITABLE, opener)


@pytest.fixture
def untouched(outside: Path) -> Iterator[Callable[[], None]]:
    def check() -> None:
        assert ["a.py", "secret.txt"] == sorted(path.name for path in outside.iterdir())
        assert SECRET == (outside / "secret.txt").read_text()
        assert SECRET == (outside / "a.py").read_text()

    yield check
    check()


def code_of(act: Callable[[], object]) -> str:
    with pytest.raises(WorkspaceError) as caught:
        act()
    assert "/tmp" not in f"{caught.value.message} {caught.value.hint}"
    return caught.value.code


def test_the_kernel_confines_where_it_can(tmp_path: Path) -> None:
    assert choose_opener(tmp_path) is open_by_kernel


def test_a_file_is_read_and_replaced(workspace: Workspace, root: Path) -> None:
    workspace.write("train.py", "x = 'ß'\r\n".encode())

    assert "x = 'ß'\r\n" == workspace.read_text("./train.py")
    assert b"x = '\xc3\x9f'\r\n" == (root / "train.py").read_bytes()
    assert [] == list(root.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("leak", "outside_workspace"),
        ("leak.py", "outside_workspace"),
        ("leakdir/secret.txt", "outside_workspace|not_found"),
        ("src/up/outside/secret.txt", "outside_workspace|not_found"),
        ("inside", "outside_workspace"),
        ("dangling", "outside_workspace"),
        ("magic/secret.txt", "outside_workspace|not_found"),
        ("cwd/secret.txt", "outside_workspace|not_found"),
        ("loop", "outside_workspace"),
        ("hard.py", "hard_link"),
        ("fifo", "not_a_file"),
        ("device", "outside_workspace"),
        ("../outside/secret.txt", "bad_path"),
        ("src/../../outside/secret.txt", "bad_path"),
        ("/etc/passwd", "bad_path"),
        ("//etc/passwd", "bad_path"),
        (".git/config", "bad_path"),
        (".GIT/config", "bad_path"),
        ("train.py\0.txt", "bad_path"),
        ("src\\model.py", "bad_path"),
        ("a" * 300, "bad_path"),
        ("a/" * 600 + "b", "bad_path"),
        ("\ud800", "bad_path"),
        ("u\u0308.py", "bad_path"),
        ("", "bad_path"),
        (".", "bad_path"),
        ("train.py/x", "not_found"),
        ("none.py", "not_found"),
        ("src", "is_directory"),
    ],
)
def test_a_trap_is_refused_by_name(workspace: Workspace, path: str, code: str) -> None:
    assert code_of(lambda: workspace.read_text(path)) in code.split("|")


@pytest.mark.parametrize(
    "path", ["leak", "leak.py", "leak-new", "hard.py", "fifo", "device", "src/up", "dir"]
)
def test_a_trap_is_not_written_through(
    workspace: Workspace, path: str, untouched: Callable[[], None]
) -> None:
    code_of(lambda: workspace.write(path, b"x = 2\n"))
    untouched()


@pytest.mark.parametrize(
    "path", ["prepare.py", "evaluate.py", "other.py", "src/deep/a.py", "src/a.txt"]
)
def test_what_is_not_editable_is_not_written(workspace: Workspace, root: Path, path: str) -> None:
    before = sorted(root.rglob("*"))

    assert "not_editable" == code_of(lambda: workspace.write(path, b"x = 2\n"))
    assert before == sorted(root.rglob("*"))


def test_a_pattern_never_makes_the_fixed_files_editable(root: Path) -> None:
    workspace = Workspace(root, ("*.py",))

    assert not workspace.is_editable("prepare.py")
    assert not workspace.is_editable("evaluate.py")
    assert workspace.is_editable("train.py")


def test_a_new_file_may_match_an_editable_pattern(workspace: Workspace, root: Path) -> None:
    (root / "src" / "up").unlink()
    (root / "src" / "model.py").unlink()
    (root / "src").rmdir()

    workspace.write("src/new.py", b"y = 1\n")

    assert "y = 1\n" == (root / "src" / "new.py").read_text()


def test_sizes_are_bounded(workspace: Workspace, root: Path) -> None:
    (root / "big.txt").write_bytes(b"x" * (MAX_FILE_BYTES + 1))

    assert "too_large" == code_of(lambda: workspace.read_text("big.txt"))
    assert "too_large" == code_of(lambda: workspace.write("train.py", b"x" * 2**20))


def test_only_text_is_text(workspace: Workspace, root: Path) -> None:
    (root / "bytes").write_bytes(b"\xff\xfe")
    (root / "zero").write_bytes(b"a\0b")

    assert "not_text" == code_of(lambda: workspace.read_text("bytes"))
    assert "not_text" == code_of(lambda: workspace.read_text("zero"))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    workspace: Workspace, root: Path
) -> None:
    (root / "dir" / "a.py").mkdir()

    code_of(lambda: workspace.write("dir/a.py", b"x"))

    assert ["a.py"] == [path.name for path in (root / "dir").iterdir()]


def test_listing_shows_plain_files_and_nothing_hidden(workspace: Workspace) -> None:
    listed = {entry.path: entry.editable for entry in workspace.list_files()}

    assert {
        "evaluate.py": False,
        "prepare.py": False,
        "src/model.py": True,
        "train.py": True,
    } == listed
    assert ["src/model.py"] == [entry.path for entry in workspace.list_files("src")]


@pytest.mark.parametrize("path", ["leakdir", "src/up", "magic", "none", "train.py", ".."])
def test_a_listing_does_not_leave_either(workspace: Workspace, path: str) -> None:
    code_of(lambda: workspace.list_files(path))


def test_a_candidate_is_everything_but_what_decides_the_score(workspace: Workspace) -> None:
    assert {"src/model.py": b"x = 1\n", "train.py": b"x = 1\n"} == workspace.candidate()


def test_restoring_makes_the_editable_files_equal(workspace: Workspace, root: Path) -> None:
    (root / "notes.txt").write_text("mine")
    best = workspace.candidate()
    workspace.write("train.py", b"x = 2\n")
    workspace.write("src/new.py", b"y = 1\n")
    (root / "notes.txt").write_text("changed by the person")
    (root / "src" / "model.py").unlink()

    workspace.restore({**best, "prepare.py": b"not mine to write"})

    assert best["train.py"] == (root / "train.py").read_bytes()
    assert best["src/model.py"] == (root / "src" / "model.py").read_bytes()
    assert not (root / "src" / "new.py").exists()
    assert "changed by the person" == (root / "notes.txt").read_text()
    assert "x = 1\n" == (root / "prepare.py").read_text()


def test_search_finds_literal_text(workspace: Workspace, root: Path) -> None:
    (root / "train.py").write_text("lr = 0.1\nlr_2 = (1)\n")

    assert [("train.py", 2)] == [(m.path, m.line) for m in workspace.search("(1)")]
    assert [] == workspace.search("l.*=")
    found = workspace.search("l", "train.py")
    assert [(1, "lr = 0.1"), (2, "lr_2 = (1)")] == [(m.line, m.text) for m in found]


def test_search_sees_no_secret(workspace: Workspace) -> None:
    assert [] == workspace.search("secret")
    code_of(lambda: workspace.search("secret", "leakdir"))
    code_of(lambda: workspace.search("secret", "leak"))


def test_search_stops_at_the_first_hundred_lines(workspace: Workspace, root: Path) -> None:
    (root / "train.py").write_text("x" * 1000 + "\n" + "x\n" * 2 * MAX_MATCHES)

    found = workspace.search("x", "train.py")

    assert list(range(1, MAX_MATCHES + 1)) == [match.line for match in found]
    assert len(found[0].text) < 1000


NAMES = [
    *("train.py", "src", "dir", "leak", "leak.py", "leakdir", "leak-new", "up", "inside"),
    *("dangling", "magic", "cwd", "loop", "hard.py", "fifo", "device", "secret.txt", "a.py"),
    *("outside", "workspace", "..", ".", "", "...", ".git", "config", "prepare.py", "new.py"),
    *("proc", "self", "root", "fd", "3", "etc", "passwd", "~", "$HOME", "%2e%2e", "CON"),
    *("..\\", "..;", "\u2025", "\uff0e\uff0e", "\u2024\u2024", "a\0", "x" * 256, "\n", " "),
]
CHARACTERS = [*"./\\~$%* a\0\n\x7f\x9f", "é", "e\u0301", "\u202e", "\ud800", "\ufffd", "\U0001f600"]


def generated_paths(chance: random.Random, number: int) -> set[str]:
    """So many different paths, most of them through the traps."""
    paths = {"leakdir/a.py", "src/up/outside/secret.txt", "magic/secret.txt", "cwd/a.py"}
    while len(paths) < number:
        names = chance.choices(NAMES, k=chance.randint(1, 6))
        if chance.random() < 0.3:
            names[chance.randrange(len(names))] = "".join(chance.choices(CHARACTERS, k=4))
        paths.add(("/" if chance.random() < 0.15 else "") + "/".join(names))
    return paths


def acts(
    workspace: Workspace, read: str, written: str, listed: str
) -> dict[str, Callable[[], str]]:
    """What can be done with paths, each as a call that gives a text."""

    def write() -> str:
        workspace.write(written, MINE.encode())
        return ""

    return {
        "read": lambda: workspace.read_text(read),
        "write": write,
        "list": lambda: str(workspace.list_files(listed)),
    }


def test_no_generated_path_reads_or_writes_outside(
    root: Path, untouched: Callable[[], None]
) -> None:
    patterns = (*EDITABLE, "*", "*/*", "*/*/*", "*/*/*/*")
    workspaces = [Workspace(root, patterns, opener) for opener in OPENERS]
    # pytest-randomly seeds `random`, and prints the seed that gives the same paths again.
    paths = generated_paths(random.Random(random.random()), 10_000)
    done = Counter[str]()
    for path, workspace in itertools.product(sorted(paths), workspaces):
        for name, act in acts(workspace, path, path, path).items():
            try:
                text = act()
                done[name] += 1
            except WorkspaceError as error:
                text = f"{error.message} {error.hint}"
            assert SECRET not in text, (name, path)
            assert str(root) not in text, (name, path)

    untouched()
    assert len(paths) == 10_000
    assert min(done["read"], done["write"], done["list"]) > 20


def exchange(one: Path, other: Path) -> None:
    """Swap two names in one step, so that there is always something to open."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), EXCHANGE) != 0:
        raise OSError(ctypes.get_errno(), "renameat2")


# What is exchanged, for what; and the path that is opened meanwhile.
SWAPS = {
    "directory_for_link": ("dir", "leakdir", "dir/a.py"),
    "directory_above_for_link": ("deep", "up-link", "deep/outside/a.py"),
    "file_for_link": ("dir/a.py", "leak-a", "dir/a.py"),
    "file_for_second_name": ("dir/a.py", "hard.py", "dir/a.py"),
    "file_for_fifo": ("dir/a.py", "fifo", "dir/a.py"),
}


@pytest.mark.parametrize(("mine", "trap", "path"), SWAPS.values(), ids=SWAPS.keys())
def test_what_is_swapped_for_a_trap_leads_nowhere(
    workspace: Workspace,
    root: Path,
    untouched: Callable[[], None],
    mine: str,
    trap: str,
    path: str,
) -> None:
    """The attack that resolving a path first, and using it later, does not survive."""
    (root / "dir" / "a.py").write_text(MINE)
    (root / "deep" / "outside").mkdir(parents=True)
    (root / "deep" / "outside" / "a.py").write_text(MINE)
    (root / "up-link").symlink_to("..")
    read, refused = set[str](), 0
    with swapping(root / mine, root / trap):
        started = time.monotonic()
        # A busy machine may not let the swapper in for a while; both sides must have been seen.
        while time.monotonic() < started + (RACE_SECONDS if read and refused else PATIENCE_SECONDS):
            for act in acts(workspace, path, f"{path}.new", path.partition("/")[0]).values():
                try:
                    read.add(act())
                except WorkspaceError:
                    refused += 1

    untouched()
    assert not any(SECRET in text for text in read)
    assert MINE in read
    assert refused > 0


@contextmanager
def swapping(one: Path, other: Path) -> Iterator[None]:
    """Exchange two names, over and over, in a thread of its own."""
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            exchange(one, other)

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        yield
    finally:
        stop.set()
        swapper.join()
