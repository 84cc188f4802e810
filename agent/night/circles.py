"""Notices circles, and a cache that stopped hitting."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from agent.record.events import Entry, ModelCalled

SAME_ACTS = 4
SAME_FAILED_EDITS = 3
ALTERNATING_ACTS = 4
CACHE_SECONDS = 3600.0
LEAST_CACHED_TOKENS = 4096
"""Below this a miss is too cheap to speak of, and a model may not cache at all."""


@dataclass(frozen=True)
class Act:
    """One tool call and what it came to, each as a digest."""

    name: str
    action: str
    result: str
    is_error: bool


def act(name: str, arguments: dict[str, Any], text: str, *, is_error: bool) -> Act:
    """The act of a call that was answered with `text`."""
    action = json.dumps([name, arguments], sort_keys=True, ensure_ascii=False)
    return Act(name, _digest(action), _digest(text), is_error)


def circle(acts: list[Act]) -> str | None:
    """What goes round in circles in `acts`, which are those since the last judged attempt."""
    if not acts:
        return None
    last = acts[-1]
    if acts.count(last) >= SAME_ACTS:
        return f"{last.name} was called {SAME_ACTS} times with the same result"
    failed = [one for one in acts if one.is_error and one.action == last.action]
    if last.is_error and last.name == "edit" and len(failed) >= SAME_FAILED_EDITS:
        return f"the same edit failed {SAME_FAILED_EDITS} times"
    recent = acts[-ALTERNATING_ACTS:]
    if len(recent) == ALTERNATING_ACTS and recent[:2] == recent[2:] and recent[0] != recent[1]:
        return f"{recent[0].name} and {recent[1].name} took turns without a change"
    return None


@dataclass
class CircleWatch:
    """Counts how often a researcher had to be called out of a circle since its last attempt."""

    acts: list[Act] = field(default_factory=list)
    warnings: int = 0
    attempts: int = 0

    def circle(self, done: list[Act], attempts: int) -> str | None:
        """What goes round in circles once `done` is done; a judged attempt clears the record."""
        if attempts != self.attempts:
            self.acts, self.warnings, self.attempts = [], 0, attempts
            return None
        for one in done:
            self.acts.append(one)
            if found := circle(self.acts):
                self.acts = []
                self.warnings += 1
                return found
        return None


def cache_miss(entries: Iterable[Entry]) -> str | None:
    """What is odd about the last call's cache, if it should have hit and did not.

    Args:
        entries: of the ledger, newest first; only as many are read as it takes.
    """
    calls = ((e.at, e.event) for e in entries if isinstance(e.event, ModelCalled))
    newest, before = next(calls, None), next(calls, None)
    if newest is None or before is None:
        return None
    (at, call), (at_before, call_before) = newest, before
    kept = call_before.usage.cache_read_tokens + call_before.usage.cache_write_tokens
    apart = datetime.fromisoformat(at) - datetime.fromisoformat(at_before)
    if (
        call.conversation != call_before.conversation
        or call.model != call_before.model
        or "lost" in (call.stop_reason, call_before.stop_reason)
        or kept < LEAST_CACHED_TOKENS
        or apart.total_seconds() > CACHE_SECONDS
        or call.usage.cache_read_tokens >= kept / 2
    ):
        return None
    return (
        f"{call.usage.cache_read_tokens} of {kept} tokens came from the prompt cache, "
        f"{apart.total_seconds():.0f} s after they were put there"
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
