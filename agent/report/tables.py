"""Tables of the report: repeats, money, time, machine."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from statistics import fmean, stdev

from agent.attempt.disturbance import was_disturbed
from agent.morning.ablation import ReviewTable
from agent.record.attempts import Attempt
from agent.record.events import (
    SMOKE,
    Disturbance,
    DriftChecked,
    Entry,
    Event,
    ModelCalled,
    Noticed,
    RetryWaited,
    RunFinished,
    RunStarted,
    SessionResumed,
    SessionStarted,
    Split,
    Usage,
)
from agent.record.history import History, is_of_the_night
from agent.record.usage import WAITS, WorkingTime
from agent.report.summary import SplitGain, compare, split_gain
from agent.settings import changed
from agent.text import one_line
from sandbox.contract.gpu import GpuReading, GpuUse
from sandbox.contract.record import Record
from sandbox.contract.run import Outcome

TRAINING, SCORING = "training", "scoring"


class Repeat(Record):
    """One attempt that was measured more than once."""

    attempt: int
    scores: tuple[tuple[int, float], ...]
    """Seed and score."""
    mean: float
    spread: float
    """Sample standard deviation."""


class ModelSpend(Record):
    """What one model was asked, and what it cost."""

    model: str
    calls: int
    usage: Usage
    usd: float
    unpriced_calls: int


def survival(history: History, review: ReviewTable | None) -> list[SplitGain]:
    """What is left of the gain where nothing was chosen; nothing where nothing was kept."""
    if history.best is None or history.best is history.baseline:
        return []
    names: dict[Split, str] = {
        "val": "val, which decided",
        "holdout": "holdout, which decided nothing",
    }
    found = [split_gain(history, split, name) for split, name in names.items()]
    if review is not None:
        values = (review.baseline_values, review.best_values)
        found.append(compare(history, "val at fresh seeds, in review", *values))
    return [row for row in found if row is not None]


def repeats(history: History) -> list[Repeat]:
    """Attempts with several seeds, in order: what the noise was measured from."""
    return [
        Repeat(
            attempt=attempt.number,
            scores=tuple(values.items()),
            mean=fmean(values.values()),
            spread=stdev(values.values()),
        )
        for attempt in history.attempts
        if len(values := attempt.values()) > 1
    ]


def time_spent(entries: Iterable[Entry]) -> list[tuple[str, float]]:
    """Where the hours went, in seconds: every one that counts is in a row, and in one alone."""
    time, seconds = WorkingTime(), defaultdict[str, float](float, {TRAINING: 0.0, SCORING: 0.0})
    before: Event | None = None
    for entry in entries:
        if is_of_the_night(entry.event):
            counted = time.active_seconds
            time.apply(entry)
            passed, waited = time.active_seconds - counted, 0.0
            if isinstance(before, RetryWaited):  # the call that comes after it took its own time
                waited = min(passed, before.wait_seconds)
                seconds["waiting for the service"] += waited
            seconds[_spent_on(before, entry.event)] += passed - waited
            before = entry.event
    return [(n, s) for n, s in seconds.items() if s or n in (TRAINING, SCORING)]


def _spent_on(before: Event | None, event: Event) -> str:
    """What the time between two events went into."""
    if isinstance(event, RunFinished):
        if event.purpose.startswith(SMOKE):
            return "smoke runs"
        return TRAINING if event.result.box == "train" else SCORING
    if isinstance(event, DriftChecked):
        return "measuring the best again"
    if isinstance(event, ModelCalled):
        return "the model's replies"
    if isinstance(before, Noticed) and before.kind in WAITS:
        return f"waiting for {'a GPU' if before.kind == 'gpu_awaited' else 'the engine'}"
    if isinstance(before, RunFinished) and isinstance(event, RunStarted) and was_disturbed(before):
        return "waiting for a quiet machine"
    return "between the boxes: files and reports"


def spend_by_model(entries: Iterable[Entry]) -> list[ModelSpend]:
    """Calls, tokens and money of each model that was asked; a sampler uses neither."""
    calls: dict[str, list[ModelCalled]] = defaultdict(list)
    for entry in entries:
        if isinstance(entry.event, ModelCalled):
            calls[entry.event.model].append(entry.event)
    spends = [
        ModelSpend(
            model=one_line(model, 60),
            calls=len(group),
            usage=_total([call.usage for call in group]),
            usd=sum(call.cost_usd or 0.0 for call in group),
            unpriced_calls=sum(call.cost_usd is None for call in group),
        )
        for model, group in calls.items()
    ]
    return [s for s in spends if any(dict(s.usage).values()) or s.usd or s.unpriced_calls]


def _total(usages: Sequence[Usage]) -> Usage:
    sums = {name: sum(getattr(u, name) for u in usages) for name in Usage.model_fields}
    return Usage(**{**sums, "estimated": any(usage.estimated for usage in usages)})


def spend_by_outcome(history: History) -> list[tuple[str, int, float]]:
    """Verdict, attempts, and the money of the model calls that led to them."""
    groups: dict[str, list[Attempt]] = defaultdict(list)
    for attempt in history.candidates:
        verdict = attempt.finished.verdict.value if attempt.finished else "not judged"
        groups[verdict].append(attempt)
    return [
        (name, len(groups[name]), sum(attempt.cost_usd for attempt in groups[name]))
        for name in ("kept", "discarded", "failed", "invalid", "not judged")
        if name in groups
    ]


def machine_state(history: History, entries: Iterable[Entry] = ()) -> list[tuple[str, str]]:
    """How quiet and how healthy the machine was while it measured."""
    begun = [
        e.event.settings for e in entries if isinstance(e.event, SessionStarted | SessionResumed)
    ]
    changes = "; ".join(words for pair in pairwise(begun) for words in changed(*pair))
    runs = [run for attempt in history.attempts for run in attempt.runs]
    quiet = [run.disturbance for run in runs if run.disturbance is not None]
    results = [run.result for run in runs]
    peaks = [r.peak_memory_bytes for r in results if r.peak_memory_bytes is not None]
    return [
        ("runs in boxes", f"{len(runs):,}"),
        *_quietness(quiet),
        *_states(quiet),
        *_drift(history.drift.checks),
        ("runs over their budget", str(sum(run.over_budget_seconds > 0 for run in runs))),
        ("killed for memory", str(sum(r.outcome is Outcome.OUT_OF_MEMORY for r in results))),
        ("killed at the wall", str(sum(r.outcome is Outcome.TIMED_OUT for r in results))),
        ("largest peak memory", f"{max(peaks) / 2**30:.2f} GiB" if peaks else "unknown"),
        *_use_of_peak([run.mfu for run in runs if run.mfu is not None]),
        *_gpus([use for result in results for use in result.gpu]),
        ("times the session was taken up again", str(history.resumes)),
        *([("changed then", one_line(changes, 600))] if changes else []),
    ]


def _use_of_peak(shares: Sequence[float]) -> list[tuple[str, str]]:
    if not shares:
        return []
    words = f"{100 * fmean(shares):.1f} % on average, {100 * max(shares):.1f} % at most"
    return [("share of the peak arithmetic (MFU, self-reported)", words)]


def _gpus(uses: Sequence[GpuUse]) -> list[tuple[str, str]]:
    """What the runs made of their GPUs; nothing where they had none."""
    if not uses:
        return []
    peaks = [use.peak_memory_bytes for use in uses if use.peak_memory_bytes is not None]
    energy = [use.energy_joules for use in uses if use.energy_joules is not None]
    shares = [use.utilisation for use in uses if use.utilisation is not None]
    heat = [use.temperature_celsius.max for use in uses if use.temperature_celsius is not None]
    reasons = {reason for use in uses for reason in use.throttled_by}
    events = Counter(event.kind for use in uses for event in use.events)
    return [
        ("GPUs", ", ".join(sorted({one_line(use.name, 60) for use in uses}))),
        ("largest peak GPU memory", f"{max(peaks) / 2**30:.2f} GiB" if peaks else "unknown"),
        ("GPU memory held by", ", ".join(sorted({use.memory_bound for use in uses}))),
        ("use of the GPUs", f"{fmean(shares):.0%} on average" if shares else "unknown"),
        ("power of the GPUs", _over_runs([use.power_watts for use in uses], "W")),
        ("clock of the GPUs", _over_runs([use.sm_clock_mhz for use in uses], "MHz")),
        ("clock of their memory", _over_runs([use.memory_clock_mhz for use in uses], "MHz")),
        ("hottest GPU", f"{max(heat):.0f} \u00b0C" if heat else "unknown"),
        ("lower clocks of the GPUs by", ", ".join(sorted(reasons)) or "nothing"),
        ("energy of the GPUs", f"{sum(energy) / 3.6e6:.2f} kWh" if energy else "unknown"),
        (
            "what GPUs reported",
            ", ".join(f"{n} x {k}" for k, n in sorted(events.items())) or "nothing",
        ),
    ]


def _over_runs(spreads: Sequence[GpuReading | None], unit: str) -> str:
    known = [spread for spread in spreads if spread is not None]
    if not known:
        return "unknown"
    mean, most = fmean(spread.mean for spread in known), max(spread.max for spread in known)
    return f"{mean:.0f} {unit} on average, {most:.0f} {unit} at most"


def _quietness(measured: Sequence[Disturbance]) -> list[tuple[str, str]]:
    if not measured:
        return []
    others = [disturbance.other_cores for disturbance in measured]
    disturbed = sum(disturbance.disturbed for disturbance in measured)
    return [
        ("cores used by others", f"{fmean(others):.2f} on average, {max(others):.2f} at most"),
        ("trainings disturbed", f"{disturbed} of {len(measured)}"),
    ]


def _states(measured: Sequence[Disturbance]) -> Iterator[tuple[str, str]]:
    """Clocks, heat and load beside the trainings, as far as the machine has them."""
    states = [s for d in measured for s in (d.before, d.after) if s is not None]
    if not states:
        return
    yield "load before and after trainings", _range([s.load for s in states], "")
    clocks = [s.cpu_mhz for s in states if s.cpu_mhz is not None]
    yield "processor clock", _range(clocks, " MHz") if clocks else "not known here"
    heat = [s.temperature_celsius for s in states if s.temperature_celsius is not None]
    yield "hottest sensor", _range(heat, " \u00b0C") if heat else "not known here"
    held = sum(bool(disturbance.held_back) for disturbance in measured)
    yield "trainings held back by heat or power", f"{held} of {len(measured)}"


def _drift(checks: Sequence[DriftChecked]) -> list[tuple[str, str]]:
    changed = sum(check.changed for check in checks)
    return [("checks of the machine", f"{len(checks)}, changed {changed} times")] if checks else []


def _range(numbers: Sequence[float], unit: str) -> str:
    return f"{min(numbers):.4g} to {max(numbers):.4g}{unit}"
