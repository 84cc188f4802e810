"""Checks a night by daylight: fresh seeds, changes left out.

What is measured is planned on record first, so a review that was cut off goes on where it was. See
docs/decisions/0005.
"""

from collections.abc import Iterator, Mapping

from agent.attempt.decide import Failure, is_noise_known
from agent.attempt.experiment import dethrone
from agent.attempt.lab import Lab
from agent.candidate.merge import Conflict, first_broken_file, merge_files
from agent.morning.ablation import (
    AFTER,
    BASELINE,
    BEFORE,
    BEST,
    SMALLER,
    WITHOUT,
    Review,
    ReviewTable,
    ablation,
    dispensable,
    kept_chain,
    review_cost,
    reviews,
)
from agent.morning.replay import Say, describe, measure_separately, recorded_bench
from agent.night.session import VERSION
from agent.record.chain import read_files
from agent.record.events import (
    ReviewFinished,
    ReviewStarted,
    Split,
    VariantMeasured,
    VariantPlanned,
)
from sandbox.contract.errors import UsageError

ON_HOLDOUT = (BASELINE, BEST, SMALLER)
"""The others only say what a change is worth; each look at the holdout wears it out."""


def review(lab: Lab, repeats: int | None, say: Say) -> ReviewTable:
    """Measure baseline, best and the best without each kept change at the same fresh seeds.

    A review that was cut off goes on with what it has measured. `repeats` is the number of fresh
    seeds, as many as the baseline had when not given; `say` takes each score as a line.

    Raises:
        UsageError: nothing was kept, so there is nothing to review.
        SandboxError: nightlab or the engine failed; what was measured is on record.
    """
    if not kept_chain(lab.history):
        raise UsageError(
            f"session {lab.session} kept no change, so there is nothing to review",
            f"`nightlab report {lab.session}` shows what was tried; "
            f"`nightlab resume {lab.session} --attempts N` goes on",
        )
    trainings, seconds = review_cost(lab.history, repeats)
    say(f"at most {trainings} trainings with their scores, about {max(1, round(seconds / 60))} min")
    if _open_review(lab, repeats) is None:
        _start(lab, repeats or lab.settings.noise.baseline_repeats)
    for planned in _plan(lab):
        if planned.variant not in _current(lab).variants:
            lab.ledger.append(planned)
    with recorded_bench(lab) as bench:
        _measure_all(bench, say)
        _plan_smaller(lab)  # which changes were luck is known only now
        _measure_all(bench, say)
    lab.ledger.append(ReviewFinished(review=_current(lab).started.review))
    dethrone(lab)
    return ablation(_current(lab), lab.history)


def _start(lab: Lab, repeats: int) -> None:
    history, earlier = lab.history, reviews(lab.ledger.entries)
    assert history.baseline is not None
    assert history.best is not None
    reviewed = {seed for one in earlier for seed in one.started.seeds}
    used = {seed for attempt in history.attempts for seed in attempt.started.seeds} | reviewed
    lab.ledger.append(
        ReviewStarted(
            review=len(earlier) + 1,
            nightlab_version=VERSION,
            baseline=history.baseline.number,
            best=history.best.number,
            heeds_seeds=is_noise_known(history, lab.ledger.get_blob),
            seeds=lab.worker.draw_seeds(repeats, used),
        )
    )


def _plan(lab: Lab) -> Iterator[VariantPlanned]:
    """Every variant but the smaller one."""
    baseline, best = lab.history.baseline, lab.history.best
    assert baseline is not None
    assert best is not None
    yield _planned(lab, BASELINE, baseline.number, baseline.started.files)
    yield _planned(lab, BEST, best.number, best.started.files)
    for attempt in kept_chain(lab.history):
        number, parent = attempt.number, attempt.started.parent
        planned = _left_out(lab, WITHOUT.format(number), number, (number,))
        yield planned
        if planned.files is None:
            assert parent is not None
            files = lab.history.attempt(parent).started.files
            yield _planned(lab, BEFORE.format(number), number, files)
            yield _planned(lab, AFTER.format(number), number, attempt.started.files)


def _planned(
    lab: Lab,
    name: str,
    attempt: int,
    files: Mapping[str, str] | None,
    left_out: tuple[int, ...] = (),
    problem: str = "",
) -> VariantPlanned:
    return VariantPlanned(
        review=_current(lab).started.review,
        variant=name,
        attempt=attempt,
        left_out=left_out,
        files=None if files is None else dict(files),
        problem=problem,
    )


def _left_out(lab: Lab, name: str, attempt: int, numbers: tuple[int, ...]) -> VariantPlanned:
    """The best's files without the changes of the attempts `numbers`."""
    try:
        files = _without_changes(lab, numbers)
    except Conflict as conflict:
        problem = f"a later change edited the same place: {conflict}"
        return _planned(lab, name, attempt, None, numbers, problem)
    if (broken := first_broken_file(files)) is not None:
        problem = f"{broken} no longer parses without it"
        return _planned(lab, name, attempt, None, numbers, problem)
    stored = {path: lab.ledger.put_blob(content) for path, content in files.items()}
    return _planned(lab, name, attempt, stored, numbers)


def _without_changes(lab: Lab, numbers: tuple[int, ...]) -> dict[str, bytes]:
    """The best's files with the changes of those kept attempts reversed, newest first.

    Raises:
        Conflict: a later change edited the same place.
    """
    history = lab.history
    assert history.best is not None
    files = lab.stored_files(history.best)
    for number in sorted(numbers, reverse=True):
        attempt = history.attempt(number)
        assert attempt.started.parent is not None
        parent = history.attempt(attempt.started.parent)
        # A three-way merge backwards: from the attempt to its parent, in the best's files.
        files = merge_files(lab.stored_files(attempt), files, lab.stored_files(parent))
    return files


def _plan_smaller(lab: Lab) -> None:
    """Plan the best without everything that was luck, once all else is measured."""
    current = _current(lab)
    numbers = dispensable(ablation(current, lab.history))
    if numbers and SMALLER not in current.variants:
        lab.ledger.append(_left_out(lab, SMALLER, current.started.best, numbers))


def _measure_all(bench: Lab, say: Say) -> None:
    """Measure whatever the plan still lacks, all variants at one seed before the next seed.

    So a review that is cut off in the middle has compared everything at some seeds.
    """
    current = _current(bench)
    for place, seed in enumerate(current.started.seeds, 1):
        for name, variant in current.variants.items():
            if _is_missing(_current(bench), variant, seed):
                text = _measure(bench, variant, seed)
                say(f"{name:<12} seed {place} of {len(current.started.seeds)}: {text}")


def _is_missing(current: Review, variant: VariantPlanned, seed: int) -> bool:
    """Whether the files need a run at that seed: none yet, and no failure before."""
    if variant.files is None:
        return False
    scores = current.scores(variant)
    return all(score.seed != seed and score.value is not None for score in scores)


def _measure(bench: Lab, variant: VariantPlanned, seed: int) -> str:
    """Put a variant's score at a seed on record; says what it came to."""
    assert variant.files is not None
    files = read_files(bench.ledger.directory, variant.files)
    splits: tuple[Split, ...] = ("val", "holdout") if variant.variant in ON_HOLDOUT else ("val",)
    purpose = f"review-{variant.review} {variant.variant}"
    trial = bench.trial(purpose, variant.attempt, seed, files, splits=splits)
    outcome = measure_separately(bench, trial)
    record = bench.history.trial(trial.key)
    value, failure = record.value("val"), outcome if isinstance(outcome, Failure) else None
    bench.ledger.append(
        VariantMeasured(
            review=variant.review,
            variant=variant.variant,
            seed=seed,
            value=value,
            holdout=record.value("holdout"),
            reason=failure.reason if failure and value is None else None,
            explanation=failure.explanation if failure else "",
        )
    )
    return describe(outcome if value is None else value)


def _current(lab: Lab) -> Review:
    return reviews(lab.ledger.entries)[-1]


def _open_review(lab: Lab, repeats: int | None) -> Review | None:
    """The review that was cut off, if it is still about the best and as thorough as asked."""
    best, found = lab.history.best, reviews(lab.ledger.entries)
    if not found or found[-1].is_finished or best is None:
        return None
    last = found[-1]
    is_the_same = last.started.best == best.number and repeats in (None, len(last.started.seeds))
    return last if is_the_same else None
