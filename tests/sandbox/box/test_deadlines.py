"""Each of the three deadlines alone, against programs that do not want to end.

All programs run at once, so that a deadline is tested beside others that are due.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import docker
import docker.errors
import pytest

from sandbox import DockerExecutor, Outcome, RunResult, RunSpec
from sandbox.box.reaper import sweep, sweep_run_directories
from tests.support.boxes import (
    CONTROLLER,
    boxes_of,
    children,
    in_session,
    remove_box,
    running,
    wait_until,
)
from tests.support.cases import case_spec, read_case

pytestmark = [pytest.mark.docker]

HOSTILE = (
    "ignores_sigterm",
    "daemons_spin",
    "stops_itself",
    "signals_everything",
    "traces_pid_1_and_hangs",
    "sleeps_in_exit_handler",
    "floods_into_the_deadline",
    "memory_thrash",
)


BUSY_SECONDS = 15.0
"""What a busy machine may add; every program would go on for a minute."""


class Stage:
    """Sessions of this test, one for each hostile program."""

    def __init__(self, engine: Any, image: Any, root: Path) -> None:
        self.engine = engine
        self.image = image
        self.root = root

    def client(self) -> docker.APIClient:
        return docker.APIClient(base_url=self.engine.base_url, version=self.engine.api_version)

    def spec(self, case: str, wall_seconds: float) -> RunSpec:
        """Return one program's run in a session of its own."""
        spec = case_spec(case, read_case(case), self.image.image_id)
        limits = spec.limits.model_copy(update={"wall_seconds": wall_seconds})
        name = case.replace("_", "-")
        return in_session(
            spec.model_copy(update={"limits": limits}), f"dead-{os.getpid()}-{name}"[:60]
        )

    def pid_1(self, client: docker.APIClient, spec: RunSpec) -> int:
        """Wait until the program runs and return PID 1 as this host sees it."""
        assert wait_until(lambda: len(running(client, spec.session)) >= 2), spec.session
        return running(client, spec.session)[0]

    def freeze(self, controller: subprocess.Popen[bytes], spec: RunSpec) -> None:
        """Freeze a controller whose program runs, and kill its watchdog."""
        with closing(self.client()) as client:
            self.pid_1(client, spec)
        for watchdog in children(controller.pid):
            os.kill(watchdog, signal.SIGKILL)
        controller.send_signal(signal.SIGSTOP)

    def living(self) -> dict[str, int]:
        """Return how many processes beside PID 1 live in each session's box."""
        with closing(self.client()) as client:
            found = {c: running(client, self.spec(c, 1).session) for c in HOSTILE}
        return {case: len(pids) - 1 for case, pids in found.items() if len(pids) > 1}

    def containers(self) -> list[str]:
        with closing(self.client()) as client:
            return [b["Id"] for c in HOSTILE for b in boxes_of(client, self.spec(c, 1).session)]


@pytest.fixture
def stage(engine: Any, image: Any, tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(engine, image, tmp_path)
    yield stage
    with closing(stage.client()) as client:
        for box in stage.containers():
            remove_box(client, box)


def stopping_pid_1(stage: Stage, spec: RunSpec) -> None:
    """Stop PID 1, which the host can and the program cannot."""
    with closing(stage.client()) as client:
        pid = stage.pid_1(client, spec)
    for _ in range(15):  # a program may wake PID 1 by SIGCONT, and one does so at its start
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.1)


def test_the_host_s_clock_alone_ends_them_all(stage: Stage) -> None:
    specs = [stage.spec(case, wall_seconds=6) for case in HOSTILE]

    def run(spec: RunSpec) -> RunResult:
        executor = DockerExecutor(
            stage.engine.base_url, stage.engine.api_version, stage.root / "runs"
        )
        return executor.run(spec)

    with ThreadPoolExecutor(2 * len(specs)) as pool:
        runs = [pool.submit(run, spec) for spec in specs]
        for stopped in [pool.submit(stopping_pid_1, stage, spec) for spec in specs]:
            stopped.result()
        results = [each.result() for each in runs]
    assert [Outcome.TIMED_OUT] * len(HOSTILE) == [result.outcome for result in results]
    assert {"host_deadline"} == {result.evidence["killed_by"] for result in results}
    assert max(result.wall_seconds for result in results) < 6 + BUSY_SECONDS
    assert [] == stage.containers()


@contextmanager
def controllers(stage: Stage, wall_seconds: float) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Give a controller for each program, frozen once that runs, and its watchdog killed."""
    started = {}
    for case in HOSTILE:
        words = (stage.engine.base_url, stage.engine.api_version, str(stage.root / "runs"))
        spec = stage.spec(case, wall_seconds)
        started[case] = subprocess.Popen(
            [sys.executable, "-c", CONTROLLER, *words, spec.model_dump_json()],
            stderr=subprocess.DEVNULL,
        )
    try:
        with ThreadPoolExecutor(len(HOSTILE)) as pool:
            specs = [stage.spec(case, wall_seconds) for case in started]
            list(pool.map(stage.freeze, started.values(), specs))
        yield list(started.values())
    finally:
        for process in started.values():
            process.kill()
            process.wait()


def test_pid_1_s_clock_alone_ends_them_all(stage: Stage) -> None:
    """Of a flood PID 1 itself stays for a minute, in case that the controller thaws."""
    with controllers(stage, wall_seconds=5):
        assert wait_until(lambda: stage.living() == {}, 5 + BUSY_SECONDS), stage.living()


def test_the_sweep_of_the_next_start_alone_ends_them_all(stage: Stage) -> None:
    wall_seconds = 3 * BUSY_SECONDS
    with controllers(stage, wall_seconds) as processes:
        specs = [stage.spec(case, wall_seconds) for case in HOSTILE]
        with ThreadPoolExecutor(len(HOSTILE)) as pool:
            list(pool.map(lambda spec: stopping_pid_1(stage, spec), specs))
        assert set(HOSTILE) == set(stage.living())
        for process in processes:
            process.kill()
            process.wait()
        with closing(stage.client()) as client:
            sweep(client)
        sweep_run_directories(stage.root / "runs")
        assert ({}, []) == (stage.living(), stage.containers())
        assert [] == list((stage.root / "runs").iterdir())
