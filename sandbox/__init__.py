"""Runs untrusted code in boxes and says what happened."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandbox.contract import (
    Executor,
    Limits,
    Log,
    Mount,
    Outcome,
    OutputFile,
    RunResult,
    RunSpec,
    SandboxError,
)

if TYPE_CHECKING:
    from sandbox.docker_executor import DockerExecutor

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
]


def __getattr__(name: str) -> object:
    """Load the executor when it is asked for: the contract alone must not load an engine's SDK."""
    if name == "DockerExecutor":
        from sandbox.docker_executor import DockerExecutor

        return DockerExecutor
    raise AttributeError(name)
