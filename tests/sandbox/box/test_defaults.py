"""An engine of somebody's own: its defaults, and that it is cleaned up between two boxes."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sandbox.box.executor import DockerExecutor
from sandbox.contract.errors import LimitNotEnforced
from sandbox.contract.run import Outcome
from sandbox.engine.find import Engine, connect
from sandbox.engine.own import install_and_start, stop_own_engine
from sandbox.image.hold import LABEL_HOLDS, hold_images
from sandbox.image.image import has_image
from tests.support.boxes import python_spec, wait_until
from tests.support.gpu_stand_ins import copy_image

pytestmark = pytest.mark.slow

DEFAULTS = """#!/bin/sh
exec {dockerd} --init --default-shm-size=1g --default-ulimit=memlock=65536 \\
    --default-ulimit=nproc=64 \\
    --default-ulimit=core=0 --default-ulimit=stack=8388608 --default-ulimit=nofile=1024:4096 \\
    --log-driver=json-file --log-opt=compress=true --log-opt=max-size=10m --log-opt=max-file=3 \\
    --log-opt=mode=non-blocking --log-opt=max-buffer-size=4m "$@"
"""
"""What hardening guides and vendors of GPU servers write into `daemon.json`."""


class Hardened(NamedTuple):
    """An engine with such defaults, and what of it a test needs."""

    engine: Engine
    image: str
    runs: Path


@pytest.fixture(scope="module")
def hardened(
    dockerd: None, engine: Engine, image: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Hardened]:
    place = tmp_path_factory.mktemp("defaults")
    program = place / "dockerd"
    program.write_text(DEFAULTS.format(dockerd=shutil.which("dockerd")))
    program.chmod(0o755)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DOCKER_")}
    environ |= {"PATH": f"{place}:{environ['PATH']}", "DOCKER_CONFIG": str(place)}
    try:
        own = install_and_start(place / "state", environ=environ, say=lambda _: None)
        base = copy_image(engine, own.base_url, image.base.image_id)
        hold_images(own, [base])
        yield Hardened(own, base, place / "runs")
    finally:
        stop_own_engine(place / "state")


def test_a_box_runs_on_an_engine_whose_defaults_only_bound_more(hardened: Hardened) -> None:
    own = hardened.engine
    executor = DockerExecutor(own.base_url, own.api_version, hardened.runs)

    result = executor.run(python_spec("print('ran')", image=hardened.image, pids=32))

    assert (Outcome.OK, "ran\n") == (result.outcome, result.log.head)
    seen = result.evidence["container"]["proved"]["rlimits"]
    assert ([64, 64], [0, 0], [1, 1]) == (seen["nproc"], seen["rtprio"], seen["core"])


def test_a_default_that_a_program_would_be_blamed_for_is_refused_by_name(
    hardened: Hardened,
) -> None:
    own = hardened.engine
    executor = DockerExecutor(own.base_url, own.api_version, hardened.runs)

    with pytest.raises(LimitNotEnforced, match=r"nproc: the box needs 65, .* leave 64"):
        executor.run(python_spec("pass", image=hardened.image, pids=65))


def test_images_of_a_session_outlive_a_clean_up_of_the_engine(hardened: Hardened) -> None:
    own = hardened.engine
    with contextlib.closing(connect(own)) as client:
        ids: dict[str, str] = {}
        for name in ("held", "other"):
            recipe = io.BytesIO(f"FROM {hardened.image}\nLABEL name={name}".encode())
            built, _ = client.images.build(fileobj=recipe, tag=f"nightlab-train:{name}", rm=True)
            ids[name] = str(built.id)
        hold_images(own, [ids["held"], "sha256:" + "0" * 64])  # one that is gone stops nothing
        hold_images(own, [ids["held"]])

        client.containers.prune()
        client.images.prune(filters={"dangling": False})

        assert has_image(own, ids["held"])
        assert not has_image(own, ids["other"])
        assert "nightlab-train:held" in client.images.get(ids["held"]).tags
        held: dict[str, Any] = {"label": f"{LABEL_HOLDS}={ids['held']}"}
        (holder,) = client.containers.list(filters=held)
        holder.stop()
        assert wait_until(lambda: not client.api.containers(all=True, filters=held))
        client.images.prune(filters={"dangling": False})
        assert not has_image(own, ids["held"])
