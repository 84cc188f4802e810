"""What every step of making an image works with."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
from docker.errors import ImageNotFound

from sandbox.contract.errors import SandboxError
from sandbox.engine.find import Engine
from sandbox.engine.host import Say, last_lines

BUILD_SECONDS = 1800
TAG_DIGITS = 16


class BuildFailed(SandboxError):
    """The engine could not build the image."""


@dataclass(frozen=True)
class Workshop:
    """Where images are made: on an engine, with this machine's programs."""

    engine: Engine
    client: docker.DockerClient
    images: Path
    """Notes of what was made, and room for what is being made."""
    environ: Mapping[str, str]
    """Of pip and apt; nothing of it reaches an image."""
    say: Say


def inspect_image(client: docker.DockerClient, reference: str) -> dict[str, Any] | None:
    """What the engine knows of an image; None where it has none of that name."""
    try:
        return dict(client.images.get(reference).attrs)
    except ImageNotFound:
        return None


def drain(events: Iterable[Mapping[str, Any]]) -> None:
    """Follow a pull or a build to its end.

    Raises:
        BuildFailed: the engine reported an error; with the end of what was said before.
    """
    printed, errors = "", []
    for event in events:  # to its end even after an error: until then its connection is not free
        printed = (printed + str(event.get("stream", "")))[-8000:]
        errors += [str(event["error"])] if "error" in event else []
    if errors:
        raise BuildFailed(
            f"the engine reports: {last_lines(errors[0], 3)[-300:]}",
            f"the end of its output:\n{last_lines(printed)}",
        )


def key_of(*parts: str | bytes) -> str:
    """One hash over several parts, each with its length, so that none runs into the next."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def engine_digits(engine: Engine) -> str:
    """What tells the notes of one engine from another's."""
    # Engines of one machine may share an id (20.10 keeps it under /etc), never an address.
    return key_of(engine.base_url, engine.engine_id)[:TAG_DIGITS]


def write_note(path: Path, text: str) -> None:
    """Replace a note as a whole, never half."""
    unfinished = path.with_suffix(".new")
    unfinished.write_text(text)
    unfinished.replace(path)
