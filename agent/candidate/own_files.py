"""A person's files: what a session copies, what it shows."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def folder_facts(folder: Path) -> dict[str, Any]:
    """What a data folder held: its files, their sizes, a hash of names, sizes, beginnings and ends.

    A change in the middle of a file over 2 MiB is not seen: to hash a terabyte takes a night.
    """
    total, count, digest = 0, 0, hashlib.sha256()
    for name in sorted(_all(folder)):
        path = folder / name
        size = path.stat().st_size
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        digest.update(_ends(path, size))
        total, count = total + size, count + 1
    return {
        "source": "folder",
        "folder": str(folder),
        "files": count,
        "bytes": total,
        "manifest_sha256": digest.hexdigest(),
    }


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
