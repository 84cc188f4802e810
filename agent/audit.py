"""Checks a session's record against itself: blobs, verdicts, spend, order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agent.history import OF_AN_ATTEMPT, History
from agent.judge import Ruling, judge, pooled_noise
from agent.ledger import LedgerError, read_blob
from agent.model import cost_usd
from agent.program import Settings
from agent.records import (
    AttemptFinished,
    AttemptStarted,
    Entry,
    ModelCalled,
    RunFinished,
    Scored,
    SessionResumed,
    SessionStarted,
    Verdict,
)
from sandbox.contract import Outcome, Record

_BLOB_FIELDS = ("program", "diff", "log", "curve", "system", "tools", "message", "input", "output")
_BLOB_TABLES = ("files", "fixed_files")


class Difference(Record):
    """Where the record contradicts itself."""

    seq: int
    what: str


@dataclass
class _Auditor:
    """Walks the ledger once, with the history as it was before each event."""

    directory: Path
    history: History = field(default_factory=History)
    settings: Settings | None = None
    checked: set[str] = field(default_factory=set)

    def look(self, entry: Entry) -> Iterator[str]:
        """What is wrong with one event."""
        event = entry.event
        yield from self._blobs(event)
        if not self.history.takes(event):
            yield f"{event.type} names an attempt that was never started"
            return
        if isinstance(event, OF_AN_ATTEMPT) and not self.history.attempt(event.attempt).open:
            yield from self._after_the_end(event)
        match event:
            case SessionStarted() | SessionResumed():
                yield from self._take_settings(event.settings)
            case AttemptStarted():
                yield from self._start(event)
            case Scored():
                yield from self._score(event)
            case AttemptFinished():
                yield from self._verdict(event)
            case ModelCalled():
                yield from self._cost(event)
        self.history.apply(entry)

    def _blobs(self, event: Record) -> Iterator[str]:
        for sha in _named_blobs(event):
            if sha in self.checked:
                continue
            self.checked.add(sha)
            try:
                read_blob(self.directory, sha)
            except LedgerError as error:
                yield error.message

    def _after_the_end(self, event: Record) -> Iterator[str]:
        """The best may be measured again, at more seeds or on holdout; nothing else may happen."""
        if not isinstance(event, RunFinished | Scored):
            yield "an attempt is closed for the second time"

    def _start(self, event: AttemptStarted) -> Iterator[str]:
        if event.attempt != len(self.history.attempts):
            yield f"attempt {event.attempt} comes where {len(self.history.attempts)} was due"
        if self.history.attempts and self.history.attempts[-1].open:
            yield f"attempt {event.attempt} starts while the one before is open"
        best = None if self.history.best is None else self.history.best.number
        if event.parent != best:
            yield f"its parent is {event.parent}, the best was {best}"

    def _score(self, event: Scored) -> Iterator[str]:
        if (event.value is None) == (event.reason is None):
            yield "a score has a value or a reason, and this one has both or neither"
        runs = self.history.attempt(event.attempt).runs
        ended = {run.result.box: run.result.outcome for run in runs if run.seed == event.seed}
        bad = [box for box in ("train", "model", "scorer") if ended.get(box) is not Outcome.OK]
        if event.value is not None and bad:
            yield f"a value without a good end of: {', '.join(bad)}"

    def _take_settings(self, settings: dict[str, Any]) -> Iterator[str]:
        try:
            self.settings = Settings.model_validate(settings, strict=False)
        except ValidationError as error:
            self.settings = None
            yield f"its settings are not valid: {error.error_count()} of them"

    def _verdict(self, event: AttemptFinished) -> Iterator[str]:
        attempt = self.history.attempt(event.attempt)
        values = list(attempt.values().values())
        if event.arithmetic is not None:
            yield from self._arithmetic(event, values)
        elif event.verdict is Verdict.KEPT and attempt.started.kind != "baseline":
            yield "kept without arithmetic"
        elif event.value is not None and not (values and _same(event.value, _mean(values))):
            yield f"its value {event.value} is not the mean of its scores"

    def _arithmetic(self, event: AttemptFinished, values: list[float]) -> Iterator[str]:
        best = self.history.best
        if best is None or not values:
            yield "it was judged without scores of its own or of a best"
            return
        assert self.history.session is not None
        if self.settings is None:
            yield "it was judged without settings in force"
            return
        noise, seeds = self.settings.noise, self.history.session.seeds
        judgement = judge(
            values,
            list(best.values().values()),
            pooled_noise(self.history.repeats()),
            direction=self.settings.goal.direction,
            confidence=noise.confidence,
            max_repeats=min(noise.max_repeats, len(seeds)),
        )
        verdict = Verdict.KEPT if judgement.ruling is Ruling.KEEP else Verdict.DISCARDED
        if (verdict, judgement.reason) != (event.verdict, event.reason):
            yield (
                f"the verdict is {event.verdict} ({event.reason}); "
                f"the scores say {verdict} ({judgement.reason})"
            )
        if judgement.arithmetic != event.arithmetic or not _same(event.value, _mean(values)):
            yield "its arithmetic is not what comes of the scores"

    def _cost(self, event: ModelCalled) -> Iterator[str]:
        if event.cost_usd is None:
            return
        priced = cost_usd(event.model, event.usage)
        if priced is not None and not _same(priced, event.cost_usd):
            yield f"the call cost ${event.cost_usd:.6f}; its usage comes to ${priced:.6f}"


def audit(directory: Path, entries: Sequence[Entry]) -> list[Difference]:
    """Every place where a verified ledger contradicts itself, its blobs or the prices.

    Args:
        directory: of the session.
        entries: as `read_ledger` returned them, so the chain is verified.
    """
    auditor = _Auditor(directory)
    return [
        Difference(seq=entry.seq, what=what) for entry in entries for what in auditor.look(entry)
    ]


def _named_blobs(event: Record) -> Iterator[str]:
    for name in _BLOB_FIELDS:
        sha = getattr(event, name, None)
        if sha is not None:
            yield sha
    for name in _BLOB_TABLES:
        yield from (getattr(event, name, None) or {}).values()


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _same(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
