"""Looks at an image before anything is run in it."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Annotated, Any

import docker
from pydantic import Field, ValidationError

from sandbox.box import hardening
from sandbox.box.reaper import process_owner
from sandbox.contract.errors import SandboxError
from sandbox.contract.record import Record
from sandbox.engine.find import FAILED_CALLS
from sandbox.engine.host import last_lines
from sandbox.image.profiles import Profile

ANSWER_SECONDS = 120
ANSWER_MEMORY_BYTES = 4 * 2**30
"""A torch that is built for several generations of GPUs needs more than one to be imported."""
OLDEST_PYTHON = (3, 11)
USER = f"{hardening.USER}:{hardening.USER}"
KEY_LABEL = "nightlab.content-key"
OWN_LABELS = "nightlab."
"""Labels by which boxes are told from other containers; an image hands its own on to them."""
NEUTRAL = {"NVIDIA_VISIBLE_DEVICES": ("void", "")}
"""What may stand in a variable that is not empty and still asks for nothing."""
WIDENING = (
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_REQUIRE_",
    "NVIDIA_MIG_",
    "NVIDIA_IMEX_CHANNELS",
    "LD_PRELOAD",
    "LD_AUDIT",
    "LD_LIBRARY_PATH",
    "GLIBC_TUNABLES",
    "GCONV_PATH",
)
"""Beginnings of variables by which an image asks a GPU runtime for devices or conditions, or puts
code of its own into programs that the engine starts for it (CVE-2025-23266, CVE-2023-4911)."""
QUESTIONS = """
import json, os, platform
import numpy, torch
flags = getattr(torch._C, "_cuda_getArchFlags", lambda: None)()
print(json.dumps({
    "python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__,
    "cuda": torch.version.cuda,
    "architectures": (flags or "").split(), "user": os.getuid(),
}))
"""


class ImageUnfit(SandboxError):
    """An image is not one that a box may run."""


class Contents(Record):
    """What an image's own Python says of it."""

    python: str
    torch: str
    numpy: str
    cuda: str | None
    """The version that torch was built for; None for a CPU build."""
    architectures: Annotated[tuple[str, ...], Field(max_length=100)]
    """GPU architectures that a build for CUDA names, `sm_90`."""
    user: int

    @property
    def torch_build(self) -> str:
        """What torch was built for, in words."""
        return f"CUDA {self.cuda}" if self.cuda else "no accelerator"


def check_image(client: docker.DockerClient, reference: str, profile: Profile) -> Contents:
    """Look at an image's settings and ask its Python what it holds.

    Args:
        reference: of the image.
        profile: what the image is for: the accelerator, the variables its programs will see.

    Raises:
        ImageUnfit: a setting would widen the box, torch cannot be imported, or it cannot use the
            accelerator that the profile gives.
    """
    # Its settings before its Python: nothing of it runs while one of them could widen a box.
    facts = client.images.get(reference).attrs
    if problems := settings_problems(facts["Config"]):
        raise ImageUnfit(
            f"the image {reference} is not fit for a box: {'; '.join(problems)}",
            "build it with the shipped Dockerfile.train, which sets all of this",
        )
    printed = ask_python(client, facts["Id"], QUESTIONS, profile.environment)
    try:
        contents = Contents.model_validate_json(printed.strip().rpartition("\n")[2])
    except ValidationError as error:
        raise ImageUnfit(
            f"the image {reference} cannot import torch and numpy: {last_lines(printed, 3)}",
            "a base image that brings its own torch needs numpy as well, and libraries that it "
            "finds without LD_LIBRARY_PATH or with the one in the profile's environment",
        ) from error
    if problems := contents_problems(contents, profile):
        raise ImageUnfit(
            f"the image {reference} is not one for profile {profile.name}: {'; '.join(problems)}",
            "name another with --base-image, or another [hardware] profile in program.md",
        )
    return contents


def contents_problems(contents: Contents, profile: Profile) -> list[str]:
    """What an image lacks for a profile, in words."""
    problems = []
    if _version(contents.python) < OLDEST_PYTHON:
        problems.append(f"its Python is {contents.python}, and a box needs 3.11")
    if contents.user != hardening.USER:
        problems.append(f"its programs run as user {contents.user}")
    any_build = "" if profile.devices == "none" else "0"  # every CUDA is later, and none is not
    if _version(contents.cuda or "") < _version(profile.oldest_build or any_build):
        wanted = f"CUDA {profile.oldest_build}".rstrip()
        problems.append(f"its torch is built for {contents.torch_build}, not {wanted}")
    elif profile.architectures and not set(profile.architectures) & set(contents.architectures):
        problems.append(
            f"its torch is built for {', '.join(contents.architectures) or 'no GPU'}, "
            f"not for {' or '.join(profile.architectures)}"
        )
    return problems


def _version(text: str) -> tuple[int, ...]:
    """The leading numbers of a version; none of them is older than all others."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


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
        if name.startswith(WIDENING) and value not in NEUTRAL.get(name, ("",)):
            problems.append(f"it sets {name[:80]} to {value[:80]!r}")
    for label in config.get("Labels") or {}:
        if label.startswith(OWN_LABELS) and label != KEY_LABEL:
            problems.append(f"it has the label {label[:80]!r}, which tells boxes apart")
    return problems


def ask_python(
    client: docker.DockerClient, image_id: str, program: str, environment: Mapping[str, str]
) -> str:
    """What an image's Python prints for a program, in a container of its own without rights."""
    with python_container(client, image_id, program, environment) as container:
        try:
            client.api.start(container)
            client.api.wait(container, timeout=ANSWER_SECONDS)
            return str(client.api.logs(container, tail=20).decode(errors="replace"))
        except FAILED_CALLS as error:
            return f"no answer: {last_lines(str(error), 1)}"


@contextmanager
def python_container(
    client: docker.DockerClient,
    image_id: str,
    program: str,
    environment: Mapping[str, str],
    user: str = USER,
) -> Iterator[str]:
    """Give the id of a container that runs a program of ours on an image's Python once started."""
    # Marked as a run's, so that the next start's sweep finds it if this process dies.
    labels = {hardening.LABEL_RUN: "image-check", hardening.LABEL_OWNER: process_owner()}
    container = create_python(client, image_id, program, labels, environment, user)
    try:
        yield container
    finally:
        client.api.remove_container(container, force=True, v=True)


def create_python(
    client: docker.DockerClient,
    image_id: str,
    program: str,
    labels: Mapping[str, str],
    environment: Mapping[str, str] = MappingProxyType({}),
    user: str = USER,
    name: str | None = None,
    *,
    auto_remove: bool = False,
) -> str:
    """Create a container without rights for a program of ours on an image's Python; its id."""
    quiet = {"NVIDIA_VISIBLE_DEVICES": "void", "LD_PRELOAD": "", "HOME": "/tmp"}  # noqa: S108 - the container's own
    # On a machine with many cores, a thread for each of them would hit the limit below.
    quiet |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    created = client.api.create_container(
        image_id,
        entrypoint=["python3"],
        command=["-I", "-c", program],
        user=user,
        name=name,
        environment=dict(environment) | quiet,
        labels=dict(labels),
        healthcheck={"test": ["NONE"]},
        stop_signal="SIGKILL",  # init without a handler is deaf to any other
        use_config_proxy=False,
        host_config=client.api.create_host_config(
            network_mode="none",
            read_only=True,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            mem_limit=ANSWER_MEMORY_BYTES,
            memswap_limit=ANSWER_MEMORY_BYTES,
            pids_limit=128,
            auto_remove=auto_remove,
        ),
    )
    return str(created["Id"])
