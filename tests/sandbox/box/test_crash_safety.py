"""Controllers killed and engines failing at every step of a run's life: nothing is left."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, get_args

import docker
import docker.errors
import pytest

from sandbox import DockerExecutor, Outcome, RunSpec, SandboxError
from sandbox.box.follow import Step
from sandbox.box.hardening import LABEL_SESSION, Lease, Settings, container_settings
from sandbox.box.reaper import sweep, sweep_run_directories
from sandbox.contract.errors import ContainerUnkillable, EngineUnavailable
from tests.support.boxes import BUSY_SECONDS, python_spec, remove_box, wait_until
from tests.support.engine_proxy import Action, EngineProxy, Fault
from tests.support.pools import asked_for, run_together

REQUESTS = [
    "GET /images//json",
    "GET /info",
    "GET /containers/json",
    "POST /containers/create",
    "POST /containers//start",
    "GET /containers//json",
    "DELETE /containers/",
]
"""Everything that a run asks of the engine, in this order."""
GIVE_UP_SECONDS = 4
"""How long an engine may take that will not answer. Others take their time meanwhile, so a busy
one that does answer must not need as long."""
AT_ONCE = 4
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


# The SDK forgets a socket that failed, whichever test runs when that is noticed.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


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

    def executor(
        self, url: str, call_seconds: int = BUSY_SECONDS, **options: Any
    ) -> DockerExecutor:
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
            with suppress(docker.errors.APIError):  # it does not run
                found += self.client.top(box, "-o pid")["Processes"] or []
        return [int(fields[0]) for fields in found]

    def started_anew(self, requests: list[str]) -> Survived:
        """Do what every start of nightlab does first, and say what is left then."""
        sweep(self.client)
        sweep_run_directories(self.runs)
        # The watchdog, or another session's sweep, may be at it at the same moment.
        wait_until(lambda: self.boxes() == [])
        return Survived(None, requests, self.leftovers(), self.processes(), self.next_outcome())

    def run(
        self,
        proxy: EngineProxy,
        spec: RunSpec,
        call_seconds: int,
        on_log: Callable[[bytes], None] | None = None,
        **options: Any,
    ) -> Survived:
        """Run one box through a proxy and say what came of it, without any sweep."""
        executor = self.executor(proxy.url, call_seconds, **options)
        ended: Outcome | type[SandboxError]
        try:
            ended = executor.run(spec, on_log=on_log).outcome
        except SandboxError as error:
            ended = type(error)
        return Survived(ended, list(proxy.requests), self.leftovers(), self.processes())

    def leftovers(self) -> tuple[list[str], list[Path]]:
        return self.boxes(), list(self.runs.iterdir()) if self.runs.is_dir() else []

    def next_outcome(self) -> Outcome:
        return self.executor(self.engine.base_url).run(self.spec).outcome


@pytest.fixture
def client(engine: Any) -> Iterator[docker.APIClient]:
    client = docker.APIClient(base_url=engine.base_url, version=engine.api_version)
    yield client
    client.close()


@contextmanager
def removed_afterwards(bench: Bench) -> Iterator[Bench]:
    """Give a bench whose boxes are gone afterwards, whatever a test found."""
    yield bench
    for box in bench.boxes():
        remove_box(bench.client, box)


@pytest.fixture
def bench(engine: Any, image: Any, client: docker.APIClient, tmp_path: Path) -> Iterator[Bench]:
    with removed_afterwards(Bench(engine, image, client, tmp_path)) as bench:
        yield bench


@pytest.mark.docker
def test_a_run_asks_the_engine_for_seven_things_and_never_for_an_exec(
    bench: Bench, tmp_path: Path
) -> None:
    with EngineProxy(bench.engine.base_url, tmp_path / "proxy") as proxy:
        assert Outcome.OK == bench.executor(proxy.url).run(bench.spec).outcome
        assert proxy.requests == REQUESTS


class Survived(NamedTuple):
    """What a controller's death, or an engine's failure, came to."""

    ended: Outcome | type[SandboxError] | None
    """How the run ended; None where the controller did not live to say."""
    requests: list[str]
    leftovers: tuple[list[str], list[Path]]
    processes: list[int]
    next_outcome: Outcome | None = None
    """Of the run after the next start, where there was one."""


@pytest.fixture(scope="module")
def survived(
    request: pytest.FixtureRequest,
    engine: Any,
    image: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Future[Survived]]]:
    """What each case that is asked for came to, a few at a time: most of one is waiting."""
    cases = {
        f"{play.__name__}[{case}]": {"play": play, **parameters}
        for test, play in PLAYS.items()
        for case, parameters in asked_for(request.session, globals()[test]).items()
    }

    def run(case: dict[str, Any]) -> Survived:
        root = tmp_path_factory.mktemp("crash")
        with closing(docker.APIClient(engine.base_url, engine.api_version)) as client:
            play: Callable[..., Survived] = case.pop("play")
            with removed_afterwards(Bench(engine, image, client, root)) as bench:
                return play(bench, **case)

    with run_together(cases, run, AT_ONCE) as results:
        yield results
    gc.collect()


def killed_at_a_request(bench: Bench, at: int, action: Action) -> Survived:
    """Kill a controller before or after the engine did what it was asked."""
    controller: Future[subprocess.Popen[bytes]] = Future()
    proxy = EngineProxy(
        bench.engine.base_url,
        bench.root / "proxy",
        Fault(at, action),
        lambda: controller.result().kill(),
    )
    with proxy, bench.controller(proxy.url) as process:
        controller.set_result(process)
        assert -9 == process.wait(BUSY_SECONDS)
    return bench.started_anew(proxy.requests)


def killed_after_a_step(bench: Bench, step: str) -> Survived:
    """Let a controller kill itself once a step of its run is done."""
    with bench.controller(bench.engine.base_url, step) as process:
        assert -9 == process.wait(BUSY_SECONDS)
    return bench.started_anew([])


def failed_once(bench: Bench, at: int, action: Action) -> Survived:
    """Let an engine fail at one request of a run; nothing is swept before the leftovers count."""
    # A busy engine takes a second for what it does at once on a quiet machine; only an answer that
    # never comes may be given up early.
    seconds = GIVE_UP_SECONDS if action == "delay" else BUSY_SECONDS
    with EngineProxy(bench.engine.base_url, bench.root / "proxy", Fault(at, action)) as proxy:
        return bench.run(proxy, bench.spec, seconds)


def failed_to_kill(bench: Bench, action: Action) -> Survived:
    """Let an engine neither kill nor remove a box that only the host can end."""
    fault = Fault(None, action, kind=KILLS + "|POST .*/wait")
    seconds = GIVE_UP_SECONDS if action == "hang" else BUSY_SECONDS
    with EngineProxy(bench.engine.base_url, bench.root / "proxy", fault) as proxy:
        stopped = stopping_pid_1(bench)
        return bench.run(proxy, sleeping(bench.spec), seconds, on_log=stopped, death_seconds=1)


PLAYS = {
    "test_a_controller_killed_at_a_request_leaves_nothing_for_the_next_start": killed_at_a_request,
    "test_a_controller_killed_after_a_step_leaves_nothing_for_the_next_start": killed_after_a_step,
    "test_an_engine_that_fails_once_is_our_error_or_no_error_and_leaves_nothing": failed_once,
    "test_a_box_dies_at_its_deadline_though_the_engine_can_no_longer_kill": failed_to_kill,
}


@pytest.fixture
def case(request: pytest.FixtureRequest, survived: dict[str, Future[Survived]]) -> Survived:
    """What the case of this very test came to."""
    play = PLAYS[request.node.originalname]
    return survived[f"{play.__name__}[{request.node.callspec.id}]"].result()


@pytest.mark.docker
@pytest.mark.parametrize("action", ["kill_before", "kill_after"])
@pytest.mark.parametrize("at", range(len(REQUESTS)), ids=REQUESTS)
def test_a_controller_killed_at_a_request_leaves_nothing_for_the_next_start(
    at: int, action: Action, case: Survived
) -> None:
    assert ([], []) == case.leftovers
    assert Outcome.OK == case.next_outcome


@pytest.mark.docker
@pytest.mark.parametrize("step", [*get_args(Step), "log"])
def test_a_controller_killed_after_a_step_leaves_nothing_for_the_next_start(
    step: str, case: Survived
) -> None:
    assert ([], []) == case.leftovers
    assert Outcome.OK == case.next_outcome


@pytest.mark.docker
@pytest.mark.parametrize("action", ["drop", "refuse", "delay"])
@pytest.mark.parametrize("at", range(len(REQUESTS)), ids=REQUESTS)
def test_an_engine_that_fails_once_is_our_error_or_no_error_and_leaves_nothing(
    at: int, action: Action, case: Survived
) -> None:
    if REQUESTS[at].startswith("DELETE"):  # asked again
        assert Outcome.OK == case.ended
    else:
        assert isinstance(case.ended, type)
        assert issubclass(case.ended, SandboxError)
    assert case.requests[: at + 1] == REQUESTS[: at + 1]
    assert ([], []) == case.leftovers


@pytest.mark.docker
def test_a_container_that_a_slow_engine_makes_after_we_gave_up_is_found_and_removed(
    bench: Bench, tmp_path: Path
) -> None:
    fault = Fault(REQUESTS.index("POST /containers/create"), "late")
    with EngineProxy(bench.engine.base_url, tmp_path / "proxy", fault) as proxy:
        executor = bench.executor(proxy.url, call_seconds=GIVE_UP_SECONDS, build=unmounted)
        with pytest.raises(EngineUnavailable):
            executor.run(bench.spec)
        assert [] == proxy.late
        proxy.release()
        assert wait_until(lambda: proxy.late == [201])
        assert wait_until(lambda: bench.boxes() == [])
    gc.collect()
    assert ([], []) == bench.leftovers()


@pytest.mark.docker
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
        assert wait_until(lambda: bench.boxes() == [])
    gc.collect()


def unmounted(spec: RunSpec, lease: Lease) -> Settings:
    """Return settings that an engine takes although the run's directory is gone by then."""
    settings = container_settings(spec, lease)
    settings["HostConfig"]["Mounts"] = []
    return settings


KILLS = "POST .*/kill|POST .*/update|DELETE"


@pytest.mark.docker
@pytest.mark.parametrize("action", ["refuse", "hang"])
def test_a_box_dies_at_its_deadline_though_the_engine_can_no_longer_kill(
    action: Action, case: Survived
) -> None:
    assert EngineUnavailable is case.ended
    assert [] == case.processes


@pytest.mark.docker
@pytest.mark.skipif(not FREEZER.is_dir() or os.geteuid() != 0, reason="needs root and a v1 freezer")
def test_a_container_that_no_kill_ends_is_an_error_of_its_own(bench: Bench, tmp_path: Path) -> None:
    def freeze(_: bytes) -> None:
        (freezer_of(bench) / "freezer.state").write_text("FROZEN")

    fault = Fault(None, "refuse", kind=KILLS)
    with EngineProxy(bench.engine.base_url, tmp_path / "proxy", fault) as proxy:
        executor = bench.executor(proxy.url, death_seconds=0.5)
        try:
            with pytest.raises(ContainerUnkillable, match="lives on") as unkillable:
                executor.run(sleeping(bench.spec, wall_seconds=4), on_log=freeze)
            assert "" != unkillable.value.hint
            assert [] != bench.processes()
        finally:
            (freezer_of(bench) / "freezer.state").write_text("THAWED")
    assert wait_until(lambda: bench.processes() == [])
    assert Outcome.OK == bench.next_outcome()
    gc.collect()


def sleeping(spec: RunSpec, wall_seconds: float = 1) -> RunSpec:
    """Return a run that says that it is up and does not end by itself."""
    code = "import time; print('up', flush=True); time.sleep(60)"
    limits = spec.limits.model_copy(update={"wall_seconds": wall_seconds})
    return spec.model_copy(update={"argv": ("python3", "-c", code), "limits": limits})


def stopping_pid_1(bench: Bench) -> Callable[[bytes], None]:
    """Return what stops PID 1 from outside, so that only the host can end the box."""
    return lambda _: os.kill(min(bench.processes()), signal.SIGSTOP)


def freezer_of(bench: Bench) -> Path:
    """Return the freezer of the session's only box."""
    (box,) = bench.boxes()
    (place,) = FREEZER.glob(f"**/{box}")
    return place
