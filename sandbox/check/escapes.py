"""Compares an engine's versions with the known ways out.

A version tells less than it seems: distributions carry fixes under the old upstream number. So an
old number with a distribution's mark is a warning with words, never a verdict.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from collections.abc import Mapping
from contextlib import closing
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from docker.errors import DockerException
from requests.exceptions import RequestException

from sandbox.contract.errors import EngineUnavailable, SandboxError
from sandbox.contract.record import Record
from sandbox.engine.find import Engine, connect
from sandbox.engine.host import run_program

Standing = Literal["ok", "warning", "gave way"]

TOOLKIT = "nvidia-container-toolkit"
DISTRIBUTION_MARKS = re.compile(r"[+~]|deb|ubuntu|\.el\d|\.fc\d|-\d")
NUMBER = re.compile(r"\d+(?:\.\d+)*")
COMMIT = re.compile(r"^[0-9a-f]{7,40}$|-g[0-9a-f]{7,40}$")
PROGRAM_SECONDS = 10


class Escape(Record):
    """One known way out of a container."""

    id: str
    component: str
    what: str
    since: str = "0"
    """The first version that has it."""
    fixed: tuple[str, ...]
    """Empty where no fixed version is on record here."""
    needs: Literal["process", "image"]
    avoided: str


class Component(Record):
    """A part of the machine that boxes rest on, and its version."""

    name: str
    version: str
    package: str
    """The distribution's own number, where the part tells it."""


class VersionRow(Record):
    """One known way out against one installed version."""

    escape: str
    component: str
    version: str
    standing: Standing
    words: str


def known_escapes() -> tuple[Escape, ...]:
    """Return the known ways out."""
    text = resources.files("sandbox.check").joinpath("escapes.toml").read_text(encoding="utf-8")
    return tuple(Escape.model_validate(entry) for entry in tomllib.loads(text)["escape"])


def number_of(version: str) -> tuple[int, ...]:
    """Return the upstream number in a version; empty when there is none.

    >>> number_of("1.1.5+ds1")
    (1, 1, 5)
    """
    found = NUMBER.search(version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def is_fixed(version: str, fixed: tuple[str, ...]) -> bool:
    """Tell whether an upstream number is at or past the fix of its branch."""
    number = number_of(version)
    fixes = sorted(number_of(text) for text in fixed)
    if not number or not fixes:
        return False
    same_branch = [fix for fix in fixes if fix[:2] == number[:2]]
    return number >= same_branch[0] if same_branch else number > fixes[-1]


def judge(escape: Escape, component: Component) -> VersionRow:
    """Return how an installed version stands to one known way out."""
    standing, words = _standing(escape, component)
    return VersionRow(
        escape=escape.id,
        component=component.name,
        version=component.version,
        standing=standing,
        words=f"{escape.what}; {words}",
    )


def _standing(escape: Escape, component: Component) -> tuple[Standing, str]:
    fixes = ", ".join(escape.fixed)
    if is_fixed(component.version, escape.fixed):
        return "ok", f"fixed in {fixes}"
    if () < number_of(component.version) < number_of(escape.since):
        return "ok", f"came with {escape.since}"
    if escape.avoided:
        return "ok", escape.avoided
    if not escape.fixed:
        return "warning", "compare your version with the maker's bulletins, and update"
    if DISTRIBUTION_MARKS.search(component.version + " " + component.package):
        return "warning", (
            f"fixed upstream in {fixes}; the distribution may carry the fix under the old number: "
            f"look up {component.package or component.version} in its security tracker"
        )
    if escape.needs == "image":
        return "warning", f"fixed in {fixes}: update; it needs a hostile image"
    return "gave way", f"fixed in {fixes}: update before the next run"


def version_rows(components: tuple[Component, ...]) -> tuple[VersionRow, ...]:
    """Return every known way out of the parts that are installed."""
    named = {component.name: component for component in components}
    return tuple(
        judge(escape, named[escape.component])
        for escape in known_escapes()
        if escape.component in named
    )


def installed(engine: Engine, environ: Mapping[str, str]) -> tuple[Component, ...]:
    """Return the versions that a box rests on.

    Raises:
        EngineUnavailable: the engine does not answer.
    """
    try:
        with closing(connect(engine)) as client:
            version, about = client.version(), client.info()
    except (DockerException, RequestException) as error:
        raise EngineUnavailable(f"the engine does not answer: {error}"[:1000]) from error
    return (
        *_engine_components(version),
        _component("kernel", str(about.get("KernelVersion", ""))),
        _component("cgroup", f"version {engine.cgroup_version}, {engine.cgroup_driver}"),
        _component("storage", engine.storage_driver),
        *nvidia_components(environ),
    )


def _component(name: str, version: str, package: str = "") -> Component:
    return Component(name=name, version=version[:100], package=package[:100])


def _engine_components(version: Mapping[str, Any]) -> list[Component]:
    names = {"Engine": "engine", "containerd": "containerd", "runc": "runc"}
    return [
        _component(names[part["Name"]], str(part["Version"]), _package(part))
        for part in version.get("Components") or []
        if part["Name"] in names
    ]


def _package(part: Mapping[str, Any]) -> str:
    """Return the distribution's number, which stands where upstream names its commit."""
    commit = str((part.get("Details") or {}).get("GitCommit", ""))
    return "" if COMMIT.search(commit) else commit


def nvidia_components(environ: Mapping[str, str]) -> list[Component]:
    """Return toolkit and driver where there are any."""
    found = []
    if shutil.which("nvidia-ctk", path=environ.get("PATH")):
        found.append(_component(TOOLKIT, _toolkit_version(environ)))
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists():
        found.append(_component("nvidia-driver", driver_version(driver.read_text()[:1000])))
    return found


def driver_version(told: str) -> str:
    """Return the number in what the driver's kernel module says of itself."""
    number = re.search(r"\b\d+\.\d+(\.\d+)?\b", told)
    return number.group() if number else "unknown"


def _toolkit_version(environ: Mapping[str, str]) -> str:
    try:
        said = run_program(["nvidia-ctk", "--version"], environ=environ, seconds=PROGRAM_SECONDS)
    except SandboxError:
        return "unknown"
    found = NUMBER.search(said)
    return found.group() if found else "unknown"
