"""Keeps the environment's secrets out of record and screen.

Only one way leads from a credential to a text of ours: a service, or a proxy before it, that
repeats in an error what it was sent. So a model's errors pass through here. What a person writes
into program.md, guidance.md or the workspace is recorded as it is.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

from agent.record.events import Reserve
from agent.researcher.base import Model, ModelError, Reply

HIDDEN = "[secret]"
SHORTEST_SECRET = 8
SHORTEST_PASSWORD = 4

_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_IN_ADDRESS = re.compile(r"://([^/@\s:]*):([^/@\s]+)@")


def secrets_in(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Values that must not be shown, longest first: of variables by name, of passwords in URLs."""
    named = {
        value
        for name, value in environ.items()
        if _NAME.search(name) and len(value) >= SHORTEST_SECRET
    }
    passwords = {
        form
        for value in environ.values()
        for match in _IN_ADDRESS.finditer(value)
        for form in (match[2], unquote(match[2]))
        if len(form) >= SHORTEST_PASSWORD
    }
    return tuple(sorted(named | passwords, key=len, reverse=True))


def hidden(text: str, secrets: Sequence[str]) -> str:
    """The text with every secret replaced."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return text


@contextmanager
def discreet(secrets: Sequence[str]) -> Iterator[None]:
    """Let a model's errors tell no secret."""
    try:
        yield
    except ModelError as error:
        raise ModelError(
            error.reason,
            hidden(error.message, secrets),
            hidden(error.hint, secrets),
            history_rejected=error.history_rejected,
        ) from error


@dataclasses.dataclass(frozen=True)
class DiscreetModel:
    """A model whose errors and refusals tell no secret."""

    model: Model
    secrets: tuple[str, ...]

    @property
    def name(self) -> str:
        """The model's own."""
        return self.model.name

    def reply(
        self, system: str, tools: list[dict[str, Any]], messages: list[dict[str, Any]]
    ) -> Reply:
        """The model's reply; see `Model.reply`."""
        with discreet(self.secrets):
            reply = self.model.reply(system, tools, messages)
        return dataclasses.replace(reply, explanation=hidden(reply.explanation, self.secrets))

    def worst_case(
        self, system: str, tools: list[dict[str, Any]], messages: list[dict[str, Any]]
    ) -> Reserve:
        """The most that the call can use; see `Model.worst_case`."""
        return self.model.worst_case(system, tools, messages)
