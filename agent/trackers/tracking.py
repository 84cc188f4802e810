"""Keeps a tracker up to date; never ends a night."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from agent.text import one_line

DEADLINE_SECONDS = 120.0
"""For one export in a night; what it did not get to, the next one does."""
MAX_ERROR_BYTES = 4000

_INHERITED = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LD_LIBRARY_PATH")


class Tracker(StrEnum):
    """Where people keep their metrics."""

    TENSORBOARD = "tensorboard"
    MLFLOW = "mlflow"
    WANDB_OFFLINE = "wandb-offline"

    @property
    def folder(self) -> str:
        """Its folder's name, and that of its library and of nightlab's extra."""
        return self.value.removesuffix("-offline")


def missing(tracker: Tracker) -> tuple[str, str] | None:
    """What is not installed, and how to install it; none when all is there."""
    spec = find_spec(tracker.folder)
    if spec is not None and spec.origin is not None:  # a folder of that name is no library
        return None
    install = f"pip install 'nightlab[{tracker.folder}]'"
    return f"--track {tracker.value} needs {tracker.folder}", install


@dataclass
class Export:
    """Brings a tracker up to date with a session's ledger, in a process of its own."""

    tracker: Tracker
    directory: Path
    environ: Mapping[str, str]
    """A few harmless variables are taken from it, never keys, proxies or addresses."""
    problem: str = ""
    """What went wrong the last time, in one line."""
    is_stuck: bool = False
    """It did not come to its end: to wait for it after every attempt would eat the night."""

    def __call__(self, session: Path, deadline_seconds: float | None = None) -> str:
        """Export; says what went wrong, if anything. Without a deadline it waits for its end."""
        paths = (str(session.absolute()), self.tracker.value, str(self.directory.absolute()))
        with tempfile.TemporaryFile() as errors:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "agent.trackers", *paths],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=environment(self.environ, self.directory.absolute()),
                start_new_session=True,  # what these libraries start is ended with it
            )
            failure = _wait(child, deadline_seconds)
            self.problem = ": ".join(filter(None, (failure, failure and _last_line(errors))))
            self.is_stuck = child.returncode == -signal.SIGKILL
        return self.problem


def environment(environ: Mapping[str, str], directory: Path) -> dict[str, str]:
    """What an export may know: named variables only, and every switch against the network."""
    own = directory / ".nightlab"
    return {name: environ[name] for name in _INHERITED if name in environ} | {
        "DO_NOT_TRACK": "true",
        "GIT_PYTHON_REFRESH": "quiet",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "WANDB_CACHE_DIR": str(own),
        "WANDB_CONFIG_DIR": str(own),
        "WANDB_DATA_DIR": str(own),
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
    }


def _wait(child: subprocess.Popen[bytes], deadline_seconds: float | None) -> str:
    """How the child failed, if it did; nothing of it is left, whatever ends the waiting."""
    try:
        status = child.wait(deadline_seconds)
    except subprocess.TimeoutExpired:
        return f"not done within {deadline_seconds:g} s"
    finally:
        if child.returncode is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return f"exit status {status}" if status else ""


def _last_line(errors: IO[bytes]) -> str:
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - MAX_ERROR_BYTES))
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return one_line(lines[-1], 300) if lines else ""
