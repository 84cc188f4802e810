"""Scores a checkpoint with separate boxes, each on a socket.

A model box has the candidate's code and checkpoint; the scorer box has the tokens and the loss.
With one model box both get an end of one socket pair. With more, every model box gets an end of a
pair of its own, and the scorer's channel brings it all the other ends (SCM_RIGHTS): the model boxes
have no connection to each other. What the scorer wrote decides, and nothing else. See
docs/decisions/0015.
"""

import contextvars
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from agent.attempt.sheet import read_sheet
from sandbox.contract.errors import BoxLost, SandboxError
from sandbox.contract.run import Outcome, RunResult, RunSpec

SOCKET_BUFFER_BYTES = 4 * 2**20


RunBox = Callable[..., RunResult]
"""As `Executor.run`."""


@dataclass(frozen=True)
class Measurement:
    """How all boxes ended, and what the scorer wrote, if it did."""

    models: tuple[RunResult, ...]
    scorer: RunResult
    sheet: bytes | None
    """The sheet's file; `parse_sheet` reads it."""


def run_scoring_boxes(
    run: RunBox, models: Sequence[RunSpec], scorer: RunSpec, output_dir: Path
) -> Measurement:
    """Run all boxes side by side and read the scorer's sheet; an interrupt ends them all.

    Raises:
        SandboxError: a box could not be run as asked, or the scorer (our side) failed although
            the models did not.
    """
    channel, ends = _channels(len(models))
    interrupted = threading.Event()
    with ThreadPoolExecutor(max_workers=len(models) + 1, thread_name_prefix="box") as pool:
        try:
            scoring = _begin(pool, run, scorer, channel, output_dir, interrupted)
            modelling = [
                _begin(pool, run, spec, end, None, interrupted)
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


def _begin(
    pool: ThreadPoolExecutor,
    run: RunBox,
    spec: RunSpec,
    end: socket.socket,
    output_dir: Path | None,
    interrupted: threading.Event,
) -> Future[RunResult]:
    def work() -> RunResult:
        # Closing our copy of the end is what tells the other box that this one is gone.
        with end:
            stops = interrupted.is_set
            return run(spec, output_dir=output_dir, channel=end, should_stop=stops)

    # Spans of the boxes hang from the attempt's: a thread would begin without it.
    return pool.submit(contextvars.copy_context().run, work)
