"""Checks a night by daylight: fresh seeds, changes left out."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from agent.attempt.decide import Failure, outcome_of
from agent.attempt.judge import judge
from agent.attempt.lab import Lab, Trial, fresh_directory
from agent.attempt.trial import run_trial
from agent.candidate.merge import Conflict, first_broken_file, merge_files
from agent.morning.ablation import (
    BASELINE,
    BEST,
    SMALLER,
    Review,
    ReviewTable,
    ablation,
    after,
    before,
    dispensable,
    kept_chain,
    reviews,
    without,
)
from agent.record.attempts import Attempt
from agent.record.events import (
    ReplayedSeed,
    ReplayFinished,
    ReviewFinished,
    ReviewStarted,
    Split,
    VariantMeasured,
    VariantPlanned,
)
from agent.record.repeats import FIVE_DIGITS
from agent.text import one_line
from sandbox.contract.errors import UsageError

Say = Callable[[str], None]

SCRATCH = "review"
ON_HOLDOUT = (BASELINE, BEST, SMALLER)
NOT_COMPARABLE = {
    "stopped_early": "the night ended its training early, and a replay trains to the end",
    "disturbed": "what others did to the machine decided, not the files",
}
"""Outcomes that say nothing about whether a run can be repeated, and why."""


def review(lab: Lab, repeats: int | None, version: str, say: Say) -> ReviewTable:
    """Measure baseline, best and the best without each kept change at the same fresh seeds.

    A review that was cut off goes on with what it has measured.

    Args:
        lab: of the session.
        repeats: how many fresh seeds; as many as the baseline had when not given.
        version: of nightlab.
        say: told each score.

    Raises:
        UsageError: nothing was kept, so there is nothing to review.
        SandboxError: nightlab or the engine failed; what was measured is on record.
    """
    _need_a_kept_change(lab)
    if _open_review(lab, repeats) is None:
        _start(lab, repeats or lab.settings.noise.baseline_repeats, version)
    _plan_all(lab)
    with _bench(lab) as bench:
        _measure_all(bench, say)
        _plan_smaller(lab)
        _measure_all(bench, say)
    lab.ledger.append(ReviewFinished(review=_current(lab).started.review))
    return ablation(_current(lab), lab.ledger.history)


def replay(lab: Lab, number: int, say: Say) -> ReplayFinished:
    """Run an attempt again from the record alone and compare.

    Raises:
        UsageError: there is no such attempt, or it has no training to compare with.
        SandboxError: nightlab or the engine failed.
    """
    attempt = _attempt_with_verdict(lab, number)
    today: dict[int, float] = {}
    failure: Failure | None = None
    with _bench(lab) as bench:
        for seed in _seeds_of(attempt):
            files, purpose = lab.stored_files(attempt), f"replay-{number}"
            outcome = measure_separately(bench, bench.trial(purpose, number, seed, files))
            say(f"attempt {number}, seed {seed}: {_describe(outcome)}")
            if isinstance(outcome, Failure):
                failure = outcome
                break
            today[seed] = outcome
    finished = _compared(lab, attempt, today, failure)
    lab.ledger.append(finished)
    return finished


# ---- a review --------------------------------------------------------------------------------


def _start(lab: Lab, repeats: int, version: str) -> None:
    history = lab.ledger.history
    assert history.baseline is not None
    assert history.best is not None
    number = len(reviews(lab.ledger.entries)) + 1
    lab.ledger.append(
        ReviewStarted(
            review=number,
            nightlab_version=version,
            baseline=history.baseline.number,
            best=history.best.number,
            seeds=_fresh_seeds(lab, repeats, number),
        )
    )


def _fresh_seeds(lab: Lab, count: int, review_number: int) -> tuple[int, ...]:
    """Seeds that follow from the session's own and were never used in it."""
    used = set(lab.seeds)
    for entry in lab.ledger.entries:
        if isinstance(entry.event, ReviewStarted):
            used.update(entry.event.seeds)
    source = random.Random(f"{lab.seeds} review {review_number}")
    fresh: list[int] = []
    while len(fresh) < count:
        seed = source.randrange(1, 2**31)
        if seed not in used:
            fresh.append(seed)
            used.add(seed)
    return tuple(fresh)


def _plan_all(lab: Lab) -> None:
    """Put every variant but the smaller one on record that is not there yet."""
    for planned in _plan(lab):
        if planned.variant not in _current(lab).variants:
            lab.ledger.append(planned)


def _plan(lab: Lab) -> Iterator[VariantPlanned]:
    history = lab.ledger.history
    assert history.baseline is not None
    assert history.best is not None
    yield _as_it_was(lab, BASELINE, history.baseline)
    yield _as_it_was(lab, BEST, history.best)
    for attempt in kept_chain(history):
        planned = _left_out(lab, without(attempt.number), attempt.number, (attempt.number,))
        yield planned
        if planned.files is None:
            assert attempt.started.parent is not None
            parent = history.attempt(attempt.started.parent)
            yield _as_it_was(lab, before(attempt.number), parent, about=attempt)
            yield _as_it_was(lab, after(attempt.number), attempt)


def _as_it_was(
    lab: Lab, name: str, attempt: Attempt, *, about: Attempt | None = None
) -> VariantPlanned:
    return VariantPlanned(
        review=_current(lab).started.review,
        variant=name,
        attempt=(about or attempt).number,
        left_out=(),
        files=attempt.started.files,
        problem="",
    )


def _left_out(lab: Lab, name: str, attempt: int, numbers: tuple[int, ...]) -> VariantPlanned:
    """The best's files without the changes of the attempts `numbers`."""
    stored, problem = None, ""
    try:
        files = leave_out(lab, numbers)
    except Conflict as conflict:
        problem = f"a later change edited the same place: {conflict}"
    else:
        if (broken := first_broken_file(files)) is not None:
            problem = f"{broken} no longer parses without it"
        else:
            stored = {path: lab.ledger.put_blob(content) for path, content in files.items()}
    return VariantPlanned(
        review=_current(lab).started.review,
        variant=name,
        attempt=attempt,
        left_out=numbers,
        files=stored,
        problem=problem,
    )


def leave_out(lab: Lab, numbers: tuple[int, ...]) -> dict[str, bytes]:
    """The best's files with the changes of those kept attempts reversed, newest first.

    Raises:
        Conflict: a later change edited the same place.
    """
    history = lab.ledger.history
    assert history.best is not None
    files = lab.stored_files(history.best)
    for number in sorted(numbers, reverse=True):
        attempt = history.attempt(number)
        assert attempt.started.parent is not None
        parent = history.attempt(attempt.started.parent)
        files = merge_files(lab.stored_files(attempt), files, lab.stored_files(parent))
    return files


def _plan_smaller(lab: Lab) -> None:
    """Plan the best without everything that was luck, once all else is measured."""
    current = _current(lab)
    numbers = dispensable(ablation(current, lab.ledger.history))
    if numbers and SMALLER not in current.variants:
        lab.ledger.append(_left_out(lab, SMALLER, current.started.best, numbers))


def _measure_all(bench: Lab, say: Say) -> None:
    """Measure whatever the plan still lacks, all variants at one seed before the next seed."""
    current = _current(bench)
    for place, seed in enumerate(current.started.seeds, 1):
        for name, variant in current.variants.items():
            if not _is_missing(_current(bench), variant, seed):
                continue
            measured = _measure_variant(bench, variant, seed)
            bench.ledger.append(measured)
            place_of = f"seed {place} of {len(current.started.seeds)}"
            say(f"{name:<12} {place_of}: {_describe(measured)}")


def _is_missing(current: Review, variant: VariantPlanned, seed: int) -> bool:
    """Whether the files need a run at that seed: none yet, and no failure before."""
    if variant.files is None:
        return False
    scores = current.scores(variant)
    return all(score.seed != seed and score.value is not None for score in scores)


def _measure_variant(bench: Lab, variant: VariantPlanned, seed: int) -> VariantMeasured:
    assert variant.files is not None
    files = {name: bench.ledger.get_blob(sha) for name, sha in variant.files.items()}
    splits: tuple[Split, ...] = ("val", "holdout") if variant.variant in ON_HOLDOUT else ("val",)
    purpose = f"review-{variant.review} {variant.variant}"
    trial = bench.trial(purpose, variant.attempt, seed, files, splits=splits)
    outcome = measure_separately(bench, trial)
    record = bench.history.trial(trial.key)
    failure = outcome if isinstance(outcome, Failure) else None
    return VariantMeasured(
        review=variant.review,
        variant=variant.variant,
        seed=seed,
        value=record.value("val"),
        holdout=record.value("holdout"),
        reason=failure.reason if failure and record.value("val") is None else None,
        explanation=failure.explanation if failure else "",
    )


def _current(lab: Lab) -> Review:
    return reviews(lab.ledger.entries)[-1]


def _open_review(lab: Lab, repeats: int | None) -> Review | None:
    """The review that was cut off, if it is still about the best and as thorough as asked."""
    best = lab.ledger.history.best
    last = next(iter(reviews(lab.ledger.entries)[::-1]), None)
    if last is None or last.is_finished or best is None or last.started.best != best.number:
        return None
    return last if repeats in (None, len(last.started.seeds)) else None


def _need_a_kept_change(lab: Lab) -> None:
    if not kept_chain(lab.ledger.history):
        raise UsageError(
            f"session {lab.session} kept no change, so there is nothing to review",
            f"`nightlab report {lab.session}` shows what was tried; "
            f"`nightlab resume {lab.session} --attempts N` goes on",
        )


# ---- runs that belong to no attempt's score -------------------------------------------------


@contextmanager
def _bench(lab: Lab) -> Iterator[Lab]:
    """The lab with a directory of its own and the recorded scorer; gone afterwards."""
    session = lab.ledger.history.session
    assert session is not None
    scratch = fresh_directory(lab.worker.directory / SCRATCH)
    fixed = scratch / "fixed"
    fixed.mkdir(mode=0o755)
    try:
        for name, sha in session.fixed_files.items():
            (fixed / name).write_bytes(lab.ledger.get_blob(sha))
            (fixed / name).chmod(0o644)
        yield replace(lab, worker=replace(lab.worker, directory=scratch, fixed_dir=fixed))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _describe(outcome: float | Failure | VariantMeasured) -> str:
    value = outcome.value if isinstance(outcome, VariantMeasured) else outcome
    if isinstance(value, float):
        return f"{value:.4f}"
    assert not isinstance(outcome, float)
    return f"{outcome.reason}: {one_line(outcome.explanation, 160)}"


def measure_separately(lab: Lab, trial: Trial) -> float | Failure:
    """What a trial comes to that belongs to no attempt of the night: its score on val, or why not.

    Raises:
        SandboxError: nightlab or the engine failed.
    """
    lab.record(run_trial(lab.worker, trial))
    outcome = outcome_of(lab.history, trial.key, lab.ledger.get_blob)
    assert outcome is not None
    return outcome


# ---- a replay --------------------------------------------------------------------------------


def _attempt_with_verdict(lab: Lab, number: int) -> Attempt:
    try:
        attempt = lab.ledger.history.attempt(number)
    except KeyError:
        last = len(lab.ledger.history.attempts) - 1
        raise UsageError(
            f"session {lab.session} has no attempt {number}", f"its attempts are 0 to {last}"
        ) from None
    if attempt.finished is None:
        raise UsageError(
            f"attempt {number} has no verdict to compare with", "choose one that was judged"
        )
    if not attempt.runs:
        raise UsageError(
            f"attempt {number} failed in its smoke run ({one_line(attempt.finished.reason, 60)}) "
            "and was never trained",
            "choose one that was trained",
        )
    return attempt


def _seeds_of(attempt: Attempt) -> list[int]:
    """The seeds it was trained at, in order."""
    return list(dict.fromkeys(run.seed for run in attempt.runs if run.result.box == "train"))


def _compared(
    lab: Lab, attempt: Attempt, today: dict[int, float], failure: Failure | None
) -> ReplayFinished:
    recorded = attempt.values()
    assert attempt.finished is not None
    was = attempt.finished.reason if attempt.finished.value is None else "measured"
    now = "measured" if failure is None else failure.reason
    differences = [abs(today[seed] - recorded[seed]) for seed in today if seed in recorded]
    largest = max(differences, default=None)
    agrees, explanation = _agreement(lab, recorded, today, largest)
    unlike = next((NOT_COMPARABLE[end] for end in (was, now) if end in NOT_COMPARABLE), None)
    if unlike is not None:
        agrees, explanation = False, f"recorded: {was}; today: {now}; {unlike}"
    elif was != now:
        agrees, explanation = False, f"recorded: {was}; today: {now}"
    elif not differences:
        agrees, explanation = True, f"{now} again"
    noise = lab.history.repeats.noise()
    return ReplayFinished(
        attempt=attempt.number,
        recorded_outcome=was,
        outcome=now,
        scores=tuple(
            ReplayedSeed(seed=seed, recorded=recorded.get(seed), today=today.get(seed))
            for seed in _seeds_of(attempt)
        ),
        noise=noise.sigma if noise else None,
        largest_difference=largest,
        agrees=agrees,
        explanation=explanation,
        is_comparable=unlike is None,
    )


def _agreement(
    lab: Lab, recorded: dict[int, float], today: dict[int, float], largest: float | None
) -> tuple[bool, str]:
    """Equal to five digits; with a wall budget a difference within noise is agreement too."""
    if largest is None:
        return False, "nothing to compare"
    if largest < FIVE_DIGITS:
        return True, "the same score to five digits"
    if lab.settings.budget.kind == "tokens":
        return False, f"scores differ by up to {largest:.6f}; with a token budget they should not"
    noise = lab.history.repeats.noise()
    if noise is None:
        return False, f"scores differ by up to {largest:.6f}, and noise is not known"
    seeds = [seed for seed in today if seed in recorded]
    numbers = judge(
        [today[seed] for seed in seeds],
        [recorded[seed] for seed in seeds],
        noise,
        direction=lab.settings.goal.direction,
        confidence=lab.settings.noise.confidence,
        max_repeats=1,
    ).arithmetic
    in_noise = f" ({abs(numbers.gain) / numbers.noise:.1f} x noise)" if numbers.noise else ""
    within = abs(numbers.gain) <= numbers.required_gain
    return within, (
        f"means differ by {abs(numbers.gain):.4f}{in_noise}: "
        f"{'within' if within else 'beyond'} noise"
    )
