"""Scores a checkpoint with two boxes and one socket.

The model box has the candidate's code and checkpoint; the scorer box has the tokens and the
loss. Each gets one end of a socket pair. What the scorer wrote decides, and nothing else.
"""

from __future__ import annotations

import json
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from sandbox.contract import Executor, Outcome, Record, RunResult, RunSpec, SandboxError

SHEET_NAME = "score.json"
MAX_SHEET_BYTES = 256 * 1024
SOCKET_BUFFER_BYTES = 4 * 2**20


class ScoreSheet(Record):
    """What the scorer wrote: a value, or the reason why there is none."""

    metric: str = Field(min_length=1, max_length=64)
    value: float | None
    valid: bool
    reason: str | None = Field(max_length=64)
    explanation: str = Field(max_length=2000)
    details: dict[str, Any]

    @model_validator(mode="after")
    def _one_of_value_and_reason(self) -> ScoreSheet:
        if self.valid != (self.value is not None) or self.valid != (self.reason is None):
            raise ValueError("a valid score has a value and no reason, an invalid one the reverse")
        return self


@dataclass(frozen=True)
class Measurement:
    """How both boxes ended, and the sheet when the scorer wrote one."""

    model: RunResult
    scorer: RunResult
    sheet: ScoreSheet | None


def measure(executor: Executor, model: RunSpec, scorer: RunSpec, output_dir: Path) -> Measurement:
    """Run both boxes side by side and read the scorer's sheet.

    Args:
        executor: runs the boxes, from two threads.
        model: the box with the candidate's code and checkpoint.
        scorer: the box with the tokens and the loss.
        output_dir: an empty directory for the scorer's output.

    Raises:
        SandboxError: a box could not be run as asked, or the scorer (our side) failed although
            the model did not.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="box") as pool:
        scoring = pool.submit(_run, executor, scorer, ours, output_dir)
        modelling = pool.submit(_run, executor, model, theirs, None)
        model_result, scorer_result = _both(modelling, scoring)
    sheet = read_sheet(output_dir) if scorer_result.outcome is Outcome.OK else None
    if sheet is None and model_result.outcome is Outcome.OK:
        raise SandboxError(
            f"the scorer box ended {scorer_result.outcome} without a score: "
            f"{scorer_result.log.tail[-500:].strip()}",
            "look at evaluate.py and at [scoring] in program.md",
        )
    return Measurement(model_result, scorer_result, sheet)


def read_sheet(directory: Path) -> ScoreSheet | None:
    """The score sheet in `directory`; none when the file is missing.

    Raises:
        SandboxError: there is one, but it is no valid sheet.
    """
    path = directory / SHEET_NAME
    if not path.is_file() or path.is_symlink():
        return None
    if path.stat().st_size > MAX_SHEET_BYTES:
        raise SandboxError("the score sheet is too large", "look at evaluate.py")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        return ScoreSheet.model_validate(content)
    except (ValueError, ValidationError, RecursionError) as error:
        raise SandboxError(
            f"the score sheet is not valid: {error}", "look at evaluate.py"
        ) from error


def _run(
    executor: Executor, spec: RunSpec, channel: socket.socket, output_dir: Path | None
) -> RunResult:
    # Closing our copy of the end is what tells the other box that this one is gone.
    with channel:
        return executor.run(spec, output_dir=output_dir, channel=channel)


def _both(first: Future[RunResult], second: Future[RunResult]) -> tuple[RunResult, RunResult]:
    return first.result(), second.result()


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")
