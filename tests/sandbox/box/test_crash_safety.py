"""Controllers killed and engines failing at every step of a run's life: nothing is left."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import docker
import docker.errors
import pytest

from sandbox import DockerExecutor, Outcome, RunSpec, SandboxError
from sandbox.box.follow import Step
from sandbox.box.hardening import LABEL_SESSION, Lease, Settings, container_settings
from sandbox.box.reaper import sweep, sweep_run_directories
from sandbox.contract.errors import ContainerUnkillable, EngineUnavailable
from tests.support.boxes import python_spec, wait_until
from tests.support.engine_proxy import Action, EngineProxy, Fault

REQUESTS = [
    "GET /images//json",
    "POST /containers/create",
    "POST /containers//start",
    "GET /containers//json",
    "DELETE /containers/",
]
"""Everything that a run asks of the engine, in this order."""
FREEZER = Path("/sys/fs/cgroup/freezer")
CONTROLLER = """
import os, signal, sys
from pathlib import Path
from sandbox import DockerExecutor, RunSpec
url, version, root, output, spec, last_step = sys.argv[1:]
def die(step):
    if step == last_step:
        os.kill(os.getpid(), signal.SIGKILL)
executor = DockerExecutor(url, version, Path(root), on_step=die)
executor.run(
    RunSpec.model_validate_json(spec), output_dir=Path(output), on_log=lambda _: die("log")
)
"""


class Bench:
    """One session's runs on the real engine, and what is left of them."""

    def __init__(self, engine: Any, image: Any, client: docker.APIClient, root: Path) -> None:
        self.engine = engine
        self.client = client
        self.root = root
        self.runs = root / "runs"
        self.session = f"crash-{os.getpid()}-{root.name.strip('_').replace('_', '-').lower()}"[:60]
        code = "open('/out/model', 'w').write('x' * 1000); print('up', flush=True)"
        self.spec: RunSpec = python_spec(code, image=image.image_id).model_copy(
            update={"session": self.session.rstrip("-")}
        )

    def executor(self, url: str, call_seconds: int = 30, **options: Any) -> DockerExecutor:
        version = self.engine.api_version
        return DockerExecutor(url, version, self.runs, call_seconds=call_seconds, **options)

    def controller(self, url: str, last_step: str = "") -> subprocess.Popen[bytes]:
        """Start a process that runs one box, and dies at a step if asked to."""
        output = self.root / "output"
        output.mkdir()
        arguments = (url, self.engine.api_version, self.runs, output, self.spec.model_dump_json())
        return subprocess.Popen(
            [sys.executable, "-c", CONTROLLER, *map(str, arguments), last_step],
            stderr=subprocess.DEVNULL,
        )

    def boxes(self) -> list[str]:
        found = self.client.containers(
            all=True, filters={"label": f"{LABEL_SESSION}={self.spec.session}"}
        )
        return [box["Id"] for box in found]

    def processes(self) -> list[int]:
        """Return the host's process ids of everything that lives in the session's boxes."""
        found = []
        for box in self.boxes():
            with contextlib.suppress(docker.errors.APIError):  # it does not run
                found += self.client.top(box, "-o pid")["Processes"] or []
        return [int(fields[0]) for fields in found]

    def start_anew(self) -> None:
        """Do what every start of nightlab does first."""
        sweep(self.client)
        sweep_run_directories(self.runs)
        give_up = time.monotonic() + 5  # the watchdog may be at it at the same moment
        while self.boxes() and time.monotonic() < give_up:
            time.sleep(0.05)

    def leftovers(self) -> tuple[list[str], list[Path]]:
        return self.boxes(), list(self.runs.iterdir()) if self.runs.is_dir() else []

    def next_outcome(self) -> Outcome:
        return self.executor(self.engine.base_url).run(self.spec).outcome


@pytest.fixture
def client(engine: Any) -> Iterator[docker.APIClient]:
    client = docker.APIClient(base_url=engine.base_url, version=engine.api_version)
    yield client
    client.close()


@pytest.fixture
def bench(engine: Any, image: Any, client: docker.APIClient, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(engine, image, client, tmp_path)
    yield bench
    for box in bench.boxes():
        client.remove_container(box, force=True)


@pytest.mark.docker
def test_a_run_asks_the_engine_for_five_things_and_never_for_an_exec(
    bench: Bench, tmp_path: Path
) -> None:
    with EngineProxy(bench.engine.base_url, tmp_path / "proxy") as proxy:
        assert Outcome.OK == bench.executor(proxy.url).run(bench.spec).outcome
        assert proxy.requests == REQUESTS


@pytest.mark.docker
@pytest.mark.parametrize("action", ["kill_before", "kill_after"])
@pytest.mark.parametrize("at", range(len(REQUESTS)), ids=REQUESTS)
def test_a_controller_killed_at_a_request_leaves_nothing_for_the_next_start(
    at: int, action: Action, bench: Bench, tmp_path: Path
) -> None:
    killed: list[subprocess.Popen[bytes]] = []
    proxy = EngineProxy(
        bench.engine.base_url, tmp_path / "proxy", Fault(at, action), lambda: killed[0].kill()
    )
    with proxy, bench.controller(proxy.url) as process:
        killed.append(process)
        assert -9 == process.wait(timeout=20)
    bench.start_anew()
    assert ([], []) == bench.leftovers()
    assert Outcome.OK == bench.next_outcome()


@pytest.mark.docker
@pytest.mark.parametrize("step", [*get_args(Step), "log"])
def test_a_controller_killed_after_a_step_leaves_nothing_for_the_next_start(
    step: str, bench: Bench
) -> None:
    with bench.controller(bench.engine.base_url, step) as process:
        assert -9 == process.wait(timeout=20)
    bench.start_anew()
    assert ([], []) == bench.leftovers()
    assert Outcome.OK == bench.next_outcome()


FAULTS = {"drop": 0.0, "refuse": 0.0, "delay": 3.0}


@pytest.mark.docker
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the SDK forgets a socket that failed
@pytest.mark.parametrize("action", list(FAULTS))
@pytest.mark.parametrize("at", range(len(REQUESTS)), ids=REQUESTS)
def test_an_engine_that_fails_once_is_our_error_or_no_error_and_leaves_nothing(
    at: int, action: Action, bench: Bench, tmp_path: Path
) -> None:
    fault = Fault(at, action, FAULTS[action])
    with EngineProxy(bench.engine.base_url, tmp_path / "proxy", fault) as proxy:
        executor = bench.executor(proxy.url, call_seconds=1)
        if REQUESTS[at].startswith("DELETE"):  # asked again
            assert Outcome.OK == executor.run(bench.spec).outcome
        else:
            with pytest.raises(SandboxError):
                executor.run(bench.spec)
        assert proxy.requests[: at + 1] == REQUESTS[: at + 1]
    gc.collect()
    assert ([], []) == bench.leftovers()


@pytest.mark.docker
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the SDK forgets a socket that failed
def test_a_container_that_a_slow_engine_makes_after_we_gave_up_is_found_and_removed(
    bench: Bench, tmp_path: Path
) -> None:
    fault = Fault(REQUESTS.index("POST /containers/create"), "late", 2.5)
    with EngineProxy(bench.engine.base_url, tmp_path / "proxy", fault) as proxy:
        with pytest.raises(EngineUnavailable):
            bench.executor(proxy.url, call_seconds=1, build=unmounted).run(bench.spec)
        assert [] == proxy.late
        assert wait_until(lambda: proxy.late == [201], 10)
        assert wait_until(lambda: bench.boxes() == [], 5)
    gc.collect()
    assert ([], []) == bench.leftovers()


@pytest.mark.docker
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the SDK forgets a socket that failed
@pytest.mark.parametrize("also", ["", "|POST .*/start"], ids=["over", "never started"])
def test_a_container_that_the_engine_would_not_remove_goes_once_it_does_while_the_session_lives(
    also: str, bench: Bench, tmp_path: Path
) -> None:
    fault = Fault(None, "refuse", kind=f"DELETE{also}")
    with EngineProxy(bench.engine.base_url, tmp_path / "proxy", fault) as proxy:
        with pytest.raises(EngineUnavailable, match="did not remove a container"):
            bench.executor(proxy.url).run(bench.spec)
        assert 1 == len(bench.boxes())
        proxy.heal()
        assert wait_until(lambda: bench.boxes() == [], 10)
    gc.collect()


def unmounted(spec: RunSpec, lease: Lease) -> Settings:
    """Return settings that an engine takes although the run's directory is gone by then."""
    settings = container_settings(spec, lease)
    settings["HostConfig"]["Mounts"] = []
    return settings


KILLS = "POST .*/kill|POST .*/update|DELETE"


@pytest.mark.docker
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the SDK forgets a socket that failed
@pytest.mark.parametrize("action", ["refuse", "hang"])
def test_a_box_dies_at_its_deadline_though_the_engine_can_no_longer_kill(
    action: Action, bench: Bench, tmp_path: Path
) -> None:
    stopped = stopping_pid_1(bench)
    fault = Fault(None, action, kind=KILLS + "|POST .*/wait")
    with EngineProxy(bench.engine.base_url, tmp_path / "proxy", fault) as proxy:
        executor = bench.executor(proxy.url, call_seconds=1, death_seconds=1)
        with pytest.raises(EngineUnavailable):
            executor.run(sleeping(bench.spec), on_log=stopped)
        assert [] == bench.processes()
    gc.collect()


@pytest.mark.docker
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the SDK forgets a socket that failed
@pytest.mark.skipif(not FREEZER.is_dir() or os.geteuid() != 0, reason="needs root and a v1 freezer")
def test_a_container_that_no_kill_ends_is_an_error_of_its_own(bench: Bench, tmp_path: Path) -> None:
    def freeze(_: bytes) -> None:
        (freezer_of(bench) / "freezer.state").write_text("FROZEN")

    fault = Fault(None, "refuse", kind=KILLS)
    with EngineProxy(bench.engine.base_url, tmp_path / "proxy", fault) as proxy:
        executor = bench.executor(proxy.url, call_seconds=1, death_seconds=0.5)
        try:
            with pytest.raises(ContainerUnkillable, match="lives on") as unkillable:
                executor.run(sleeping(bench.spec), on_log=freeze)
            assert "" != unkillable.value.hint
            assert [] != bench.processes()
        finally:
            (freezer_of(bench) / "freezer.state").write_text("THAWED")
    assert wait_until(lambda: bench.processes() == [], 5)
    assert Outcome.OK == bench.next_outcome()
    gc.collect()


def sleeping(spec: RunSpec) -> RunSpec:
    """Return a run that says that it is up and does not end by itself."""
    code = "import time; print('up', flush=True); time.sleep(60)"
    limits = spec.limits.model_copy(update={"wall_seconds": 1})
    return spec.model_copy(update={"argv": ("python3", "-c", code), "limits": limits})


def stopping_pid_1(bench: Bench) -> Callable[[bytes], None]:
    """Return what stops PID 1 from outside, so that only the host can end the box."""
    return lambda _: os.kill(min(bench.processes()), signal.SIGSTOP)


def freezer_of(bench: Bench) -> Path:
    """Return the freezer of the session's only box."""
    (box,) = bench.boxes()
    (place,) = FREEZER.glob(f"**/{box}")
    return place
