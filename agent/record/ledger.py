"""The append-only record, held open by its one writer.

An event is on disk, or it is not there at all: each line is synced before what it announces
happens. What makes the lines a chain, and how they are read, is in `chain.py`.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from agent.record.chain import (
    BLOBS_NAME,
    FIRST_PREVIOUS,
    LEDGER_NAME,
    Clock,
    LedgerError,
    blob_path,
    canonical,
    entry_hash,
    read_blob,
    read_bytes,
    steady_clock,
    verify,
    what_to_do,
)
from agent.record.events import Entry, Event, SessionStarted
from agent.record.files import replace_file, sync_directory
from agent.record.history import History, fold

LOCK_NAME = "ledger.lock"


def is_locked(directory: Path) -> bool:
    """Whether some process holds the session, on whatever side of a container's wall it is.

    It takes the lock for a moment: that is for what a person does, not for what looks all the time.
    """
    try:
        with (directory / LOCK_NAME).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


class Ledger:
    """One session's record, held open by one process.

    Use `create` or `open`, and close it: as a context manager or with `close`. Ctrl-C may come at
    any step: an event counts from the moment it stands in `entries`, and everything else follows
    from there.
    """

    def __init__(self, directory: Path, lock: int, file: int, entries: list[Entry], now: Clock):
        self.directory = directory
        self.entries = entries
        self.now = now
        self._history, self._folded = fold(entries), len(entries)
        self._synced: set[str] = set()
        """Blobs, and folders of blobs, that this process knows to survive a power cut."""
        self._lock: int | None = lock
        self._file = _DurableFile(file, len(entries))

    @classmethod
    def create(cls, directory: Path, now: Clock | None = None) -> Self:
        """Begin a ledger in a directory that has none.

        Raises:
            LedgerError: there is one already, another process holds it, or the disk refused.
        """
        with _disk_errors(f"a ledger cannot be created in {directory}"):
            (directory / BLOBS_NAME).mkdir(parents=True, exist_ok=True)
            lock = _lock(directory)
            try:
                file = os.open(
                    directory / LEDGER_NAME,
                    os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC,
                    0o644,
                )
                sync_directory(directory)
            except OSError as error:
                os.close(lock)
                if not isinstance(error, FileExistsError):
                    raise
                raise LedgerError(
                    f"{directory} already holds a ledger",
                    f"`nightlab resume {directory.name}` goes on with it; "
                    "a new session needs a name of its own.",
                ) from error
        return cls(directory, lock, file, [], now or steady_clock())

    @classmethod
    def open(cls, directory: Path, now: Clock | None = None) -> Self:
        """Go on with a ledger: verify its chain, cut a torn last line off, lock it.

        The bytes cut off stay beside it as `ledger.torn-<n>`.

        Raises:
            LedgerError: none there, damaged, or held by another process.
        """
        read_bytes(directory)  # says that there is none before a lock file is left behind
        with _disk_errors(f"the ledger in {directory} cannot be opened"):
            lock = _lock(directory)
            try:
                path = directory / LEDGER_NAME
                written = path.read_bytes()
                entries: list[Entry] = []
                good_bytes = verify(written, path, entries)
                if entries and not isinstance(entries[0].event, SessionStarted):
                    raise LedgerError(f"{path} does not begin with a session's start")
                flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
                file = os.open(path, flags)
                if good_bytes < len(written):
                    _set_torn_aside(directory, written[good_bytes:])
                    os.ftruncate(file, good_bytes)
                    os.fsync(file)
            except BaseException:
                os.close(lock)
                raise
        return cls(directory, lock, file, entries, now or steady_clock())

    @property
    def head(self) -> str:
        """The last entry's hash: who knows it can tell that nothing was changed or cut off."""
        return self.entries[-1].hash if self.entries else FIRST_PREVIOUS

    @property
    def history(self) -> History:
        """The fold over all entries; made anew when one was broken off while it was applied."""
        if self._folded != len(self.entries):
            self._history, self._folded = fold(self.entries), len(self.entries)
        return self._history

    def append(self, event: Event) -> Entry:
        """Write one event, durably: when this returns, it survives a power cut.

        A NaN in an open-ended field, such as a score's details, is stored as null. Broken off,
        as by Ctrl-C, the event is on record or the next one takes its place.

        Raises:
            LedgerError: the event is about an attempt that was never started, or the disk
                refused; the ledger is as it was before.
        """
        history = self.history
        if not history.takes(event):
            raise LedgerError(f"a {event.type} names an attempt that was never started")
        line: dict[str, Any] = {
            "seq": len(self.entries),
            "at": self.now().isoformat(timespec="microseconds"),
            "previous": self.head,
            "event": event.model_dump(mode="json"),
        }
        entry = self._file.append(canonical(line | {"hash": entry_hash(line)}))
        self.entries.append(entry)
        history.apply(entry)
        self._folded = len(self.entries)
        return entry

    def put_blob(self, data: bytes) -> str:
        """Store bytes durably under their SHA-256, once; returns it.

        Raises:
            LedgerError: the disk refused.
        """
        sha = hashlib.sha256(data).hexdigest()
        path = blob_path(self.directory, sha)
        with _disk_errors("a blob cannot be written"):
            is_there = path.is_file() and path.stat().st_size == len(data)
            if is_there and sha in self._synced:
                return sha
            self._make_folder(path.parent)
            if is_there:  # who stored it may have been broken off before it was synced
                sync_directory(path.parent)
            else:
                replace_file(path, data, durably=True)
        self._synced.add(sha)
        return sha

    def get_blob(self, sha: str) -> bytes:
        """The bytes with that SHA-256, verified.

        Raises:
            LedgerError: missing, unreadable or damaged.
        """
        return read_blob(self.directory, sha)

    def close(self) -> None:
        """Let another process have the ledger. Closing twice is fine."""
        self._file.close()
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _make_folder(self, folder: Path) -> None:
        """A folder of blobs that survives a power cut."""
        folder.mkdir(parents=True, exist_ok=True)
        if folder.name not in self._synced:
            sync_directory(folder.parent)
            self._synced.add(folder.name)


class _DurableFile:
    """Lines, `count` so far, appended so that each is either on disk or not there at all."""

    def __init__(self, descriptor: int, count: int) -> None:
        self._descriptor: int | None = descriptor
        self._begins = {count: os.fstat(descriptor).st_size}
        """Where the next line begins, by its number. That of the last one is kept too: only who
        numbers the lines knows whether it counts."""

    def append(self, line: str) -> Entry:
        """Write and sync one line, in place of what a broken-off append left there.

        Raises:
            LedgerError: the disk refused; what was written of the line is gone again.
            ValueError: the line could not be read back as an entry; nothing was written.
        """
        if self._descriptor is None:
            raise LedgerError("the ledger is closed", "Open it again to write to it.")
        entry = Entry.model_validate_json(line)
        record, begin = line.encode() + b"\n", self._begins[entry.seq]
        try:
            if os.fstat(self._descriptor).st_size != begin:
                os.ftruncate(self._descriptor, begin)
            _write_all(self._descriptor, record)
            os.fsync(self._descriptor)
        except OSError as error:
            self._roll_back(begin)
            message = f"the ledger cannot be written: {error.strerror}"
            raise LedgerError(message, what_to_do(error)) from error
        self._begins = {entry.seq: begin, entry.seq + 1: begin + len(record)}
        return entry

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _roll_back(self, begin: int) -> None:
        """Take a half-written line back; where even that fails, the next `open` repairs it."""
        assert self._descriptor is not None
        try:
            os.ftruncate(self._descriptor, begin)
            os.fsync(self._descriptor)
        except OSError:
            self.close()


def _lock(directory: Path) -> int:
    """Take the session's lock; returns the descriptor that holds it.

    The file stays when the lock goes: removing it would let two processes lock two files.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(directory / LOCK_NAME, flags, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        _write_all(descriptor, f"{os.getpid()}\n".encode())
    except BlockingIOError as error:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise LedgerError(
            f"another process (pid {holder}) is working on {directory}",
            "Wait for it or stop it; two processes never share a session.",
        ) from error
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _set_torn_aside(directory: Path, torn: bytes) -> None:
    taken = {path.name for path in directory.glob("ledger.torn-*")}
    number = next(n for n in range(1, len(taken) + 2) if f"ledger.torn-{n}" not in taken)
    replace_file(directory / f"ledger.torn-{number}", torn, durably=True)


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


@contextmanager
def _disk_errors(message: str) -> Iterator[None]:
    """What the disk refuses becomes a LedgerError with what to do."""
    try:
        yield
    except OSError as error:
        raise LedgerError(f"{message}: {error.strerror}", what_to_do(error)) from error
