"""Keeps trackers' files up to date; never ends a night.

The trackers' libraries are guests in the night's own process: what they print, log, warn of and
read from the environment is kept from them, and what they raise is one line of text. See
docs/decisions/0020.
"""

import fcntl
import logging
import os
import sys
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from agent.record.chain import read_blob, read_ledger
from agent.text import one_line
from agent.trackers.attempts import Content, TrackedRun, content_of, tracked_runs
from sandbox.contract.errors import UsageError

LOCK_NAME = ".nightlab-lock"
MAX_ERROR_CHARACTERS = 300

# Not `all but secrets`: nobody knows every variable that can hold a key or lead to a server.
_KEPT = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LD_LIBRARY_PATH")


class Tracker(StrEnum):
    """Where people keep their metrics."""

    TENSORBOARD = "tensorboard"
    MLFLOW = "mlflow"
    WANDB_OFFLINE = "wandb-offline"

    @property
    def folder(self) -> str:
        """Its folder's name, and that of its library and of nightlab's extra."""
        return self.value.removesuffix("-offline")


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

    def close(self) -> None:
        """Leave nothing behind that runs or is open."""


@dataclass
class Export:
    """Brings a tracker up to date with a session's ledger."""

    tracker: Tracker
    directory: Path
    environ: MutableMapping[str, str]
    """The process's own: the libraries read their switches, addresses and keys from it."""
    problem: str = ""
    """What went wrong the last time, in one line."""

    def __call__(self, session: Path) -> str:
        """Write every finished attempt that is not there as it is; says what went wrong, if so."""
        directory = self.directory.absolute()
        try:
            with offline(self.environ, directory), _silence():
                _export(session, self.tracker, directory)
        # One of these libraries leaves by sys.exit; a night ends for none of what they do.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            self.problem = one_line(f"{type(error).__name__}: {error}", MAX_ERROR_CHARACTERS)
        else:
            self.problem = ""
        return self.problem


def exporter(
    tracker: Tracker | None, directory: Path | None, runs: Path, environ: MutableMapping[str, str]
) -> Export | None:
    """What keeps the tracker's files up to date; none when no tracker was asked for.

    Raises:
        UsageError: its library is not installed.
    """
    if tracker is None:
        return None
    spec = find_spec(tracker.folder)
    if spec is None or spec.origin is None:  # a folder of that name is no library
        install = f"pip install 'nightlab[{tracker.folder}]'"
        raise UsageError(f"--track {tracker.value} needs {tracker.folder}", install)
    return Export(tracker, directory or runs / tracker.folder, environ)


@contextmanager
def offline(environ: MutableMapping[str, str], directory: Path) -> Iterator[None]:
    """An environment without keys, proxies and addresses, and every switch against the network."""
    before, own = dict(environ), str(directory / ".nightlab")
    kept = {name: before[name] for name in _KEPT if name in before}
    _replace(
        environ,
        kept
        | {
            "DO_NOT_TRACK": "true",
            "GIT_PYTHON_REFRESH": "quiet",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "WANDB_CACHE_DIR": own,
            "WANDB_CONFIG_DIR": own,
            "WANDB_DATA_DIR": own,
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_MODE": "offline",
            "WANDB_SILENT": "true",
        },
    )
    try:
        yield
    finally:
        _replace(environ, before)


def _replace(environ: MutableMapping[str, str], content: dict[str, str]) -> None:
    environ.clear()
    environ.update(content)


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing reaches the terminal, where `--json` is read by scripts; hooks stay as they were."""
    was_disabled, hooks = logging.root.manager.disable, (sys.exit, sys.excepthook)
    logging.disable()
    try:
        with (
            Path(os.devnull).open("w") as nothing,
            redirect_stdout(nothing),
            redirect_stderr(nothing),
            warnings.catch_warnings(action="ignore"),
        ):
            yield
    finally:
        logging.disable(was_disabled)
        sys.exit, sys.excepthook = hooks  # W&B puts its own in their place for good


def _export(session: Path, tracker: Tracker, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK_NAME).open("w") as lock:
        # Two exports at once would each write what is missing; to wait could hold up a night.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        module, name = _STORES[tracker]
        store: Store = getattr(import_module(module), name)(directory)  # loads this library alone
        try:
            for run in tracked_runs(read_ledger(session)):
                if not store.holds(run):
                    store.put(run, content_of(run, lambda sha: read_blob(session, sha)))
        finally:
            store.close()
