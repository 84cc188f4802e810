"""Hardware profiles as data: base image, torch, packages, environment."""

import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from sandbox.contract.errors import SandboxError, first_problem
from sandbox.contract.gpu import Devices
from sandbox.contract.reading import read_named
from sandbox.contract.record import Record

OWN_PROFILES = "profiles.toml"
"""Name of the file beside program.md that may add profiles."""
MERGED = ("environment", "knobs", "peak_flops")
"""Tables of a profile to which one that is like it adds; everything else it replaces."""
TORCH_DEVICES: dict[Devices, str] = {"none": "cpu", "nvidia": "cuda"}
"""What torch calls the device."""
SET_BY_NIGHTLAB = ("NIGHTLAB_", "NVIDIA_", "LD_PRELOAD", "LD_AUDIT")
"""Beginnings of variables that decide what a box gets, and so are no profile's to set."""


class UnknownProfile(SandboxError):
    """No hardware profile has this name."""


class TorchBuild(Record):
    """The torch that is installed on a base, and the lock of what it needs."""

    lock: str
    """Name of the lock file beside the shipped profiles."""
    version: str
    build: str
    index: str
    """A wheel index to ask when pip as configured has no such build; empty for none."""
    limit_bytes: Annotated[int, Field(gt=0)]
    """A larger wheel is not the one that is wanted."""


class Profile(Record):
    """What the image of one kind of machine is made of, and what its programs are told."""

    name: str
    description: str
    base_image: str
    """Empty for a base made of the distribution's packages."""
    packages: tuple[str, ...]
    torch: TorchBuild | Literal[False]
    """False where the base brings its own."""
    base_advice: str = ""
    """What to name as base image where the profile names none and installs no torch."""
    devices: Devices
    """What kind of accelerator its boxes get, and so how the engine is asked for it."""
    oldest_build: Annotated[str, Field(pattern=r"^([0-9]+(\.[0-9]+)*)?$")] = ""
    """Version of CUDA that torch must at least be built for; empty for any."""
    architectures: tuple[str, ...] = ()
    """GPU architectures of which torch must be built for one; empty for any."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """What to compute in; `auto` leaves it to train.py."""
    knobs: dict[str, str] = Field(default_factory=dict)
    """Where train.py starts on such a machine: literal and comment of single knobs, by name."""
    peak_flops: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Dense arithmetic operations a second in the profile's dtype, by the device's full name."""
    allocator_variable: Annotated[str, Field(pattern=r"^[A-Z_]*$")] = ""
    """Variable by which this torch bounds its allocator (`per_process_memory_fraction`, torch 2.13
    and later); empty where it cannot."""
    environment: dict[str, str]

    @field_validator("environment")
    @classmethod
    def _leaves_the_box_alone(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if name.startswith(SET_BY_NIGHTLAB):
                raise ValueError(f"{name[:60]} is not for a profile to set")
        return environment

    @property
    def variables(self) -> dict[str, str]:
        """What programs are told of the hardware: the profile's own words, device, dtype."""
        described = {"NIGHTLAB_DEVICE": TORCH_DEVICES[self.devices]}
        if self.dtype != "auto":
            described["NIGHTLAB_DTYPE"] = self.dtype
        return self.environment | described


def find_profile(name: str, place: Path | None = None) -> Profile:
    """The profile called `name`: one of the person's own beside program.md, else a shipped one.

    Args:
        name: as `[hardware] profile` says it.
        place: the directory of program.md; None asks for shipped profiles only.

    Raises:
        UnknownProfile: there is none; the hint lists those there are.
        SandboxError: the file of profiles cannot be used; the message says where.
    """
    profiles = known_profiles(place)
    if name not in profiles:
        raise UnknownProfile(
            f"there is no hardware profile {name[:60]!r}",
            f"known profiles: {', '.join(sorted(profiles))}; "
            f"{OWN_PROFILES} beside program.md may add one",
        )
    return profiles[name]


def known_profiles(place: Path | None) -> dict[str, Profile]:
    """Every profile that can be named from a place, by name; see `find_profile`."""
    shipped = _tables(packaged_text("profiles.toml"), "the shipped profiles")
    own = {} if place is None else _own_tables(place / OWN_PROFILES)
    # A shipped name with other content would say on record what was not run.
    if shadowed := sorted(own.keys() & shipped.keys()):
        raise SandboxError(
            f"{OWN_PROFILES}: {shadowed[0]!r} is the name of a shipped profile",
            f"choose another name, and write: like = {shadowed[0]!r}",
        )
    return read_profiles(shipped | own)


def read_profiles(tables: Mapping[str, Any]) -> dict[str, Profile]:
    """The profiles of parsed tables, by name; `like` takes what a table leaves out from another.

    Raises:
        SandboxError: a profile lacks a field, has one too many, or is like one that is not there.
    """
    return {name: _profile(name, tables) for name in tables}


def lock_text(build: TorchBuild) -> str:
    """The lock file of a torch: names, versions and hashes, no index addresses."""
    return packaged_text(build.lock)


def _profile(name: str, tables: Mapping[str, Any]) -> Profile:
    try:
        return Profile.model_validate({**_inherited(name, tables, ()), "name": name})
    except ValidationError as error:
        raise SandboxError(
            f"hardware profile {name[:60]!r}: {first_problem(error)}",
            "see the fields of a shipped profile, or begin with: like = 'cpu'",
        ) from error


def _inherited(name: str, tables: Mapping[str, Any], heirs: tuple[str, ...]) -> dict[str, Any]:
    """The fields of one table, and below them those of the profile that it is like."""
    table = tables.get(name)
    if not isinstance(table, dict) or name in heirs:
        heir = heirs[-1] if heirs else name
        why = "is like itself" if name in heirs else f"{name[:60]!r} is not a table"
        raise SandboxError(f"hardware profile {heir[:60]!r}: {why}", "see `like` in profiles.toml")
    fields = dict(table)
    parent = fields.pop("like", None)
    if parent is None:
        return fields
    older = _inherited(str(parent), tables, (*heirs, name))
    merged = {
        table: older.get(table, {}) | fields.get(table, {})
        for table in MERGED
        if table in older or table in fields
    }
    return older | fields | merged


def _own_tables(path: Path) -> dict[str, Any]:
    try:
        return _tables(read_named(path).decode(), path.name)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise SandboxError(f"{path.name} cannot be read: {error}", "mend or remove it") from error


def _tables(text: str, name: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SandboxError(f"{name}: {error}", "mend this line of the TOML") from error


def packaged_text(name: str) -> str:
    """A file that is shipped beside the profiles."""
    return (files("sandbox.image") / name).read_text(encoding="utf-8")
