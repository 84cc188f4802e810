"""Checks the files beside a ledger: used, or looked at.

Only what is there is compared: a session that was brought elsewhere with its ledger and blobs alone
is whole. What is used is compared again before each use (`lab.py`).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from agent.attempt.lab import hashes_of
from agent.candidate.diffs import WORKSPACE
from agent.candidate.workspace import WorkspaceError
from agent.morning.export import APPROVED, PATCH_NAME
from agent.night.session import workspace_of
from agent.record.attempts import TrialKey
from agent.record.events import (
    ATTEMPT,
    AttemptFinished,
    AttemptInterrupted,
    AttemptStarted,
    Dethroned,
    Entry,
    FileChanged,
    HumanDecided,
)
from agent.record.files import FileHashes
from agent.record.history import History

PROGRAM, FIXED, CHECKPOINTS = "program.md", "fixed", "checkpoints"


def file_differences(directory: Path, history: History, entries: Sequence[Entry]) -> Iterator[str]:
    """What of a session's files beside its ledger is not what the record says, in words."""
    session, hashes = history.session, FileHashes()
    if session is None:
        return
    if (directory / PROGRAM).exists() and hashes.of(directory / PROGRAM) != session.program:
        yield f"{PROGRAM} is not the one that the session began with"
    if (directory / FIXED).is_dir():
        for what in hashes.differences(directory / FIXED, session.fixed_files):
            yield f"{FIXED}/{what}, not what the session began with"
    yield from _checkpoints(directory / CHECKPOINTS, history, hashes)
    yield from _approved(directory / APPROVED, entries, hashes)
    yield from _workspace(directory, history, entries)


def _checkpoints(folder: Path, history: History, hashes: FileHashes) -> Iterator[str]:
    """Holdout is scored from them, and a would-be keep once more.

    While an attempt is open, or was cut off, one may be half there.
    """
    if history.open:
        return
    for path in sorted(folder.glob("*-*")):
        number, _, seed = path.name.partition("-")
        training = None
        if number.isdecimal() and seed.isdecimal():
            training = history.trial(TrialKey(ATTEMPT, int(number), int(seed))).training
        due = {} if training is None else {f.name: f.sha256 for f in training.result.output}
        for what in hashes.differences(path, due):
            yield f"{CHECKPOINTS}/{path.name}/{what}, not what the training left"


def _approved(folder: Path, entries: Sequence[Entry], hashes: FileHashes) -> Iterator[str]:
    events = (entry.event for entry in reversed(entries))
    # A rejection leaves what was approved before where it is.
    taken = next((e for e in events if isinstance(e, HumanDecided) and e.patch is not None), None)
    if not folder.is_dir():
        return
    due: dict[str, str] = {}
    if taken is not None and taken.patch is not None:
        due = {f"{WORKSPACE}/{name}": sha for name, sha in taken.files.items()}
        due[PATCH_NAME] = taken.patch
    for what in hashes.differences(folder, due):
        yield f"{APPROVED}/{what}, not what was approved"


def _workspace(directory: Path, history: History, entries: Sequence[Entry]) -> Iterator[str]:
    """Between attempts it holds the best's files, and edits of them that are on record.

    Compared only once the session has ended: a kill leaves it as it may, and a resume mends that.
    """
    best = history.best or history.baseline
    if history.ended is None or best is None or not (directory / WORKSPACE).is_dir():
        return
    due = dict(best.started.files)
    for entry in entries:
        match entry.event:
            case AttemptStarted() | AttemptFinished() | AttemptInterrupted() | Dethroned():
                due = dict(best.started.files)
            case FileChanged():
                due.pop(entry.event.path, None)
                if entry.event.after is not None:
                    due[entry.event.path] = entry.event.after
    try:
        found = hashes_of(workspace_of(directory, history.in_force).candidate())
    except (WorkspaceError, OSError) as error:
        yield f"{WORKSPACE} cannot be read: {error}"
        return
    for name in sorted(due.keys() | found.keys()):
        if due.get(name) != found.get(name):
            yield f"{WORKSPACE}/{name} is neither the best's nor an edit on record"
