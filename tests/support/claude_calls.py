"""Calls of the model through the real SDK, one by one or as a session makes them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.attempt.lab import Lab
from agent.night import asking
from agent.night.waiting import for_the_night
from agent.record.events import ModelCalled, RetryWaited
from agent.record.ledger import Ledger
from agent.researcher.base import Model, Prompt, Reply
from agent.researcher.claude import ClaudeModel
from agent.researcher.conversation import Conversation
from agent.settings import ResearcherSettings
from tests.support.messages_server import MessagesServer
from tests.support.nights import Place

SYSTEM = "You improve train.py. " * 150
TOOLS: list[dict[str, Any]] = [
    {
        "name": "run",
        "description": "Train, score and judge.",
        "input_schema": {"type": "object", "properties": {"hypothesis": {"type": "string"}}},
    }
]
OPENING: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "Begin."}]},
]


@dataclass
class Night:
    """A session that asks a model, on a clock that only waiting moves."""

    seconds_left: float = 36_000.0
    usd: float | None = None
    sleep: Callable[[float], None] | None = None
    ledgers: list[Ledger] = field(default_factory=list)

    @contextmanager
    def lab(self) -> Iterator[Lab]:
        """A lab whose ledger is open; what it held can be read afterwards as well."""
        session = {"attempts": 100, "hours": self.seconds_left / 3600, "usd": self.usd}
        with tempfile.TemporaryDirectory() as root:
            place = Place(Path(root), changes={"session": session})
            place.sleep = self.sleep
            lab = for_the_night(place.begin("claude"))
            self.ledgers.append(lab.ledger)
            try:
                with lab.ledger:
                    yield lab
            finally:
                self.seconds_left -= place.clock.seconds

    @contextmanager
    def asks(self, model: Model) -> Iterator[Callable[[], Reply]]:
        """A function that asks the model as often as it takes."""
        with self.lab() as lab:
            conversation = Conversation.start(
                lab.ledger,
                researcher=model.name,
                system=SYSTEM,
                tools=TOOLS,
                brief="Begin.",
                reason="the test began",
            )
            reserve = model.worst_case(conversation.prompt)
            yield lambda: asking.ask(lab, model, conversation, reserve)

    @property
    def retries(self) -> list[tuple[str, float]]:
        """What failed, and for how long it was waited."""
        return [(event.error, event.wait_seconds) for event in self._events(RetryWaited)]

    @property
    def lost(self) -> list[ModelCalled]:
        """Calls that were paid for without a reply."""
        return [event for event in self._events(ModelCalled) if event.stop_reason == "lost"]

    @property
    def lost_usd(self) -> float:
        return sum(call.cost_usd or 0.0 for call in self.lost)

    def _events(self, kind: type) -> list[Any]:
        entries = [entry for ledger in self.ledgers for entry in ledger.entries]
        return [entry.event for entry in entries if isinstance(entry.event, kind)]


@contextmanager
def claude(server_url: str, **changes: Any) -> Iterator[ClaudeModel]:
    """A model at this address; changes are of its settings, its environment or its limits."""
    settings: dict[str, Any] = {"model": "claude-sonnet-5-5", "read_seconds": 10.0}
    settings |= {n: changes.pop(n) for n in [*changes] if n in ResearcherSettings.model_fields}
    environ = {"ANTHROPIC_API_KEY": "not-a-real-key", "ANTHROPIC_BASE_URL": server_url}
    environ |= {name: changes.pop(name) for name in [*changes] if name.isupper()}
    chosen = ResearcherSettings.model_validate(settings)
    with closing(ClaudeModel(chosen.model, chosen, environ, **changes)) as model:
        yield model


def reply_of(
    model: Model,
    messages: list[dict[str, Any]] = OPENING,
    tools: list[dict[str, Any]] = TOOLS,
) -> Reply:
    """What the model answers when it is asked once."""
    return model.reply(Prompt(SYSTEM, tools, messages), 3600.0)


def ask(night: Night, *script: Any, **changes: Any) -> tuple[Reply, MessagesServer]:
    """What a session gets from a service that answers by the script."""
    server = MessagesServer(script)
    with server, claude(server.url, **changes) as model, night.asks(model) as asks:
        return asks(), server
