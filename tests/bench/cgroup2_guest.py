"""What runs inside the emulated machine of `tests.bench.cgroup2`.

`load FILE` hands an image to the engine; `test REFERENCE TEST...` runs pytest with that image as
the one that boxes are made from, and then `nightlab check`.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from sandbox.engine.find import Engine, connect, find_engine
from sandbox.engine.versions import installed
from sandbox.image.base import BaseImage
from sandbox.image.image import ImageRecord
from sandbox.image.wheels import Target
from sandbox.machine import state_directory
from tests.support.boxes import remember

STATE = state_directory(os.environ)
OPTIONS = ("--require=docker", "-p", "no:cacheprovider", "--color=no", "--tb=short", "-rfE")
NEED_TORCH = "loader_worker or data_loader_workers or inductor or gloo"
SECONDS_OF_A_TEST = 1200


def without_torch(engine: Engine, reference: str) -> ImageRecord:
    """Return a base image as if it were the one that set-up makes, which has torch."""
    with closing(connect(engine)) as client:
        image_id = client.images.get(reference).id
    base = BaseImage(
        reference=reference,
        image_id=image_id,
        digest=image_id,
        source="given",
        target=Target(python="3.11", machine=platform.machine()),
    )
    return ImageRecord(
        reference=reference,
        image_id=image_id,
        digest=image_id,
        base=base,
        python=base.target.python,
        torch="none",
        torch_build="no accelerator",
        torch_wheel=None,
        content_key="0" * 64,
        profile="cpu",
        built=True,
    )


def main() -> int:
    """Do as told; other than 0 when something failed."""
    task, subject, *tests = sys.argv[1:]
    engine = find_engine(STATE, environ=os.environ)
    if task == "load":
        with closing(connect(engine)) as client, Path(subject).open("rb") as archive:
            client.images.load(archive)
        return 0
    versions = (f"{part.name} {part.version}" for part in installed(engine, os.environ))
    sys.stdout.write(f"cgroup v{engine.cgroup_version}: {', '.join(versions)}\n")
    sys.stdout.flush()
    remember(without_torch(engine, subject), engine, STATE)
    failed = pytest.main(
        [*OPTIONS, f"--timeout={SECONDS_OF_A_TEST}", f"-knot ({NEED_TORCH})", *tests]
    )
    return failed or subprocess.run([sys.executable, "-m", "agent.cli", "check"]).returncode


if __name__ == "__main__":
    sys.exit(main())
