"""Scores a checkpoint with separate boxes, each on a socket.

A model box has the candidate's code and checkpoint; the scorer box has the tokens and the loss.
With one model box both get an end of one socket pair. With more, every model box gets an end of a
pair of its own, and the scorer's channel brings it all the other ends (SCM_RIGHTS): the model boxes
have no connection to each other. What the scorer wrote decides, and nothing else.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from sandbox.contract.errors import BoxLost, SandboxError
from sandbox.contract.record import Record
from sandbox.contract.run import Executor, Outcome, RunResult, RunSpec

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
    """How all boxes ended, and what the scorer wrote, if it did."""

    models: tuple[RunResult, ...]
    scorer: RunResult
    sheet: bytes | None
    """The sheet's file; `parse_sheet` reads it."""


@dataclass(frozen=True)
class Finding:
    """What a measurement comes to: a value, or the reason why there is none."""

    value: float | None
    reason: str | None
    explanation: str
    model_failed: bool
    """Whether the reason is how a model box ended, and not what the scorer found."""


HUNG_UP = "hung_up"
"""A scorer's reason when a model box is gone; how the box ended then tells more."""
TOO_SLOW = "too_slow"
"""The reason when the scorer's own time was over: it does nothing but wait for answers."""


def finding(sheet: ScoreSheet | None, models: Sequence[Outcome]) -> Finding:
    """Read a measurement: what the scorer found, or else how a model box ended.

    A value counts only when every model box ended well: one that answers all and then dies or hangs
    has something to hide. What the scorer found wrong is the better reason.

    Args:
        sheet: what the scorer wrote; none when it came to no end within its time.
        models: how the model boxes ended.
    """
    bad = next((outcome for outcome in models if outcome is not Outcome.OK), None)
    if bad is not None and (sheet is None or sheet.reason in (None, HUNG_UP)):
        return Finding(None, f"model_box_{bad.value}", "", model_failed=True)
    if sheet is None:
        explanation = "the score took longer than wall_seconds in [scoring] allows"
        return Finding(None, TOO_SLOW, explanation, model_failed=False)
    return Finding(sheet.value, sheet.reason, sheet.explanation, model_failed=False)


def measure(
    executor: Executor, models: Sequence[RunSpec], scorer: RunSpec, output_dir: Path
) -> Measurement:
    """Run all boxes side by side and read the scorer's sheet; an interrupt ends them all.

    Args:
        executor: runs the boxes, each from a thread of its own.
        models: the boxes with the candidate's code and checkpoint.
        scorer: the box with the tokens and the loss.
        output_dir: an empty directory for the scorer's output.

    Raises:
        SandboxError: a box could not be run as asked, or the scorer (our side) failed although
            the models did not.
    """
    channel, ends = _channels(len(models))
    interrupted = threading.Event()
    with ThreadPoolExecutor(max_workers=len(models) + 1, thread_name_prefix="box") as pool:
        try:
            scoring = pool.submit(_run, executor, scorer, channel, output_dir, interrupted.is_set)
            modelling = [
                pool.submit(_run, executor, spec, end, None, interrupted.is_set)
                for spec, end in zip(models, ends, strict=True)
            ]
            model_results = tuple(one.result() for one in modelling)
            scorer_result = _ours(scoring)
        except BaseException:
            interrupted.set()
            raise
    sheet = read_sheet(output_dir) if scorer_result.outcome is Outcome.OK else None
    is_late = scorer_result.outcome is Outcome.TIMED_OUT
    models_are_well = all(result.outcome is Outcome.OK for result in model_results)
    if sheet is None and models_are_well and not is_late:
        raise SandboxError(
            f"the scorer box ended {scorer_result.outcome} without a score: "
            f"{scorer_result.log.tail[-500:].strip()}",
            "look at evaluate.py and at [scoring] in program.md",
        )
    return Measurement(model_results, scorer_result, sheet)


def _ours(scoring: Future[RunResult]) -> RunResult:
    """What became of the scorer box; that it was lost says nothing of the candidate."""
    try:
        return scoring.result()
    except BoxLost as error:
        raise SandboxError(error.message, error.hint) from error


def _channels(count: int) -> tuple[socket.socket, list[socket.socket]]:
    """The scorer's channel, and an end for each model box."""
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(count)]
    for pair in pairs:
        for end in pair:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    ours, theirs = [one for one, _ in pairs], [other for _, other in pairs]
    if count == 1:
        return ours[0], theirs
    channel, bringer = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with bringer:
        socket.send_fds(bringer, [b"model boxes"], [end.fileno() for end in ours])
    for end in ours:
        end.close()
    return channel, theirs


def read_sheet(directory: Path) -> bytes | None:
    """The valid score sheet in `directory`; none when the file is missing.

    Raises:
        SandboxError: there is one, but it is no valid sheet.
    """
    path = directory / SHEET_NAME
    if not path.is_file() or path.is_symlink():
        return None
    if path.stat().st_size > MAX_SHEET_BYTES:
        raise SandboxError("the score sheet is too large", "look at evaluate.py")
    raw = path.read_bytes()
    try:
        parse_sheet(raw)
    except ValueError as error:
        raise SandboxError(str(error), "look at evaluate.py") from error
    return raw


def parse_sheet(raw: bytes) -> ScoreSheet:
    """Read a score sheet.

    Raises:
        ValueError: it is none.
    """
    try:
        content = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
        return ScoreSheet.model_validate(content)
    except (ValueError, ValidationError, RecursionError) as error:
        raise ValueError(f"the score sheet is not valid: {error}") from error


def _run(
    executor: Executor,
    spec: RunSpec,
    channel: socket.socket,
    output_dir: Path | None,
    should_stop: Callable[[], bool],
) -> RunResult:
    # Closing our copy of the end is what tells the other box that this one is gone.
    with channel:
        return executor.run(spec, output_dir=output_dir, channel=channel, should_stop=should_stop)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")
