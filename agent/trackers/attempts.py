"""One attempt as trackers take it, folded from the ledger."""

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import pairwise
from statistics import fmean

from agent.candidate.knobs import KnobValue, knob_values
from agent.record.attempts import Attempt
from agent.record.chain import GetBlob, LedgerError, canonical
from agent.record.curves import Curve, unpacked
from agent.record.events import Entry, RunFinished, SessionStarted, Verdict
from agent.record.history import History, fold, metric_of
from agent.record.repeats import pooled_noise
from agent.text import one_line
from sandbox.contract.record import Record, Sha256

FORMAT = 1
"""Raise it when what is exported changes: then every run is exported anew."""
MAX_TEXT_CHARACTERS = 1000
MAX_FACT_CHARACTERS = 250
MAX_TRAININGS = 20

_UNUSUAL = re.compile(r"[^A-Za-z0-9_.-]")


class TrackedRun(Record):
    """A finished attempt; its text is visible and bounded, not yet escaped."""

    group: str
    """The session, and the start of its first hash: a name that is safe as a folder's."""
    session_hash: Sha256
    attempt: int
    kind: str
    verdict: str
    """Or `dethroned`, where a later score of what was kept was refused."""
    hypothesis: str
    started_at: datetime
    finished_seconds: float
    """When it finished, in seconds since 1970."""
    facts: dict[str, str]
    metrics: dict[str, float]
    files: dict[str, Sha256]
    trainings: tuple[RunFinished, ...]

    @property
    def name(self) -> str:
        return f"attempt-{self.attempt:04d}"

    @property
    def key(self) -> str:
        """The same whenever this attempt is exported, and no other attempt's."""
        return f"{self.session_hash[:16]}-{self.attempt}"

    @property
    def has_score(self) -> bool:
        return self.verdict in (Verdict.KEPT, Verdict.DISCARDED)

    @property
    def fingerprint(self) -> str:
        """Changes when anything changes that a tracker holds of this attempt."""
        content = {"format": FORMAT, "run": self.model_dump(mode="json")}
        return hashlib.sha256(canonical(content).encode()).hexdigest()[:16]


class TrackedCurve(Record):
    """What one training reported of itself, point by point."""

    name: str
    """`train`; `train-2` for the second training, and so on."""
    steps: tuple[int, ...]
    """Each larger than the one before."""
    times: tuple[float, ...]
    """Seconds since 1970, never past the training's end."""
    points: Curve

    def rows(self) -> Iterator[tuple[int, float, dict[str, float]]]:
        """Of each point its step, its time, and its other numbers by their names in a tracker."""
        for step, time, point in zip(self.steps, self.times, self.points, strict=True):
            yield step, time, {f"{self.name}/{n}": x for n, x in point.items() if n != "step"}


class Content(Record):
    """What an attempt's blobs say; read only when the attempt is exported."""

    knobs: dict[str, KnobValue]
    curves: tuple[TrackedCurve, ...]


def tracked_runs(entries: Sequence[Entry]) -> Iterator[TrackedRun]:
    """Every attempt with a verdict, in order."""
    history = fold(entries)
    if history.session is None:
        return
    for attempt in history.attempts:
        if attempt.finished is not None:
            yield _tracked(history, history.session, entries[0].hash, attempt)


def content_of(run: TrackedRun, get_blob: GetBlob) -> Content:
    """Knobs and curves of an attempt; what is lost or damaged is left out."""
    return Content(knobs=knob_values(run.files, get_blob), curves=tuple(_curves(run, get_blob)))


def _tracked(
    history: History, session: SessionStarted, session_hash: str, attempt: Attempt
) -> TrackedRun:
    assert attempt.finished is not None
    started_at = datetime.fromisoformat(attempt.started_at)
    return TrackedRun(
        # Two sessions of one name may be tracked in one place: the hash tells them apart.
        group=f"{_UNUSUAL.sub('_', session.session)[:60]}-{session_hash[:8]}",
        session_hash=session_hash,
        attempt=attempt.number,
        kind=attempt.started.kind,
        verdict=attempt.standing,
        hypothesis=one_line(attempt.started.hypothesis, MAX_TEXT_CHARACTERS),
        started_at=started_at,
        finished_seconds=started_at.timestamp() + attempt.finished.seconds,
        facts=_facts(session, attempt),
        metrics=_metrics(_metric_name(history), attempt),
        files=attempt.started.files,
        # Bounded, since an attempt that others disturb is trained again and again.
        trainings=tuple(attempt.trainings[:MAX_TRAININGS]),
    )


def _facts(session: SessionStarted, attempt: Attempt) -> dict[str, str]:
    assert attempt.finished is not None
    runs = attempt.trainings
    facts = {
        "session": session.session,
        "attempt": str(attempt.number),
        "kind": attempt.started.kind,
        "researcher": attempt.started.researcher,
        "verdict": attempt.standing,
        "reason": attempt.finished.reason,
        "parent": "" if attempt.started.parent is None else str(attempt.started.parent),
        "seeds": ", ".join(str(run.seed) for run in runs),
        "outcomes": ", ".join(run.result.outcome.value for run in runs),
        "source": attempt.scores[-1].source if attempt.scores else "",
        "image": runs[0].result.image_digest if runs else "",
        "profile": session.settings.hardware.profile,
        "nightlab": session.nightlab_version,
    }
    return {name: one_line(text, MAX_FACT_CHARACTERS) for name, text in facts.items()}


def _metrics(metric: str, attempt: Attempt) -> dict[str, float]:
    """The ledger's own numbers; what is not known has no entry, rather than a zero."""
    assert attempt.finished is not None
    numbers, runs = attempt.finished.arithmetic, attempt.trainings
    holdout, values = attempt.values("holdout").values(), list(attempt.values().values())
    measured_noise = pooled_noise([values]).sigma if len(values) > 1 else None
    peaks = [p for run in runs if (p := run.result.peak_memory_bytes) is not None]
    found = {
        metric: attempt.finished.value,
        f"{metric}_holdout": fmean(holdout) if holdout else None,
        "gain": numbers.gain if numbers else None,
        "required_gain": numbers.required_gain if numbers else None,
        "noise": numbers.noise if numbers else measured_noise,
        "train_seconds": math.fsum(run.result.wall_seconds for run in runs),
        "peak_memory_bytes": max(peaks, default=None),
        "cost_usd": attempt.cost_usd,
        "attempt_seconds": attempt.finished.seconds,
    }
    return {name: float(number) for name, number in found.items() if number is not None}


def _metric_name(history: History) -> str:
    """A name that every tracker takes; it says whose word the number is where nobody checked it."""
    name = _UNUSUAL.sub("_", metric_of(history))
    return f"{name}_self_reported" if history.is_self_reported else name


def _curves(run: TrackedRun, get_blob: GetBlob) -> Iterator[TrackedCurve]:
    for number, training in enumerate(run.trainings, start=1):
        if training.curve is not None:
            with suppress(LedgerError, ValueError):
                yield _curve(number, training, unpacked(get_blob(training.curve)))


def _curve(number: int, training: RunFinished, points: Curve) -> TrackedCurve:
    began, last = training.result.started_at.timestamp(), training.result.wall_seconds
    return TrackedCurve(
        name="train" if number == 1 else f"train-{number}",
        steps=tuple(_steps(points)),
        # A run may say anything of its time; a point a year ahead would hide all others.
        times=tuple(began + min(point["seconds"], last) for point in points),
        points=points,
    )


def _steps(points: Curve) -> Sequence[int]:
    """The run's own steps where they rise; a run that counts otherwise has its points counted."""
    own = [int(point["step"]) for point in points if point.get("step", -1) >= 0]
    rises = all(before < after for before, after in pairwise(own))
    return own if rises and len(own) == len(points) else range(len(points))
