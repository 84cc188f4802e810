"""What chains a ledger's lines, and how they are read.

Each line of `ledger.jsonl` is canonical JSON (sorted keys, no spaces, UTF-8) and carries the
SHA-256 of itself and of the line before. So a line that was changed, moved or taken out is found.
A tail that was cut off cannot be found from the file alone: only the head hash, kept elsewhere,
shows it.
"""

import errno
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agent.record.events import EVENT_TYPES, SCHEMA_VERSION, Entry
from agent.record.history import History
from sandbox.contract.errors import NightlabError, first_problem

FIRST_PREVIOUS = "0" * 64
LEDGER_NAME = "ledger.jsonl"
_KEYS = {"at", "event", "hash", "previous", "seq"}
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
GetBlob = Callable[[str], bytes]
"""Reads a blob by its hash, as `Ledger.get_blob` does."""


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


def steady_clock(wall: Clock = utc_now) -> Clock:
    """A wall clock that is read once and counted on from there, through sleep and steps of it."""
    since = time.clock_gettime(time.CLOCK_BOOTTIME)
    began = wall()
    return lambda: began + timedelta(seconds=time.clock_gettime(time.CLOCK_BOOTTIME) - since)


def read_ledger(directory: Path) -> list[Entry]:
    """Every entry, verified, without taking the lock or changing anything.

    A torn last line is left out: a session that is being written right now looks the same.

    Raises:
        LedgerError: no ledger, or one that was damaged.
    """
    entries: list[Entry] = []
    verify(read_bytes(directory), directory / LEDGER_NAME, entries)
    return entries


def read_files(directory: Path, shas: Mapping[str, str]) -> dict[str, bytes]:
    """Files by name, from their blobs; see `read_blob`."""
    return {name: read_blob(directory, sha) for name, sha in shas.items()}


def torn_bytes(directory: Path) -> int:
    """How many bytes of a torn last line a verified ledger ends with; 0 as a rule."""
    _, torn = _lines(read_bytes(directory))
    return len(torn)


class Follower:
    """A ledger that somebody else writes: each poll verifies and takes in only what is new.

    No lock is taken and nothing is changed. A torn last line is left for the next poll.
    """

    def __init__(self, directory: Path) -> None:
        self.entries: list[Entry] = []
        self.history = History()
        self.problem: LedgerError | None = None
        self._path = directory / LEDGER_NAME
        self._seen: tuple[int, int, int] | None = None
        self._good_bytes = 0

    def poll(self) -> bool:
        """Take in what was written since the last time; whether there was any change.

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
            written = read_bytes(self._path.parent, self._good_bytes)
            self._good_bytes += verify(written, self._path, self.entries)
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
    path = blob_path(directory, sha)
    try:
        body = path.read_bytes()
    except OSError as error:
        raise LedgerError(f"blob {sha} cannot be read: {error.strerror}", _RESTORE_HINT) from error
    found = hashlib.sha256(body).hexdigest()
    if found != sha:
        raise LedgerError(f"blob {sha} is damaged: its content hashes to {found}", _RESTORE_HINT)
    return body


def verify(written: bytes, path: Path, entries: list[Entry]) -> int:
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
    event = parsed.get("event")
    kind = event.get("type") if isinstance(event, dict) else None
    if isinstance(event, dict) and kind == "session_started":
        upgrade(event.get("schema_version"))
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


def upgrade(version: object) -> None:
    """The one place that knows of other versions: where an older line will be lifted to this one.

    None was ever released, so there is nothing to lift, and all others are refused by name.
    """
    if version != SCHEMA_VERSION:
        raise _TooNew(f"its schema_version is {version}; this nightlab reads {SCHEMA_VERSION}")


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


def read_bytes(directory: Path, skip_bytes: int = 0) -> bytes:
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
        raise LedgerError(message, what_to_do(error)) from error


def blob_path(directory: Path, sha: str) -> Path:
    if not _SHA256.fullmatch(sha):
        raise LedgerError(f"{sha[:80]!r} is not the name of a blob")
    return directory / f"{BLOBS_NAME}/{sha[:2]}/{sha[2:]}"  # one step: an audit does it often


def what_to_do(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Make room on the disk, then `nightlab resume` goes on; nothing recorded is lost."
    return "Look at the disk and its permissions, then `nightlab resume` goes on."
