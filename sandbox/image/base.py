"""Chooses what an image is built on.

A given image, the profile's image from a registry, or, where no registry answers, a base of the
host's own distribution's packages.
"""

from contextlib import closing, suppress
from typing import Literal

import docker
from docker.utils import parse_repository_tag
from pydantic import ValidationError

from sandbox.contract.record import Record
from sandbox.engine.find import FAILED_CALLS, connect
from sandbox.engine.host import last_lines
from sandbox.image.check import OLDEST_PYTHON, ask_python
from sandbox.image.debian import BaseUnavailable, import_debian
from sandbox.image.profiles import Profile
from sandbox.image.wheels import Target
from sandbox.image.workshop import (
    TAG_DIGITS,
    BuildFailed,
    Workshop,
    drain,
    engine_digits,
    inspect_image,
    key_of,
    write_note,
)

BASE_NAME = "nightlab-base"
REGISTRY_SECONDS = 20
MACHINES = ("x86_64", "aarch64")
PROBE = (
    "import json, platform, sys; print(json.dumps({"
    "'python': '%d.%d' % sys.version_info[:2], "
    "'machine': platform.machine(), 'libc': platform.libc_ver()[0]}))"
)


class BaseImage(Record):
    """What the image is built on, and where it came from."""

    reference: str
    image_id: str
    digest: str
    """The registry's digest, or the image's own id where it came from no registry."""
    source: Literal["given", "registry", "debian"]
    target: Target


class _Probed(Record):
    python: str
    machine: str
    libc: str


def base_for(shop: Workshop, profile: Profile, given: str) -> BaseImage:
    """The base chosen before for the same wish, or a new choice.

    Args:
        shop: where it is looked for, and made.
        profile: names an image of its own, or the packages of one.
        given: an image that a person named instead; empty for none.

    Raises:
        BaseUnavailable: there is none to be had; the hint says which way round it leads.
    """
    wish = key_of(profile.base_image, *profile.packages, given)
    note = shop.images / f"base-{wish[:TAG_DIGITS]}-{engine_digits(shop.engine)}.json"
    with suppress(OSError, ValidationError):
        base = BaseImage.model_validate_json(note.read_text())
        facts = inspect_image(shop.client, base_tag(base.image_id))
        is_there = facts is not None and facts["Id"] == base.image_id
        if is_there and not has_moved(shop.client, given, base):
            return base
    base = _choose_base(shop, profile, given)
    write_note(note, base.model_dump_json())
    return base


def _choose_base(shop: Workshop, profile: Profile, given: str) -> BaseImage:
    wanted = given or profile.base_image
    if not wanted and not profile.torch:
        raise BaseUnavailable(
            f"profile {profile.name} needs a base image that brings its own torch",
            "name it: `[hardware] base_image` in program.md, or --base-image REF"
            + (f"; {profile.base_advice}" if profile.base_advice else ""),
        )
    if wanted:
        reference = _local(shop.client, wanted, has_digest=not given) or _pull(shop, wanted)
        if reference is not None:
            return _describe(shop.client, reference, "given" if given else "registry")
    if given or not profile.torch:
        raise BaseUnavailable(
            f"the base image {wanted} is neither on this engine nor to be had from its registry",
            "check the name, `docker pull` or `docker load` it, or leave it out",
        )
    # Last, since it takes half a minute and builds what nobody else has ever seen.
    return _describe(shop.client, import_debian(shop, profile), "debian")


def _local(client: docker.DockerClient, reference: str, *, has_digest: bool) -> str | None:
    """The reference, if the engine has it; by digest if it must have come from a registry."""
    facts = inspect_image(client, reference)
    if facts is None:
        return None
    return next(iter(facts["RepoDigests"] or ()), None) if has_digest else reference


def _pull(shop: Workshop, reference: str) -> str | None:
    """Pull an image by the digest its tag stands for today; None where no registry gives one."""
    shop.say(f"Asking the registry for {reference} (at most {REGISTRY_SECONDS} s).")
    try:
        with closing(connect(shop.engine, timeout_seconds=REGISTRY_SECONDS)) as client:
            digest = client.images.get_registry_data(reference).attrs["Descriptor"]["digest"]
        # By digest: between asking and pulling a tag can come to mean another image.
        pinned = f"{parse_repository_tag(reference)[0]}@{digest}"
        shop.say(f"Pulling {pinned}.")
        with closing(connect(shop.engine, timeout_seconds=REGISTRY_SECONDS * 10)) as client:
            drain(client.api.pull(pinned, stream=True, decode=True))
    except (BuildFailed, *FAILED_CALLS) as error:
        shop.say(f"No registry gives it: {last_lines(str(error), 1)[:200]}")
        return None
    return pinned


def _describe(
    client: docker.DockerClient, reference: str, source: Literal["given", "registry", "debian"]
) -> BaseImage:
    """Tag a base, ask its Python what it is, and record where it came from."""
    facts = client.images.get(reference).attrs
    digests = [name.partition("@")[2] for name in facts["RepoDigests"] or ()]
    base = BaseImage(
        reference=reference if source != "debian" else base_tag(facts["Id"]),
        image_id=facts["Id"],
        digest=digests[0] if digests else facts["Id"],
        source=source,
        target=_target(reference, ask_python(client, facts["Id"], PROBE, {})),
    )
    client.images.get(base.image_id).tag(base_tag(base.image_id))
    return base


def _target(reference: str, printed: str) -> Target:
    """The wheels' target for a base whose Python said this of itself."""
    try:
        probed = _Probed.model_validate_json(printed)
    except ValidationError as error:
        raise BaseUnavailable(
            f"the base image {reference} has no usable python3: {last_lines(printed, 1)}",
            "give `--base-image` one that has Python 3.11 or later",
        ) from error
    version = tuple(int(part) for part in probed.python.split("."))
    if version < OLDEST_PYTHON or probed.libc != "glibc" or probed.machine not in MACHINES:
        raise BaseUnavailable(
            f"the base image {reference} has Python {probed.python}, {probed.libc or 'no glibc'}, "
            f"{probed.machine}; torch's wheels need Python 3.11, glibc, x86-64 or AArch64",
            "give `--base-image` one that has them, such as an official python:3.11 image",
        )
    return Target(python=probed.python, machine=probed.machine)


def has_moved(client: docker.DockerClient, given: str, base: BaseImage) -> bool:
    """Whether the name that a person gave stands for another image on this engine now."""
    facts = inspect_image(client, given) if given else None
    return facts is not None and facts["Id"] != base.image_id


def base_tag(image_id: str) -> str:
    """The name by which the builder takes a base: a local tag on every engine, an id on some."""
    return f"{BASE_NAME}:{image_id.partition(':')[2][:TAG_DIGITS]}"
