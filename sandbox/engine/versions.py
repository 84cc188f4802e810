"""Versions of everything that boxes rest on, for the record.

They are recorded and shown, never judged: a list of known holes would be silently wrong within a
month, and distributions carry fixes under the old upstream number.
"""

import re
import shutil
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from sandbox.contract.errors import SandboxError
from sandbox.contract.record import Record
from sandbox.engine.find import Engine, connect, must_answer
from sandbox.engine.host import run_program

ENGINE_PARTS = {"Engine": "engine", "containerd": "containerd", "runc": "runc"}
TOOLKIT = "nvidia-container-toolkit"
NUMBER = re.compile(r"\b\d+(\.\d+)+\b")
COMMIT = re.compile(r"^[0-9a-f]{7,40}$|-g[0-9a-f]{7,40}$")
PROGRAM_SECONDS = 10


class Component(Record):
    """A part of the machine that boxes rest on, and its version."""

    name: str
    version: str
    package: str
    """The distribution's own number, where the part tells it."""


def installed(engine: Engine, environ: Mapping[str, str]) -> tuple[Component, ...]:
    """Return the versions that a box rests on.

    Raises:
        EngineUnavailable: the engine does not answer.
    """
    with must_answer("the engine does not answer"), closing(connect(engine)) as client:
        version, about = client.version(), client.info()
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
    return [
        _component(ENGINE_PARTS[part["Name"]], str(part["Version"]), _package(part))
        for part in version.get("Components") or []
        if part["Name"] in ENGINE_PARTS
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
        found.append(_component("nvidia-driver", version_in(driver.read_text()[:1000])))
    return found


def version_in(text: str) -> str:
    """Return the first version number in what a program or a driver prints of itself."""
    number = NUMBER.search(text)
    return number.group() if number else "unknown"


def _toolkit_version(environ: Mapping[str, str]) -> str:
    try:
        return version_in(
            run_program(["nvidia-ctk", "--version"], environ=environ, seconds=PROGRAM_SECONDS)
        )
    except SandboxError:
        return "unknown"
