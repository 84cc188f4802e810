"""Runs untrusted code in boxes and says what happened."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from sandbox.contract.errors import SandboxError
from sandbox.contract.run import (
    Executor,
    Limits,
    Log,
    Mount,
    Outcome,
    OutputFile,
    RunResult,
    RunSpec,
)

if TYPE_CHECKING:
    from sandbox.box.executor import DockerExecutor
    from sandbox.machine import run_box

__all__ = [
    "DockerExecutor",
    "Executor",
    "Limits",
    "Log",
    "Mount",
    "Outcome",
    "OutputFile",
    "RunResult",
    "RunSpec",
    "SandboxError",
    "run_box",
]


LOADED_LATE = {"DockerExecutor": "sandbox.box.executor", "run_box": "sandbox.machine"}


def __getattr__(name: str) -> object:
    """Load what runs boxes when it is asked for: the contract alone needs no engine's SDK."""
    if name not in LOADED_LATE:
        raise AttributeError(name)
    return getattr(import_module(LOADED_LATE[name]), name)
