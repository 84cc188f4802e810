"""The append-only record: hash-chained events, content-addressed blobs.

Each line of `ledger.jsonl` is canonical JSON (sorted keys, no spaces, UTF-8) and carries the
SHA-256 of itself and of the line before. So a line that was changed, moved or taken out is found.
A tail that was cut off cannot be found from the file alone: only the head hash, kept elsewhere,
shows it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import structlog
from pydantic import ValidationError

from agent.record.events import EVENT_TYPES, SCHEMA_VERSION, Entry, Event
from agent.record.files import replace_file, sync_directory
from agent.record.history import History, fold
from sandbox.contract.errors import NightlabError, first_problem

FIRST_PREVIOUS = "0" * 64
LEDGER_NAME = "ledger.jsonl"

_KEYS = {"at", "event", "hash", "previous", "seq"}
LOCK_NAME = "ledger.lock"
BLOBS_NAME = "blobs"
_ENCODER = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RESTORE_HINT = (
    "Keep the directory as it is for inspection and restore the session from a copy; "
    "nightlab does not go on from a record that it cannot trust."
)

Clock = Callable[[], datetime]
_EventDict = MutableMapping[str, Any]


class LedgerError(NightlabError):
    """The ledger cannot be used as it is."""

    usual_hint = "`nightlab audit` says what is wrong with a session's record"


def canonical(value: object) -> str:
    """The one JSON text of a value, the form that is hashed and stored.

    Raises:
        ValueError: NaN or infinity.
    """
    return _ENCODER.encode(value)


def entry_hash(entry: Mapping[str, Any]) -> str:
    """SHA-256 over everything in a parsed line but its own `hash`."""
    rest = {key: value for key, value in entry.items() if key != "hash"}
    return hashlib.sha256(canonical(rest).encode()).hexdigest()


def request_sha(shas: Sequence[str]) -> str:
    """What a model call asked, by hash.

    SHA-256 of the canonical JSON list that names the blobs of the system prompt, of the tools and
    of every message until then. All of them are on record, so an auditor finds the same.
    """
    return hashlib.sha256(canonical(list(shas)).encode()).hexdigest()


def utc_now() -> datetime:
    """The wall clock, in UTC."""
    return datetime.now(UTC)


def read_ledger(directory: Path) -> list[Entry]:
    """Every entry, verified, without taking the lock or changing anything.

    A torn last line is left out: a session that is being written right now looks the same.

    Raises:
        LedgerError: no ledger, or one that was damaged.
    """
    entries: list[Entry] = []
    _verify(_read_bytes(directory), directory / LEDGER_NAME, entries)
    return entries


def torn_bytes(directory: Path) -> int:
    """How many bytes of a torn last line a verified ledger ends with; 0 as a rule."""
    _, torn = _lines(_read_bytes(directory))
    return len(torn)


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


class Follower:
    """A ledger that somebody else writes: each look verifies and takes in only what is new.

    No lock is taken and nothing is changed. A torn last line is left for the next look.
    """

    def __init__(self, directory: Path) -> None:
        self.entries: list[Entry] = []
        self.history = History()
        self.problem: LedgerError | None = None
        self._path = directory / LEDGER_NAME
        self._seen: tuple[int, int, int] | None = None
        self._good_bytes = 0

    def look(self) -> bool:
        """Take in what was written since the last look; whether there was any change.

        A ledger that was replaced, cut or rewritten is read from its start again. What is wrong
        with it is in `problem`, and what stands before a damage is in `entries`.
        """
        found = _file_state(self._path)
        if found == self._seen:
            return False
        before, self._seen = self._seen, found
        if self.problem or not (
            found and before and found[0] == before[0] and found[1] > before[1]
        ):
            self._begin()
        try:
            self._take_in()
        except LedgerError as error:
            self.problem = error
        return True

    def _begin(self) -> None:
        self.entries, self.history = [], History()
        self.problem, self._good_bytes = None, 0

    def _take_in(self) -> None:
        known = len(self.entries)
        try:
            written = _read_bytes(self._path.parent, self._good_bytes)
            self._good_bytes += _verify(written, self._path, self.entries)
        finally:
            for entry in self.entries[known:]:
                self.history.apply(entry)


def _file_state(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is replaced, grows or is rewritten; none where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def read_blob(directory: Path, sha: str) -> bytes:
    """The bytes with that SHA-256.

    Raises:
        LedgerError: missing, unreadable, or no longer the bytes that were stored.
    """
    path = _blob_path(directory, sha)
    try:
        body = path.read_bytes()
    except OSError as error:
        raise LedgerError(f"blob {sha} cannot be read: {error.strerror}", _RESTORE_HINT) from error
    found = hashlib.sha256(body).hexdigest()
    if found != sha:
        raise LedgerError(f"blob {sha} is damaged: its content hashes to {found}", _RESTORE_HINT)
    return body


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
        self._log: _Appender = structlog.wrap_logger(
            self._file,
            processors=[
                self._number,
                _Stamp(now),
                self._link,
                _seal,
                structlog.processors.JSONRenderer(serializer=_serialise),
            ],
            wrapper_class=_Appender,
        )

    @classmethod
    def create(cls, directory: Path, now: Clock = utc_now) -> Self:
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
            except FileExistsError as error:
                os.close(lock)
                raise LedgerError(
                    f"{directory} already holds a ledger",
                    f"`nightlab resume {directory.name}` goes on with it; "
                    "a new session needs a name of its own.",
                ) from error
            except OSError:
                os.close(lock)
                raise
        return cls(directory, lock, file, [], now)

    @classmethod
    def open(cls, directory: Path, now: Clock = utc_now) -> Self:
        """Go on with a ledger: verify its chain, cut a torn last line off, lock it.

        The bytes cut off stay beside it as `ledger.torn-<n>`.

        Raises:
            LedgerError: none there, damaged, or held by another process.
        """
        _read_bytes(directory)  # says that there is none before a lock file is left behind
        with _disk_errors(f"the ledger in {directory} cannot be opened"):
            lock = _lock(directory)
            try:
                path = directory / LEDGER_NAME
                written = path.read_bytes()
                entries: list[Entry] = []
                good_bytes = _verify(written, path, entries)
                flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
                file = os.open(path, flags)
                if good_bytes < len(written):
                    _set_torn_aside(directory, written[good_bytes:])
                    os.ftruncate(file, good_bytes)
                    os.fsync(file)
            except BaseException:
                os.close(lock)
                raise
        return cls(directory, lock, file, entries, now)

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
        entry = self._log.append(event.model_dump(mode="json"))
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
        path = _blob_path(self.directory, sha)
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

    def _number(self, _logger: object, _method: str, line: _EventDict) -> _EventDict:
        line["seq"] = len(self.entries)
        return line

    def _link(self, _logger: object, _method: str, line: _EventDict) -> _EventDict:
        line["previous"] = self.head
        return line


class _Appender(structlog.BoundLoggerBase):
    """structlog's way to our file: one method, which returns the entry written."""

    def append(self, event: dict[str, Any]) -> Entry:
        entry: Entry = self._proxy_to_logger("append", event)  # type: ignore[arg-type]  # an object, not a sentence
        return entry


class _Stamp:
    """Adds the time of writing, from the clock it was given."""

    def __init__(self, now: Clock) -> None:
        self._now = now

    def __call__(self, _logger: object, _method: str, line: _EventDict) -> _EventDict:
        line["at"] = self._now().isoformat(timespec="microseconds")
        return line


def _seal(_logger: object, _method: str, line: _EventDict) -> _EventDict:
    line["hash"] = entry_hash(line)
    return line


def _serialise(line: _EventDict, **_options: object) -> str:
    return canonical(line)


class _DurableFile:
    """Lines appended so that each is either on disk or not there at all.

    Args:
        descriptor: of the file.
        count: how many lines it holds.
    """

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
            raise LedgerError(message, _what_to_do(error)) from error
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


def _verify(written: bytes, path: Path, entries: list[Entry]) -> int:
    """Put the entries that a ledger's bytes hold behind `entries`; how many bytes hold them."""
    lines, torn = _lines(written)
    for line in lines:
        seq, previous = len(entries), entries[-1].hash if entries else FIRST_PREVIOUS
        try:
            entries.append(_verified_entry(line, seq, previous))
        except _Damage as damage:
            message = f"{path}, line {seq + 1} (seq {seq}): {damage}"
            raise LedgerError(message, damage.hint) from damage
    return len(written) - len(torn)


def _lines(written: bytes) -> tuple[list[bytes], bytes]:
    """The lines, and a torn last one: without its newline, or with bytes that never reached the
    disk and read as NUL."""
    *lines, torn = written.split(b"\n")
    if lines and not torn and b"\0" in lines[-1]:
        torn = lines.pop() + b"\n"
    return lines, torn


class _Damage(Exception):
    """What differs in one line."""

    hint = _RESTORE_HINT


class _TooNew(_Damage):
    """A line that this nightlab cannot read because another one wrote it."""

    hint = "Another version of nightlab wrote it: go on with that one, or with a newer one."


def _verified_entry(line: bytes, seq: int, previous: str) -> Entry:
    """One line as an entry; hashed as the JSON it is, never as a model would write it again."""
    parsed = _parsed(line)
    event = parsed.get("event") if isinstance(parsed.get("event"), dict) else None
    kind, version = (event.get("type"), event.get("schema_version")) if event else (None, None)
    if kind == "session_started" and version != SCHEMA_VERSION:
        raise _TooNew(f"its schema_version is {version}; this nightlab reads {SCHEMA_VERSION}")
    if parsed.get("seq") != seq:
        raise _Damage(f"its seq is {parsed.get('seq')!r}: a line is missing, extra or moved")
    if parsed.get("previous") != previous:
        raise _Damage("its `previous` is not the hash of the line before")
    if parsed.get("hash") != _hash_of_line(line, parsed):
        raise _Damage("its content does not match its hash")
    if kind not in EVENT_TYPES:
        raise _TooNew(f"this nightlab knows no event of type {str(kind)[:80]!r}")
    try:
        return Entry.model_validate_json(line)
    except ValidationError as error:
        raise _TooNew(f"this nightlab cannot read its {kind}: {first_problem(error)}") from error


def _hash_of_line(line: bytes, parsed: Mapping[str, Any]) -> str:
    """`entry_hash` of a line in canonical form, without writing it anew.

    Where a line has the keys of an entry, it ends with hash, previous and seq, in this order.
    """
    end = f',"hash":"{parsed.get("hash")}"'.encode()
    rest = f',"previous":"{parsed.get("previous")}","seq":{parsed.get("seq")}}}'.encode()
    if parsed.keys() != _KEYS or not line.endswith(end + rest):
        return entry_hash(parsed)
    return hashlib.sha256(line[: -len(end) - len(rest)] + rest).hexdigest()


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(line.decode())
        if not isinstance(parsed, dict):
            raise _Damage("it is not a JSON object")
        if canonical(parsed).encode() != line:
            raise _Damage("it is not in the form in which nightlab writes it")
    except (ValueError, RecursionError) as error:
        raise _Damage(f"it is not readable as JSON ({error})") from error
    return parsed


def _read_bytes(directory: Path, skip_bytes: int = 0) -> bytes:
    try:
        with (directory / LEDGER_NAME).open("rb") as file:
            file.seek(skip_bytes)
            return file.read()
    except FileNotFoundError as error:
        raise LedgerError(
            f"there is no ledger in {directory}",
            "Name a session's directory, such as runs/<session>.",
        ) from error
    except OSError as error:
        message = f"the ledger in {directory} cannot be read: {error.strerror}"
        raise LedgerError(message, _what_to_do(error)) from error


def _blob_path(directory: Path, sha: str) -> Path:
    if not _SHA256.fullmatch(sha):
        raise LedgerError(f"{sha[:80]!r} is not the name of a blob")
    return directory / f"{BLOBS_NAME}/{sha[:2]}/{sha[2:]}"  # one step: an audit does it often


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
        raise LedgerError(f"{message}: {error.strerror}", _what_to_do(error)) from error


def _what_to_do(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Make room on the disk, then `nightlab resume` goes on; nothing recorded is lost."
    return "Look at the disk and its permissions, then `nightlab resume` goes on."
