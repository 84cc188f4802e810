"""A short training first: whether files run at all.

Most of what is wrong with changed code shows at once, but some of it only at the end: no
checkpoint, one that cannot be loaded, a crash while it is saved. A smoke run is the same script in
the same box with a budget of seconds, then the model box with the checkpoint and a scorer that asks
nothing. It judges nothing but that. A script that ignores its budget is ended and has passed.
"""

from __future__ import annotations

import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path

from agent.attempt.lab import Lab, fresh_directory, hashes_of, make_readable, snapshot, stored_files
from agent.attempt.measurement import (
    evidence_of,
    leased,
    model_spec,
    put_run,
    refuse_interruption,
    run_id,
    run_started,
    train_spec,
)
from agent.candidate.knobs import without_knobs
from agent.record.events import SmokeFinished, SmokeRun, SmokeStarted
from agent.record.history import Smoke
from sandbox.contract.errors import host_faults
from sandbox.contract.run import Outcome, RunResult

MAX_SHARE = 0.05
"""Of the budget, up to which a smoke run comes by itself: one in twenty must save a whole one."""


def is_due(lab: Lab, files: dict[str, bytes]) -> bool:
    """Whether nightlab smokes these files by itself before it trains them."""
    economy, history = lab.settings.economy, lab.ledger.history
    smoked = history.find_smoke(hashes_of(files))
    if economy.smoke == "off" or (smoked and smoked.finished and smoked.finished.passed):
        return False
    if economy.smoke == "always":
        return True
    if economy.smoke_seconds > MAX_SHARE * lab.settings.budget.seconds:
        return False
    best = None if history.best is None else stored_files(lab, history.best)
    return best is None or _code(best) != _code(files)


def smoke(lab: Lab, files: dict[str, bytes], *, asked_by_researcher: bool) -> Smoke:
    """Run files for a few seconds and record what came of it.

    Raises:
        SandboxError: nightlab or the engine failed.
    """
    history = lab.ledger.history
    number, began = len(history.smokes), time.monotonic()
    attempts = len(history.attempts)
    lab.ledger.append(
        SmokeStarted(
            smoke=number,
            attempt=attempts if asked_by_researcher else attempts - 1,
            asked_by="researcher" if asked_by_researcher else "nightlab",
            files={name: lab.ledger.put_blob(content) for name, content in files.items()},
        )
    )
    inside = replace(lab, envelope=lambda run: SmokeRun(smoke=number, run=run))
    checkpoint = lab.directory / "boxes" / f"smoke-{number}"
    with (
        host_faults(),
        leased(lab, history.smokes[number].started.attempt) as gpus,
        snapshot(lab, attempts, files) as root,
    ):
        fresh_directory(checkpoint)
        try:
            answered = _run(inside, history.smokes[number], root, checkpoint, gpus)
        finally:
            shutil.rmtree(checkpoint, ignore_errors=True)
    smoked = history.smokes[number]
    is_reported = lab.settings.goal.is_reported
    reason = smoked.reason(answered=answered, is_reported=is_reported)
    told = "nothing went wrong" if reason is None else _told(smoked.runs[-1].result)
    seconds = lab.settings.economy.smoke_seconds
    lab.ledger.append(
        SmokeFinished(
            smoke=number,
            passed=reason is None,
            reason=reason,
            explanation=f"in a smoke run of {seconds:g} s: {told}",
            answered=answered,
            seconds=time.monotonic() - began,
        )
    )
    return smoked


def _run(lab: Lab, smoke: Smoke, files: Path, checkpoint: Path, gpus: tuple[str, ...]) -> bool:
    """Train, then load what training left; whether the model box said a word."""
    number, seed, settings = smoke.started.attempt, lab.seeds[0], lab.settings
    spec = train_spec(
        lab, run_id(lab, number), seed, files, settings.smoke_budget(), settings.smoke_limits()
    )
    spec = lab.with_gpus(spec, gpus)
    lab.record(run_started(number, seed, spec))
    lab.observer.run_started("train", seed, settings.economy.smoke_seconds)
    train = lab.executor.run(spec, output_dir=checkpoint, on_log=lab.observer.log)
    _record(lab, number, seed, train)
    make_readable(checkpoint)
    if train.outcome is not Outcome.OK or not train.output or settings.goal.is_reported:
        return False
    spec = lab.with_gpus(model_spec(lab, run_id(lab, number), files, checkpoint), gpus)
    lab.record(run_started(number, seed, spec))
    lab.observer.run_started("model", seed, spec.limits.wall_seconds)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        ours.shutdown(socket.SHUT_WR)  # nobody asks anything
        with theirs:
            model = lab.executor.run(spec, channel=theirs)
        ours.setblocking(False)
        answered = _has_something(ours)
    _record(lab, number, seed, model)
    return answered


def _record(lab: Lab, number: int, seed: int, result: RunResult) -> None:
    put_run(lab, number, seed, result)
    refuse_interruption(result)


def _has_something(end: socket.socket) -> bool:
    try:
        return bool(end.recv(1))
    except OSError:  # nothing was ever sent
        return False


def _told(result: RunResult) -> str:
    """How the run that failed ended: a training, or a model box that loaded its checkpoint."""
    what = "the training" if result.box == "train" else "loading the checkpoint"
    left_nothing = " and left no file behind" if result.outcome is Outcome.OK else ""
    return f"{what}: {evidence_of(result)}{left_nothing}"


def _code(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: without_knobs(name, content) for name, content in files.items()}
