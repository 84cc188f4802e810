"""Whether the machine is still the one of the beginning.

See docs/decisions/0010 for the checks, 0017 for what a run is held against.
"""

from dataclasses import dataclass, field
from typing import Any

from agent.record.attempts import Attempt
from agent.record.events import DRIFT, DriftChecked, RunFinished

SAME_MACHINE = ("cpu", "cores", "memory_bytes", "kernel")
"""Facts that two records of one machine share."""


@dataclass
class Drift:
    """Checks of the machine, and how much work came since."""

    checks: list[DriftChecked] = field(default_factory=list)
    judged_since_result: int = 0
    """Candidates with a verdict since a check last had a result."""
    judged_since_check: int = 0
    """The same since the last check, be it in vain."""
    checks_in_vain: int = 0
    """Checks in a row, until now, that had no result."""
    is_on_another_machine: bool = False
    """Since a resume, or since a best came back that was measured before the machine changed,
    until a check has a result."""
    moved: tuple[int, int] | None = None
    """The best when the session came to another machine, and how many runs it had by then."""
    runs_since_move: list[RunFinished] = field(default_factory=list)
    """Trainings of the checks on that other machine."""
    machine: dict[str, Any] = field(default_factory=dict)
    """Where the session is, as its start or last resume recorded it."""

    @property
    def cores(self) -> int:
        """Processor cores of the machine that the session is on; 0 where nobody wrote it down."""
        cores = self.machine.get("cores")
        return cores if isinstance(cores, int) else 0

    def resume_on(self, machine: dict[str, Any], best: Attempt | None) -> None:
        """The session goes on, maybe elsewhere."""
        if _is_another(self.machine, machine):
            self.is_on_another_machine, self.checks_in_vain = True, 0
            self.moved = None if best is None else (best.number, len(best.runs))
            self.runs_since_move = []
        self.machine = machine

    def dethroned(self, best: int | None) -> None:
        """Another attempt is the best again, whose scores may be from before a change."""
        last = next((check for check in reversed(self.checks) if check.changed), None)
        if last is not None and last.attempt != best:
            self.is_on_another_machine, self.checks_in_vain = True, 0

    def judged(self) -> None:
        """A candidate got a verdict."""
        self.judged_since_result += 1
        self.judged_since_check += 1

    def trained(self, run: RunFinished) -> None:
        """A box of a check ended; its training tells of the machine's speed."""
        if self.moved is not None and run.purpose.startswith(DRIFT) and run.result.box == "train":
            self.runs_since_move.append(run)

    def checked(self, event: DriftChecked) -> None:
        """A check of the machine is over."""
        self.checks.append(event)
        self.judged_since_check = 0
        if not event.today:
            self.checks_in_vain += 1
        else:
            self.judged_since_result = self.checks_in_vain = 0
            self.is_on_another_machine = False


def _is_another(machine: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a session goes on elsewhere, as far as both records tell."""
    return any(
        machine.get(fact) is not None and machine[fact] != now.get(fact) for fact in SAME_MACHINE
    )
