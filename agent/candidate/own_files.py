"""A person's files: what a session copies, what it shows."""

import hashlib
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sandbox.contract.errors import UsageError

GIT_SECONDS = 60
END_BYTES = 2**20
"""Of each file of a data folder, so much of its beginning and of its end is hashed."""
NEVER_COPIED = ("__pycache__",)


def copy_workspace(source: Path, target: Path, runs: Path) -> None:
    """Copy what an experiment is made of, so that the person's own files stay as they are.

    Hidden files, caches and the directory of the sessions stay out, and in a git repository
    whatever its .gitignore names.
    """
    target.mkdir()
    for name in sorted(_tracked(source) or _all(source)):
        path, place = source / name, target / name
        if path.is_file() and is_wanted(Path(name)) and not path.resolve().is_relative_to(runs):
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
            shutil.copymode(path, place)


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


def _tracked(source: Path) -> list[str]:
    """Files that git knows or would take, relative to `source`; empty outside a repository."""
    # A monitor that the repository names is a program, and git would run it.
    listing = ("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    try:
        done = subprocess.run(
            ["git", "-c", "core.fsmonitor=false", "-C", str(source), *listing],
            capture_output=True,
            timeout=GIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
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
