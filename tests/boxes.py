"""Makes run specs small enough for tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sandbox.contract import Limits, Mount, RunSpec

MEBIBYTE = 2**20
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
}


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


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Tell whether a condition came true in time."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        if condition():
            return True
        time.sleep(0.02)
    return False
