"""Boxes of one score meet in no file or user.

A box sees which parts of a file others have locked, and by timing what of it lies in memory: where
two of them see one file, the first can tell the second all that it was asked (docs/decisions/0024).
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from sandbox.contract.errors import SandboxError
from sandbox.contract.run import RunResult, RunSpec

File = tuple[int, int, int]
"""Device and number of an inode, and its last change: a free number is given away again."""


class Apart:
    """What the boxes of one score have had so far."""

    def __init__(self) -> None:
        self._files: set[File] = set()
        self._users: set[int] = set()

    def begin(self, spec: RunSpec) -> None:
        """Take note of all that a box is about to see.

        Raises:
            SandboxError: an earlier box saw a file or directory of it, or it has a second name.
        """
        seen: set[File] = set()
        for path in (path for mount in spec.mounts for path in _below(mount.source.resolve())):
            about = path.lstat()
            file = (about.st_dev, about.st_ino, about.st_ctime_ns)
            # A second name moves the time of the last change, and leads to the same inode.
            if file in self._files or (stat.S_ISREG(about.st_mode) and about.st_nlink > 1):
                raise SandboxError(
                    f"two boxes of one score would see one file: {path}",
                    "every box that sees rows gets copies of its own; nothing else is mounted",
                )
            seen.add(file)
        self._files |= seen

    def end(self, result: RunResult) -> None:
        """Take note of the user that a box had, as PID 1 proved it.

        Raises:
            SandboxError: an earlier box had it.
        """
        proved = result.evidence.get("container", {}).get("proved", {})
        users = set(proved.get("uids", ()))
        if users & self._users:
            raise SandboxError(f"two boxes of one score had one user: {users & self._users}")
        self._users |= users


def _below(place: Path) -> Iterator[Path]:
    """Give a place and all that is below it; links are not followed."""
    yield place
    for folder, folders, files in os.walk(place):
        yield from (Path(folder) / name for name in (*folders, *files))
