"""Engines with defaults of their own: what only bounds more passes, the rest is refused by name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sandbox.box.executor import DockerExecutor
from sandbox.contract.errors import LimitNotEnforced
from sandbox.contract.run import Outcome
from sandbox.engine.find import Engine
from sandbox.engine.own import install_and_start, stop_own_engine
from tests.support.boxes import python_spec
from tests.support.gpu_stand_ins import copy_image

pytestmark = pytest.mark.slow

DEFAULTS = """#!/bin/sh
exec {dockerd} --init --default-shm-size=1g --default-ulimit=memlock=65536 \\
    --default-ulimit=nproc=64 \\
    --default-ulimit=core=0 --default-ulimit=rtprio=99 --default-ulimit=nofile=1024:4096 \\
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
