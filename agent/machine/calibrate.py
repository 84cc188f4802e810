"""Measures a machine by its baseline, in the night's boxes.

Each budget has a small session of its own, and each score is on its ledger as soon as it is there:
what was measured before an interruption is not measured again.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from agent.attempt.boxes import box_spec, train_spec, with_gpus
from agent.attempt.decide import Failure, outcome_of
from agent.attempt.judge import SINGLE_LOOK
from agent.attempt.lab import Lab, Observer, hashes_of
from agent.attempt.trial import files_of, leased, run_trial
from agent.candidate.knobs import Knob, find_knobs, turn
from agent.machine.calibration import AtBudget, Batches, BatchTried, Calibration, proposals
from agent.machine.rates import PROGRAM, Rates, read_rates
from agent.machine.setup import Say
from agent.night.session import Runtime, begin, has_begun, open_lab, recover
from agent.program import Program
from agent.record.chain import read_ledger
from agent.record.curves import Curve, Point, curve_of, unpacked
from agent.record.events import ATTEMPT, AttemptFinished, AttemptStarted, Verdict
from agent.record.history import History, fold
from agent.record.ledger import Ledger
from agent.settings import Settings
from sandbox.contract.errors import host_faults
from sandbox.contract.run import Outcome, RunResult

SEED = 0
"""Always the same, so that what another call measured counts for this one."""
MOST_REPEATS = 10
"""Seeds are drawn when a session begins: enough for every number of repeats that may be asked."""
SCORING_SECONDS = 10.0
"""A guess of what scoring takes after a training, to say beforehand how long all of it will."""
BATCH_SECONDS = 4.0
"""How long one size of batch trains, start-up not counted."""
MIN_STEPS = 3
"""One starts up, two can be timed."""
MAX_BATCH_SECONDS = 300.0
MAX_BATCHES = 12
FEWEST_STEPS = 100
"""A batch that leaves fewer steps in the longest budget is of no use, however well it fits."""

Watched = Callable[[Settings, Ledger], AbstractContextManager[Observer]]


@dataclass(frozen=True)
class Bench:
    """What is calibrated, and where its sessions lie."""

    root: Path
    program: Program
    settings: Settings
    source: Path
    runtime: Runtime
    watched: Watched
    say: Say


def calibrate(bench: Bench, budgets: Sequence[float], repeats: int) -> Calibration:
    """Measure rates, the baseline at each budget, and how large a batch may be.

    Raises:
        SandboxError: nightlab or the engine failed; what was measured is kept.
        KeyboardInterrupt: passed on; the same call goes on where it was.
    """
    at_budgets = []
    rates = None
    for budget_seconds in sorted(budgets):
        with _lab(bench, budget_seconds) as lab:
            rates = rates or _rates(lab)
            at_budgets.append(_at_budget(lab, budget_seconds, repeats))
        bench.say(_line(at_budgets[-1]))
    with _lab(bench, max(budgets)) as lab:
        batches = _batches(lab, at_budgets[-1])
        files = hashes_of(lab.workspace.candidate())
    return Calibration(
        measured_at=datetime.now(UTC),
        files=files,
        rates=rates,
        at_budgets=tuple(at_budgets),
        batches=batches,
        proposals=proposals(at_budgets, batches, SINGLE_LOOK),
    )


def seconds_left(bench: Bench, budgets: Sequence[float], repeats: int) -> float:
    """About how long `calibrate` will take, without what an earlier call measured."""
    seconds = MAX_BATCHES / 2 * (BATCH_SECONDS + 4)
    for budget_seconds in budgets:
        directory = _directory(bench, budget_seconds)
        done = len(_scores(fold(read_ledger(directory)))) if has_begun(directory) else 0
        seconds += max(0, repeats - done) * (budget_seconds + SCORING_SECONDS)
    return seconds


def _directory(bench: Bench, budget_seconds: float) -> Path:
    return bench.root / f"calibrate-{budget_seconds:g}s".replace(".", "-")


@contextmanager
def _lab(bench: Bench, budget_seconds: float) -> Iterator[Lab]:
    """The lab of one budget's session, begun or gone on with."""
    directory, settings = _directory(bench, budget_seconds), _settings(bench, budget_seconds)
    if was_there := has_begun(directory):
        ledger = Ledger.open(directory)
    else:
        shutil.rmtree(directory, ignore_errors=True)  # a beginning that was cut off holds nothing
        ledger = begin(
            directory,
            bench.program,
            settings,
            bench.source,
            bench.runtime,
            researcher="calibrate",
            seed=SEED,
        )
    with ledger, bench.watched(settings, ledger) as observer:
        lab = open_lab(ledger, settings, bench.runtime, observer)
        # Only what was cut off is brought back: a call that finds all done adds no event.
        if was_there and any(attempt.open for attempt in ledger.history.attempts):
            recover(lab, removed_containers=(), engine=bench.runtime.engine)
        yield lab


def _settings(bench: Bench, budget_seconds: float) -> Settings:
    """The program's, with that wall budget and seeds enough for every number of repeats."""
    # In seconds whatever the program counts: how much fits into them is what is asked.
    tables = bench.settings.model_dump()
    tables["budget"] |= {"kind": "wall", "seconds": budget_seconds, "tokens": None}
    tables["noise"]["baseline_repeats"] = MOST_REPEATS
    return Settings.model_validate(tables)


def _rates(lab: Lab) -> Rates | None:
    argv = ("python3", "-I", "-c", PROGRAM)  # isolated: nothing of the candidate's is imported
    # Seconds are enough; a device that is not done in two minutes has no rate worth knowing.
    limits = lab.settings.train_limits().model_copy(update={"wall_seconds": 120.0})
    worker, name = lab.worker, f"{lab.session}-rates"
    spec = box_spec(worker, name, "train", argv, worker.environment, {}, limits)
    with leased(worker, 0) as gpus:
        given = with_gpus(worker, spec, gpus)
        result = worker.run(given.model_copy(update={"working_directory": "/"}))
    return read_rates(result.log.head + result.log.tail) if result.outcome is Outcome.OK else None


def _at_budget(lab: Lab, budget_seconds: float, repeats: int) -> AtBudget:
    """Train and score the baseline at the seeds that lack a score."""
    missing = [seed for seed in lab.seeds[:repeats] if seed not in _scores(lab.history)]
    problem = _train_and_score(lab, missing) if missing else ""
    scores, runs = _scores(lab.history), [r for a in lab.history.attempts for r in a.trainings]
    curves = [run.curve for run in runs if run.curve is not None]
    last = unpacked(lab.ledger.get_blob(curves[-1]))[-1] if curves else {}
    return AtBudget(
        budget_seconds=budget_seconds,
        values=tuple(scores[seed] for seed in lab.seeds[:repeats] if seed in scores),
        tokens_per_second=amount_of(last, "tokens_per_second"),
        start_seconds=_start_seconds(last),
        flops_per_token=amount_of(last, "flops_per_token"),
        disturbed=sum(run.disturbance.disturbed for run in runs if run.disturbance),
        problem=problem,
    )


def _train_and_score(lab: Lab, seeds: Sequence[int]) -> str:
    """Measure at each seed, on record; why it could not be, or nothing."""
    number, candidate = len(lab.ledger.history.attempts), lab.workspace.candidate()
    lab.ledger.append(
        AttemptStarted(
            attempt=number,
            kind="baseline",
            hypothesis=f"calibration at {lab.settings.budget.seconds:g} s",
            researcher="calibrate",
            files={name: lab.ledger.put_blob(content) for name, content in candidate.items()},
            diff=None,
            parent=None,
            seeds=tuple(lab.seeds),
        )
    )
    lab.observer.attempt_started(number, "baseline", "calibration")
    # What makes one seed fail is mostly not luck: the others would only take as long.
    failure = None
    for seed in seeds:
        trial = lab.trial(ATTEMPT, number, seed, candidate)
        lab.record(run_trial(lab.worker, trial))
        outcome = outcome_of(lab.history, trial.key, lab.ledger.get_blob)
        if isinstance(outcome, Failure):
            failure = outcome
            break
    values = list(lab.ledger.history.attempt(number).values().values())
    lab.ledger.append(
        AttemptFinished(
            attempt=number,
            verdict=failure.verdict if failure else Verdict.KEPT,
            reason=failure.reason if failure else "baseline",
            explanation=failure.explanation if failure else "calibration",
            value=None if failure else sum(values) / len(values),
            arithmetic=None,
            seconds=0.0,
        )
    )
    return f"{failure.reason}: {failure.explanation}"[:300] if failure else ""


def _scores(history: History) -> dict[int, float]:
    """Every score on val so far, by seed."""
    scores = (score for attempt in history.attempts for score in attempt.scores)
    return {s.seed: s.value for s in scores if s.split == "val" and s.value is not None}


def amount_of(point: Point, name: str) -> float | None:
    """An amount in a progress line; None where it is not there or is less than nothing."""
    amount = point.get(name, 0.0)
    return amount if amount > 0 else None


def _start_seconds(point: Point) -> float | None:
    """When the first step began, from what the last one says of tokens and seconds."""
    rate, tokens = amount_of(point, "tokens_per_second"), amount_of(point, "tokens")
    if rate is None or tokens is None:
        return None
    return max(0.0, point["seconds"] - tokens / rate)


def _batches(lab: Lab, at: AtBudget) -> Batches:
    """Double the batch until it no longer fits, or leaves too few steps."""
    files = lab.workspace.candidate()
    batch, sequence = _knob(files, "BATCH"), _knob(files, "SEQUENCE")
    rate = at.tokens_per_second
    if batch is None or sequence is None or not rate:
        return Batches(present=None, tried=(), ended="train.py names no BATCH and no SEQUENCE")
    size, length = int(batch.value), int(sequence.value)
    most = rate * at.budget_seconds / (length * FEWEST_STEPS)
    tried: list[BatchTried] = []
    ended = f"{MAX_BATCHES} sizes were tried"
    while len(tried) < MAX_BATCHES:
        tried.append(_try_batch(lab, files, batch, size, length, rate))
        if tried[-1].outcome is not Outcome.OK:
            ended = f"{size} ends with {tried[-1].outcome.value}"
            break
        size *= 2
        if size > most:
            few = f"fewer than {FEWEST_STEPS} steps in {at.budget_seconds:g} s"
            ended = f"twice as much leaves {few}"
            break
    return Batches(present=int(batch.value), tried=tuple(tried), ended=ended)


def _knob(files: dict[str, bytes], name: str) -> Knob | None:
    """The only knob of that name, if it is a whole number."""
    found = [k for file, text in files.items() for k in find_knobs(file, text) if k.name == name]
    return found[0] if len(found) == 1 and type(found[0].value) is int else None


def _try_batch(
    lab: Lab, files: dict[str, bytes], knob: Knob, size: int, length: int, rate: float
) -> BatchTried:
    """A short training with that batch; nothing of it is scored or kept."""
    # Counted in tokens, so that every size is given its steps however slow it is.
    steps = max(MIN_STEPS, round(BATCH_SECONDS * rate / (size * length)))
    tokens = steps * size * length
    budget = lab.settings.budget.model_copy(update={"kind": "tokens", "tokens": tokens})
    limits = lab.settings.train_limits().model_copy(update={"wall_seconds": MAX_BATCH_SECONDS})
    changed = files | {knob.file: turn(files[knob.file], knob, size)}
    worker, run_id = lab.worker, f"{lab.session}-batch-{size}"
    trial = replace(
        lab.trial(ATTEMPT, 0, lab.seeds[0], changed), id=run_id, budget=budget, limits=limits
    )
    with host_faults(), leased(worker, 0) as gpus, files_of(worker, trial) as root:
        spec = with_gpus(worker, train_spec(worker, trial, run_id, root), gpus)
        result = worker.run(spec)
    return BatchTried(
        batch=size,
        outcome=result.outcome,
        peak_memory_bytes=result.peak_memory_bytes,
        tokens_per_second=_steady_rate(curve_of(result.log.head + result.log.tail), result),
    )


def _steady_rate(curve: Curve, result: RunResult) -> float | None:
    """Tokens a second between the first report and the last: compiling comes before the first."""
    if result.outcome is not Outcome.OK or not curve:
        return None
    first, last = curve[0], curve[-1]
    seconds = last["seconds"] - first["seconds"]
    tokens = last.get("tokens", 0.0) - first.get("tokens", 0.0)
    # Reports of one moment, or of one step, give no rate: there the program's own word has to do.
    if seconds < 1 or tokens <= 0:
        return amount_of(last, "tokens_per_second")
    return tokens / seconds


def _line(at: AtBudget) -> str:
    if at.problem:
        return f"{at.budget_seconds:g} s: {at.problem}"
    sigma = "not known" if at.sigma is None else f"{at.sigma:.4f}"
    rate = f", {at.tokens_per_second:,.0f} tokens a second" if at.tokens_per_second else ""
    disturbed = f", {at.disturbed} disturbed" if at.disturbed else ""
    scores = f"{at.mean:.4f} from {len(at.values)} seeds, noise {sigma}"
    return f"{at.budget_seconds:g} s: {scores}{rate}{disturbed}"
