"""Every decision about an attempt: pure functions of the record.

The night appends what these functions return, the audit compares with it: nothing is decided
twice in other words. See docs/decisions/0022 for the judge, 0008 for interruptions, 0018 for this
module.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from agent.attempt.disturbance import reasons, was_disturbed
from agent.attempt.judge import (
    MIN_SCORES_BESIDE,
    Demands,
    Judgement,
    Ruling,
    at_the_door,
    doubt_of_a_test,
    drift_purposes,
    drift_tolerance,
    has_drifted,
    holds_beside,
    judge,
    lacks_scores,
)
from agent.attempt.lab import evidence_of, sha_of
from agent.attempt.sheet import MODEL_BOX, Pace, over_pace, parse_sheet, read_score
from agent.attempt.stopping import Rule, describe_stop, past
from agent.candidate.held_out import read_literals
from agent.candidate.seeds import is_only_a_seed, pins_its_seed
from agent.candidate.workspace import may_be_written
from agent.record.attempts import DISTURBED, HELD_OUT_TEXT, Attempt, Smoke, TrialKey, TrialRecord
from agent.record.chain import GetBlob
from agent.record.curves import unpacked
from agent.record.events import (
    SMOKE,
    Arithmetic,
    AttemptFinished,
    Dethroned,
    Disturbance,
    DriftChecked,
    EarlyStop,
    LiteralsRead,
    Purpose,
    RunFinished,
    Scored,
    SmokeFinished,
    Split,
    Verdict,
)
from agent.record.history import BOX_LOST, TRIES, History
from agent.record.repeats import FIVE_DIGITS, Noise
from agent.record.reported import Reading, read_reported
from agent.settings import Budget, Goal, Settings
from sandbox.contract.run import Log, Outcome, RunResult

DID_NOT_HOLD = "did_not_hold"
"""Why a gain was not kept that the best's scores of the same hour do not show."""
MOST_CHECKS = 8
"""Of a score: what could still be hidden then is added to the gain that is needed."""
UNKNOWN_NOISE = (
    "the program does not heed NIGHTLAB_SEED; draw its seed from there, or say in program.md what "
    "a gain must be worth: [noise] smallest_gain"
)
PROVISIONAL = (
    "beside other work: taken again once the machine is quiet; where it never is, [budget] "
    'kind = "tokens" makes scores that others cannot move'
)
ONLY_A_SEED = "only_a_seed"
ANOTHER_DRAW = (
    "nothing but a seed was changed: another draw of the same luck, which no other run would "
    "repeat; nothing was trained"
)
PARENT_DETHRONED = "parent_dethroned"
LIKELY = {
    "answers_change": "; likely a scale or mean over the batch (fp8 by tensor, batch norm that "
    "trains), a batch's expert capacity, dropout, or a memory of rows: take it by row or token, or "
    "fix it in training",
    "looks_ahead": "; likely attention or a convolution without its causal mask, or a norm, scale "
    "or choice over a row's positions: take it by token, or fix it in training",
}
"""What makes honest models answer so. Scales of fp8 over a batch bring 0.049 nats of noise where
0.05 are allowed, and pass or fail by luck."""
UNREAD_LITERALS = "literals_unread"
LEAST_BLOCKS = 4
"""Of held-out text that are no chance: no work of the shipped corpus shares so many with another
that quotes it, and four of 32 letters are less than 0.001 bits per byte of a split's score."""
MUCH_GROWTH_BYTES = 16_000
"""Of literals, which a person then looks at: a cipher of a program's own is not undone here."""

TOO_LONG = ("too_slow", "over_budget")
"""Reasons of a score that other work on the machine can have brought about."""


@dataclass(frozen=True)
class Measure:
    """What an attempt needs next: a trial of its own files, or of the best's."""

    attempt: int
    seed: int


@dataclass(frozen=True)
class Rescore:
    """What a would-be keep needs: a checkpoint scored again, with so many check boxes."""

    attempt: int
    seed: int
    checks: int


Step = Measure | Rescore
"""What is done before there is a decision."""


@dataclass(frozen=True)
class Decision:
    """What became of an attempt: its closing event but for the time that it took."""

    verdict: Verdict
    reason: str
    explanation: str
    value: float | None = None
    arithmetic: Arithmetic | None = None
    early_stop: EarlyStop | None = None

    def finished(self, number: int, seconds: float) -> AttemptFinished:
        """The event that closes the attempt."""
        return AttemptFinished(attempt=number, seconds=seconds, **vars(self))


class Failure(Decision):
    """Why a trial has no score, which decides about its attempt, too: a value, not an error."""


def next_step(history: History, number: int, get_blob: GetBlob) -> Step | Decision:
    """What an attempt needs next, or what became of it.

    Raises:
        LedgerError: a blob that decides is lost.
        ValueError: the record does not hold what the decision stands on; no night writes such one.
    """
    step, grown = _next_step(history, number, get_blob), grown_literals(history, number)
    if grown and isinstance(step, Decision):
        said = f"its literals grew by {grown / 1000:.0f} kB"
        return replace(step, explanation=f"{step.explanation}; {said}")
    return step


def _next_step(history: History, number: int, get_blob: GetBlob) -> Step | Decision:
    attempt = history.attempt(number)
    if (refused := _held_out_text(history, attempt)) is not None:
        return refused
    smoked = attempt.smoke and attempt.smoke.finished
    if smoked and smoked.reason is not None:
        return Decision(Verdict.FAILED, smoked.reason, smoked.explanation)
    if attempt.started.kind == "baseline":
        return _next_of_baseline(history, attempt, get_blob)
    parent = attempt.started.parent
    if parent is not None and _is_refused(history, parent):
        # Whatever the score, its files hold what was just refused.
        text = f"attempt {parent}, on which it builds, was refused meanwhile: make it anew"
        return Decision(Verdict.DISCARDED, PARENT_DETHRONED, text)
    if parent is not None and _is_only_a_seed(attempt, history.attempt(parent), get_blob):
        return Decision(Verdict.DISCARDED, ONLY_A_SEED, ANOTHER_DRAW)
    return _next_of_candidate(history, attempt, get_blob)


def _is_refused(history: History, number: int) -> bool:
    """Whether a score of an attempt was refused after it was kept, be it the best or not."""
    was_dethroned = history.attempt(number).dethroned is not None
    return was_dethroned or history.refusals.of(number) is not None


def _is_only_a_seed(attempt: Attempt, parent: Attempt, get_blob: GetBlob) -> bool:
    """Whether nothing was changed but a seed; only files that are no longer equal are read."""
    own, before = attempt.started.files, parent.started.files
    changed = {name for name in own.keys() | before.keys() if own.get(name) != before.get(name)}
    if not changed or not changed <= own.keys() & before.keys():
        return False
    return is_only_a_seed(
        {name: get_blob(before[name]) for name in changed},
        {name: get_blob(own[name]) for name in changed},
    )


def literals_read(history: History, number: int, get_blob: GetBlob) -> LiteralsRead:
    """What the files of an attempt that may be changed carry beside code."""
    assert history.session is not None
    editable, index = history.in_force.workspace.editable, history.session.held_out_index
    files = {
        name: get_blob(sha)
        for name, sha in history.attempt(number).started.files.items()
        if may_be_written(name.split("/"), editable)
    }
    return read_literals(number, files, get_blob(index) if index else None)


def _held_out_text(history: History, attempt: Attempt) -> Decision | None:
    """The end of an attempt whose files hold what its score is computed on."""
    if (read := attempt.literals) is None:
        if history.session is not None and history.session.held_out_index is not None:
            raise ValueError("its files were not searched for text of the held-out splits")
        return None
    if not read.is_read_whole:
        text = "the literals unpack to more than is looked through: nothing was trained"
        return Decision(Verdict.INVALID, UNREAD_LITERALS, text)
    if sum(found.blocks for found in read.held_out) < LEAST_BLOCKS:
        return None
    # Not how much: whoever knows texts by heart could ask so which of them are held out.
    places = ", ".join(f"{found.file} ({found.encoding})" for found in read.held_out)
    text = f"text that scores are computed on stands in {places}: nothing was trained"
    return Decision(Verdict.INVALID, HELD_OUT_TEXT, text)


def grown_literals(history: History, number: int) -> int:
    """Bytes by which an attempt's literals outgrew the best's; 0 for up to `MUCH_GROWTH_BYTES`."""
    attempt = history.attempt(number)
    parent = None if attempt.started.parent is None else history.attempt(attempt.started.parent)
    if parent is None or parent.literals is None or attempt.literals is None:
        return 0
    grown = attempt.literals.literal_bytes - parent.literals.literal_bytes
    return grown if grown > MUCH_GROWTH_BYTES else 0


def _next_of_baseline(history: History, attempt: Attempt, get_blob: GetBlob) -> Step | Decision:
    assert history.session is not None
    for seed in attempt.started.seeds[: history.in_force.noise.baseline_repeats]:
        outcome = outcome_of(history, attempt.key(seed), get_blob)
        if outcome is None:
            return Measure(attempt.number, seed)
        if isinstance(outcome, Failure):
            return outcome
    values = list(attempt.values().values())
    noise = history.repeats.noise()
    if noise is None:
        raise ValueError("a baseline without repeats says nothing of noise")
    text = f"baseline {fmean(values):.4f}, noise {noise.sigma:.4f} from {len(values)} repeats"
    if not _shows_luck(history, attempt, noise, get_blob):
        text = f"baseline {fmean(values):.4f}; {UNKNOWN_NOISE}"
    if attempt.provisional:
        text = f"{text}; {len(attempt.provisional)} of them {PROVISIONAL}"
    return Decision(Verdict.KEPT, "baseline", text, value=fmean(values))


def _next_of_candidate(history: History, attempt: Attempt, get_blob: GetBlob) -> Step | Decision:
    """The door, then fresh seeds on both sides until the judge is sure; a keep is confirmed."""
    seeds, own = attempt.started.seeds, list[float]()
    for seed in seeds:
        outcome = outcome_of(history, attempt.key(seed), get_blob)
        if isinstance(outcome, Failure):
            return outcome
        if outcome is None:
            break
        own.append(outcome)
    if not own:
        return Measure(attempt.number, seeds[0])
    assert history.best is not None
    if not is_noise_known(history, get_blob) and history.in_force.noise.smallest_gain is None:
        text = f"scored {own[0]:.4f}, but what luck does is not known: {UNKNOWN_NOISE}"
        return Decision(Verdict.DISCARDED, "noise_unknown", text, value=own[0])
    if len(own) > 1 and lacks_scores(len(history.best.values()), len(own) - 1):
        asked = _next_beside(history, attempt)
        if asked is not None:
            return asked
    judgement = judgement_of(history, attempt, own)
    if judgement.ruling is Ruling.REPEAT:
        return Measure(attempt.number, seeds[len(own)])
    if judgement.ruling is Ruling.KEEP:
        return _next_of_keep(history, attempt, own, judgement)
    return _decided(Verdict.DISCARDED, judgement)


def retakes_due(history: History) -> tuple[int, ...]:
    """Seeds at which the baseline is measured again on a machine that is quiet by now.

    Each is tried twice as often as any training is, and no more.
    """
    baseline = history.baseline
    if baseline is None or baseline.counted_from:  # the machine changed: its scores count no more
        return ()
    tries = Counter(run.seed for run in baseline.trainings)
    most = 2 * (1 + history.in_force.disturbance.max_repeats)
    return tuple(seed for seed in sorted(baseline.provisional) if tries[seed] < most)


def is_noise_known(history: History, get_blob: GetBlob) -> bool:
    """Whether the baseline's repeats showed what a seed does."""
    baseline, noise = history.baseline, history.repeats.noise()
    if baseline is None or noise is None:
        return False
    return _shows_luck(history, baseline, noise, get_blob)


def _shows_luck(history: History, baseline: Attempt, noise: Noise, get_blob: GetBlob) -> bool:
    """Whether noise is what seeds do: not that of a program which pins its own."""
    if noise.sigma < FIVE_DIGITS:
        return False
    files = {name: get_blob(sha) for name, sha in baseline.started.files.items()}
    return not pins_its_seed(files, history.in_force.workspace.command)


def judgement_of(
    history: History, attempt: Attempt, own: Sequence[float], smallest_gain: float = 0.0
) -> Judgement:
    """The judge's ruling on an attempt's scores against those of the best, as they are now.

    Args:
        history: with them.
        attempt: a candidate.
        own: its scores, the first run's first.
        smallest_gain: what a gain must be worth beside what the settings say.

    Raises:
        ValueError: there is no best, or nothing was ever repeated.
    """
    settings, noise = history.in_force.noise, history.repeats.noise(beside=attempt.number)
    if noise is None or history.best is None:
        raise ValueError("nothing was repeated beside it, so noise is not known")
    terms = Demands(
        direction=history.in_force.goal.direction,
        rate=settings.false_keep_rate_per_night,
        doubt=doubt_of_a_test(settings.false_keep_rate_per_night, history.tests_before(attempt)),
        max_repeats=min(settings.max_repeats, len(attempt.started.seeds) - 1),
        smallest_gain=max(settings.smallest_gain or 0.0, smallest_gain),
        against=history.best.number,
    )
    best = list(history.best.values().values())
    if len(own) == 1:
        return at_the_door(own[0], best, noise, terms)
    return judge(own[1:], best, noise, terms, own[:1])


def _next_of_keep(
    history: History, attempt: Attempt, own: Sequence[float], judgement: Judgement
) -> Step | Decision:
    """What a gain that is beyond noise must still pass: the best beside it, and many checks."""
    best, noise = history.best, history.repeats.noise(beside=attempt.number)
    assert best is not None
    assert noise is not None
    scores = best.values()
    asked_for = (key.seed for key in attempt.beside if key.attempt == best.number)
    beside = [scores[seed] for seed in asked_for if seed in scores]
    asked = _next_beside(history, attempt)
    if len(beside) < MIN_SCORES_BESIDE and asked is not None:
        return asked
    if not beside or not holds_beside(own[1:], beside, noise, history.in_force.goal.direction):
        had = f"{fmean(beside):.4f}" if beside else "no score"
        text = f"better beyond noise, but the best had {had} when it was measured beside it"
        return _decided(Verdict.DISCARDED, replace(judgement, reason=DID_NOT_HOLD), text)
    checks, hidden = checks_due(history, judgement.arithmetic.required_gain)
    if hidden > judgement.arithmetic.required_gain:
        judgement = judgement_of(history, attempt, own, hidden)
        if judgement.ruling is Ruling.REPEAT:
            return Measure(attempt.number, attempt.started.seeds[len(own)])
        if judgement.ruling is Ruling.DISCARD:
            return _decided(Verdict.DISCARDED, judgement)
    for seed in attempt.started.seeds[1 : len(own)]:
        if history.trial(attempt.key(seed)).scores["val"].checks < checks:
            return Rescore(attempt.number, seed, checks)
    return _decided(Verdict.KEPT, judgement, f"{judgement.explanation}; {attempt.confirmation}")


def _next_beside(history: History, attempt: Attempt) -> Measure | None:
    """The best at the next of a test's fresh seeds; none where all were tried.

    One that failed meanwhile is not tried again: the test goes on without it.
    """
    best = history.best
    assert best is not None
    for seed in attempt.started.seeds[1:]:
        if best.key(seed) not in attempt.beside:
            return Measure(best.number, seed)
    return None


def checks_due(history: History, required: float) -> tuple[int, float]:
    """How many check boxes a keep's scores need, and the gain that could still hide behind them.

    The baseline's sheet says what a model could gain by looking ahead where it pays most and still
    pass so many checks once in a thousand times. Where no scorer said so, nothing is checked again.
    """
    baseline = history.baseline
    scores = baseline.scores if baseline else []
    said = (score.details.get("hidden_gain") for score in scores if score.split == "val")
    hidden = next((list(gains) for gains in said if gains), [])[:MOST_CHECKS]
    for checks, gain in enumerate(hidden, start=1):
        if gain < required:
            return checks, 0.0
    return len(hidden), hidden[-1] if hidden else 0.0


def _decided(verdict: Verdict, judgement: Judgement, text: str = "") -> Decision:
    return Decision(
        verdict,
        judgement.reason,
        text or judgement.explanation,
        judgement.arithmetic.candidate_mean,
        judgement.arithmetic,
    )


def dethroned(history: History) -> Dethroned | None:
    """What takes the best away, once a later score of it was refused; None while it stands.

    The best is then the last kept attempt of which no score was refused. It was the best before,
    so nothing of what was refused is in its files. See docs/decisions/0023.
    """
    best = history.best
    refusal = None if best is None else history.refusals.of(best.number)
    if best is None or refusal is None:
        return None
    standing = [a for a in history.standing if history.refusals.of(a.number) is None]
    return Dethroned(
        attempt=best.number,
        purpose=refusal.purpose,
        seed=refusal.seed,
        split=refusal.split,
        reason=refusal.reason or "",
        explanation=refusal.explanation,
        sheet=refusal.sheet,
        best=standing[-1].number if standing else None,
    )


def lost(history: History, number: int) -> Decision | None:
    """The end of an attempt whose box was lost once more; None while it is to be tried again.

    The engine answers, so the files bring it about; see docs/decisions/0008.
    """
    files = history.attempt(number).started.files
    tries = [attempt for attempt in history.attempts if attempt.started.files == files]
    losses = (a.interrupted is not None and a.interrupted.is_box_lost for a in tries)
    if sum(losses) < TRIES - 1:
        return None
    text = f"the box was lost in {TRIES} tries, and the engine answers"
    return Decision(Verdict.FAILED, BOX_LOST, text)


def outcome_of(history: History, key: TrialKey, get_blob: GetBlob) -> float | Failure | None:
    """What a trial came to: its score on val, or why there is none; None until it is over."""
    trial, settings = history.trial(key), history.in_force
    trainings = [run for run in trial.runs if run.result.box == "train"]
    if not trainings:
        return None
    attempt = history.attempt(key.attempt)
    # What was asked of the baseline later, beside a test, must be as undisturbed as the test.
    is_baseline = attempt.started.kind == "baseline" and key.seed in attempt.started.seeds
    stop = early_stop_of(history, trainings[-1], get_blob)
    failure = failure_of_training(trainings, settings, is_baseline, stop)
    return failure or _outcome_of_scores(trial)


def _outcome_of_scores(trial: TrialRecord) -> float | Failure | None:
    for score in trial.scores.values():
        if score.reason is not None:
            is_own_fault = score.reason.startswith(MODEL_BOX)
            verdict = Verdict.FAILED if is_own_fault else Verdict.INVALID
            if score.reason == DISTURBED:
                verdict = Verdict.DISCARDED
            return Failure(verdict, score.reason, score.explanation + LIKELY.get(score.reason, ""))
    return trial.value("val")


def early_stop_of(history: History, run: RunFinished, get_blob: GetBlob) -> EarlyStop | None:
    """Why a training was ended before its time, from its curve and those before it."""
    if run.result.outcome is not Outcome.STOPPED or run.curve is None:
        return None
    seen = past(history, run.attempt, get_blob, history.in_force.budget)
    return None if seen is None else Rule(history.in_force, seen)(unpacked(get_blob(run.curve)))


def failure_of_training(
    trainings: Sequence[RunFinished],
    settings: Settings,
    is_baseline: bool,
    stop: EarlyStop | None = None,
) -> Failure | None:
    """Why a trial's last training cannot be scored, if it cannot.

    There are several trainings where others disturbed them; `stop` is for the words.
    """
    # Only the baseline is measured on a machine that is never quiet: its noise then shows it.
    run = trainings[-1]
    result, busy = run.result, ""
    if was_disturbed(run) and not is_baseline:
        return Failure(Verdict.DISCARDED, DISTURBED, _why_disturbed(run, len(trainings)))
    if result.outcome is Outcome.STOPPED:
        text = describe_stop(stop) if stop else "the curves on record do not say why"
        return Failure(Verdict.DISCARDED, "stopped_early", text, early_stop=stop)
    if run.disturbance is not None:
        busy = "".join(f"; {reason}" for reason in reasons(run.disturbance))
    if result.outcome is not Outcome.OK:
        return Failure(Verdict.FAILED, result.outcome.value, evidence_of(result) + busy)
    if run.over_budget_seconds > 0:
        text = (
            f"the run took {run.over_budget_seconds:.1f} s longer than its budget of "
            f"{settings.budget.seconds:g} s; start-up and saving count{busy}"
        )
        return Failure(Verdict.INVALID, "over_budget", text)
    if not result.output and not settings.goal.is_reported:
        return Failure(Verdict.FAILED, "no_checkpoint", "the run left no checkpoint file")
    return None


def _why_disturbed(run: RunFinished, runs: int) -> str:
    if run.disturbance is None or not run.disturbance.disturbed:
        return f"each of {runs} runs was disturbed, the last by a throttled GPU: not judged"
    why = ", ".join(reasons(run.disturbance))
    return f"each of {runs} runs was disturbed, the last because {why}: not judged"


def over_budget_seconds(purpose: Purpose, result: RunResult, budget: Budget) -> float:
    """Seconds that a training took beyond its budget, on the host's clock; 0 for other boxes.

    A smoke run's script is ended in its time. Tokens are counted by the program itself: the seconds
    that they must fit into are all that bounds what it trains on, so there is no grace in them. A
    program behind a fence ends by itself, and one that is cut was ended in its time.
    """
    if result.box != "train" or purpose.startswith(SMOKE) or budget.kind in ("fence", "cut"):
        return 0.0
    return max(0.0, result.wall_seconds - budget.seconds)


def scored_by_boxes(
    key: TrialKey,
    split: Split,
    sheet: bytes | None,
    models: Sequence[RunResult],
    noise: Disturbance | None,
    free: Pace | None,
    left_seconds: float,
) -> Scored:
    """The score of a measurement: what the scorer wrote, and how the model boxes ended.

    `noise` is what others did meanwhile, `free` what a model box may take for nothing, and
    `left_seconds` what it may take besides.
    """
    parsed = parse_sheet(sheet) if sheet is not None else None
    found = read_score(parsed, [model.outcome for model in models])
    if found.reason is None and (why := over_pace(found.details, free, left_seconds)):
        found = Reading(None, "over_budget", why, found.details)
    if found.reason in TOO_LONG and noise is not None and noise.disturbed:
        text = f"{found.reason}, but {', '.join(reasons(noise))} meanwhile: not judged"
        found = Reading(None, DISTURBED, text, found.details)
    bad = next((model for model in models if model.outcome is not Outcome.OK), None)
    # What the scorer found wrong is the better reason; where it found nothing, the host's words.
    return Scored(
        **key._asdict(),
        split=split,
        value=found.value,
        reason=found.reason,
        explanation=evidence_of(bad) if bad and not found.explanation else found.explanation,
        details=found.details,
        checks=max(0, len(models) - 1),
        source="scored",
        sheet=sha_of(sheet) if sheet is not None else None,
    )


def scored_by_itself(key: TrialKey, log: Log, goal: Goal, content: bytes | None) -> Scored:
    """The score that a training printed or wrote of itself, or why there is none; see 0009."""
    found = read_reported(log, goal, content)
    return Scored(
        **key._asdict(),
        split="val",
        value=found.value,
        reason=found.reason,
        explanation=found.explanation,
        details=found.details,
        checks=0,
        source="reported",
        sheet=None if content is None else sha_of(content),
    )


def smoke_finished(
    smoke: Smoke, settings: Settings, *, answered: bool, seconds: float
) -> SmokeFinished:
    """Whether files passed their smoke run, from what its boxes showed.

    `answered` is whether the model box, with the checkpoint loaded, said a word on its channel.
    """
    reason = smoke.reason(answered=answered, is_reported=settings.goal.is_reported)
    text = "nothing went wrong" if reason is None else _describe_failure(smoke.runs[-1].result)
    return SmokeFinished(
        smoke=smoke.started.smoke,
        passed=reason is None,
        reason=reason,
        explanation=f"in a smoke run of {settings.economy.smoke_seconds:g} s: {text}",
        answered=answered,
        seconds=seconds,
    )


def _describe_failure(result: RunResult) -> str:
    """How the run that failed ended: a training, or a model box that loaded its checkpoint."""
    what = "the training" if result.box == "train" else "loading the checkpoint"
    left_nothing = " and left no file behind" if result.outcome is Outcome.OK else ""
    return f"{what}: {evidence_of(result)}{left_nothing}"


def drift_checked(history: History, seed: int, problem: str) -> DriftChecked:
    """What a check of the machine comes to, from the runs on record after its trials.

    `problem` says why there is no result, where there is none.
    """
    best, noise = history.best, history.repeats.noise()
    assert best is not None
    assert noise is not None
    check, recorded = len(history.drift.checks) + 1, best.values()[seed]
    tolerance = drift_tolerance(noise)
    keys = [TrialKey(purpose, best.number, seed) for purpose in drift_purposes(check)]
    values = [] if problem else [history.trial(key).value("val") for key in keys]
    today = tuple(value for value in values if value is not None)
    changed = has_drifted(recorded, today, tolerance)
    numbers = f"the best (attempt {best.number}) "
    if not today:
        text = f"{numbers}could not be measured again: {problem}"
    else:
        numbers += (
            f"had {recorded:.4f} and has {fmean(today):.4f} now; up to {tolerance:.4f} is noise"
        )
        text = f"the machine is as it was: {numbers}"
    if changed:
        text = f"the machine changed: {numbers}; from here on the new measurement counts"
    return DriftChecked(
        check=check,
        attempt=best.number,
        seed=seed,
        recorded=recorded,
        today=today,
        tolerance=tolerance,
        changed=changed,
        problem=problem,
        explanation=text,
    )
