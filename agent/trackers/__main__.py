"""Brings one tracker up to date with one session's ledger.

It runs as a process of its own (see `agent/trackers/tracking.py`): what these libraries do to an
interpreter, and how long they take, is then nothing that a night has to fear.
"""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from agent.record.ledger import read_blob, read_ledger
from agent.text import one_line
from agent.trackers.attempts import Content, TrackedRun, content_of, tracked_runs
from agent.trackers.tracking import Tracker

LOCK_NAME = ".nightlab-lock"
MAX_ERROR_CHARACTERS = 300

_STORES = {
    Tracker.TENSORBOARD: ("agent.trackers.tensorboard", "TensorBoardFiles"),
    Tracker.MLFLOW: ("agent.trackers.mlflow", "MlflowStore"),
    Tracker.WANDB_OFFLINE: ("agent.trackers.wandb", "WandbFolders"),
}


class Store(Protocol):
    """Where a tracker keeps its runs."""

    def holds(self, run: TrackedRun) -> bool:
        """Whether exactly this is there of the attempt, once."""

    def put(self, run: TrackedRun, content: Content) -> None:
        """Write the attempt in place of what was there of it."""


def open_store(tracker: Tracker, directory: Path) -> Store:
    """The tracker's store in `directory`; only its own library is loaded."""
    module, name = _STORES[tracker]
    make = cast("Callable[[Path], Store]", getattr(import_module(module), name))
    return make(directory)


def export(session: Path, tracker: Tracker, directory: Path) -> int:
    """Write every finished attempt that the store does not hold as it is; says how many."""
    directory.mkdir(parents=True, exist_ok=True)
    written = 0
    with (directory / LOCK_NAME).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two exports at once would each write what is missing
        store = open_store(tracker, directory)
        for run in tracked_runs(read_ledger(session)):
            if not store.holds(run):
                store.put(run, content_of(run, lambda sha: read_blob(session, sha)))
                written += 1
    return written


def main(session: str, tracker: str, directory: str) -> int:
    """Export, and say in one line what went wrong; the exit status is 0 or 1."""
    try:
        export(Path(session), Tracker(tracker), Path(directory))
    except Exception as error:  # noqa: BLE001 - whatever a library raises, it is told in one line
        text = f"{type(error).__name__}: {error}"
        sys.stderr.write("\n" + one_line(text, MAX_ERROR_CHARACTERS) + "\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
