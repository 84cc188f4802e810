"""Keeps the environment's secrets out of record and screen.

Only one way leads from a credential to a text of ours: a service, or a proxy before it, that
repeats in an error what it was sent. So what a service says passes through here before anything
else is done with it. What a person writes into program.md, guidance.md or the workspace is recorded
as it is.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

HIDDEN = "[secret]"
SHORTEST_SECRET = 8
SHORTEST_PASSWORD = 4

_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
_HEADERS = re.compile(r"_HEADERS?$", re.IGNORECASE)
_FILE = re.compile(r"_(FILE|PATH)$", re.IGNORECASE)
MAX_SECRET_FILE_BYTES = 64 * 1024
_IN_ADDRESS = re.compile(r"://([^/@\s:]*):([^/@\s]+)@")


def secrets_in(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Values that must not be shown, longest first.

    Of variables by name, of headers, of files that hold a token, of passwords in addresses.
    """
    told = [v for n, v in environ.items() if _NAME.search(n) and not _FILE.search(n)]
    told += [part for n, v in environ.items() if _HEADERS.search(n) for part in _header_values(v)]
    # Of a workload's identity the environment holds the place alone; a proxy may show the token.
    told += [_content(v) for n, v in environ.items() if _FILE.search(n) and _NAME.search(n)]
    named = {value for value in told if len(value) >= SHORTEST_SECRET}
    passwords = {
        form
        for value in environ.values()
        for match in _IN_ADDRESS.finditer(value)
        for form in (match[2], unquote(match[2]))
        if len(form) >= SHORTEST_PASSWORD
    }
    # Longest first, since a secret may hold another one and must not be cut by its replacement.
    return tuple(sorted(named | passwords, key=len, reverse=True))


def _header_values(headers: str) -> list[str]:
    """What lines such as `x-team: word` or `authorization: Bearer word` hold."""
    values = [line.partition(":")[2].strip() for line in headers.splitlines()]
    return [*values, *(value.rpartition(" ")[2] for value in values)]


def _content(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            return file.read(MAX_SECRET_FILE_BYTES).decode(errors="replace").strip()
    except OSError:
        return ""


def hidden_in(value: Any, secrets: Sequence[str]) -> Any:
    """What a service sent, with every secret replaced in all its texts and names."""
    if isinstance(value, str):
        return hidden(value, secrets)
    if isinstance(value, dict):
        return {hidden(f"{k}", secrets): hidden_in(item, secrets) for k, item in value.items()}
    return [hidden_in(one, secrets) for one in value] if isinstance(value, list) else value


def hidden(text: str, secrets: Sequence[str]) -> str:
    """The text with every secret replaced."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return text
