"""What a session came to: its first screen's numbers."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from statistics import fmean, median

from agent.attempt.decide import grown_literals
from agent.attempt.disturbance import was_disturbed
from agent.morning.ablation import decision, review_cost, reviews
from agent.record.attempts import Attempt
from agent.record.chain import FIRST_PREVIOUS
from agent.record.events import (
    ATTEMPT,
    PLANNED_STOPS,
    Arithmetic,
    AttemptFinished,
    Dethroned,
    Entry,
    ModelCalled,
    Noticed,
    RunFinished,
    Scored,
    Split,
    StopReason,
    Verdict,
)
from agent.record.history import HOLDOUT_MISSING, History, direction_of, fold, gain, metric_of
from agent.settings import Direction
from agent.text import in_words, labelled, one_line, visible
from sandbox.contract.record import Record
from sandbox.contract.run import Outcome

_FOR_THE_RECORD = frozenset({"model_facts", "paused", "continued", "engine_back"})
"""Kinds of notices that nobody has to look at."""
LONGEST_REASON = 700
"""Characters: what a service said, and behind it what to do about it."""
_PLATEAU_ATTEMPTS = 20
_MUCH_OVER = 1.02
"""A last batch may reach a little beyond the budget."""
_MUCH_FASTER = 3.0
_MUCH_OF_THE_GAIN = 0.5
_LAST_LINES = 12
_WIDE = 8.0
"""So many times the noise no gain needs but where an attempt's few own scores lie far apart."""


class Attention(Record):
    """One thing that a person should look at, in a sentence, with the attempts it is about."""

    kind: str
    text: str
    attempts: tuple[int, ...] = ()


class SplitGain(Record):
    """Best against baseline on one split, or at other seeds."""

    name: str
    baseline: float
    best: float
    gain: float
    seeds: int
    """How often the best was scored."""
    error: float | None
    """Standard error of the gain; none where the noise is not known."""


class Summary(Record):
    """The numbers of the first screen."""

    session: str
    researcher: str
    metric: str
    is_self_reported: bool
    """The scores are the program's own word: no scorer, no holdout, no probes."""
    direction: Direction
    started_at: str
    is_running: bool
    """No end is recorded: still at work, or cut off."""
    ended: StopReason | None
    ended_explanation: str
    baseline: float | None
    best: float | None
    best_attempt: int | None
    noise: float | None
    """Standard deviation of one score; none before anything was repeated."""
    baseline_failure: str
    """Why there is no baseline to compare with; empty where there is one, or may be."""
    baseline_cause: str
    """What that came from, as far as is known; see `agent.causes`."""
    baseline_cure: str
    """What helps then."""
    last_words: tuple[str, ...]
    """What the log of such a baseline ends with."""
    gain: float | None
    """How much better the best is than the baseline, positive when better."""
    gain_in_noise: float | None
    holdout_gain: float | None
    """The same gain on text that decided nothing; none until both were scored on it."""
    survived: float | None
    """See `survived_share`."""
    attempts: int
    kept: int
    discarded: int
    failed: int
    invalid: int
    interrupted: int
    dethroned: int
    """How many were kept, and refused by a later score; they do not count as kept."""
    stopped_early: int
    """How many of the discarded were ended before their time."""
    saved_seconds: float
    """Training that they did not use, against what a whole training takes."""
    attempts_limit: int | None
    hours: float
    hours_limit: float | None
    spent_usd: float
    usd_limit: float | None
    unpriced_calls: int
    calls: int
    input_tokens: int
    output_tokens: int
    attention: tuple[Attention, ...]
    next_steps: tuple[str, ...]
    """What a person has still to do about a night that is over and kept something."""
    events: int
    head: str
    """The last entry's hash: keep it elsewhere, and a cut-off tail can be found."""

    @property
    def asked_a_model(self) -> bool:
        """Whether a language model had a part in it; a sampler uses neither calls nor money."""
        return bool(self.input_tokens or self.spent_usd or self.unpriced_calls)

    @property
    def label(self) -> str:
        """The metric, and whose word it is where nobody checked it."""
        return labelled(self.metric, is_self_reported=self.is_self_reported)


def summary(entries: Sequence[Entry], folded: History | None = None) -> Summary:
    """What the session came to, as far as its ledger goes; `folded` where that is at hand."""
    history = fold(entries) if folded is None else folded
    session = history.session
    direction = direction_of(history)
    baseline, best = value_of(history.baseline), value_of(history.best)
    noise = noise_of(history)
    better = None if baseline is None or best is None else gain(direction, best, baseline)
    limits = history.settings.session if history.settings else None
    holdout, failure = split_gain(history, "holdout"), failed_baseline(history)
    end, cause = failure.finished if failure else None, failure.cause if failure else None
    return Summary(
        session=session.session if session else "",
        researcher=history.researcher,
        metric=metric_of(history),
        is_self_reported=history.is_self_reported,
        direction=direction,
        started_at=history.time.started_at,
        is_running=history.ended is None,
        ended=history.ended.reason if history.ended else None,
        ended_explanation=history.ended.explanation if history.ended else "",
        baseline=baseline,
        best=best,
        best_attempt=history.best.number if history.best else None,
        noise=noise,
        baseline_failure=(end.explanation or in_words(end.reason)) if end else "",
        baseline_cause=cause.words if cause else "",
        baseline_cure=cause.cure if cause else "",
        last_words=last_words(failure) if failure else (),
        gain=better,
        gain_in_noise=better / noise if better is not None and noise else None,
        holdout_gain=holdout.gain if holdout else None,
        survived=survived_share(history),
        attempts=len(history.completed),
        kept=history.count(Verdict.KEPT),
        discarded=history.count(Verdict.DISCARDED),
        failed=history.count(Verdict.FAILED),
        invalid=history.count(Verdict.INVALID),
        interrupted=sum(a.interrupted is not None for a in history.attempts),
        dethroned=sum(a.dethroned is not None for a in history.attempts),
        stopped_early=len(_ended(history, lambda end: end.early_stop is not None)),
        saved_seconds=saved_seconds(history),
        attempts_limit=limits.attempts if limits else None,
        hours=history.time.active_seconds / 3600,
        hours_limit=limits.hours if limits else None,
        spent_usd=history.spend.usd,
        usd_limit=limits.usd if limits else None,
        unpriced_calls=history.spend.unpriced_calls,
        calls=history.spend.calls,
        input_tokens=history.spend.input_tokens,
        output_tokens=history.spend.output_tokens,
        attention=tuple(_attention(history, entries)),
        next_steps=tuple(_next_steps(history, entries)),
        events=len(entries),
        head=entries[-1].hash if entries else FIRST_PREVIOUS,
    )


def failed_baseline(history: History) -> Attempt | None:
    """The last baseline, if it has a verdict and none was kept."""
    last = next((a for a in reversed(history.attempts) if a.started.kind == "baseline"), None)
    return last if last and last.finished and not history.baseline else None


def last_words(attempt: Attempt) -> tuple[str, ...]:
    """The last lines that the run printed which went wrong, or else the last training."""
    runs = attempt.telling_runs
    wrong = [run for run in runs if run.result.outcome is not Outcome.OK]
    trained = [run for run in runs if run.result.box == "train"]
    for run in [*wrong[-1:], *trained[-1:]]:
        log = run.result.log
        lines = [line for line in visible(log.tail or log.head).splitlines() if line.strip()]
        if lines:
            return tuple(one_line(line, 200) for line in lines[-_LAST_LINES:])
    return ()


def way_on(numbers: Summary) -> str:
    """What to do about a baseline that failed."""
    mend = numbers.baseline_cure or "mend the files in your own workspace"
    return f"{mend}, then begin anew with `nightlab run`: a resume has its own copy of the files"


def result_in_words(numbers: Summary) -> Iterator[str]:
    """Baseline, best and holdout in words, as far as they are known."""
    if numbers.baseline_failure:
        yield f"baseline {one_line(numbers.baseline_failure, 300)}"
        if numbers.baseline_cause:
            yield f"cause    {numbers.baseline_cause}"
        yield from (f"log      {line}" for line in numbers.last_words)
        yield f"next     {way_on(numbers)}"
        return
    if numbers.baseline is not None and numbers.noise is not None:
        yield f"baseline {numbers.label} {numbers.baseline:.4f}, noise {numbers.noise:.4f}"
    for item in numbers.attention:
        if item.kind == "dethroned":
            yield f"refused  {item.text}"
    if not numbers.kept or numbers.best is None or numbers.gain is None:
        yield "no attempt was better than the baseline beyond noise"
        return
    in_noise = f" ({numbers.gain_in_noise:.1f} x noise)" if numbers.gain_in_noise else ""
    yield (
        f"best     {numbers.label} {numbers.best:.4f} by attempt #{numbers.best_attempt}, "
        f"better by {numbers.gain:.4f}{in_noise}"
    )
    if numbers.holdout_gain is not None and numbers.survived is not None:
        yield f"holdout  better by {numbers.holdout_gain:.4f}: {numbers.survived:.0%} of the gain"


def _next_steps(history: History, entries: Sequence[Entry]) -> Iterator[str]:
    if history.ended is None or history.session is None or not history.count(Verdict.KEPT):
        return
    name = one_line(history.session.session, 80)
    if not any(one.is_finished for one in reviews(entries)):
        trainings, seconds = review_cost(history)
        takes = f"at most {trainings} trainings, about {max(1, round(seconds / 60))} min"
        yield f"not reviewed: nightlab review {name} ({takes})"
    if decision(entries) is None:
        ways = (f"nightlab {word} {name} --reason …" for word in ("approve", "reject"))
        yield f"not decided: {' or '.join(ways)}"


def needed(numbers: Arithmetic) -> str:
    """The gain that would do, and why it is so large where so little is known."""
    few = len(numbers.candidate_values) if numbers.own_noise is not None else 0
    is_wide = few and numbers.required_gain > _WIDE * numbers.noise
    why = f" (large: only {few} scores, which lie apart)" if is_wide else ""
    return f"{numbers.required_gain:.4f}{why}"


def noise_of(history: History) -> float | None:
    """Standard deviation of one score, pooled over all repeats; none before there are any."""
    noise = history.repeats.noise()
    return noise.sigma if noise else None


def saved_seconds(history: History) -> float:
    """How much training early stops saved: what whole trainings take, less what they took."""
    trainings = [run.result for a in history.attempts for run in a.trainings]
    # By their median: one training beside a backup must not say what all the others saved.
    whole = [run.wall_seconds for run in trainings if run.outcome is Outcome.OK]
    stopped = [run.wall_seconds for run in trainings if run.outcome is Outcome.STOPPED]
    return sum(max(0.0, median(whole) - seconds) for seconds in stopped) if whole else 0.0


def all_scores(attempt: Attempt, split: Split) -> dict[int, float]:
    """Valid scores by seed, also those that came after the verdict, or before the machine changed.

    Who wins was lucky at the scores that it won by; those on holdout are of the same trainings.
    """
    scores = attempt.scores
    return {s.seed: s.value for s in scores if s.split == split and s.value is not None}


def split_gain(history: History, split: Split, name: str = "") -> SplitGain | None:
    """Best against baseline by all their scores on a split; none unless both are scored there."""
    if history.baseline is None or history.best is None:
        return None
    before, after = all_scores(history.baseline, split), all_scores(history.best, split)
    return compare(history, name, before.values(), after.values())


def compare(
    history: History, name: str, before: Collection[float], after: Collection[float]
) -> SplitGain | None:
    """The means of two groups of scores; none where one of them is empty."""
    if not before or not after:
        return None
    baseline, best, noise = fmean(before), fmean(after), noise_of(history)
    return SplitGain(
        name=name,
        baseline=baseline,
        best=best,
        gain=gain(direction_of(history), best, baseline),
        seeds=len(after),
        error=noise * math.sqrt(1 / len(before) + 1 / len(after)) if noise else None,
    )


def survived_share(history: History) -> float | None:
    """What share of the gain on val came back on holdout; none without a gain or a holdout."""
    on_val, on_holdout = split_gain(history, "val"), split_gain(history, "holdout")
    if on_val is None or on_holdout is None or on_val.gain <= 0:
        return None
    return on_holdout.gain / on_val.gain


def value_of(attempt: Attempt | None) -> float | None:
    """The mean score of an attempt; none unless it was measured.

    Of a baseline that was taken again on a quiet machine it is that of now, which others were held
    against.
    """
    if attempt is None or attempt.finished is None:
        return None
    own = [v for seed, v in attempt.values().items() if seed in attempt.started.seeds]
    is_same_machine = attempt.started.kind == "baseline" and not attempt.counted_from
    return fmean(own) if own and is_same_machine else attempt.finished.value


def _attention(history: History, entries: Sequence[Entry]) -> Iterator[Attention]:
    yield from _about_refusals(history)
    yield from _about_the_end(history)
    yield from _about_the_result(history)
    yield from _about_attempts(history)
    yield from _about_tokens(history)
    yield from _about_the_service(history, entries)
    events = (entry.event for entry in entries)
    done = _FOR_THE_RECORD | ({HOLDOUT_MISSING} if _has_holdout(history) else set())
    notices = [e for e in events if isinstance(e, Noticed) and e.kind not in done]
    for kind, count in Counter(notice.kind for notice in notices).items():
        latest = next(n.explanation for n in reversed(notices) if n.kind == kind)
        times = "" if count == 1 else f" ({count} times; this is the last)"
        yield Attention(kind=one_line(kind, 60), text=one_line(latest, LONGEST_REASON) + times)


def _about_refusals(history: History) -> Iterator[Attention]:
    for attempt in history.attempts:
        if attempt.dethroned is not None:
            text = f"Attempt {attempt.number} {describe(attempt.dethroned)}"
            yield Attention(kind="dethroned", text=text, attempts=(attempt.number,))
    baseline = history.baseline
    refusal = history.refusals.of(baseline.number) if baseline else None
    if baseline is not None and refusal is not None and baseline.dethroned is None:
        text = f"The baseline was refused {_where(refusal)}: what gains are against it is not sure."
        yield Attention(kind="baseline_refused", text=text, attempts=(baseline.number,))


def describe(event: Dethroned) -> str:
    """What took the best away, and who is the best since; for a reader."""
    now = "nothing is left that stands" if event.best is None else f"the best is {event.best} again"
    why = f" {one_line(event.explanation, 160)}" if event.explanation else ""
    return f"was the best until it was refused {_where(event)}; {now}.{why}"


def _where(score: Dethroned | Scored) -> str:
    """Which score was refused, and why, in words."""
    when = "when it was scored again" if score.purpose == ATTEMPT else f"in {score.purpose}"
    place = "on holdout" if score.split == "holdout" else when
    return f"{place} at seed {score.seed} ({in_words(score.reason or '')})"


def _has_holdout(history: History) -> bool:
    ends = (history.baseline, history.best)
    return all(attempt is not None and attempt.values("holdout") for attempt in ends)


def _about_the_end(history: History) -> Iterator[Attention]:
    if history.session is None:
        return
    name = history.session.session
    if history.ended is None:
        text = "No end is recorded: the session is at work, or it was cut off and"
        yield Attention(kind="not_ended", text=f"{text} nightlab resume {name} goes on with it.")
    elif history.ended.reason not in PLANNED_STOPS and failed_baseline(history) is None:
        text = f"It ended early ({in_words(history.ended.reason)}): {history.ended.explanation}"
        yield Attention(kind="ended_early", text=one_line(text, LONGEST_REASON))


def _about_the_result(history: History) -> Iterator[Attention]:
    if history.settings and history.settings.budget.kind == "tokens":
        text = (
            "Each program counts its tokens itself, and nothing checks that it trained on no more: "
            f"only the {history.settings.budget.seconds:g} seconds that they must fit into do."
        )
        yield Attention(kind="token_budget", text=text)
    if history.settings and history.settings.budget.kind == "fence":
        text = (
            "Each program ended by itself, within a fence of "
            f"{history.settings.budget.seconds:g} seconds: a gain may have been bought with time."
        )
        yield Attention(kind="fence", text=text)
    if history.settings and history.settings.budget.kind == "cut":
        seconds = history.settings.budget.seconds
        ended = [run for one in history.attempts for run in one.trainings]
        cut = sum(run.result.wall_seconds >= seconds for run in ended)
        text = (
            f"Time ended {cut} of {len(ended)} trainings, after {seconds:g} seconds; their last "
            "score until then counts, and other work on this machine makes it worse."
        )
        yield Attention(kind="cut", text=text)
    if history.is_self_reported:
        text = "The scores are self-reported: the program printed them, and nothing checked them."
        yield Attention(kind="self_reported", text=text)
    first = list(history.baseline.values().values()) if history.baseline else []
    if len(first) > 1 and len(set(first)) == 1:
        text = (
            "Every repeat of the baseline had the same score, so the noise is not known: does "
            "the program use NIGHTLAB_SEED? Nothing is kept then, unless [noise] smallest_gain "
            "says what counts."
        )
        yield Attention(kind="no_noise", text=text)
    share = survived_share(history)
    if share is not None and share < _MUCH_OF_THE_GAIN:
        text = f"Only {share:.0%} of the gain came back on the holdout."
        yield Attention(kind="holdout", text=text)
    if history.discards_in_a_row >= _PLATEAU_ATTEMPTS:
        text = f"None of the last {history.discards_in_a_row} attempts was kept: a plateau."
        yield Attention(kind="plateau", text=text)


def _about_attempts(history: History) -> Iterator[Attention]:
    if invalid := _ended(history, lambda end: end.verdict is Verdict.INVALID):
        text = f"{_count(len(invalid), 'score was', 'scores were')} refused as invalid."
        yield Attention(kind="invalid", text=text, attempts=invalid)
    if grown := _numbers(history, lambda a: grown_literals(history, a.number) > 0):
        attempts = _count(len(grown), "attempt", "attempts")
        text = f"{attempts} carried literals that outgrew the best's by far: see what they are for."
        yield Attention(kind="literals", text=text, attempts=grown)
    if changed := [check for check in history.drift.checks if check.changed]:
        last, times = changed[-1], "" if len(changed) == 1 else f" {len(changed)} times"
        text = (
            f"The machine changed during the session{times}: the best then had "
            f"{last.recorded:.4f}, and {fmean(last.today):.4f} when it was measured again. Gains "
            "from before and after do not add up; nightlab review measures baseline and best side "
            "by side."
        )
        numbers = tuple(check.attempt for check in changed)
        yield Attention(kind="drift", text=one_line(text, 500), attempts=numbers)
    if disturbed := _numbers(history, lambda a: any(map(was_disturbed, a.runs))):
        count = sum(was_disturbed(run) for a in history.attempts for run in a.runs)
        text = f"{_count(count, 'run was', 'runs were')} disturbed by other work, heat or power."
        yield Attention(kind="disturbed", text=text, attempts=disturbed)
    if unjudged := _ended(history, lambda end: end.reason == "disturbed"):
        text = (
            f"{_count(len(unjudged), 'attempt', 'attempts')} could not be judged: the machine was "
            "never quiet meanwhile. Keep it free, or allow more in [disturbance] of program.md."
        )
        yield Attention(kind="unjudged", text=text, attempts=unjudged)
    if interrupted := _numbers(history, lambda a: a.interrupted is not None):
        count_of = _count(len(interrupted), "attempt was", "attempts were")
        text = f"{count_of} interrupted, not judged."
        yield Attention(kind="interrupted", text=text, attempts=interrupted)


def _about_tokens(history: History) -> Iterator[Attention]:
    """What programs said of their tokens, where those are the budget and nobody else counts."""
    budget = history.settings.budget if history.settings else None
    if budget is None or budget.tokens is None:
        return
    most, baseline = _MUCH_OVER * budget.tokens, history.baseline
    if over := _numbers(history, lambda a: any((r.said_tokens or 0) > most for r in a.trainings)):
        text = f"{_count(len(over), 'attempt', 'attempts')} said to have trained on more than the "
        text += f"{budget.tokens} tokens of the budget."
        yield Attention(kind="tokens_over", text=text, attempts=over)
    usual = max((_speed(run) for run in baseline.trainings), default=0.0) if baseline else 0.0
    fast = _numbers(history, lambda a: any(_speed(r) > _MUCH_FASTER * usual for r in a.trainings))
    if usual and fast:
        text = (
            f"{_count(len(fast), 'attempt', 'attempts')} said more than {_MUCH_FASTER:g} times the "
            "baseline's tokens a second: a smaller model, or a count that is wrong."
        )
        yield Attention(kind="tokens_fast", text=text, attempts=fast)


def _speed(run: RunFinished) -> float:
    """Tokens that a training said, by the host's seconds."""
    return (run.said_tokens or 0) / max(run.result.wall_seconds, 1e-9)


def _about_the_service(history: History, entries: Sequence[Entry]) -> Iterator[Attention]:
    events = [entry.event for entry in entries]
    refusals = sum(isinstance(e, ModelCalled) and e.stop_reason == "refusal" for e in events)
    if refusals:
        text = f"The model refused {_count(refusals, 'time', 'times')}."
        yield Attention(kind="refusals", text=text)
    if history.spend.unpriced_calls:
        calls = _count(history.spend.unpriced_calls, "call has", "calls have")
        text = f"{calls} no known price: the money shown is less than what was spent."
        yield Attention(kind="unpriced", text=text)


def _ended(history: History, is_meant: Callable[[AttemptFinished], bool]) -> tuple[int, ...]:
    return _numbers(history, lambda a: a.finished is not None and is_meant(a.finished))


def _numbers(history: History, is_meant: Callable[[Attempt], bool]) -> tuple[int, ...]:
    return tuple(attempt.number for attempt in history.attempts if is_meant(attempt))


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
