"""A person's files: what a session copies, what it shows."""

import hashlib
import os
import shutil
import stat
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import dropwhile
from pathlib import Path
from typing import Any

from agent.text import one_line
from sandbox.contract.errors import UsageError

GIT_SECONDS = 60
END_BYTES = 2**20
"""Of each file of a data folder, so much of its beginning and of its end is hashed."""
NEVER_COPIED = ("__pycache__", ".git")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MISSING_PROGRAM = 127
POINTERS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_NAMESPACE")
"""Set in the person's shell, or by a hook that we are called from, they name another repository."""


def copy_workspace(
    source: Path,
    target: Path,
    runs: Path,
    leave_out: Sequence[str] = (),
    *,
    max_files: int = 5000,
    max_bytes: int = 256 * 2**20,
) -> str:
    """Copy what an experiment is made of, so that the person's own files stay as they are.

    The directory of the sessions stays out, and what a pattern leaves out.

    Returns:
        What else is not copied, in one line; empty where that is nothing.

    Raises:
        UsageError: git refuses or ignores all of it, it is more than the bounds, a link leads to
            what is not copied, or a file is the pointer of one that was never fetched.
    """
    found = look_through(source)
    if (
        not found.files
        and is_in_repository(source)
        and any(map(is_wanted, map(Path, _all(source))))
    ):
        hint = (
            "`git add -f` what an experiment is made of, or `git init` there if it is one by itself"
        )
        raise UsageError(f"git ignores all of {source.absolute()}", hint)
    names = [
        name
        for name in found.files
        if not is_named(name, leave_out) and not (source / name).resolve().is_relative_to(runs)
    ]
    _refuse_too_much(source, names, max_files, max_bytes)
    copied = {(source.resolve() / name) for name in names}
    target.mkdir()
    for name in names:
        path, place = source / name, target / name
        if (real := path.resolve()) not in copied:
            hint = "put the file itself there, or name the link under leave_out in [workspace]"
            raise UsageError(f"{name} is a link to {real}, which no session copies", hint)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
        shutil.copymode(path, place)
    if pointers := [name for name in names if _is_pointer(target / name)]:
        named = ", ".join(pointers[:5])
        hint = "run `git lfs pull`, or name them under leave_out in [workspace]"
        raise UsageError(f"pointers of Git LFS lie in the place of files: {named}", hint)
    others = {
        what: [one_line(name, 60) for name in every if not is_named(name, leave_out)]
        for what, every in found.left.items()
    }
    return "; ".join(
        f"{len(left)} {what} ({', '.join(left[:3])}{', …' * (len(left) > 3)})"
        for what, left in others.items()
        if left
    )


def _refuse_too_much(source: Path, names: Sequence[str], max_files: int, max_bytes: int) -> None:
    """Measure before anything is copied; the largest places are named.

    Raises:
        UsageError: it is more than the bounds.
    """
    sizes = {name: (source / name).stat().st_size for name in names}
    total = sum(sizes.values())
    if len(sizes) <= max_files and total <= max_bytes:
        return
    counts, places = Counter[str](), Counter[str]()
    for name, size in sizes.items():
        top = name.partition("/")[0]
        counts[top] += 1
        places[top] += size
    largest = counts if len(sizes) > max_files else places
    named = ", ".join(
        f"{top} ({counts[top]} files, {places[top] / 2**20:.1f} MiB)"
        for top, _ in largest.most_common(4)
    )
    held = f"{len(sizes)} files of {total / 2**20:.0f} MiB"
    bound = f"the bounds are {max_files} and {max_bytes / 2**20:.0f} MiB"
    hint = (
        f"most lies in {named}: name what no run needs under leave_out in [workspace], show data "
        "by [[data]], or raise max_files or max_size there"
    )
    raise UsageError(f"{source.absolute()} holds {held}; {bound}", hint)


def _is_pointer(path: Path) -> bool:
    if path.stat().st_size >= 2 * len(LFS_POINTER) + 200:
        return False
    return path.read_bytes().startswith(LFS_POINTER)


@dataclass(frozen=True)
class Found:
    """What lies in a person's directory."""

    files: list[str]
    """What a session copies, sorted."""
    left: dict[str, list[str]]
    """What it does not, by why; beside what git ignores."""


def files_of(source: Path) -> list[str]:
    """Files of a person's directory that a session copies, sorted; see `look_through`."""
    return look_through(source).files


def look_through(source: Path) -> Found:
    """What a session copies of a person's directory; in a repository nothing that git ignores.

    Hidden files only where git tracks them, caches never; of a link to a folder what it leads to
    inside the same directory.

    Raises:
        UsageError: it is a repository and git does not tell: without it secrets would be copied
            that are ignored for a reason.
    """
    files: set[str] = set()
    left: dict[str, list[str]] = {}
    listed = _listed(source)
    for name, is_tracked in sorted(listed.items()):
        path = source / name
        if not is_wanted(Path(name), is_tracked=is_tracked):
            if not any(part in NEVER_COPIED for part in Path(name).parts):
                left.setdefault("hidden files that git does not track", []).append(name)
        elif not name.isprintable():
            left.setdefault("names that cannot be printed", []).append(name)
        elif path.is_file():
            files.add(name)
        elif path.is_symlink() and path.is_dir():
            real, here = path.resolve(), source.resolve()
            # What lies there is copied under both names, if it is copied at all.
            if real.is_relative_to(here) and not here.is_relative_to(real):
                below = str(real.relative_to(here)) + "/"
                inside = [one for one in listed if one.startswith(below)]
                files |= {
                    f"{name}/{one.removeprefix(below)}"
                    for one in inside
                    if is_wanted(Path(one), is_tracked=listed[one]) and (source / one).is_file()
                }
            else:
                left.setdefault("links to folders elsewhere", []).append(name)
        elif path.is_dir():
            left.setdefault("repositories inside, or submodules not fetched", []).append(name)
    return Found(sorted(files), left)


def is_named(name: str, patterns: Sequence[str]) -> bool:
    """Whether a path is one that a pattern names, or lies in a folder that it names."""
    parts = name.split("/")
    return any(
        fnmatchcase(name, pattern)
        or any(matches(parts[:end], pattern.split("/")) for end in range(1, len(parts) + 1))
        for pattern in patterns
    )


def matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path is one of a pattern: `*` within a name, `**` for any folders or none."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        # One after another they are one: else they could be tried in ever more ways.
        rest = list(dropwhile(lambda part: part == "**", pattern))
        if not rest:
            return bool(parts)
        return any(matches(parts[start:], rest) for start in range(len(parts)))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


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
    """Whether a directory is a git repository or lies in one.

    Raises:
        UsageError: git was told where one is, and none is seen here.
    """
    places = (source.absolute(), *source.absolute().parents, *source.resolve().parents)
    is_seen = any((folder / ".git").exists() for folder in (*places, source.resolve()))
    if not is_seen and (told := next((name for name in POINTERS if os.environ.get(name)), None)):
        hint = f"unset {told}, or put a .git there: what git ignores is never copied"
        raise UsageError(f"{told} is set, and {source.absolute()} has no .git of its own", hint)
    return is_seen


def _listed(source: Path) -> dict[str, bool]:
    """Names of a directory, relative to it, and whether git tracks each.

    Those of submodules are among them; a folder is one that git does not look into.
    """
    if not is_in_repository(source):
        links = (p for p in source.rglob("*") if p.is_symlink() and p.is_dir())
        names = [*_all(source), *(str(link.relative_to(source)) for link in links)]
        return dict.fromkeys(names, False)
    others = dict.fromkeys(git_lists(source, "--others", "--exclude-standard"), False)
    tracked = dict.fromkeys(git_lists(source, "--cached", "--recurse-submodules"), True)
    return {name.rstrip("/"): is_tracked for name, is_tracked in (others | tracked).items()}


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


def is_wanted(path: Path, *, is_tracked: bool = False) -> bool:
    """Whether a file of the workspace is copied into a session: a hidden one if git tracks it."""
    return path.suffix != ".pyc" and not any(
        part in NEVER_COPIED or (part.startswith(".") and not is_tracked) for part in path.parts
    )


def _ends(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        head = file.read(END_BYTES)
        file.seek(max(file.tell(), size - END_BYTES))
        return head + file.read(END_BYTES)
