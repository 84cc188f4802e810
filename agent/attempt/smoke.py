"""A short training first: whether files run at all.

Most of what is wrong with changed code shows at once, but some of it only at the end: no
checkpoint, one that cannot be loaded, a crash while it is saved. A smoke run is the same script in
the same box with a budget of seconds, then the model box with the checkpoint and a scorer that asks
nothing. It judges nothing but that. A script that ignores its budget is ended and has passed.
"""

import socket
import time
from collections.abc import Generator
from typing import Literal

from agent.attempt.boxes import model_spec, train_spec, with_gpus
from agent.attempt.decide import smoke_finished
from agent.attempt.lab import (
    Lab,
    Step,
    Steps,
    Trial,
    Worker,
    hashes_of,
    make_readable,
    refuse_interruption,
)
from agent.attempt.trial import checkpoint_of, files_of, finish, leased, run_names, start
from agent.candidate.knobs import without_knobs
from agent.record.attempts import Smoke
from agent.record.events import SMOKE, SmokeStarted
from sandbox.contract.errors import host_faults
from sandbox.contract.run import Outcome, RunSpec

MAX_SHARE = 0.05
"""Of the budget, up to which a smoke run comes by itself: one in twenty must save a whole one."""


def is_due(lab: Lab, files: dict[str, bytes]) -> bool:
    """Whether nightlab smokes these files by itself before it trains them."""
    economy, history = lab.settings.economy, lab.history
    smoked = history.find_smoke(hashes_of(files))
    if economy.smoke == "off" or (smoked and smoked.finished and smoked.finished.passed):
        return False
    if economy.smoke == "always":
        return True
    if economy.smoke_seconds > MAX_SHARE * lab.settings.budget.seconds:
        return False
    if history.best is None:
        return True
    best = lab.stored_files(history.best)
    # Other values of the knobs run like those before: what may break is the code.
    return best.keys() != files.keys() or any(
        code != best[name] and without_knobs(name, best[name]) != without_knobs(name, code)
        for name, code in files.items()
    )


def run_smoke(
    lab: Lab,
    files: dict[str, bytes],
    *,
    asked_by: Literal["nightlab", "researcher"],
    attempt: int,
) -> Smoke:
    """Run files for a few seconds and record what came of it.

    Args:
        attempt: the one that it belongs to, or that would come next.

    Raises:
        SandboxError: nightlab or the engine failed.
    """
    number, began = len(lab.history.smokes), time.monotonic()
    lab.ledger.append(
        SmokeStarted(
            smoke=number,
            attempt=attempt,
            asked_by=asked_by,
            files={name: lab.ledger.put_blob(content) for name, content in files.items()},
        )
    )
    answers: list[bool] = []
    trial = lab.trial(f"{SMOKE}{number}", attempt, lab.seeds[0], files)
    lab.record(_smoke(lab.worker, trial, answers))
    smoke = lab.history.smokes[number]
    seconds = time.monotonic() - began
    finished = smoke_finished(smoke, lab.settings, answered=any(answers), seconds=seconds)
    lab.ledger.append(finished)
    return smoke


def _smoke(worker: Worker, trial: Trial, answers: list[bool]) -> Steps:
    """Train, then load what training left; whether the model box said a word goes to `answers`."""
    names = run_names(trial)
    with (
        host_faults(),
        leased(worker, trial.attempt, is_begun=trial.is_begun) as gpus,
        files_of(worker, trial) as files,
        checkpoint_of(worker, trial) as checkpoint,
    ):
        spec = with_gpus(worker, train_spec(worker, trial, next(names), files), gpus)
        yield start(trial, spec)
        training = worker.run(spec, output_dir=checkpoint, on_log=worker.on_log)
        yield finish(worker, trial, training)
        refuse_interruption(training)
        make_readable(checkpoint)
        has_checkpoint = training.outcome is Outcome.OK and bool(training.output)
        if has_checkpoint and not worker.settings.goal.is_reported:
            spec = with_gpus(worker, model_spec(worker, next(names), files, checkpoint), gpus)
            answers.append((yield from _load(worker, trial, spec)))


def _load(worker: Worker, trial: Trial, spec: RunSpec) -> Generator[Step, None, bool]:
    """Let a model box load a checkpoint; whether it said a word, though nobody asked anything."""
    yield start(trial, spec)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        ours.shutdown(socket.SHUT_WR)  # nobody asks anything
        with theirs:
            result = worker.run(spec, channel=theirs)
        ours.setblocking(False)
        try:
            answered = bool(ours.recv(1))
        except OSError:  # nothing was ever sent
            answered = False
    yield finish(worker, trial, result)
    refuse_interruption(result)
    return answered
