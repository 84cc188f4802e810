"""A person's files: what a session copies, what it shows."""

import hashlib
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from agent.text import one_line
from sandbox.contract.errors import UsageError

GIT_SECONDS = 60
END_BYTES = 2**20
"""Of each file of a data folder, so much of its beginning and of its end is hashed."""
NEVER_COPIED = ("__pycache__",)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MISSING_PROGRAM = 127
POINTERS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_NAMESPACE")
"""Set in the person's shell, or by a hook that we are called from, they name another repository."""


def copy_workspace(source: Path, target: Path, runs: Path, leave_out: Sequence[str] = ()) -> None:
    """Copy what an experiment is made of, so that the person's own files stay as they are.

    The directory of the sessions stays out, and what a pattern leaves out.

    Raises:
        UsageError: git refuses or ignores all of it, a link leads to what is not copied, or a file
            is the pointer of one that was never fetched.
    """
    listed = files_of(source)
    if not listed and is_in_repository(source) and any(map(is_wanted, map(Path, _all(source)))):
        hint = (
            "`git add -f` what an experiment is made of, or `git init` there if it is one by itself"
        )
        raise UsageError(f"git ignores all of {source.absolute()}", hint)
    names = [name for name in listed if not any(_matches(name, one) for one in leave_out)]
    copied = {(source.resolve() / name) for name in names}
    target.mkdir()
    pointers = []
    for name in names:
        path, place = source / name, target / name
        if (real := path.resolve()).is_relative_to(runs):
            continue
        if real not in copied:
            hint = "put the file itself there, or name the link under leave_out in [workspace]"
            raise UsageError(f"{name} is a link to {real}, which no session copies", hint)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
        shutil.copymode(path, place)
        if place.stat().st_size < 2 * len(LFS_POINTER) + 200:
            pointers += [name] if place.read_bytes().startswith(LFS_POINTER) else []
    if pointers:
        named = ", ".join(pointers[:5])
        hint = "run `git lfs pull`, or name them under leave_out in [workspace]"
        raise UsageError(f"pointers of Git LFS lie in the place of files: {named}", hint)


def files_of(source: Path) -> list[str]:
    """Files of a person's directory, sorted; in a repository those that git does not ignore.

    Hidden files and caches stay out, and files that git knows and that are gone.

    Raises:
        UsageError: it is a repository and git does not tell: without it secrets would be copied
            that are ignored for a reason.
    """
    listed = set(_tracked(source) if is_in_repository(source) else _all(source))
    return sorted(name for name in listed if is_wanted(Path(name)) and (source / name).is_file())


def _matches(name: str, pattern: str) -> bool:
    """Whether a path is one that a pattern names, or lies in a folder that it names."""
    if pattern.endswith("/**"):
        return fnmatchcase(name, f"{pattern[:-3]}/*")
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}/")


def folder_facts(folders: Mapping[Path, str]) -> dict[str, Any]:
    """What data folders held: files, sizes, a hash of names, sizes, beginnings and ends.

    A change in the middle of a file over 2 MiB is not seen: to hash a terabyte takes a night.

    Args:
        folders: folders or files, each with the place where a program looks for it.
    """
    if not folders:
        return {}
    digest, facts = hashlib.sha256(), []
    for folder, at in folders.items():
        total, names = 0, sorted(_all(folder)) or ["."]
        for name in names:
            size = (path := folder / name).stat().st_size
            digest.update(f"{at}\0{name}\0{size}\0".encode("utf-8", "surrogateescape"))
            digest.update(_ends(path, size) if path.is_file() else b"")
            total += size
        facts.append({"folder": str(folder), "at": at, "files": len(names), "bytes": total})
    return {"source": "folders", "folders": facts, "manifest_sha256": digest.hexdigest()}


def refuse_unreadable(folder: Path) -> None:
    """Refuse data that a box could not read: its user is nobody on the host.

    Raises:
        UsageError: there is none, or a file or directory of it is closed to others.
    """
    if not folder.exists():
        hint = "see [data] in program.md; a relative path begins where nightlab was started"
        raise UsageError(f"{folder} is not there", hint)
    for path in (folder, *folder.rglob("*")):
        mode = 0 if path.is_symlink() and not path.exists() else path.stat().st_mode
        needed = stat.S_IROTH | (stat.S_IXOTH if stat.S_ISDIR(mode) else 0)
        if mode and mode & needed != needed:
            raise UsageError(
                f"{path} cannot be read by a box, whose user is nobody here",
                f"open it to read: chmod -R o+rX {folder}",
            )


def is_in_repository(source: Path) -> bool:
    """Whether a directory is a git repository or lies in one."""
    place = source.absolute()
    return any((folder / ".git").exists() for folder in (place, *place.parents))


def _tracked(source: Path) -> list[str]:
    """Files that git knows or would take, those of submodules among them, relative to `source`."""
    known = git_lists(source, "--cached", "--recurse-submodules")
    return known + git_lists(source, "--others", "--exclude-standard")


def git_lists(source: Path, *options: str) -> list[str]:
    """What `git ls-files` tells, with nothing in the repository run.

    Raises:
        UsageError: it refused.
    """
    # A monitor that the repository names is a program, and git would run it; a variable of the
    # person's shell may point to another repository.
    unset = [word for name in POINTERS for word in ("-u", name)]
    git = ["env", *unset, "git", "-c", "core.fsmonitor=false", "-C", str(source), "ls-files", "-z"]
    try:
        done = subprocess.run(
            [*git, *options], capture_output=True, timeout=GIT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise UsageError(f"git took over {GIT_SECONDS} s in {source}", "look at it there") from None
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()
        hint = "run `git status` there and mend what it says: what git ignores is never copied"
        if done.returncode == MISSING_PROGRAM:
            hint = "install git: what it ignores is never copied, and nothing else knows that"
        elif "dubious ownership" in said:
            hint = f"if it is yours: git config --global --add safe.directory {source.absolute()}"
        problem = one_line(said, 200)
        raise UsageError(f"{source.absolute()} is a repository, and git refuses: {problem}", hint)
    return [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]


def _all(folder: Path) -> Iterator[str]:
    """Files in a folder and below, relative to it; links to folders are not followed."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.is_file():
                yield str(path.relative_to(folder))


def is_wanted(path: Path) -> bool:
    """Whether a file of the workspace is copied into a session."""
    return path.suffix != ".pyc" and not any(
        part.startswith(".") or part in NEVER_COPIED for part in path.parts
    )


def _ends(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        head = file.read(END_BYTES)
        file.seek(max(file.tell(), size - END_BYTES))
        return head + file.read(END_BYTES)
