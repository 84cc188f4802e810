"""One training with its scoring, as a generator of events.

A trial is a function of its inputs. It reads no ledger, no workspace and no environment, so it runs
alike in this process and on another machine; whoever runs it puts what it yields on record, each
event before the next step. See docs/decisions/0002 for the clock of the budget, 0018 for trials.
"""

import shutil
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

from agent.attempt.boxes import (
    CHECK_RUN,
    model_names,
    model_spec,
    scorer_spec,
    train_spec,
    with_gpus,
    with_own_copies,
)
from agent.attempt.decide import (
    TOO_LONG,
    failure_of_training,
    over_budget_seconds,
    scored_by_boxes,
    scored_by_itself,
)
from agent.attempt.disturbance import (
    Sample,
    Usual,
    disturbance,
    idle_cores,
    is_crowded,
    was_disturbed,
)
from agent.attempt.lab import (
    Step,
    Steps,
    Trial,
    Worker,
    fresh_directory,
    make_readable,
    refuse_interruption,
    sha_of,
    snapshot,
)
from agent.attempt.scoring import Measurement, ScoringBoxes
from agent.attempt.sheet import left_seconds_of
from agent.attempt.stopping import Rule, Watch
from agent.record.attempts import DISTURBED
from agent.record.chain import canonical
from agent.record.curves import (
    Curve,
    CurveCollector,
    mfu_of,
    packed,
    progress_read,
    said_tokens,
    unpacked,
)
from agent.record.events import ATTEMPT, Disturbance, RunFinished, RunStarted, Scored, Split
from agent.record.logs import excerpt, packed_log
from agent.record.reported import reported_file
from sandbox.contract.errors import host_faults
from sandbox.contract.log import log
from sandbox.contract.run import Log, Outcome, RunResult, RunSpec

MAX_QUIET_WAIT_SECONDS = 30.0
QUIET_SAMPLE_SECONDS = 2.0


def run_trial(worker: Worker, trial: Trial) -> Steps:
    """Train until a run was not disturbed, then score, as long as there is something to score.

    Raises:
        BoxLost: somebody else ended a box.
        SandboxError: nightlab or the engine failed.
        SessionOver: the session had to end while there was no GPU.
    """
    names, settings = run_names(trial), worker.settings
    with (
        host_faults(),
        files_of(worker, trial) as files,
        checkpoint_of(worker, trial) as checkpoint,
    ):
        run, output = yield from _train(worker, trial, names, files, checkpoint)
        if failure_of_training([run], settings, trial.counts_when_disturbed) is not None:
            return
        if settings.goal.is_reported:
            content = reported_file(checkpoint, settings.goal)
            scored = scored_by_itself(trial.key, output, settings.goal, content)
            yield Step(scored, () if content is None else (content,))
            return
        trained = replace(trial, left_seconds=left_seconds_of(run, trial.budget))
        for split in trial.splits:
            score = yield from score_split(worker, trained, names, files, checkpoint, split)
            if score.value is None:
                return


def score_again(worker: Worker, trial: Trial, checkpoint: Path) -> Steps:
    """Score a kept checkpoint on the splits of a trial that was trained before.

    Raises:
        SandboxError: nightlab or the engine failed.
    """
    names = run_names(trial)
    with host_faults(), files_of(worker, trial) as files:
        for split in trial.splits:
            yield from score_split(worker, trial, names, files, checkpoint, split)


def run_names(trial: Trial) -> Iterator[str]:
    """Ids of a trial's boxes, unique within the session and readable."""
    return (f"{trial.id}-{number}" for number in count())


def files_of(worker: Worker, trial: Trial) -> AbstractContextManager[Path]:
    """A directory that holds exactly a trial's files, as long as it goes on."""
    return snapshot(worker.directory / "boxes" / f"{trial.id}-files", trial.files)


@contextmanager
def checkpoint_of(worker: Worker, trial: Trial) -> Iterator[Path]:
    """Where a trial's checkpoint goes; an attempt's, which may be kept, stays once it is whole.

    Until then it lies where a resumed night clears away what a kill left.
    """
    path = fresh_directory(worker.directory / "boxes" / f"{trial.id}-checkpoint")
    kept = worker.directory / "checkpoints" / f"{trial.attempt}-{trial.seed}"
    if trial.purpose == ATTEMPT:
        shutil.rmtree(kept, ignore_errors=True)  # of an earlier training at this seed
    try:
        yield path
        if trial.purpose == ATTEMPT:
            kept.parent.mkdir(exist_ok=True)
            path.rename(kept)
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def leased(worker: Worker, attempt: int, *, is_begun: bool = False) -> Iterator[tuple[str, ...]]:
    """The GPUs of one box, as soon as there are any.

    Once an attempt has a run it is brought to its end, however long that takes.

    Raises:
        SessionOver: the session had to end before there were any.
    """
    stand_by = (lambda: None) if is_begun else worker.stand_by
    purpose = f"session {worker.session}, attempt {attempt}"
    with worker.gpus.lease(
        purpose, lambda text: worker.on_wait("gpu_awaited", text), stand_by
    ) as gpus:
        yield gpus


def start(trial: Trial, spec: RunSpec) -> Step:
    """The event that asks for a box."""
    return Step(
        RunStarted(purpose=trial.purpose, attempt=trial.attempt, seed=trial.seed, spec=spec)
    )


def finish(
    worker: Worker,
    trial: Trial,
    result: RunResult,
    *,
    noise: Disturbance | None = None,
    curve: Curve | None = None,
) -> Step:
    """The event that says how a box ended; its bulk goes into blobs, the line gets an excerpt."""
    evidence = dict(result.evidence)
    container = evidence.pop("container", None)
    log, points = packed_log(result.log), packed(curve) if curve else None
    settings_asked = canonical(container).encode() if container else None
    said = unpacked(points) if points else []
    event = RunFinished(
        purpose=trial.purpose,
        attempt=trial.attempt,
        seed=trial.seed,
        result=result.model_copy(update={"log": excerpt(result.log), "evidence": evidence}),
        log=sha_of(log),
        disturbance=noise,
        over_budget_seconds=over_budget_seconds(trial.purpose, result, trial.budget),
        curve=sha_of(points) if points else None,
        container=sha_of(settings_asked) if settings_asked else None,
        said_tokens=said_tokens(said),
        mfu=mfu_of(worker.peaks, worker.cpu, result, said),
    )
    return Step(event, tuple(blob for blob in (log, points, settings_asked) if blob))


def score_split(
    worker: Worker,
    trial: Trial,
    names: Iterator[str],
    files: Path,
    checkpoint: Path,
    split: Split,
) -> Generator[Step, None, Scored]:
    """Score a checkpoint on one split, again where it took too long while others used the machine.

    Only a score that has no value is taken again, so nobody gets a second chance to be lucky.
    """
    for left in range(worker.settings.disturbance.max_repeats, -1, -1):
        scored = yield from _score_once(worker, trial, next(names), files, checkpoint, split)
        if scored.reason != DISTURBED or not left:
            break
        log.info("score_repeated", attempt=trial.attempt, seed=trial.seed)
        _wait_for_quiet(worker, trial)
    return scored


def _score_once(
    worker: Worker, trial: Trial, name: str, files: Path, checkpoint: Path, split: Split
) -> Generator[Step, None, Scored]:
    """One score; the scorer box never has any of the GPUs."""
    boxes, checks = worker.directory / "boxes", trial.checks
    scorer = scorer_spec(worker, f"{name}-scorer", seed=trial.seed, split=split, checks=checks)
    output = fresh_directory(boxes / scorer.run_id)
    with leased(worker, trial.attempt, is_begun=True) as gpus:
        yield start(trial, scorer)
        before = worker.read_load(worker.read_machine)
        brings_boxes = worker.settings.model_boxes > 1
        with ScoringBoxes(worker.run, scorer, output, brings_boxes=brings_boxes) as scoring:
            for run_id in model_names(name, checks):
                if not scoring.wants_more():
                    break
                asked = with_gpus(worker, model_spec(worker, run_id, files, checkpoint), gpus)
                if CHECK_RUN.search(run_id):  # or it could read what another score's left there
                    worker.forget_pages(asked.image)
                with with_own_copies(asked, boxes / f"{run_id}-sees") as spec:
                    yield start(trial, spec)
                    result = scoring.ask(spec)
                yield finish(worker, trial, result)
                refuse_interruption(result)
                if result.outcome is not Outcome.OK:
                    break
            measurement = scoring.measurement()
    shutil.rmtree(output, ignore_errors=True)
    found, noise = partial(_scored, trial, split, measurement), None
    if found(noise).reason in TOO_LONG:
        results = (*measurement.models, measurement.scorer)
        cpu_seconds = sum(result.cpu_seconds or 0.0 for result in results)
        noise = _noise_since(worker, trial.usual, before, cpu_seconds)
    yield finish(worker, trial, measurement.scorer, noise=noise)
    scored = found(noise)
    yield Step(scored, () if measurement.sheet is None else (measurement.sheet,))
    return scored


def _scored(
    trial: Trial, split: Split, measurement: Measurement, noise: Disturbance | None
) -> Scored:
    sheet, models = measurement.sheet, measurement.models
    free, left_seconds = trial.free, trial.left_seconds
    return scored_by_boxes(trial.key, split, sheet, models, noise, free, left_seconds)


def _train(
    worker: Worker, trial: Trial, names: Iterator[str], files: Path, checkpoint: Path
) -> Generator[Step, None, tuple[RunFinished, Log]]:
    """Train, again where others disturbed the run; the last run counts, with its whole log."""
    is_begun = trial.is_begun
    for left in range(worker.settings.disturbance.max_repeats, -1, -1):
        run, output = yield from _train_once(
            worker, trial, next(names), files, checkpoint, is_begun=is_begun
        )
        is_begun = True
        if not was_disturbed(run) or not left:
            break
        log.info("training_repeated", run=run.result.run_id, seed=trial.seed)
        _wait_for_quiet(worker, trial)
    return run, output


def _train_once(
    worker: Worker, trial: Trial, run_id: str, files: Path, checkpoint: Path, *, is_begun: bool
) -> Generator[Step, None, tuple[RunFinished, Log]]:
    fresh_directory(checkpoint)
    with leased(worker, trial.attempt, is_begun=is_begun) as gpus:
        spec = with_gpus(worker, train_spec(worker, trial, run_id, files), gpus)
        yield start(trial, spec)
        before = worker.read_load(worker.read_machine)
        collector = CurveCollector(worker.on_log)
        rule = None if trial.past is None else Rule(worker.settings, trial.past)
        watch = None if rule is None else Watch(collector.curve, rule, trial.budget)
        with progress_read(worker.settings.progress.pattern, collector) as on_log:
            result = worker.run(spec, output_dir=checkpoint, on_log=on_log, should_stop=watch)
    noise = _noise_since(worker, trial.usual, before, result.cpu_seconds or 0.0)
    make_readable(checkpoint)
    # What is said after the decision did not count for it, and must not when it is checked.
    is_stopped = watch is not None and result.outcome is Outcome.STOPPED
    curve = watch.seen if watch and is_stopped else collector.curve()
    step = finish(worker, trial, result, noise=noise, curve=curve)
    yield step
    refuse_interruption(result)
    assert isinstance(step.event, RunFinished)
    return step.event, result.log


def _wait_for_quiet(worker: Worker, trial: Trial) -> None:
    """Wait until the machine is quiet again, but no longer than a training takes."""
    patience_seconds = min(MAX_QUIET_WAIT_SECONDS, trial.budget.seconds)
    waited = 0.0
    while waited < patience_seconds:
        waited += QUIET_SAMPLE_SECONDS
        if not is_crowded(sampled(worker, trial.usual)):
            return


def sampled(worker: Worker, usual: Usual) -> Disturbance:
    """What others do now, while no box of ours runs."""
    before = worker.read_load(worker.read_machine)
    worker.sleep(QUIET_SAMPLE_SECONDS)
    return _noise_since(worker, usual, before, 0.0)


def _noise_since(worker: Worker, usual: Usual, before: Sample, cpu_seconds: float) -> Disturbance:
    """What others did since a sample, beside boxes of ours that used so many CPU seconds."""
    settings, now = worker.settings, worker.read_load(worker.read_machine)
    idle = idle_cores(settings.limits.cpus)
    limits = settings.disturbance
    return disturbance(before, now, cpu_seconds, limits, idle=idle, usual=usual)
