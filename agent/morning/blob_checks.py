"""Checks blobs and diffs that events name by hash."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from agent.candidate.merge import Files
from agent.record.chain import BLOBS_NAME, LedgerError, read_blob
from agent.record.events import Event
from sandbox.contract.record import Record

BLOB_FIELDS = (
    *("program", "diff", "log", "curve", "container", "system", "tools", "message"),
    *("reply", "input", "output", "before", "after", "patch", "sheet", "held_out_index"),
)
BLOB_TABLES = ("files", "fixed_files")


@dataclass
class BlobChecks:
    """Every blob of a session, each read once."""

    directory: Path
    """Of the session."""
    _checked: set[str] = field(default_factory=set)
    _bodies: dict[str, bytes] = field(default_factory=dict)
    """Those that the present event names for the first time."""
    _shown: dict[tuple[Any, ...], str] = field(default_factory=dict)
    """Diffs that were found right, by what changed."""

    def check(self, event: Event) -> Iterator[str]:
        """Name the blobs of an event that are lost or damaged."""
        self._bodies.clear()
        for sha in named_blobs(event):
            if sha in self._checked:
                continue
            self._checked.add(sha)
            try:
                self._bodies[sha] = read_blob(self.directory, sha)
            except LedgerError as error:
                yield error.message

    def read(self, sha: str) -> bytes:
        """The bytes of a blob.

        Raises:
            LedgerError: missing or damaged.
        """
        return self._bodies[sha] if sha in self._bodies else read_blob(self.directory, sha)

    def shown(
        self,
        show: Callable[[Files, Files], bytes],
        sha: str | None,
        old: Mapping[str, str],
        new: Mapping[str, str],
    ) -> Iterator[str]:
        """Whether the diff that a person reads is what changed in the files."""
        names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        change = (show.__name__, *((name, old.get(name), new.get(name)) for name in names))
        if sha is not None and self._shown.get(change) == sha:
            return  # a file change and the attempt that tried it mostly have one diff
        try:
            before, after = (
                {name: self.read(files[name]) for name in names if name in files}
                for files in (old, new)
            )
            if sha is None or show(before, after) != self.read(sha):
                yield "its diff is not what changed in the files"
            else:
                self._shown[change] = sha
        except LedgerError:
            return  # named where blobs are checked

    def unnamed(self) -> Iterator[str]:
        """Name the damaged blobs among those that no event names: a crash may leave whole ones."""
        for folder, _, names in os.walk(self.directory / BLOBS_NAME):
            begin = Path(folder).name
            for name in sorted(names):
                # A dot: half-written when nightlab was killed.
                if begin + name in self._checked or name.startswith("."):
                    continue
                try:
                    read_blob(self.directory, begin + name)
                except LedgerError:
                    yield f"{BLOBS_NAME}/{begin}/{name} is not the blob that it is named after"


def named_blobs(event: Record) -> Iterator[str]:
    """SHA-256 of every blob that an event names."""
    fields, tables = _blob_names(type(event))
    for name in fields:
        sha = getattr(event, name)
        if sha is not None:
            yield sha
    for name in tables:
        yield from (getattr(event, name) or {}).values()


@cache
def _blob_names(event: type[Record]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    names = event.model_fields.keys()
    return (
        tuple(name for name in BLOB_FIELDS if name in names),
        tuple(name for name in BLOB_TABLES if name in names),
    )
