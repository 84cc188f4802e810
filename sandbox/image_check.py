"""Looks at an image before anything is run in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import docker
from pydantic import ValidationError

from sandbox import hardening
from sandbox.contract import Record, SandboxError
from sandbox.engine import FAILED_CALLS, last_lines

ANSWER_SECONDS = 120
USER = f"{hardening.USER}:{hardening.USER}"
NEUTRAL = {"NVIDIA_VISIBLE_DEVICES": ("void", ""), "LD_PRELOAD": ("",)}
"""Variables by which an image could widen its own box, and the values that do nothing."""
QUESTIONS = """
import json, os, platform, sys
import numpy, torch
accelerator = torch.version.cuda or getattr(torch.version, "hip", None)
print(json.dumps({
    "python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__,
    "accelerator": accelerator, "user": os.getuid(),
}))
"""


class ImageUnfit(SandboxError):
    """An image is not one that a box may run."""


class Contents(Record):
    """What an image's own Python says of it."""

    python: str
    torch: str
    numpy: str
    accelerator: str | None
    """Version of CUDA or HIP that torch was built for; None for a CPU build."""
    user: int


def check_image(client: docker.DockerClient, reference: str) -> Contents:
    """Look at an image's settings and ask its Python what it holds.

    Raises:
        ImageUnfit: a setting would widen the box, or torch cannot be imported.
    """
    facts = client.images.get(reference).attrs
    if problems := settings_problems(facts["Config"]):
        raise ImageUnfit(
            f"the image {reference} is not fit for a box: {'; '.join(problems)}",
            "build it with the shipped Dockerfile.train, which sets all of this",
        )
    said = ask_python(client, facts["Id"], QUESTIONS)
    try:
        return Contents.model_validate_json(said.strip().rpartition("\n")[2])
    except ValidationError as error:
        raise ImageUnfit(
            f"the image {reference} cannot import torch and numpy: {last_lines(said, 3)}",
            "a base image that brings its own torch needs numpy as well",
        ) from error


def settings_problems(config: Mapping[str, Any]) -> list[str]:
    """What in an image's settings has no place in a box, in words."""
    problems = []
    if config.get("User") != USER:
        problems.append(f"its user is {config.get('User') or 'root'!r}, not {USER}")
    problems += [
        f"it has {words}"
        for name, words in (("Entrypoint", "an entrypoint"), ("Volumes", "volumes"))
        if config.get(name)
    ]
    if config.get("OnBuild"):
        problems.append("it has triggers for builds on it")
    if (config.get("Healthcheck") or {}).get("Test", ["NONE"]) != ["NONE"]:
        problems.append("it has a health check")
    for entry in config.get("Env") or []:
        name, _, value = entry.partition("=")
        if name in NEUTRAL and value not in NEUTRAL[name]:
            problems.append(f"it sets {name} to {value[:80]!r}")
    return problems


def ask_python(client: docker.DockerClient, image_id: str, program: str) -> str:
    """What an image's Python prints for a program, in a container of its own without rights."""
    container = client.api.create_container(
        image_id,
        entrypoint=["python3"],
        command=["-I", "-c", program],
        user=USER,
        environment={"NVIDIA_VISIBLE_DEVICES": "void", "LD_PRELOAD": "", "HOME": "/tmp"},  # noqa: S108 - the container's own
        labels={"nightlab.probe": "image"},
        healthcheck={"test": ["NONE"]},
        use_config_proxy=False,
        host_config=client.api.create_host_config(
            network_mode="none",
            read_only=True,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            mem_limit=2**30,
            memswap_limit=2**30,
            pids_limit=128,
        ),
    )
    try:
        client.api.start(container)
        client.api.wait(container, timeout=ANSWER_SECONDS)
        return str(client.api.logs(container, tail=20).decode(errors="replace"))
    except FAILED_CALLS as error:
        return f"no answer: {last_lines(str(error), 1)}"
    finally:
        client.api.remove_container(container, force=True, v=True)
