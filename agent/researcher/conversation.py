"""Messages between nightlab and a researcher: append-only, on record.

History is stored byte for byte and never edited: current models refuse a conversation whose earlier
messages changed. What would make it too long opens a new conversation from a brief instead.
"""

import json
from dataclasses import dataclass
from typing import Any, Self

from agent.record.events import ConversationOpened, MessageAdded
from agent.record.ledger import Ledger
from agent.researcher.base import Prompt

Message = dict[str, Any]


@dataclass
class Conversation:
    """One conversation; every message is in the ledger before it is used."""

    ledger: Ledger
    number: int
    researcher: str
    system: str
    tools: list[dict[str, Any]]
    messages: list[Message]
    shas: list[str]
    """Blobs of the system prompt, of the tools and of each message, in this order."""

    @classmethod
    def start(
        cls,
        ledger: Ledger,
        *,
        researcher: str,
        system: str,
        tools: list[dict[str, Any]],
        brief: str,
        reason: str,
    ) -> Self:
        """Open the next conversation with `brief` as its first message."""
        opening = ConversationOpened(
            conversation=1 + ledger.history.conversation,
            researcher=researcher,
            system=ledger.put_blob(system.encode()),
            tools=ledger.put_blob(_to_bytes(tools)),
            reason=reason,
        )
        ledger.append(opening)
        shas = [opening.system, opening.tools]
        conversation = cls(ledger, opening.conversation, researcher, system, tools, [], shas)
        conversation.add_user([{"type": "text", "text": brief}])
        return conversation

    @classmethod
    def last(cls, ledger: Ledger) -> Self | None:
        """The conversation that was going on when the ledger was last written."""
        opening = cls.last_opening(ledger)
        if opening is None:
            return None
        shas = [
            entry.event.message
            for entry in ledger.entries
            if isinstance(entry.event, MessageAdded)
            and entry.event.conversation == opening.conversation
        ]
        return cls(
            ledger,
            opening.conversation,
            opening.researcher,
            ledger.get_blob(opening.system).decode(),
            json.loads(ledger.get_blob(opening.tools)),
            [json.loads(ledger.get_blob(sha)) for sha in shas],
            [opening.system, opening.tools, *shas],
        )

    @property
    def prompt(self) -> Prompt:
        """What a model is asked with."""
        return Prompt(self.system, self.tools, self.messages)

    @staticmethod
    def last_opening(ledger: Ledger) -> ConversationOpened | None:
        """Who was spoken with last, and about what."""
        return next(
            (e.event for e in reversed(ledger.entries) if isinstance(e.event, ConversationOpened)),
            None,
        )

    def add_user(self, blocks: list[dict[str, Any]]) -> None:
        """Append a message of ours."""
        self._add({"role": "user", "content": blocks})

    def add_assistant(self, blocks: list[dict[str, Any]]) -> None:
        """Append a reply, exactly as it came."""
        self._add(_reply(blocks))

    def store_reply(self, blocks: list[dict[str, Any]]) -> str:
        """Keep a reply as a blob, whether or not it becomes a message; returns its SHA-256."""
        return self.ledger.put_blob(_to_bytes(_reply(blocks)))

    def orphans(self) -> list[str]:
        """Ids of tool calls in the last message that nobody answered."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            return []
        return [b["id"] for b in self.messages[-1]["content"] if b.get("type") == "tool_use"]

    def _add(self, message: Message) -> None:
        # On record first: a message that was sent and then lost to a crash could not be replayed.
        sha = self.ledger.put_blob(_to_bytes(message))
        self.ledger.append(
            MessageAdded(conversation=self.number, role=message["role"], message=sha)
        )
        self.messages.append(message)
        self.shas.append(sha)


def _reply(blocks: list[dict[str, Any]]) -> Message:
    return {"role": "assistant", "content": blocks}


def _to_bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
