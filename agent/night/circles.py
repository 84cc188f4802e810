"""Notices a researcher that goes in circles.

A model that repeats itself burns the night's money without a new result. It is called out of its
circle once, then given a new conversation; then the session ends (`turns.py`).
"""

from dataclasses import dataclass, field
from typing import Any

SAME_ACTS = 4
SAME_FAILED_EDITS = 3
ALTERNATING_ACTS = 4


@dataclass(frozen=True)
class Act:
    """One tool call and what it came to."""

    name: str
    arguments: dict[str, Any]
    result: str
    is_error: bool


def circle(acts: list[Act]) -> str | None:
    """What goes round in circles in `acts`, which are those since the last judged attempt."""
    last = acts[-1]
    if acts.count(last) >= SAME_ACTS:
        return f"{last.name} was called {SAME_ACTS} times with the same result"
    # Whatever the errors say: they name lines, which move while other edits succeed.
    failed = [a for a in acts if a.is_error and (a.name, a.arguments) == ("edit", last.arguments)]
    if last in failed and len(failed) >= SAME_FAILED_EDITS:
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
