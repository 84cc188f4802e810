"""Checks conversations on record: asked, answered, charged."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version

from agent.morning.derive import is_same
from agent.record.chain import request_sha
from agent.record.events import (
    ConversationOpened,
    Event,
    MessageAdded,
    ModelCalled,
    ToolCalled,
    ToolReturned,
)
from agent.record.history import History
from agent.researcher.providers import cost_usd


@dataclass
class TalkChecks:
    """Every conversation of a session so far."""

    history: History
    """As it was before each event."""
    usage_usd: float = 0.0
    """What all calls come to by the price list."""
    _conversations: dict[int, list[str]] = field(default_factory=dict)
    _replies: dict[int, str] = field(default_factory=dict)
    _called_tools: dict[str, str] = field(default_factory=dict)

    def check(self, event: Event) -> Iterator[str]:
        """What is wrong with an event, if it is about a conversation."""
        match event:
            case ConversationOpened():
                self._conversations[event.conversation] = [event.system, event.tools]
            case MessageAdded():
                yield from self._message(event)
            case ToolCalled():
                self._called_tools[event.call_id] = event.name
            case ToolReturned():
                if self._called_tools.get(event.call_id) != event.name:
                    yield f"tool {event.name} answers a call that is not on record"
            case ModelCalled():
                yield from self._call(event)
            case _:
                pass

    def _message(self, event: MessageAdded) -> Iterator[str]:
        reply = self._replies.pop(event.conversation, event.message)
        if event.role == "assistant" and reply != event.message:
            yield "the message is not the reply that the model gave"
        if event.conversation not in self._conversations:
            yield f"conversation {event.conversation} was never opened"
        self._conversations.setdefault(event.conversation, []).append(event.message)

    def _call(self, event: ModelCalled) -> Iterator[str]:
        if event.reply is not None:
            self._replies[event.conversation] = event.reply
        messages = self._conversations.get(event.conversation, [])
        if event.request is not None and event.request != request_sha(messages):
            yield "what the model was asked is not the conversation on record"
        settings = self.history.settings
        provider = settings.researcher.provider if settings else "anthropic"
        own = settings.researcher.price_usd_per_million if settings else ()
        priced = cost_usd(event.model, event.usage, provider=provider, own=own)
        self.usage_usd += (event.cost_usd or 0.0) if priced is None else priced
        if priced is None or is_same(priced, event.cost_usd):
            return
        charged = "nothing" if event.cost_usd is None else f"${event.cost_usd:.6f}"
        yield f"the call cost {charged}; its usage comes to ${priced:.6f}{self._other_prices()}"

    def _other_prices(self) -> str:
        session = self.history.session
        then = (session.machine.get("packages") or {}).get("genai-prices") if session else None
        now = version("genai-prices")
        return f" by today's price list {now}, then {then}" if then not in (None, now) else ""
