"""Makes run specs small enough for tests, and looks after their boxes from outside."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docker
import docker.errors

from sandbox.box.hardening import LABEL_SESSION
from sandbox.box.reaper import GONE_OR_GOING
from sandbox.contract.run import Limits, Mount, RunSpec
from sandbox.engine.find import Engine
from sandbox.image.image import ImageRecord, Recipe, remember_image
from sandbox.image.profiles import find_profile
from sandbox.machine import shipped_recipe as shipped

CONTROLLER = """
import sys
from pathlib import Path
from sandbox import DockerExecutor, RunSpec
url, version, root, spec = sys.argv[1:]
DockerExecutor(url, version, Path(root)).run(RunSpec.model_validate_json(spec))
"""
"""A process that runs one box: engine, API version, run directory, spec."""
DOCKERFILE = Path(__file__).parents[2] / "Dockerfile.train"
MEBIBYTE = 2**20
BUSY_SECONDS = 60
"""What a busy machine may take for anything that a quiet one does at once."""
IMAGE = "sha256:" + "0" * 64

SMALL_LIMITS: dict[str, float] = {
    "wall_seconds": 10,
    "memory_bytes": 128 * MEBIBYTE,
    "cpus": 1,
    "pids": 32,
    "tmp_bytes": 16 * MEBIBYTE,
    "shm_bytes": 8 * MEBIBYTE,
    "output_bytes": 4 * MEBIBYTE,
    "output_files": 8,
    "open_files": 128,
    "log_bytes": 4096,
    "loopback": False,
}


def shipped_recipe(
    profile: str = "cpu", base_image: str = "", dockerfile: Path = DOCKERFILE
) -> Recipe:
    """Return what the shipped program.md asks of its image, or a variation of it."""
    changes = {"profile": find_profile(profile), "base_image": base_image}
    return shipped().model_copy(update=changes | {"dockerfile": dockerfile.read_text()})


def remember(image: ImageRecord, engine: Engine, state_dir: Path) -> None:
    """Note an image as the one that set-up made on an engine, where `find_image` looks."""
    remember_image(engine, shipped_recipe(), image, state_dir=state_dir)


def box_spec(
    *argv: str, image: str = IMAGE, mounts: dict[Path, str] | None = None, **limits: float
) -> RunSpec:
    """Return a spec with small limits; keyword arguments replace single limits."""
    return RunSpec(
        run_id="run-1",
        session="test",
        box="train",
        image=image,
        argv=argv or ("true",),
        working_directory="/",
        environment={"NIGHTLAB_SEED": "7"},
        mounts=tuple(Mount(source=s, target=t) for s, t in (mounts or {}).items()),
        gpus=(),
        limits=Limits.model_validate(SMALL_LIMITS | limits),
    )


def python_spec(code: str, **options: Any) -> RunSpec:
    """Return a spec that runs one Python program."""
    return box_spec("python3", "-c", code, **options)


def wait_until(condition: Callable[[], bool], seconds: float = BUSY_SECONDS) -> bool:
    """Tell whether a condition came true in time; a test that measures time lies in `bench`."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        if condition():
            return True
        time.sleep(0.02)
    return False


def in_session(spec: RunSpec, session: str) -> RunSpec:
    """Return the same run in a session of its own."""
    return spec.model_copy(update={"session": session})


def remove_box(client: docker.APIClient, box: str) -> None:
    """Remove a container that may be gone, or that a sweep of another session removes just now."""
    try:
        client.remove_container(box, force=True)
    except docker.errors.APIError as error:
        if error.status_code not in GONE_OR_GOING:
            raise


def boxes_of(client: docker.APIClient, session: str) -> list[dict[str, Any]]:
    """Return the containers of one session."""
    found: list[dict[str, Any]] = client.containers(
        all=True, filters={"label": f"{LABEL_SESSION}={session}"}
    )
    return found


def running(client: docker.APIClient, session: str) -> list[int]:
    """Return the host's process ids of a session's only box, PID 1 first."""
    for box in boxes_of(client, session):
        with contextlib.suppress(docker.errors.APIError):
            processes = client.top(box["Id"], "-o pid")["Processes"] or []
            return sorted(int(fields[0]) for fields in processes)
    return []


def children(pid: int) -> list[int]:
    """Return the process ids of a process's children, of all of its threads."""
    found = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(word) for text in found for word in text.split()]
