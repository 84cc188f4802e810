"""`nightlab check`: every wall holds in a box, and the attempts succeed where there is none."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from socket import socket

import pytest

from sandbox.contract import Log, Outcome, RunResult, RunSpec
from sandbox.docker_executor import DockerExecutor
from sandbox.engine import Engine, connect
from sandbox.image import ImageRecord
from sandbox.self_check import FAMILIES, Finding, lay_out, try_family, try_walls

pytestmark = [pytest.mark.docker]

STILL_HELD = 40
"""Root without seccomp still has namespaces, a cgroup and a /proc of its own."""


class Bare:
    """Runs a program in a container without any of a box's walls."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def run(
        self,
        spec: RunSpec,
        *,
        output_dir: Path | None = None,
        channel: socket | None = None,
        on_log: Callable[[bytes], None] | None = None,
    ) -> RunResult:
        with closing(connect(self.engine)) as client:
            container = client.containers.create(
                spec.image,
                entrypoint=list(spec.argv),
                command=[],
                user="0:0",
                security_opt=["seccomp=unconfined"],
                network_mode="none",
                environment=spec.environment | {"NIGHTLAB_CHECK_CANARY": "seen"},
                volumes=[f"{mount.source}:{mount.target}" for mount in spec.mounts],
            )
            try:
                container.start()
                code = int(container.wait(timeout=60)["StatusCode"])
                log = container.logs().decode(errors="replace")
            finally:
                container.remove(force=True)
        now = datetime.now(UTC)
        return RunResult(
            run_id=spec.run_id,
            box=spec.box,
            outcome=Outcome.OK if code == 0 else Outcome.FAILED,
            exit_code=code,
            signal=None,
            wall_seconds=1.0,
            limits=spec.limits,
            peak_memory_bytes=None,
            cpu_seconds=None,
            oom_kills=0,
            gpus=(),
            log=Log(head=log, tail="", omitted_bytes=0),
            output=(),
            image_digest=spec.image,
            started_at=now,
            finished_at=now,
            evidence={},
        )


def test_every_wall_of_a_box_holds(engine: Engine, image: ImageRecord, state_dir: Path) -> None:
    executor = DockerExecutor(engine.base_url, engine.api_version, state_dir / "run")

    findings = try_walls(executor, image.image_id, state_dir / "run", os.environ)

    assert [] == [finding for finding in findings if finding.standing != "held"]
    assert len(findings) >= 100
    assert "NIGHTLAB_CHECK_CANARY" not in os.environ


@pytest.fixture(scope="module")
def without_walls(engine: Engine, image: ImageRecord, state_dir: Path) -> list[Finding]:
    with lay_out(image.image_id, state_dir / "run", os.environ) as place:
        return [f for family in FAMILIES for f in try_family(Bare(engine), place, family)]


def test_most_attempts_succeed_where_the_walls_are_gone(without_walls: list[Finding]) -> None:
    held = [f"{f.family}: {f.tried}" for f in without_walls if f.standing == "held"]

    assert len(held) < STILL_HELD, held


@pytest.mark.parametrize("family", ["files", "identity", "memory", "processes", "secrets"])
def test_each_family_notices_that_its_walls_are_gone(
    without_walls: list[Finding], family: str
) -> None:
    standings = {finding.standing for finding in without_walls if finding.family == family}

    assert "gave way" in standings


def test_a_program_that_says_nothing_proves_nothing(
    engine: Engine, image: ImageRecord, state_dir: Path
) -> None:
    class Silent(Bare):
        def run(self, spec: RunSpec, **kept: object) -> RunResult:
            return super().run(spec.model_copy(update={"argv": ("true",)}))

    with lay_out(image.image_id, state_dir / "run", os.environ) as place:
        findings = try_family(Silent(engine), place, "identity")

    assert {"not tried"} == {finding.standing for finding in findings}
