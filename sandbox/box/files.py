"""Receives a run's output as fresh plain files.

Nothing here follows what a box sent: names are checked again, files are created and never opened,
every directory on the way is entered without following links, and bytes and files are bounded.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from sandbox.box.supervisor import OUTPUT_DEPTH, OUTPUT_NAME
from sandbox.contract.errors import DISK_REFUSES, MACHINE_REFUSES, SandboxError
from sandbox.contract.run import OutputFile

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""How every directory is entered: never through a link that a box left."""


class OutputRefused(SandboxError):
    """What came as output breaks the rules that PID 1 obeys, so PID 1 is not to be believed."""


def output_name_parts(name: str) -> list[str]:
    """Return the checked parts of an output file's relative name.

    Raises:
        OutputRefused: a part is not a plain short name, or there are too many.
    """
    parts = name.split("/")
    if len(parts) > OUTPUT_DEPTH or not all(OUTPUT_NAME.match(part) for part in parts):
        raise OutputRefused(f"an output file's name is not allowed: {name[:200]!r}")
    return parts


class OutputReceiver:
    """Writes announced files one after the other under one empty directory."""

    def __init__(self, directory: Path | None, *, max_bytes: int, max_files: int) -> None:
        self._root = None if directory is None else _open_empty(directory)
        self._bytes_left = max_bytes
        self._files_left = max_files
        self._received: list[OutputFile] = []
        self._name = ""
        self._size = 0
        self._awaited = 0
        self._hash = hashlib.sha256()
        self._file: int | None = None

    @property
    def wants_files(self) -> bool:
        """Whether there is a place for files at all."""
        return self._root is not None

    def begin(self, name: str, size: int) -> None:
        """Create the file announced next.

        Raises:
            OutputRefused: the file was not asked for, is one too many or too large, exists
                already, or the one before is incomplete.
        """
        if self._root is None:
            raise OutputRefused("output came although none was asked for")
        if self._file is not None or self._files_left == 0 or not 0 <= size <= self._bytes_left:
            raise OutputRefused(f"output file {name[:200]!r} is outside the limits")
        self._file = _create(self._root, output_name_parts(name))
        # The whole size at once: what was announced cannot grow past the limits later.
        self._files_left -= 1
        self._bytes_left -= size
        self._name, self._size, self._awaited, self._hash = name, size, size, hashlib.sha256()
        self._finish_when_complete()

    def add(self, piece: bytes) -> None:
        """Write the next piece of the file begun last.

        Raises:
            OutputRefused: more came than was announced.
        """
        if self._file is None or not 0 < len(piece) <= self._awaited:
            raise OutputRefused("output came that was not announced")
        view = memoryview(piece)
        while view:
            view = view[os.write(self._file, view) :]
        self._hash.update(piece)
        self._awaited -= len(piece)
        self._finish_when_complete()

    def finish(self) -> tuple[OutputFile, ...]:
        """Return what was received, now safe on disk.

        Raises:
            OutputRefused: the last file is incomplete.
        """
        if self._file is not None:
            raise OutputRefused(f"output file {self._name!r} is incomplete")
        if self._root is not None:
            os.fsync(self._root)
        return tuple(self._received)

    def close(self) -> None:
        """Let go of every file descriptor; safe to call at any time."""
        for fd in (self._file, self._root):
            if fd is not None:
                os.close(fd)
        self._file = self._root = None

    def _finish_when_complete(self) -> None:
        if self._file is None or self._awaited:
            return
        os.fsync(self._file)  # a checkpoint that a ledger names must outlive a power cut
        os.close(self._file)
        self._file = None
        self._received.append(
            OutputFile(name=self._name, bytes=self._size, sha256=self._hash.hexdigest())
        )


def _open_empty(directory: Path) -> int:
    try:
        root = os.open(directory, DIRECTORY)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        problem = f"the output directory cannot be used: {directory}: {error.strerror}"
        raise SandboxError(problem, "give an empty directory of your own") from error
    if os.listdir(root):  # noqa: PTH208 - the directory opened, not one of that name
        os.close(root)
        raise SandboxError(f"the output directory is not empty: {directory}", "give a fresh one")
    return root


def _create(root: int, parts: list[str]) -> int:
    # Exclusive: a name that is there already was not asked for, and is never opened.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with _directory(root, parts[:-1]) as parent, _blaming(f"file {'/'.join(parts)!r}"):
        return os.open(parts[-1], flags, 0o600, dir_fd=parent)


@contextlib.contextmanager
def _blaming(what: str) -> Iterator[None]:
    """Blame the name that came, unless it is the host that has no room."""
    try:
        yield
    except OSError as error:
        if error.errno in (*DISK_REFUSES, *MACHINE_REFUSES):
            raise
        raise OutputRefused(f"output {what}: {error.strerror}") from error


@contextlib.contextmanager
def _directory(root: int, parts: list[str]) -> Iterator[int]:
    """Enter, and make where missing, one directory after the other."""
    current = os.dup(root)
    try:
        for part in parts:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o700, dir_fd=current)
            with _blaming(f"directory {part!r}"):
                deeper = os.open(part, DIRECTORY, dir_fd=current)
            os.close(current)
            current = deeper
        yield current
    finally:
        os.close(current)
