"""Replaces a whole file; compares files with those on record."""

import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path


def replace_file(path: Path, data: bytes, *, durably: bool = False) -> None:
    """Make `path` hold `data`; where it is done `durably` that survives a power cut.

    Raises:
        OSError: the disk refused, and it names `path`, which is as it was.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(temporary, flags, 0o644), "wb") as stream:
            stream.write(data)
            if durably:
                stream.flush()
                os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # who reads of it knows nothing of the temporary name
            error.filename, error.filename2 = str(path), None
        raise
    if durably:
        sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make what was created, renamed or removed in a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FileHashes:
    """SHA-256 of files, each read once for as long as the kernel says that it did not change.

    Whoever writes a file can set the time of its change back, but not that of its inode's.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], str] = {}

    def of(self, path: Path) -> str:
        """The hash of a plain file; a link is not followed.

        Raises:
            OSError: it is not there, or it is a link.
        """
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            s = os.fstat(descriptor)
            state = (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
            if state not in self._known:
                self._known[state] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._known[state]

    def below(self, directory: Path) -> dict[str, str]:
        """The hashes of all files in a directory, by their paths in it."""
        found = (path for path in sorted(directory.rglob("*")) if not path.is_dir())
        return {path.relative_to(directory).as_posix(): self.of(path) for path in found}

    def differences(self, directory: Path, due: Mapping[str, str]) -> Iterator[str]:
        """What a directory lacks, holds otherwise or holds beyond what is due, in words."""
        try:
            found = self.below(directory)
        except OSError as error:
            yield f"{error.filename} cannot be read as a plain file"
            return
        for name in sorted(due.keys() | found.keys()):
            if name not in found:
                yield f"{name} is missing"
            elif name not in due:
                yield f"{name} is on no record"
            elif found[name] != due[name]:
                yield f"{name} is another one"
