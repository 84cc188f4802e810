"""What a session has used: hours, calls, tokens, money.

See docs/decisions/0016 for what counts as working time.
"""

from dataclasses import dataclass
from datetime import datetime

from agent.record.events import (
    SAMPLERS,
    ConversationOpened,
    Entry,
    Event,
    ModelAsked,
    ModelCalled,
    Noticed,
    SessionEnded,
    SessionResumed,
    SessionStarted,
)

WAITS = frozenset({"engine_away", "gpu_awaited"})
"""Kinds of notices that say what the session waits for until the next event."""


@dataclass
class WorkingTime:
    """When the session worked, and what it waits for."""

    started_at: str = ""
    working_since: str = ""
    """When the session was started or last resumed."""
    last_at: str = ""
    active_seconds: float = 0.0
    """Time between events, without pauses and the gaps before a resume."""
    waits_for: str = ""
    """What the session waits for right now, in words."""
    is_paused: bool = False
    """Whether the person asked for a pause that goes on."""
    _is_ended: bool = False

    def apply(self, entry: Entry) -> None:
        """Take one more event of the night into account."""
        event = entry.event
        ends_a_pause = isinstance(event, Noticed) and event.kind == "continued"
        is_gap = ends_a_pause or isinstance(event, SessionResumed)
        if self.last_at and not self._is_ended and not is_gap:
            passed = datetime.fromisoformat(entry.at) - datetime.fromisoformat(self.last_at)
            self.active_seconds += max(0.0, passed.total_seconds())
        self.last_at, self.waits_for = entry.at, ""
        match event:
            case SessionStarted():
                self.started_at = self.working_since = entry.at
            case SessionResumed():
                self.working_since, self.is_paused, self._is_ended = entry.at, False, False
            case Noticed(kind="paused" | "continued"):
                self.is_paused = event.kind == "paused"
            case Noticed() if event.kind in WAITS:
                self.waits_for = event.explanation
            case SessionEnded():
                self._is_ended = True
            case _:
                pass


@dataclass
class Spend:
    """What the calls of language models used."""

    calls: int = 0
    usd: float = 0.0
    unpriced_calls: int = 0
    input_tokens: int = 0
    """Those read from or written to the cache included."""
    output_tokens: int = 0
    asked: ModelAsked | None = None
    """The last call that was begun."""
    unanswered: ModelAsked | None = None
    """The same, while nothing on record tells how it ended."""
    _since_attempt_usd: float = 0.0
    _samplers: int = -1
    """The last conversation that a sampler holds, whose replies are no calls."""

    def apply(self, event: Event) -> None:
        """Take one more event of the night into account."""
        if isinstance(event, ModelAsked):
            self.asked = self.unanswered = event
        elif not isinstance(event, SessionResumed):  # written before the call is charged
            self.unanswered = None
        # By who opened it: what a reply says of its own model is the service's word.
        if isinstance(event, ConversationOpened) and event.researcher in SAMPLERS:
            self._samplers = event.conversation
        if isinstance(event, ModelCalled) and event.conversation != self._samplers:
            self._charge(event)

    def take_since_attempt_usd(self) -> float:
        """What was spent since this was asked last: it led to the attempt that begins now."""
        spent, self._since_attempt_usd = self._since_attempt_usd, 0.0
        return spent

    def _charge(self, call: ModelCalled) -> None:
        usage = call.usage
        self.calls += 1
        self.input_tokens += usage.input_tokens + usage.cache_read_tokens + usage.cache_write_tokens
        self.output_tokens += usage.output_tokens
        if call.cost_usd is None:
            self.unpriced_calls += 1
        else:
            self.usd += call.cost_usd
            self._since_attempt_usd += call.cost_usd
