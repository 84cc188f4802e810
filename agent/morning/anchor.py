"""The ledger's head in a second place: anchored, signed, compared.

A chain shows whatever was changed in it, but not that its tail was cut off or that all of it was
written anew. Somebody who knows an earlier head can tell: a person who noted it, a file elsewhere
that gets each head as a line, or a signature by the person's SSH key.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from agent.record.events import Entry
from agent.record.ledger import Clock, LedgerError, canonical, utc_now
from agent.text import one_line
from sandbox.contract.record import Record

NAMESPACE = "nightlab"
SIGNATURES = "signatures"
SSH_SECONDS = 20
SHORT_HASH = 12

_KEY_HINT = "a key with a passphrase must be in ssh-agent: ssh-add KEY, then give KEY.pub"
_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")


class Head(Record):
    """Where a session's ledger stood: one line of an anchor file, and what a signature is over."""

    session: str
    seq: Annotated[int, Field(ge=0)]
    head: str
    at: str


@dataclass(frozen=True)
class Heard:
    """What others say of a record: where it contradicts them, and what they confirm."""

    differences: list[str]
    notes: list[str]


@dataclass(frozen=True)
class Seal:
    """A head that a key signed."""

    head: Head
    fingerprint: str


@dataclass
class Anchor:
    """A file that gets each new head.

    Args:
        path: of the file; it is made when it is not there.
        session: name of the session.
    """

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
        line = head_of(self.session, entries, self.now)
        try:
            _append_durably(self.path, line)
        except OSError as error:
            message = f"the head could not be written to {self.path}: {error.strerror}"
            raise LedgerError(message, "look at [record] anchor in program.md") from error
        self.last, self.has_failed = entries[-1].hash, False


def head_of(session: str, entries: Sequence[Entry], now: Clock) -> Head:
    """The head as it is now."""
    at = now().isoformat(timespec="seconds")
    return Head(session=session, seq=entries[-1].seq, head=entries[-1].hash, at=at)


def anchor_path(setting: str | None, directory: Path) -> Path | None:
    """The anchor file that the settings name.

    Raises:
        LedgerError: it lies in the session's own directory, where it would share its fate.
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
        lines = path.read_bytes().splitlines()
    except OSError as error:
        message = f"the anchor {path} cannot be read: {error.strerror}"
        raise LedgerError(message, "name the file with --anchor") from error
    heads = (_head(line) for line in lines)
    return [head for head in heads if head is not None and head.session == session]


def cut_or_rewritten(heads: Sequence[Head], entries: Sequence[Entry], where: str) -> Iterator[str]:
    """What a record lacks that somebody else has seen of it.

    Args:
        heads: that somebody else kept.
        entries: of the record as it is now.
        where: they were kept, for the sentence.
    """
    for head in heads:
        told = f"{where} has event {head.seq} of {one_line(head.at, 40)}"
        if head.seq >= len(entries):
            yield f"{told}; the ledger ends at event {len(entries) - 1}: its tail was cut off"
        elif entries[head.seq].hash != head.head:
            yield f"{told} with another hash: the ledger was written anew from there or before"


def place_of(noted: str, entries: Sequence[Entry]) -> int | None:
    """The number of the event whose hash begins like that; none if no event's does."""
    return next((entry.seq for entry in entries if entry.hash.startswith(noted)), None)


def ask_witnesses(
    directory: Path, entries: Sequence[Entry], *, noted: str | None, anchor: Path | None
) -> Heard:
    """Compare a record with everything that is known of it elsewhere.

    Args:
        directory: of the session.
        entries: of its ledger.
        noted: a head that the person kept, or its first digits.
        anchor: a file of heads.

    Raises:
        LedgerError: the anchor cannot be read.
    """
    found = Heard([], [])
    if noted is not None:
        _hear_person(found, entries, noted)
    if anchor is not None:
        heads = anchored(anchor, directory.name)
        contradictions = list(cut_or_rewritten(heads, entries, str(anchor)))
        found.differences.extend(contradictions)
        if heads and not contradictions:
            found.notes.append(f"{anchor} agrees: {_span(heads[-1].seq, entries)}")
        elif not heads:
            found.notes.append(f"{anchor} holds no head of this session")
    for seal in seals(directory):
        if isinstance(seal, str):
            found.differences.append(seal)
            continue
        where = f"the signature by {seal.fingerprint}"
        contradictions = list(cut_or_rewritten([seal.head], entries, where))
        found.differences.extend(contradictions)
        if not contradictions:
            found.notes.append(f"signed by {seal.fingerprint}: {_span(seal.head.seq, entries)}")
    return found


def _hear_person(found: Heard, entries: Sequence[Entry], noted: str) -> None:
    seq = place_of(noted, entries)
    if seq is None:
        what = f"no event has the hash {noted}: the tail was cut off, or the ledger written anew"
        found.differences.append(what)
    else:
        found.notes.append(f"{noted[:SHORT_HASH]} is in the chain: {_span(seq, entries)}")


def _span(seq: int, entries: Sequence[Entry]) -> str:
    later = len(entries) - 1 - seq
    return f"event {seq}, the head now" if not later else f"event {seq}, and {later} came later"


def sign(directory: Path, head: Head, key: Path) -> Seal:
    """Sign a head with an SSH key and keep the signature in the session's directory.

    Args:
        directory: of the session.
        head: what is signed.
        key: a private key, or a public one whose private key is in the agent of `SSH_AUTH_SOCK`.
            ssh-keygen alone reads it.

    Raises:
        LedgerError: the key cannot be used.
    """
    if key.expanduser().resolve().is_relative_to(directory.parent.resolve()):
        message = f"{key} lies among the sessions, where agents write"
        raise LedgerError(message, "keep your key in your home")
    content = canonical(head.model_dump()).encode()
    words = ["-Y", "sign", "-n", NAMESPACE, "-f", str(key.expanduser())]
    signature = _ssh_keygen(words, content)
    folder = directory / SIGNATURES
    folder.mkdir(exist_ok=True)
    path = folder / f"{head.seq}-{head.head[:SHORT_HASH]}.json"
    path.write_bytes(content)
    path.with_suffix(".sig").write_bytes(signature)
    return _seal(path)


def seals(directory: Path) -> Iterator[Seal | str]:
    """Every signature beside a ledger: the head that it is over, or what is wrong with it."""
    for path in sorted((directory / SIGNATURES).glob("*.json")):
        try:
            yield _seal(path)
        except LedgerError as error:
            yield f"signature {one_line(path.name, 80)}: {error.message}"


def _seal(path: Path) -> Seal:
    """A signature, verified; whose key it is the person compares by its fingerprint."""
    words = ["-Y", "check-novalidate", "-n", NAMESPACE, "-s", str(path.with_suffix(".sig"))]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LedgerError(f"{path.name} cannot be read: {error.strerror}") from error
    said = _ssh_keygen(words, content).decode(errors="replace")
    found, head = _FINGERPRINT.search(said), _head(content)
    if found is None or head is None:
        raise LedgerError("it is over something else than a head")
    return Seal(head, found.group())


def _ssh_keygen(words: list[str], content: bytes) -> bytes:
    """Run ssh-keygen without a terminal, so that it can ask nobody and waits for nothing."""
    try:
        done = subprocess.run(
            ["ssh-keygen", *words],
            input=content,
            capture_output=True,
            timeout=SSH_SECONDS,
            check=False,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise LedgerError("there is no ssh-keygen here", "install OpenSSH's client") from error
    except subprocess.TimeoutExpired as error:
        raise LedgerError(f"ssh-keygen did not answer in {SSH_SECONDS} s", _KEY_HINT) from error
    if done.returncode != 0:
        said = one_line((done.stderr or done.stdout).decode(errors="replace"), 300)
        raise LedgerError(f"ssh-keygen failed: {said}", _KEY_HINT)
    return done.stdout


def _head(line: bytes) -> Head | None:
    try:
        return Head.model_validate(json.loads(line))
    except (ValidationError, ValueError, RecursionError):
        return None


def _append_durably(path: Path, head: Head) -> None:
    """Append one line and sync it; a line that a crash tore is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
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
