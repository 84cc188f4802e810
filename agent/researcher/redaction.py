"""Keeps the environment's secrets out of record and screen.

Only one way leads from a credential to a text of ours: a service, or a proxy before it, that
repeats in an error what it was sent. So what a service says passes through here before anything
else is done with it. What a person writes into program.md, guidance.md or the workspace is recorded
as it is.
"""

import re
from collections.abc import Mapping, Sequence
from urllib.parse import unquote

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
    # Longest first, since a secret may hold another one and must not be cut by its replacement.
    return tuple(sorted(named | passwords, key=len, reverse=True))


def hidden(text: str, secrets: Sequence[str]) -> str:
    """The text with every secret replaced."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return text
