"""One measurement: train box, model boxes, scorer box, score."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agent.attempt.disturbance import (
    Sample,
    disturbance,
    idle_cores,
    is_crowded,
    reasons,
    usual_cores,
    usual_speed,
)
from agent.attempt.lab import (
    Lab,
    checkpoint_dir,
    forget_checkpoints,
    fresh_directory,
    make_readable,
    snapshot,
    stored_files,
)
from agent.attempt.machine_state import held_back
from agent.attempt.reported import read_reported
from agent.attempt.sheet import Measurement, finding, parse_sheet
from agent.attempt.sheet import measure as score_in_boxes
from agent.attempt.stopping import Rule, Watch, describe, past
from agent.attempt.waiting import stand_by
from agent.record.curves import CurveCollector, packed
from agent.record.events import (
    Disturbance,
    EarlyStop,
    Event,
    LaterRun,
    MachineState,
    RunEvent,
    RunFinished,
    RunStarted,
    Scored,
    Split,
    Verdict,
)
from agent.record.history import Attempt
from agent.record.ledger import canonical
from agent.record.logs import excerpt, packed_log
from agent.record.mfu import mfu_of
from agent.settings import Budget
from sandbox.contract.errors import BoxLost, host_faults
from sandbox.contract.run import Box, Limits, Mount, Outcome, RunResult, RunSpec

WORKSPACE, DATA, CHECKPOINT = "/workspace", "/data", "/checkpoint"
EVALUATE, OUTPUT = "/evaluate", "/out"
DISTURBED_ENDS = (Outcome.OK, Outcome.TIMED_OUT, Outcome.STOPPED)
"""Ends that other work on the machine can have brought about."""
MAX_QUIET_WAIT_SECONDS = 30.0
QUIET_SAMPLE_SECONDS = 2.0


@dataclass(frozen=True)
class Failure:
    """Why an attempt has no score: a value, not an error."""

    verdict: Verdict
    reason: str
    explanation: str
    early_stop: EarlyStop | None = None


def measure(
    lab: Lab,
    number: int,
    seed: int,
    files: Path,
    splits: Sequence[Split] = ("val",),
    *,
    may_stop: bool = False,
) -> Failure | None:
    """Train and score once at `seed`; the scores are in the ledger when nothing is returned.

    A program that reports its own score says nothing about other splits than val. With `may_stop` a
    training that can no longer win is ended early, if the settings say so.
    """
    checkpoint = checkpoint_dir(lab, number, seed)
    rule = _rule(lab) if may_stop else None
    trained = _train(lab, number, seed, files, checkpoint, rule)
    if isinstance(trained, Failure):
        return trained
    if lab.settings.goal.is_reported:
        return _take_its_word(lab, number, seed, trained)
    failure = None
    for split in splits:
        failure = failure or _score(lab, number, seed, files, checkpoint, split)
    return failure


def measure_aside(
    lab: Lab,
    purpose: str,
    number: int,
    seed: int,
    files: dict[str, bytes],
    splits: Sequence[Split],
) -> tuple[float | None, float | None, Failure | None]:
    """Scores on val and holdout that belong to no attempt, and why one is missing.

    Every run is on record as a later one. The lab's directory must be a scratch one: checkpoints
    of the attempt that lie there are forgotten.
    """
    scores: dict[Split, float | None] = {}

    def envelope(event: RunEvent) -> Event:
        if isinstance(event, Scored):
            scores[event.split] = event.value
        return LaterRun(purpose=purpose, run=event)

    aside = replace(lab, envelope=envelope)
    with snapshot(aside, number, files) as root:
        failure = measure(aside, number, seed, root, splits)
    forget_checkpoints(aside, number)
    return scores.get("val"), scores.get("holdout"), failure


def _rule(lab: Lab) -> Rule | None:
    """What ends a training early; none where nothing does."""
    if lab.settings.economy.early_stopping == "off":
        return None
    seen = past(lab.ledger.history, lab.ledger.get_blob, lab.settings.budget)
    return None if seen is None else Rule(lab.settings, seen)


def _train(
    lab: Lab, number: int, seed: int, files: Path, checkpoint: Path, rule: Rule | None
) -> Failure | RunResult:
    """Train until a run was not disturbed, as often as the settings allow.

    Only the baseline is measured on a machine that is never quiet: its noise then shows it.
    """
    repeats = lab.settings.disturbance.max_repeats
    is_baseline = lab.ledger.history.attempt(number).started.kind == "baseline"
    for repeat in range(repeats + 1):
        last = repeat == repeats
        with leased(lab, number) as gpus:
            run = _train_once(lab, number, seed, files, checkpoint, rule, gpus)
        noise = run.disturbance
        refuse_interruption(run.result)
        slowed = noise.disturbed or run.result.was_throttled
        disturbed = slowed and run.result.outcome in DISTURBED_ENDS
        if not disturbed or (last and is_baseline):
            return _judge_run(lab, run) or run.result
        if not last:
            _wait_for_quiet(lab)
    return Failure(Verdict.DISCARDED, "disturbed", _why_disturbed(noise, repeats + 1))


def _why_disturbed(noise: Disturbance, runs: int) -> str:
    if not noise.disturbed:
        return f"each of {runs} runs was disturbed, the last by a throttled GPU: not judged"
    why = ", ".join(reasons(noise))
    return f"each of {runs} runs was disturbed, the last because {why}: not judged"


def refuse_interruption(result: RunResult) -> None:
    """Take no run for the program's that somebody else ended.

    Raises:
        BoxLost: it was.
    """
    if result.was_ended_by_somebody_else:
        raise BoxLost(
            f"run {result.run_id} was ended by somebody else: {evidence_of(result)}",
            "see who stopped the container, then resume the session",
        )


def leased(lab: Lab, number: int) -> AbstractContextManager[tuple[str, ...]]:
    """The GPUs of one box, as soon as there are any; what is waited for is on record.

    Once an attempt has a run it is brought to its end, however long that takes.

    Raises:
        SessionOver: the session had to end before there were any.
    """
    attempts = lab.ledger.history.attempts
    is_begun = bool(attempts) and attempts[-1].open and bool(attempts[-1].runs)

    def note(words: str) -> None:
        lab.tell_waiting("gpu_awaited", words)

    purpose = f"session {lab.session}, attempt {number}"
    return lab.gpus.lease(purpose, note, lambda: None if is_begun else stand_by(lab))


@dataclass(frozen=True)
class _Training:
    """One training as it came out."""

    result: RunResult
    disturbance: Disturbance
    over_seconds: float
    early_stop: EarlyStop | None


def _train_once(
    lab: Lab,
    number: int,
    seed: int,
    files: Path,
    checkpoint: Path,
    rule: Rule | None,
    gpus: tuple[str, ...],
) -> _Training:
    fresh_directory(checkpoint)
    settings = lab.settings
    spec = train_spec(
        lab, run_id(lab, number), seed, files, settings.budget, settings.train_limits()
    )
    spec = lab.with_gpus(spec, gpus)
    lab.record(run_started(number, seed, spec))
    lab.observer.run_started("train", seed, lab.settings.budget.seconds)
    before, state = lab.read_load(), lab.read_machine()
    progress = CurveCollector(lab.observer.log)
    watch = None if rule is None else Watch(progress.curve, rule, lab.settings.budget)
    result = lab.executor.run(spec, output_dir=checkpoint, on_log=progress, should_stop=watch)
    is_stopped = watch is not None and result.outcome is Outcome.STOPPED
    noise = _with_state(
        _disturbance(lab, before, result.cpu_seconds or 0.0), state, lab.read_machine()
    )
    over_seconds = _over_budget_seconds(lab, result)
    session = lab.ledger.history.session
    curve = watch.seen if watch and is_stopped else progress.curve()
    assert session is not None
    lab.record(
        RunFinished(
            attempt=number,
            seed=seed,
            **_with_bulk_aside(lab, result),
            disturbance=noise,
            over_budget_seconds=over_seconds,
            curve=lab.ledger.put_blob(packed(curve)) if curve else None,
            mfu=mfu_of(session, result, curve),
        )
    )
    lab.observer.run_finished(result, noise)
    make_readable(checkpoint)
    found = watch.found if watch and is_stopped else None
    return _Training(result, noise, over_seconds, found)


def _with_state(noise: Disturbance, before: MachineState, after: MachineState) -> Disturbance:
    """What others did, and what heat did; either makes a run worth another try."""
    reasons = held_back(before, after)
    return noise.model_copy(
        update={
            "before": before,
            "after": after,
            "held_back": reasons,
            "disturbed": noise.disturbed or bool(reasons),
        }
    )


def _with_bulk_aside(lab: Lab, result: RunResult) -> dict[str, Any]:
    """The fields of a result whose bulk goes into blobs; the line gets an excerpt of the log."""
    evidence = dict(result.evidence)
    container = evidence.pop("container", None)
    short = result.model_copy(update={"log": excerpt(result.log), "evidence": evidence})
    return {
        "result": short,
        "log": lab.ledger.put_blob(packed_log(result.log)),
        "container": container and lab.ledger.put_blob(canonical(container).encode()),
    }


def put_run(lab: Lab, number: int, seed: int, result: RunResult) -> None:
    """Record and show how a box ended that was not asked for a training within the budget."""
    lab.record(
        RunFinished(
            attempt=number,
            seed=seed,
            **_with_bulk_aside(lab, result),
            disturbance=None,
            over_budget_seconds=0.0,
        )
    )
    lab.observer.run_finished(result, None)


def _judge_run(lab: Lab, run: _Training) -> Failure | None:
    result, noise, over_seconds = run.result, run.disturbance, run.over_seconds
    if run.early_stop is not None:
        explanation = describe(run.early_stop)
        return Failure(Verdict.DISCARDED, "stopped_early", explanation, run.early_stop)
    busy = "".join(f"; {reason}" for reason in reasons(noise))
    if result.outcome is not Outcome.OK:
        return Failure(Verdict.FAILED, result.outcome.value, evidence_of(result) + busy)
    if over_seconds > 0:
        return Failure(
            Verdict.INVALID,
            "over_budget",
            f"the run took {over_seconds:.1f} s longer than its budget of "
            f"{lab.settings.budget.seconds:g} s; start-up and saving count{busy}",
        )
    if not result.output and not lab.settings.goal.is_reported:
        return Failure(Verdict.FAILED, "no_checkpoint", f"the run left no file in {OUTPUT}")
    return None


def _take_its_word(lab: Lab, number: int, seed: int, trained: RunResult) -> Failure | None:
    """Record the score that a training printed of itself, or why there is none."""
    said = read_reported(trained.log, lab.settings.goal.metric)
    lab.record(
        Scored(
            attempt=number,
            seed=seed,
            split="val",
            value=said.value,
            reason=said.reason,
            explanation=said.explanation,
            details=said.details,
            source="reported",
        )
    )
    if said.reason is None:
        return None
    return Failure(Verdict.INVALID, said.reason, said.explanation)


def _score(
    lab: Lab, number: int, seed: int, files: Path, checkpoint: Path, split: Split
) -> Failure | None:
    """Score a checkpoint in model boxes and a scorer box and record what came of it."""
    with leased(lab, number) as gpus:
        return _score_on(lab, number, seed, files, checkpoint, split, gpus)


def _score_on(
    lab: Lab,
    number: int,
    seed: int,
    files: Path,
    checkpoint: Path,
    split: Split,
    gpus: tuple[str, ...],
) -> Failure | None:
    """The same on GPUs that the model boxes may have; the scorer box never has any."""
    models, scorer = scoring_specs(
        lab, run_id(lab, number), seed=seed, files=files, checkpoint=checkpoint, split=split
    )
    models = [lab.with_gpus(model, gpus) for model in models]
    for spec in (*models, scorer):
        lab.record(run_started(number, seed, spec))
    lab.observer.run_started("scorer", seed, scorer.limits.wall_seconds)
    output = fresh_directory(lab.directory / "boxes" / scorer.run_id)
    try:
        measurement = score_in_boxes(lab.executor, models, scorer, output)
    finally:
        shutil.rmtree(output, ignore_errors=True)
    for result in (*measurement.models, measurement.scorer):
        put_run(lab, number, seed, result)
    for result in measurement.models:
        refuse_interruption(result)
    scored, failure = _read_measurement(lab, number, seed, split, measurement)
    lab.record(scored)
    return failure


def _read_measurement(
    lab: Lab, number: int, seed: int, split: Split, measurement: Measurement
) -> tuple[Scored, Failure | None]:
    raw = measurement.sheet
    sheet = parse_sheet(raw) if raw is not None else None
    found = finding(sheet, [model.outcome for model in measurement.models])
    bad = next((m for m in measurement.models if m.outcome is not Outcome.OK), None)
    explanation = evidence_of(bad) if found.model_failed and bad else found.explanation
    scored = Scored(
        attempt=number,
        seed=seed,
        split=split,
        value=found.value,
        reason=found.reason,
        explanation=explanation,
        details=sheet.details if sheet else {},
        sheet=lab.ledger.put_blob(raw) if raw is not None else None,
    )
    if found.reason is None:
        return scored, None
    verdict = Verdict.FAILED if found.model_failed else Verdict.INVALID
    return scored, Failure(verdict, found.reason, explanation)


def score_holdout(lab: Lab, attempt: Attempt) -> None:
    """Score an attempt's kept checkpoints on the holdout split, once for each seed, ever.

    Raises:
        SandboxError: nightlab or the engine failed.
    """
    scored = {score.seed for score in attempt.scores if score.split == "holdout"}
    checkpoints = {
        seed: checkpoint_dir(lab, attempt.number, seed) for seed in attempt.values().keys() - scored
    }
    due = {seed: path for seed, path in sorted(checkpoints.items()) if path.is_dir()}
    if not due:
        return
    with host_faults(), snapshot(lab, attempt.number, stored_files(lab, attempt)) as files:
        for seed, checkpoint in due.items():
            _score(lab, attempt.number, seed, files, checkpoint, "holdout")


def train_spec(
    lab: Lab, run_id: str, seed: int, files: Path, budget: Budget, limits: Limits
) -> RunSpec:
    """A train box for files, with what it is told of its seed and its budget."""
    environment = lab.environment | {
        "NIGHTLAB_SEED": str(seed),
        "NIGHTLAB_BUDGET_SECONDS": f"{budget.seconds:g}",
        "NIGHTLAB_OUTPUT": OUTPUT,
    }
    mounts = {files: WORKSPACE}
    if lab.train_data is not None:
        environment["NIGHTLAB_DATA"] = DATA
        mounts[lab.train_data] = DATA
    if budget.tokens is not None:
        environment["NIGHTLAB_BUDGET_TOKENS"] = str(budget.tokens)
    return box_spec(
        lab,
        run_id,
        "train",
        lab.settings.workspace.command,
        environment,
        mounts,
        limits,
    )


def scoring_specs(
    lab: Lab, run_id: str, *, seed: int, files: Path, checkpoint: Path, split: Split
) -> tuple[list[RunSpec], RunSpec]:
    """The model boxes and the scorer box of one score; `run_id` begins the name of each."""
    names = ("model", "second")[: lab.settings.model_boxes]
    models = [model_spec(lab, f"{run_id}-{name}", files, checkpoint) for name in names]
    return models, _scorer_spec(lab, f"{run_id}-scorer", seed, split)


def model_spec(lab: Lab, run_id: str, files: Path, checkpoint: Path) -> RunSpec:
    """A model box for files and the checkpoint that they left."""
    argv = ("python3", f"{EVALUATE}/evaluate.py", "model", "--workspace", WORKSPACE)
    limits = lab.settings.scoring_limits()
    # Boxes that work side by side would else wait for each other's threads.
    threads = max(1, int(limits.cpus / lab.settings.model_boxes))
    return box_spec(
        lab,
        run_id,
        "model",
        (*argv, "--checkpoint", CHECKPOINT, "--device", lab.device),
        {"OMP_NUM_THREADS": str(threads)} | lab.environment,
        {files: WORKSPACE, checkpoint: CHECKPOINT, lab.fixed_dir: EVALUATE},
        limits,
    )


def _scorer_spec(lab: Lab, run_id: str, seed: int, split: Split) -> RunSpec:
    argv = ("python3", f"{EVALUATE}/evaluate.py", "score", "--data", DATA, "--output", OUTPUT)
    return box_spec(
        lab,
        run_id,
        "scorer",
        (*argv, "--seed", str(seed)),
        lab.environment | {"NIGHTLAB_DEVICE": "cpu"},  # it only adds up losses
        {lab.fixed_dir: EVALUATE, lab.split(split): DATA},
        lab.settings.scoring_limits(),
    )


def box_spec(
    lab: Lab,
    run_id: str,
    box: Box,
    argv: tuple[str, ...],
    environment: dict[str, str],
    mounts: dict[Path, str],
    limits: Limits,
) -> RunSpec:
    """What a box of this session is asked."""
    return RunSpec(
        run_id=run_id,
        session=_label(lab),
        box=box,
        image=lab.image_id,
        argv=argv,
        working_directory=WORKSPACE if box != "scorer" else EVALUATE,
        environment=environment,
        mounts=tuple(Mount(source=s.absolute(), target=t) for s, t in mounts.items()),
        gpus=(),
        limits=limits,
    )


def run_started(number: int, seed: int, spec: RunSpec) -> RunStarted:
    """The event that asks for a box."""
    return RunStarted(
        attempt=number,
        run_id=spec.run_id,
        box=spec.box,
        seed=seed,
        spec=json.loads(spec.model_dump_json()),
    )


def run_id(lab: Lab, number: int) -> str:
    """Unique within the session and readable: the attempt and the place in the ledger."""
    return f"{_label(lab)}-{number}-{len(lab.ledger.entries)}"


def _label(lab: Lab) -> str:
    """The session's name as a box can carry it; a copied directory may be called anything."""
    return re.sub(r"[^a-z0-9]+", "-", lab.session.lower()).strip("-")[:30] or "session"


def _disturbance(lab: Lab, before: Sample, run_cpu_seconds: float) -> Disturbance:
    limits, history = lab.settings.disturbance, lab.ledger.history
    return disturbance(
        before,
        lab.read_load(),
        run_cpu_seconds,
        limits.max_other_cores,
        idle_cores=idle_cores(lab.settings.limits.cpus),
        usual_cores=usual_cores(history),
        usual_speed=usual_speed(history),
        min_speed=limits.min_speed,
    )


def _wait_for_quiet(lab: Lab) -> None:
    """Wait until the machine is quiet again, but no longer than a training takes."""
    patience_seconds = min(MAX_QUIET_WAIT_SECONDS, lab.settings.budget.seconds)
    waited = 0.0
    while waited < patience_seconds:
        before = lab.read_load()
        lab.sleep(QUIET_SAMPLE_SECONDS)
        waited += QUIET_SAMPLE_SECONDS
        if not is_crowded(_disturbance(lab, before, 0.0)):
            return


def _over_budget_seconds(lab: Lab, result: RunResult) -> float:
    budget = lab.settings.budget
    if budget.kind == "tokens":
        return 0.0
    return max(0.0, result.wall_seconds - budget.seconds)


def evidence_of(result: RunResult) -> str:
    """One sentence about how a run ended, from the host's evidence."""
    if result.signal is not None:
        how = f"ended by signal {result.signal}"
    else:
        how = f"exit code {result.exit_code}"
    return f"{result.outcome.value} after {result.wall_seconds:.1f} s, {how}"
