"""Checks a record against the session's limits: nothing beyond them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from agent.record.events import (
    AttemptFinished,
    AttemptStarted,
    Event,
    ModelAsked,
    SessionEnded,
    StopReason,
)
from agent.record.history import History
from agent.settings import SessionLimits, Settings


@dataclass
class LimitChecks:
    """What was begun beyond the limits in force, and ends that no count explains."""

    history: History
    """As it was before each event."""
    settings: Settings | None = None
    """In force now."""
    judged: int = 0
    """Candidates that have a verdict; the history counts them anew each time."""

    def look(self, event: Event) -> Iterator[str]:
        """What is wrong with one event."""
        if isinstance(event, AttemptFinished):
            self.judged += self.history.attempt(event.attempt).started.kind == "candidate"
        if self.settings is None:
            return
        limits = self.settings.session
        match event:
            case AttemptStarted(kind="candidate") if self.judged >= limits.attempts:
                yield (
                    f"attempt {event.attempt} starts although {limits.attempts} attempts are "
                    "done, the limit"
                )
            case ModelAsked() if limits.usd is not None:
                yield from self._money(event, limits.usd)
            case SessionEnded():
                yield from self._end(event, limits)

    def _money(self, event: ModelAsked, limit_usd: float) -> Iterator[str]:
        could_usd = self.history.spent_usd + (event.reserve.usd or 0.0)
        if could_usd > limit_usd and not math.isclose(could_usd, limit_usd):
            yield f"${could_usd:.2f} could be spent after this call; the limit is ${limit_usd:.2f}"

    def _end(self, event: SessionEnded, limits: SessionLimits) -> Iterator[str]:
        """Ends that follow from counts must be what the counts come to."""
        discards = limits.max_discards_in_a_row
        holds = {
            StopReason.ATTEMPTS: self.judged >= limits.attempts,
            StopReason.FAILURES_IN_A_ROW: self.history.failures_in_a_row
            >= limits.max_failures_in_a_row,
            StopReason.DISCARDS_IN_A_ROW: discards is not None
            and self.history.discards_in_a_row >= discards,
        }
        if not holds.get(event.reason, True):
            yield f"it says that it ended for {event.reason.value}, and the record does not"
