"""One call of the model through the real SDK, on a clock that only sleep moves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from agent.researcher.base import LostCall, Reply
from agent.researcher.claude import ClaudeModel
from tests.support.messages_server import MessagesServer

SYSTEM = "You improve train.py. " * 150
TOOLS: list[dict[str, Any]] = [
    {
        "name": "run",
        "description": "Train, score and judge.",
        "input_schema": {"type": "object", "properties": {"hypothesis": {"type": "string"}}},
    }
]
OPENING = [{"role": "user", "content": [{"type": "text", "text": "Begin."}]}]


@dataclass
class Night:
    """A clock that only sleep moves, and what the model told us."""

    seconds_left: float = 36_000.0
    now: float = 1000.0
    retries: list[tuple[str, float]] = field(default_factory=list)
    lost: list[LostCall] = field(default_factory=list)

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.seconds_left -= seconds

    @property
    def lost_usd(self) -> float:
        return sum(call.cost_usd or 0.0 for call in self.lost)


@contextmanager
def claude(server_url: str, night: Night, **changes: Any) -> Iterator[ClaudeModel]:
    arguments: dict[str, Any] = {
        "model": "claude-sonnet-5-5",
        "max_output_tokens": 32_000,
        "effort": "high",
        "api_key": "not-a-real-key",
        "auth_token": None,
        "base_url": server_url,
        "deadline": lambda: night.seconds_left,
        "on_retry": lambda error, wait: night.retries.append((error, wait)),
        "on_lost": night.lost.append,
        "sleep": night.sleep,
        "read_seconds": 10.0,
        **changes,
    }
    with ClaudeModel(**arguments) as model:
        yield model


def ask(night: Night, *script: Any, **changes: Any) -> tuple[Reply, MessagesServer]:
    server = MessagesServer(script)
    with server, claude(server.url, night, **changes) as model:
        return model.reply(SYSTEM, TOOLS, OPENING), server
