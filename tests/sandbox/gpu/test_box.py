"""GPUs through a real engine: its hook and NVIDIA's library are stand-ins, everything else is not.

What a box sees, what it is refused, what ends it, and who gets which GPU when attempts run side by
side and things go wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from sandbox import DockerExecutor, Outcome, RunSpec, SandboxError
from sandbox.box.follow import Step
from sandbox.box.hardening import LABEL_GPUS, LABEL_SESSION
from sandbox.check.self_check import lay_out, try_gpus
from sandbox.contract.errors import GpuFault, LimitNotEnforced
from sandbox.contract.gpu import GpuMemory, NoGpus
from sandbox.gpu.inventory import GpuUnavailable
from sandbox.gpu.leases import Leases
from sandbox.machine import executor, gpu_leases, gpu_source
from tests.support.boxes import boxes_of, in_session, python_spec, running, wait_until
from tests.support.facilities import GpuMachine
from tests.support.gpu_stand_ins import GIBIBYTE, GPU_0, GPU_1, GPU_2

pytestmark = pytest.mark.docker

SEES = "import os; print(*sorted(n for n in os.listdir('/dev') if n.startswith('nvidia')))"
SLEEPS = "import time; print('up', flush=True); time.sleep(30)"
OUT_OF_MEMORY = (
    "import sys, time; print('up', flush=True); time.sleep(1); "
    "sys.exit('torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {}. GPU 0 has …')"
)


def spec_on(machine: GpuMachine, code: str, *gpus: str, memory: GpuMemory | None = None) -> RunSpec:
    spec = python_spec(code, image=machine.image, wall_seconds=40)
    devices = "nvidia" if gpus else "none"
    given = {"devices": devices, "gpus": gpus, "gpu_memory": memory}
    return RunSpec.model_validate(spec.model_dump() | given)


@pytest.fixture
def boxes(gpu_machine: GpuMachine) -> DockerExecutor:
    return executor(gpu_machine.engine, gpu_machine.state_dir)


@pytest.fixture
def client(gpu_machine: GpuMachine) -> Iterator[docker.APIClient]:
    engine = gpu_machine.engine
    with contextlib.closing(
        docker.APIClient(base_url=engine.base_url, version=engine.api_version)
    ) as client:
        yield client


def out_of_use(machine: GpuMachine) -> list[str]:
    return [e.gpu for e in gpu_leases(machine.engine, machine.state_dir).quarantined()]


# --- requests ---


def test_a_box_sees_the_gpu_that_was_asked_for_and_no_other(
    gpu_machine: GpuMachine, boxes: DockerExecutor
) -> None:
    result = boxes.run(spec_on(gpu_machine, SEES, GPU_1))
    assert "nvidia-uvm nvidia1 nvidiactl\n" == result.log.head
    assert (GPU_1,) == result.gpus == tuple(use.uuid for use in result.gpu)
    assert "hook" == result.evidence["gpus"]["form"]
    assert f"{GPU_1} compute,utility\n" == (gpu_machine.cards.root / "asked").read_text()


def test_a_box_sees_both_gpus_when_both_were_asked_for(
    gpu_machine: GpuMachine, boxes: DockerExecutor
) -> None:
    result = boxes.run(spec_on(gpu_machine, SEES, GPU_0, GPU_1))
    assert "nvidia-uvm nvidia0 nvidia1 nvidiactl\n" == result.log.head


def test_a_box_that_asks_for_none_sees_none_whatever_the_image_says(
    gpu_machine: GpuMachine, boxes: DockerExecutor
) -> None:
    result = boxes.run(spec_on(gpu_machine, SEES))
    assert ("\n", (), ()) == (result.log.head, result.gpus, result.gpu)


@pytest.mark.parametrize(
    ("mood", "words"),
    [
        ("all", "PID 1 sees /dev/nvidia0, not asked for"),
        ("none", "PID 1 sees no /dev/nvidia1"),
        ("wrong", "PID 1 sees no /dev/nvidia1"),
    ],
)
def test_an_engine_that_gives_other_gpus_than_asked_refuses_the_run_before_it_starts(
    gpu_machine: GpuMachine, boxes: DockerExecutor, mood: str, words: str
) -> None:
    gpu_machine.cards.set("misbehave", mood)
    with pytest.raises(LimitNotEnforced, match=words):
        boxes.run(spec_on(gpu_machine, SEES, GPU_1))


def test_an_engine_whose_hook_fails_is_our_fault_not_the_program_s(
    gpu_machine: GpuMachine, boxes: DockerExecutor
) -> None:
    gpu_machine.cards.set("misbehave", "crash")
    with pytest.raises(SandboxError, match="told to crash"):
        boxes.run(spec_on(gpu_machine, SEES, GPU_1))


def test_a_gpu_that_is_not_on_this_machine_is_refused(
    gpu_machine: GpuMachine, boxes: DockerExecutor
) -> None:
    with pytest.raises(GpuUnavailable, match=GPU_2):
        boxes.run(spec_on(gpu_machine, SEES, GPU_2))


def test_an_engine_without_a_hook_says_what_is_missing(
    gpu_machine: GpuMachine, engine: Any, image: Any, tmp_path: Path
) -> None:
    plain = DockerExecutor(engine.base_url, engine.api_version, tmp_path / "runs")
    given = {"devices": "nvidia", "gpus": (GPU_1,)}
    spec = RunSpec.model_validate(python_spec(SEES, image=image.image_id).model_dump() | given)
    with pytest.raises(SandboxError) as refusal:
        plain.run(spec)
    assert "Container Toolkit" in refusal.value.hint


# --- bounds ---


def test_a_run_over_its_gpu_memory_is_ended_and_the_numbers_are_kept(
    gpu_machine: GpuMachine, boxes: DockerExecutor
) -> None:
    asked = GpuMemory(bytes=4 * GIBIBYTE, at_least="watchdog")
    result = boxes.run(
        spec_on(gpu_machine, SLEEPS, GPU_0, memory=asked),
        on_log=lambda _: gpu_machine.cards.set("0/memory_used", 7 * GIBIBYTE),
    )
    assert Outcome.OUT_OF_GPU_MEMORY == result.outcome
    assert ["memory_left"] == [event.kind for event in result.gpu[0].events]  # and still judged
    assert [GPU_0] == out_of_use(gpu_machine)
    assert ("watchdog", 7 * GIBIBYTE - GIBIBYTE // 2) == (
        result.gpu[0].memory_bound,
        result.gpu[0].peak_memory_bytes,
    )
    assert f"of {4 * GIBIBYTE} bytes on {GPU_0}" in result.evidence["gpus"]["memory_exceeded"]
    assert result.wall_seconds < 20


def test_a_run_within_its_gpu_memory_is_let_alone(
    gpu_machine: GpuMachine, boxes: DockerExecutor
) -> None:
    asked = GpuMemory(bytes=4 * GIBIBYTE, at_least="watchdog")
    result = boxes.run(spec_on(gpu_machine, SEES, GPU_0, memory=asked))
    assert (Outcome.OK, "watchdog") == (result.outcome, result.gpu[0].memory_bound)


def test_a_bound_that_this_machine_cannot_give_refuses_the_run(
    gpu_machine: GpuMachine, boxes: DockerExecutor
) -> None:
    asked = GpuMemory(bytes=4 * GIBIBYTE, at_least="hardware")
    with pytest.raises(LimitNotEnforced, match="asked at least 'hardware'"):
        boxes.run(spec_on(gpu_machine, SEES, GPU_0, memory=asked))


def test_the_program_s_allocator_is_told_its_share(
    gpu_machine: GpuMachine, boxes: DockerExecutor
) -> None:
    asked = GpuMemory(
        bytes=20 * GIBIBYTE, at_least="library", allocator_variable="PYTORCH_ALLOC_CONF"
    )
    code = "import os; print(os.environ['PYTORCH_ALLOC_CONF'])"
    result = boxes.run(spec_on(gpu_machine, code, GPU_0, memory=asked))
    assert "per_process_memory_fraction:0.2406\n" == result.log.head
    assert "library" == result.gpu[0].memory_bound


@pytest.mark.parametrize(
    ("taken", "tried", "outcome"),
    [
        (70 * GIBIBYTE, "20.00 GiB", Outcome.OUT_OF_GPU_MEMORY),
        (GIBIBYTE, "100.00 GiB", Outcome.OUT_OF_GPU_MEMORY),
        (GIBIBYTE, "2.00 MiB", Outcome.FAILED),
    ],
)
def test_a_program_that_says_out_of_gpu_memory_is_believed_when_the_gpu_bears_it_out(
    gpu_machine: GpuMachine, tmp_path: Path, taken: int, tried: str, outcome: Outcome
) -> None:
    def free(step: Step) -> None:
        if step == "reported":
            gpu_machine.cards.set("0/memory_used", GIBIBYTE // 2)

    url, version = gpu_machine.engine.base_url, gpu_machine.engine.api_version
    result = DockerExecutor(url, version, tmp_path, on_step=free).run(
        spec_on(gpu_machine, OUT_OF_MEMORY.format(tried), GPU_0),
        on_log=lambda _: gpu_machine.cards.set("0/memory_used", taken),
    )
    assert outcome == result.outcome


# --- health ---


def test_a_gpu_that_fails_under_a_run_ends_it_at_once_and_goes_out_of_use(
    gpu_machine: GpuMachine, boxes: DockerExecutor, client: docker.APIClient
) -> None:
    with pytest.raises(GpuFault, match="Xid 79") as fault:
        boxes.run(
            in_session(spec_on(gpu_machine, SLEEPS, GPU_0), "gpu-fault"),
            on_log=lambda _: gpu_machine.cards.report(0, 79),
        )
    assert f"nightlab gpus --lift {GPU_0}" in fault.value.hint
    assert [GPU_0] == out_of_use(gpu_machine)
    assert [] == boxes_of(client, "gpu-fault")
    source = gpu_source(gpu_machine.engine, gpu_machine.state_dir, "nvidia", (), 1)
    with source.lease("the next run") as granted:
        assert (GPU_1,) == granted


def test_an_error_of_the_program_s_own_making_is_its_own_failure(
    gpu_machine: GpuMachine, boxes: DockerExecutor
) -> None:
    gpu_machine.cards.report(0, 31)
    code = "import sys, time; time.sleep(1); sys.exit(1)"
    result = boxes.run(spec_on(gpu_machine, code, GPU_0))
    assert (Outcome.FAILED, [(31, False)]) == (
        result.outcome,
        [(event.xid, event.is_fault) for event in result.gpu[0].events],
    )
    assert [] == out_of_use(gpu_machine)


def test_memory_left_behind_takes_the_gpu_out_of_use_and_leaves_the_result_alone(
    gpu_machine: GpuMachine, boxes: DockerExecutor
) -> None:
    result = boxes.run(
        spec_on(gpu_machine, "print('up', flush=True)", GPU_0),
        on_log=lambda _: gpu_machine.cards.set("0/memory_used", 3 * GIBIBYTE),
    )
    assert (Outcome.OK, ["memory_left"]) == (
        result.outcome,
        [event.kind for event in result.gpu[0].events],
    )
    assert [GPU_0] == out_of_use(gpu_machine)


def test_a_gpu_that_does_not_answer_before_the_run_is_never_given_to_it(
    gpu_machine: GpuMachine, boxes: DockerExecutor
) -> None:
    gpu_machine.cards.fail("0/power_mw", 999)
    with pytest.raises(GpuFault, match="cannot tell"):
        boxes.run(spec_on(gpu_machine, SEES, GPU_0))
    assert [GPU_0] == out_of_use(gpu_machine)


# --- what a person types ---

PROFILE = '[mine]\nlike = "cpu"\ndescription = "a pretended machine"\ndevices = "nvidia"\n'


def nightlab(machine: GpuMachine, place: Path, *words: str) -> str:
    """Run a command on a machine whose profile has NVIDIA GPUs; return what it printed."""
    program = (Path(__file__).parents[3] / "program.md").read_text()
    (place / "program.md").write_text(program.replace('profile = "cpu" ', 'profile = "mine"'))
    (place / "profiles.toml").write_text(PROFILE)
    environ = os.environ | {
        "DOCKER_HOST": machine.engine.base_url,
        "NIGHTLAB_HOME": str(machine.state_dir),
        "LD_LIBRARY_PATH": str(machine.library),
    }
    argv = [sys.executable, "-P", "-m", "agent.cli", *words]
    root = Path(__file__).parents[3]
    done = subprocess.run(
        argv,
        cwd=place,
        env=environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    return done.stdout


def test_a_person_sees_the_gpus_and_puts_one_back_into_use(
    gpu_machine: GpuMachine, tmp_path: Path
) -> None:
    line = gpu_leases(gpu_machine.engine, gpu_machine.state_dir)
    line.quarantine(GPU_1, "Xid 79", "run-7")
    rows = json.loads(nightlab(gpu_machine, tmp_path, "gpus", "--json"))["gpus"]
    assert [("0", GPU_0, "free"), ("1", GPU_1, "out of use")] == [
        (row["index"], row["id"], row["status"]) for row in rows
    ]
    nightlab(gpu_machine, tmp_path, "gpus", "--lift", GPU_1)
    rows = json.loads(nightlab(gpu_machine, tmp_path, "gpus", "--json"))["gpus"]
    assert ["free", "free"] == [row["status"] for row in rows]


def test_the_check_runs_a_box_with_a_gpu_and_says_what_bounds_its_memory(
    gpu_machine: GpuMachine, boxes: DockerExecutor, tmp_path: Path
) -> None:
    source = gpu_source(gpu_machine.engine, gpu_machine.state_dir, "nvidia", (), 1)
    with lay_out(gpu_machine.image, tmp_path, {}) as place:
        (wall,) = try_gpus(boxes, place, source)
        assert ("held", f"{GPU_0}; its memory can be bounded by: watchdog") == (
            wall.status,
            wall.seen,
        )
        gpu_machine.cards.set("misbehave", "all")
        (wall,) = try_gpus(boxes, place, source)
        assert "gave way" == wall.status
        for uuid in (GPU_0, GPU_1):
            gpu_leases(gpu_machine.engine, gpu_machine.state_dir).quarantine(uuid, "lost", "r")
        (wall,) = try_gpus(boxes, place, source)
        assert "not tried" == wall.status
        assert [] == try_gpus(boxes, place, NoGpus())


# --- side by side ---

ATTEMPT = """
    import os, sys
    from pathlib import Path
    from sandbox import RunSpec
    from sandbox.engine.find import find_engine
    from sandbox.machine import executor, gpu_source
    state, spec = Path(sys.argv[1]), RunSpec.model_validate_json(sys.argv[2])
    engine = find_engine(state, environ=os.environ)
    with gpu_source(engine, state, "nvidia", (), 1).lease(spec.session) as gpus:
        print(*gpus, flush=True)
        given = {"devices": "nvidia", "gpus": gpus}
        result = executor(engine, state).run(RunSpec.model_validate(spec.model_dump() | given))
        print(result.outcome.value, *result.gpus, flush=True)
"""
HANGS = "import signal\nwhile True: signal.pthread_sigmask(0, range(1, 64)); signal.pause()"


@contextlib.contextmanager
def attempt(machine: GpuMachine, name: str, code: str, wall: float) -> Iterator[Any]:
    """Start a controller of its own that leases a GPU and runs one box on it."""
    spec = python_spec(code, image=machine.image, wall_seconds=wall)
    text = in_session(spec, name).model_dump_json()
    words = [sys.executable, "-c", textwrap.dedent(ATTEMPT), str(machine.state_dir), text]
    environ = os.environ | {
        "DOCKER_HOST": machine.engine.base_url,
        "LD_LIBRARY_PATH": str(machine.library),
    }
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environ) as controller:
        try:
            yield controller
        finally:
            controller.kill()


def said(controller: subprocess.Popen[str]) -> str:
    assert controller.stdout is not None
    return controller.stdout.readline().strip()


def test_leases_are_right_when_attempts_are_killed_hang_or_lose_their_controller(
    gpu_machine: GpuMachine, client: docker.APIClient
) -> None:
    """Two GPUs, four attempts: one loses its controller, one hangs, one is killed, one is well."""

    def having() -> dict[str, str]:
        found = client.containers(filters={"label": LABEL_GPUS})
        return {box["Labels"][LABEL_GPUS]: box["Labels"][LABEL_SESSION] for box in found}

    line = Leases(gpu_machine.state_dir / "gpus", list, "the test")
    with (
        attempt(gpu_machine, "orphaned", SLEEPS, 60) as orphaned,
        contextlib.ExitStack() as others,
    ):
        assert GPU_0 == said(orphaned)
        hanging = others.enter_context(attempt(gpu_machine, "hanging", HANGS, 20))
        assert GPU_1 == said(hanging)
        killed = others.enter_context(attempt(gpu_machine, "killed", SLEEPS, 60))
        assert wait_until(lambda: line.status().waiting == ("killed",))
        well = others.enter_context(attempt(gpu_machine, "well", SEES, 60))
        assert wait_until(lambda: line.status().waiting == ("killed", "well"))
        assert wait_until(lambda: having() == {GPU_0: "orphaned", GPU_1: "hanging"})
        assert {GPU_0: "orphaned", GPU_1: "hanging"} == line.status().held

        orphaned.kill()
        assert GPU_0 == said(killed)
        assert "orphaned" not in having().values()
        assert wait_until(lambda: len(running(client, "killed")) > 1)  # PID 1 and program
        assert "killed" == having()[GPU_0]
        assert "well" in line.status().waiting

        for box in boxes_of(client, "killed"):
            client.kill(box["Id"])
        assert f"interrupted {GPU_0}" == said(killed)
        granted = said(well)
        assert granted in (GPU_0, GPU_1)
        assert f"ok {granted}" == said(well)
        assert f"timed_out {GPU_1}" == said(hanging)
        for controller in (killed, well, hanging):
            assert 0 == controller.wait(20)
    after = line.status()
    assert ({}, (), ()) == (after.held, after.waiting, after.quarantined)
    assert {} == having()
