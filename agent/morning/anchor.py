"""The ledger's head in a second place: anchored and compared.

A chain shows whatever was changed in it, but not that its tail was cut off or that all of it was
written anew. Somebody who knows an earlier head can tell: a person who noted it, or a file
elsewhere that gets each head as a line. docs/ledger.md says how to sign one.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from agent.record.chain import Clock, LedgerError, canonical, utc_now
from agent.record.events import Entry, SessionStarted
from agent.text import one_line
from sandbox.contract.reading import read_named
from sandbox.contract.record import Record

SHORT_HASH = 12
MAX_ANCHOR_BYTES = 64 * 2**20


class Head(Record):
    """Where a session's ledger stood: one line of an anchor file."""

    session: str
    seq: Annotated[int, Field(ge=0)]
    head: str
    at: str


@dataclass(frozen=True)
class HeadCheck:
    """How a record compares with heads kept elsewhere: what differs, and what they confirm."""

    differences: list[str]
    notes: list[str]


@dataclass
class Anchor:
    """A file that gets each new head of a session; it is made when it is not there."""

    path: Path
    session: str
    now: Clock = utc_now
    last: str = ""
    has_failed: bool = False
    """The last time that it was tried."""

    def add(self, entries: Sequence[Entry]) -> None:
        """Append the present head, durably, unless it is there already.

        Raises:
            LedgerError: the file cannot be written.
        """
        if not entries or entries[-1].hash == self.last:
            return
        last, at = entries[-1], self.now().isoformat(timespec="seconds")
        try:
            _append_durably(
                self.path, Head(session=self.session, seq=last.seq, head=last.hash, at=at)
            )
        except OSError as error:
            message = f"the head could not be written to {self.path}: {error.strerror}"
            raise LedgerError(message, "look at [record] anchor in program.md") from error
        self.last, self.has_failed = entries[-1].hash, False


def anchor_path(setting: str | None, directory: Path) -> Path | None:
    """The anchor file that the settings name.

    Raises:
        LedgerError: it lies in the session's own directory and would be lost or forged with it.
    """
    if setting is None:
        return None
    path = Path(setting).expanduser()
    if path.resolve().is_relative_to(directory.resolve()):
        message = f"the anchor {path} lies in the session's own directory"
        raise LedgerError(message, "name a file elsewhere under [record], best on another disk")
    return path


def anchored(path: Path, session: str) -> list[Head]:
    """The heads of a session that a file holds, oldest first; a line that is none is passed over.

    Raises:
        LedgerError: the file cannot be read.
    """
    try:
        lines = read_named(path, MAX_ANCHOR_BYTES).splitlines()
    except OSError as error:
        message = f"the anchor {path} cannot be read: {error.strerror}"
        raise LedgerError(message, "name the file with --anchor") from error
    heads = (_head(line) for line in lines)
    return [head for head in heads if head is not None and head.session == session]


def compare_heads(
    directory: Path, entries: Sequence[Entry], *, noted: str | None, anchor: Path | None
) -> HeadCheck:
    """Compare a record with the heads of it that are known elsewhere.

    `noted` is a head that the person kept, or its first digits; `anchor` is a file of heads.

    Raises:
        LedgerError: the anchor cannot be read.
    """
    differences: list[str] = []
    notes: list[str] = []
    if noted is not None:
        seq = next((entry.seq for entry in entries if entry.hash.startswith(noted)), None)
        if seq is None:
            what = "the tail was cut off, or the ledger written anew"
            differences.append(f"no event has the hash {noted}: {what}")
        else:
            notes.append(f"{noted[:SHORT_HASH]} is in the chain: {_position(seq, entries)}")
    if anchor is not None:
        heads = anchored(anchor, name_on_record(directory, entries))
        lost = [what for head in heads if (what := _lost(head, entries))]
        differences += [f"{anchor} has {what}" for what in lost]
        if heads and not lost:
            notes.append(f"{anchor} agrees: {_position(heads[-1].seq, entries)}")
        elif not heads:
            # From the first minute of a session on a file that its settings name holds its heads.
            is_due = anchor == _anchor_in(entries)
            what = f"{anchor} holds no head of this session"
            (differences if is_due else notes).append(what)
    return HeadCheck(differences, notes)


def name_on_record(directory: Path, entries: Sequence[Entry]) -> str:
    """The session's name as it began with it: its directory may be called anything by now."""
    first = entries[0].event if entries else None
    return first.session if isinstance(first, SessionStarted) else directory.name


def _anchor_in(entries: Sequence[Entry]) -> Path | None:
    """The anchor that the settings of the beginning name."""
    first = entries[0].event if entries else None
    setting = first.settings.record.anchor if isinstance(first, SessionStarted) else None
    return None if setting is None else Path(setting).expanduser()


def _lost(head: Head, entries: Sequence[Entry]) -> str:
    """What a record lacks of a head that somebody else has seen; empty where it has it."""
    event = f"event {head.seq} of {one_line(head.at, 40)}"
    if head.seq >= len(entries):
        return f"{event}; the ledger ends at event {len(entries) - 1}: its tail was cut off"
    if entries[head.seq].hash != head.head:
        return f"{event} with another hash: the ledger was written anew from there or before"
    return ""


def _position(seq: int, entries: Sequence[Entry]) -> str:
    later = len(entries) - 1 - seq
    return f"event {seq}, the head now" if not later else f"event {seq}, and {later} came later"


def _head(line: bytes) -> Head | None:
    try:
        return Head.model_validate(json.loads(line))
    except (ValidationError, ValueError, RecursionError):
        return None


def _append_durably(path: Path, head: Head) -> None:
    """Append one line and sync it; a line that a crash tore is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A FIFO without a reader must not hold up a night, nor a link lead into another file.
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        line = canonical(head.model_dump()).encode() + b"\n"
        os.write(descriptor, (b"\n" if is_torn else b"") + line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
