"""`nightlab check`: every wall holds in a box, and the attempts succeed where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from socket import socket
from typing import Any

import pytest

from sandbox.box.executor import DockerExecutor
from sandbox.check.probes import PROBES
from sandbox.check.self_check import (
    CANARY_VARIABLE,
    CHECK_LIMITS,
    FAMILIES,
    WallCheck,
    _canary_is_whole,
    lay_out,
    machine_notes,
    try_family,
    try_stress_test,
    try_users,
    try_walls,
)
from sandbox.check.stress import FLOOD_BYTES, STRESS_TESTS, StressTest
from sandbox.contract.gpu import NoGpus
from sandbox.contract.run import Log, Outcome, OutputFile, RunResult, RunSpec
from sandbox.engine.find import Engine, connect
from sandbox.image.image import ImageRecord
from tests.support.boxes import remember
from tests.support.engine_proxy import EngineProxy, Fault
from tests.support.pools import asked_for, run_together

pytestmark = [pytest.mark.docker]

ROOT = Path(__file__).parents[3]
ADDED = ["SYS_ADMIN", "SYS_NICE", "SYS_PTRACE", "SYS_RAWIO", "SYS_TIME", "SYSLOG"]
TEMPTING = ("/var/run/docker.sock", "/root/.netrc", "/nightlab/link.sock")
STILL_HELD = {
    "the address of a name": "asks the machine's own network",
    "a socket for the kernel's ciphers (AF_ALG)": "the kernel may not have it",
    "change the kernel's settings": "the engine mounts them read-only itself",
    "ask what of a file is in memory (cachestat)": "the kernel may be older than it",
    "read and drop from memory (RWF_DONTCACHE)": "the same",
    "remap pages of a file": "the kernel may be without it",
    "kernel modules": "the right to them is not given here: it would be dangerous",
    "kexec": "the same",
    "reboot": "the same",
    "stop or kill PID 1": "the kernel protects the init of any namespace",
    "see processes of somebody else": "with the machine's pids, attempts would hit the machine",
    "shared memory of the host (System V)": "the machine may have none",
    "hide from the kernel's choice when memory is short": "the machine may not grant that right",
    "real-time scheduling": "the kernel may grant it to no cgroup",
    "a disk": "none is lent",
    "ports of the processor": "the kernel may not have them",
}
"""What may hold in a container without walls, and why; everything else must give way there."""


class Bare:
    """Runs a program in a container without any of a box's walls."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def answers(self) -> bool:
        return True

    def run(
        self,
        spec: RunSpec,
        *,
        output_dir: Path | None = None,
        channel: socket | None = None,
        on_log: Callable[[bytes], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> RunResult:
        (source,) = (mount.source for mount in spec.mounts)
        volumes = [f"{source}:/workspace", f"{source.parent}:{source.parent}"]
        with closing(connect(self.engine)) as client:
            container = client.containers.create(
                spec.image,
                entrypoint=list(spec.argv),
                command=[],
                user="0:0",
                security_opt=["seccomp=unconfined"],
                cap_add=ADDED,
                network_mode="host",
                ipc_mode="host",
                devices=["/dev/null:/dev/kvm:r", "/dev/null:/dev/nvidia0:r"],
                tmpfs={"/out": "exec", "/nightlab": ""},
                environment=spec.environment | {CANARY_VARIABLE: os.environ[CANARY_VARIABLE]},
                volumes=[*volumes, *(f"{source}/train.py:{place}" for place in TEMPTING)],
            )
            try:
                container.start()
                code = int(container.wait(timeout=60)["StatusCode"])
                log = container.logs().decode(errors="replace")
            finally:
                container.remove(force=True)
        outcome = Outcome.OK if code == 0 else Outcome.FAILED
        return result_of(log, outcome=outcome, exit_code=code)


def test_every_wall_of_a_box_holds(engine: Engine, image: ImageRecord, state_dir: Path) -> None:
    executor = DockerExecutor(engine.base_url, engine.api_version, state_dir / "run")

    walls = try_walls(executor, image.image_id, state_dir / "run", os.environ, NoGpus())

    assert [] == [wall for wall in walls if wall.status != "held"]
    assert len(walls) >= 100
    assert "NIGHTLAB_CHECK_CANARY" not in os.environ


@pytest.fixture(scope="module")
def without_walls(engine: Engine, image: ImageRecord, state_dir: Path) -> list[WallCheck]:
    with lay_out(image.image_id, state_dir / "run", os.environ) as place:
        return [f for family in FAMILIES for f in try_family(Bare(engine), place, family)]


def test_every_attempt_succeeds_where_the_walls_are_gone(without_walls: list[WallCheck]) -> None:
    held = {wall.tried for wall in without_walls if wall.status != "gave way"}

    assert set() == held - set(STILL_HELD)


def test_boxes_of_one_user_are_noticed(engine: Engine, image: ImageRecord, state_dir: Path) -> None:
    with lay_out(image.image_id, state_dir / "run", os.environ) as place:
        assert "gave way" == try_users(Bare(engine), place).status


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_notices_that_its_walls_are_gone(
    without_walls: list[WallCheck], family: str
) -> None:
    statuses = {wall.status for wall in without_walls if wall.family == family}

    assert "gave way" in statuses


def test_every_family_of_probes_and_stress_tests_is_made() -> None:
    families = {family for family, _ in PROBES} | {stress.family for stress in STRESS_TESTS}
    assert set(FAMILIES) == families


def test_a_program_that_says_nothing_proves_nothing(
    engine: Engine, image: ImageRecord, state_dir: Path
) -> None:
    class Silent(Bare):
        def run(self, spec: RunSpec, **kept: object) -> RunResult:
            return super().run(spec.model_copy(update={"argv": ("true",)}))

    with lay_out(image.image_id, state_dir / "run", os.environ) as place:
        walls = try_family(Silent(engine), place, "identity")

    assert {"not tried"} == {wall.status for wall in walls}


@pytest.mark.parametrize("changed", ["ledger.jsonl", "workspace/train.py", "workspace/more.py"])
def test_what_changed_on_the_host_is_noticed_and_said(tmp_path: Path, changed: str) -> None:
    with lay_out("none", tmp_path, {}) as place:
        assert "held" == _canary_is_whole(place).status
        (place.workspace.parent / changed).write_text("another\n")
        found = _canary_is_whole(place)
    assert ("gave way", "changed on the host") == (found.status, found.seen)


class Roomy(DockerExecutor):
    """Runs every box with many times the room that was asked for."""

    def run(self, spec: RunSpec, **kept: Any) -> RunResult:
        asked = spec.limits
        limits = asked.model_copy(
            update={
                "wall_seconds": 6,
                "memory_bytes": 32 * asked.memory_bytes,
                "pids": 8 * asked.pids,
                "tmp_bytes": 16 * asked.tmp_bytes,
                "shm_bytes": 32 * asked.shm_bytes,
                "output_bytes": 32 * asked.output_bytes,
            }
        )
        result = super().run(spec.model_copy(update={"limits": limits}), **kept)
        return result.model_copy(update={"limits": asked})


BOUNDED = [
    test
    for test in STRESS_TESTS
    if (test.family in ("memory", "processes", "time") or "fill" in test.tried)
    and test.tried != "kill everything"
]


@pytest.fixture(scope="module")
def unbounded(
    request: pytest.FixtureRequest, engine: Engine, image: ImageRecord, state_dir: Path
) -> Iterator[dict[str, Future[WallCheck]]]:
    """What each stress test comes to in a box with more room than it is told, three at a time."""
    executor = Roomy(engine.base_url, engine.api_version, state_dir / "run")
    cases = asked_for(request.session, test_a_stress_test_notices_that_its_bound_is_gone)
    with lay_out(image.image_id, state_dir / "run", os.environ) as place:
        run = lambda case: try_stress_test(executor, place, case["stress"])  # noqa: E731
        with run_together(cases, run, at_once=3) as results:
            yield results


@pytest.mark.parametrize("stress", BOUNDED, ids=lambda stress: stress.tried)
def test_a_stress_test_notices_that_its_bound_is_gone(
    stress: StressTest, unbounded: dict[str, Future[WallCheck]]
) -> None:
    assert "gave way" == unbounded[stress.tried].result().status


def result_of(head: str = "began\n", **changes: Any) -> RunResult:
    """Return what a run came to that went well."""
    now = datetime.now(UTC)
    result = RunResult(
        run_id="check-stress",
        box="train",
        outcome=Outcome.OK,
        exit_code=0,
        signal=None,
        wall_seconds=1.0,
        limits=CHECK_LIMITS,
        peak_memory_bytes=None,
        cpu_seconds=None,
        oom_kills=0,
        gpus=(),
        gpu=(),
        log=Log(head=head, tail="", omitted_bytes=0),
        output=(),
        image_digest="sha256:0",
        started_at=now,
        finished_at=now,
        evidence={"reported": True, "output_skipped": {"symlink": 2}},
    )
    return result.model_copy(update=changes)


LONE = OutputFile(name="lone", bytes=1, sha256="0" * 64)
LINK = OutputFile(name="link", bytes=1, sha256="0" * 64)
WHOLE = FLOOD_BYTES + len("began\n")


@pytest.mark.parametrize(
    ("tried", "changes"),
    [
        ("kill everything", {"evidence": {"reported": False}}),
        ("kill everything", {"outcome": Outcome.INTERRUPTED}),
        ("ten thousand files in the output", {}),
        ("flood the log", {"log": Log(head="began\n", tail="", omitted_bytes=0)}),
        ("flood the log", {"log": Log(head="y" * WHOLE, tail="", omitted_bytes=0)}),
        ("output that leads out", {"output": (LINK, LONE)}),
        ("output that leads out", {"output": (LONE,), "evidence": {"output_skipped": {}}}),
    ],
)
def test_a_stress_test_without_a_bound_is_judged_by_what_came_out(
    tried: str, changes: dict[str, Any]
) -> None:
    (stress,) = (stress for stress in STRESS_TESTS if stress.tried.startswith(tried))
    assert not stress.held(result_of(**changes))


def test_an_engine_that_drops_a_limit_makes_check_exit_1(
    engine: Engine, image: ImageRecord, tmp_path: Path
) -> None:
    fault = Fault(None, "forget", kind="POST .*/create")
    with EngineProxy(engine.base_url, tmp_path / "proxy", fault) as proxy:
        remember(image, engine.model_copy(update={"base_url": proxy.url}), tmp_path)
        environ = {"DOCKER_HOST": proxy.url, "NIGHTLAB_HOME": str(tmp_path)}
        done = subprocess.run(
            [
                sys.executable,
                "-P",
                "-m",
                "agent.cli",
                "check",
                "--json",
                "--program",
                str(ROOT / "program.md"),
            ],
            cwd=tmp_path,
            env=os.environ | environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
    walls = json.loads(done.stdout)["walls"]
    assert 1 == done.returncode
    assert {"gave way"} == {f["status"] for f in walls if f["tried"].startswith("four times")}
    assert any("pids: asked 48" in wall["seen"] for wall in walls)


@pytest.mark.parametrize(
    ("core_pattern", "release", "modprobe", "programs"),
    [
        ("core", "6.14.0", "/sbin/modprobe", []),
        ("core", "6.13.9", "", []),
        ("core", "6.13.9-1-amd64", "/sbin/modprobe", ["/sbin/modprobe"]),
        ("core", "5.15.167.4-microsoft-standard-WSL2", "/sbin/modprobe", ["/sbin/modprobe"]),
        ("|/usr/share/apport/apport -p%p", "7.0", "/sbin/modprobe", ["/usr/share/apport/apport"]),
    ],
)
def test_what_a_kernel_starts_on_the_host_for_a_box_is_said(
    core_pattern: str, release: str, modprobe: str, programs: list[str]
) -> None:
    notes = machine_notes("2", core_pattern, release, modprobe)

    assert "flock" in notes[0]
    assert programs == [note.split("`")[1] for note in notes[1:]]
    assert len(notes) + 1 == len(machine_notes("1", core_pattern, release, modprobe))
