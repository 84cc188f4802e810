"""An engine killed and started anew in the middle of a run: nothing outlives the deadline."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from sandbox.box.hardening import LABEL_RUN
from sandbox.box.reaper import sweep, sweep_run_directories
from sandbox.engine.find import connect
from sandbox.engine.host import own_places
from sandbox.engine.own import install_and_start, stop_own_engine
from tests.support.boxes import python_spec

CONTROLLER = """
import sys
from pathlib import Path
from sandbox import DockerExecutor, RunSpec
url, version, root, spec = sys.argv[1:]
def show(piece):
    sys.stdout.write("up\\n")
    sys.stdout.flush()
executor = DockerExecutor(url, version, Path(root))
executor.run(RunSpec.model_validate_json(spec), on_log=show)
"""
PROGRAM = "import time; print('up', flush=True); time.sleep(60)"
ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith("DOCKER_")}


@pytest.mark.slow
@pytest.mark.usefixtures("dockerd")
def test_a_run_whose_engine_is_killed_and_started_anew_leaves_nothing(
    engine: Any, image: Any, tmp_path: Path
) -> None:
    state_dir, runs = tmp_path / "state", tmp_path / "runs"
    try:
        own = install_and_start(state_dir, environ=ENVIRON, say=lambda _: None)
        with closing(connect(engine)) as there, closing(connect(own)) as here:
            here.images.load(b"".join(there.images.get(image.base.image_id).save()))
        spec = python_spec(PROGRAM, image=image.base.image_id, wall_seconds=4)
        arguments = (own.base_url, own.api_version, str(runs), spec.model_dump_json())
        with subprocess.Popen(
            [sys.executable, "-c", CONTROLLER, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as controller:
            assert controller.stdout is not None
            assert b"up\n" == controller.stdout.readline()
            dockerd = int(own_places(state_dir).pid_file.read_text())
            os.kill(dockerd, signal.SIGKILL)
            os.waitpid(dockerd, 0)
            install_and_start(state_dir, environ=ENVIRON, say=lambda _: None)
            controller.wait(timeout=60)
        with closing(connect(own)) as here:
            sweep(here.api)
            assert [] == here.containers.list(all=True, filters={"label": LABEL_RUN})
        sweep_run_directories(runs)
        assert [] == list(runs.iterdir())
    finally:
        stop_own_engine(state_dir)
