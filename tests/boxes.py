"""Makes run specs small enough for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sandbox.contract import Limits, Mount, RunSpec
from sandbox.hardware import find_profile
from sandbox.image import Recipe

DOCKERFILE = Path(__file__).parents[1] / "Dockerfile.train"
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


def shipped_recipe(
    profile: str = "cpu", base_image: str = "", dockerfile: Path = DOCKERFILE
) -> Recipe:
    """Return what the shipped program.md asks of its image, or a variation of it."""
    return Recipe(
        profile=find_profile(profile), dockerfile=dockerfile.read_text(), base_image=base_image
    )


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
