"""Hardware profiles as data: base image, packages, wheels, environment."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import Annotated, Any

from pydantic import Field, ValidationError

from sandbox.contract import Record, SandboxError


class UnknownProfile(SandboxError):
    """No hardware profile has this name."""


class Profile(Record):
    """What the image of one kind of machine is made of, and what its programs are told."""

    name: str
    base_image: str
    debian_packages: tuple[str, ...]
    lock: str
    """Name of the lock file beside the profiles."""
    torch_version: str
    torch_build: str
    torch_index: str
    """A wheel index to ask when pip as configured has no such build; empty for none."""
    torch_wheel_limit_bytes: Annotated[int, Field(gt=0)]
    environment: dict[str, str]


def find_profile(name: str) -> Profile:
    """The profile called `name`.

    Raises:
        UnknownProfile: there is none; the hint lists those there are.
    """
    profiles = read_profiles(_packaged("profiles.toml"))
    if name not in profiles:
        raise UnknownProfile(
            f"there is no hardware profile {name[:60]!r}",
            f"known profiles: {', '.join(sorted(profiles))}",
        )
    return profiles[name]


def read_profiles(text: str) -> dict[str, Profile]:
    """The profiles of a TOML text, by name.

    Raises:
        SandboxError: the text is no TOML, or a profile lacks a field or has one too many.
    """
    try:
        tables: dict[str, Any] = tomllib.loads(text)
        return {name: Profile.model_validate({"name": name, **tables[name]}) for name in tables}
    except (tomllib.TOMLDecodeError, ValidationError, TypeError) as error:
        raise SandboxError(
            f"the hardware profiles cannot be read: {error}", "reinstall nightlab"
        ) from error


def lock_text(profile: Profile) -> str:
    """The lock file of `profile`: names, versions and hashes, no index addresses."""
    return _packaged(profile.lock)


def _packaged(name: str) -> str:
    return (files("sandbox") / name).read_text(encoding="utf-8")
