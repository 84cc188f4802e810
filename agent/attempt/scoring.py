"""Scores a checkpoint with boxes, one after another.

A model box has the candidate's code and checkpoint; the scorer box has the tokens and the loss, and
lives as long as the score takes. Model boxes come one after another: each is gone, by the host's
evidence, before the next one begins, and has a socket pair of its own, whose other end the scorer's
channel brings to the scorer (SCM_RIGHTS) when the box is started. A scorer that speaks to one model
box has the other end itself. What the scorer wrote decides, and nothing else. See
docs/decisions/0015.
"""

import contextvars
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from agent.attempt.sheet import read_sheet
from sandbox.contract.apart import Apart
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


class ScoringBoxes:
    """A scorer box at work, as a context: who leaves it early ends that box.

    Args:
        run: runs a box.
        scorer: the box with the tokens and the loss.
        output_dir: an empty directory for the scorer's output.
        brings_boxes: whether the scorer's channel brings it its boxes, or leads to the only one.
    """

    def __init__(
        self, run: RunBox, scorer: RunSpec, output_dir: Path, *, brings_boxes: bool
    ) -> None:
        self._run, self._output_dir, self._brings_boxes = run, output_dir, brings_boxes
        self._ours, theirs = _pair()
        self._models: list[RunResult] = []
        self._apart = Apart()
        self._left = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scorer")

        def work() -> RunResult:
            # Closing our copy of the end is what tells the other box that this one is gone.
            with theirs:
                stops = self._left.is_set
                return run(scorer, output_dir=output_dir, channel=theirs, should_stop=stops)

        # Spans of the box hang from the attempt's: a thread would begin without it.
        self._scorer = self._pool.submit(contextvars.copy_context().run, work)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._ours.close()
        self._pool.shutdown()

    def wants_more(self) -> bool:
        """Whether the scorer wants one more box, or its first; false once it is over."""
        return not self._models or bool(self._ours.recv(4))

    def ask(self, spec: RunSpec) -> RunResult:
        """Let the scorer ask a model box; when this returns, that box is gone.

        Raises:
            SandboxError: the box could not be run as asked, or would meet an earlier one.
        """
        self._apart.begin(spec)
        ours, theirs = _pair() if self._brings_boxes else (None, self._ours)
        with theirs:
            if ours is not None:
                with ours, suppress(OSError):  # a scorer that is over leaves the box with nobody
                    socket.send_fds(self._ours, [b"a model box"], [ours.fileno()])
            self._models.append(self._run(spec, channel=theirs))
        self._apart.end(self._models[-1])
        return self._models[-1]

    def measurement(self) -> Measurement:
        """How all boxes ended, once the scorer's has.

        Raises:
            SandboxError: the scorer (our side) failed although the models did not.
        """
        self._ours.close()  # no more boxes come
        try:
            scorer = self._scorer.result()
        except BoxLost as error:  # which says nothing of the candidate
            raise SandboxError(error.message, error.hint) from error
        sheet = read_sheet(self._output_dir) if scorer.outcome is Outcome.OK else None
        is_late = scorer.outcome is Outcome.TIMED_OUT
        models_are_well = all(result.outcome is Outcome.OK for result in self._models)
        if sheet is None and models_are_well and not is_late:
            raise SandboxError(
                f"the scorer box ended {scorer.outcome} without a score: "
                f"{scorer.log.tail[-500:].strip()}",
                "look at evaluate.py and at [scoring] in program.md",
            )
        return Measurement(tuple(self._models), scorer, sheet)


def _pair() -> tuple[socket.socket, socket.socket]:
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in pair:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    return pair
