"""One run from create to remove: causes, deadlines, walls taken away, nothing left behind."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import docker
import pytest

from agent.attempt.lab import evidence_of
from agent.attempt.sheet import read_score
from sandbox import DockerExecutor, Outcome, RunSpec, SandboxError
from sandbox.box.container import hint_for
from sandbox.box.hardening import LABEL_SESSION, Lease, Settings, container_settings
from sandbox.box.supervisor import HIDDEN_PATHS
from sandbox.contract.errors import EngineUnavailable, ImageMissing, LimitNotEnforced
from sandbox.engine.find import connect
from sandbox.image.profiles import find_profile
from sandbox.machine import box_environment
from tests.support.boxes import (
    CONTROLLER,
    MEBIBYTE,
    box_spec,
    boxes_of,
    children,
    in_session,
    python_spec,
    remove_box,
    running,
    wait_until,
)
from tests.support.labs import score_in_boxes

# --- the real engine ---


@pytest.fixture
def executor(engine: Any, tmp_path: Path) -> DockerExecutor:
    return DockerExecutor(engine.base_url, engine.api_version, tmp_path / "runs")


@pytest.fixture
def client(engine: Any) -> Iterator[docker.APIClient]:
    client = docker.APIClient(base_url=engine.base_url, version=engine.api_version)
    yield client
    client.close()


@pytest.mark.docker
def test_log_output_and_numbers_of_a_run_arrive(
    executor: DockerExecutor, image: Any, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    output.mkdir()
    pieces: list[bytes] = []
    code = "print('step 1'); open('/out/model', 'w').write('weights')"
    result = executor.run(
        python_spec(code, image=image.image_id), output_dir=output, on_log=pieces.append
    )
    assert (Outcome.OK, 0, None) == (result.outcome, result.exit_code, result.signal)
    assert "step 1\n" == result.log.head
    assert b"step 1\n" == b"".join(pieces)
    assert b"weights" == (output / "model").read_bytes()
    assert image.image_id == result.image_digest
    assert result.peak_memory_bytes is not None
    assert 0 < result.peak_memory_bytes <= result.limits.memory_bytes
    assert result.cpu_seconds is not None
    assert result.started_at < result.finished_at


@pytest.mark.docker
def test_head_and_tail_of_a_long_log_are_exact(executor: DockerExecutor, image: Any) -> None:
    code = "for n in range(50000): print(n)"
    log = executor.run(python_spec(code, image=image.image_id)).log
    whole = "".join(f"{number}\n" for number in range(50000))
    assert whole[:4096] == log.head
    assert whole[-4096:] == log.tail
    assert len(whole) - 8192 == log.omitted_bytes


@pytest.mark.docker
def test_a_program_that_is_not_there_is_the_program_s_failure(
    executor: DockerExecutor, image: Any
) -> None:
    result = executor.run(box_spec("no-such-program", image=image.image_id))
    assert (Outcome.FAILED, 127) == (result.outcome, result.exit_code)
    assert "no-such-program" in result.log.head


@pytest.mark.docker
def test_two_boxes_talk_over_their_channel(executor: DockerExecutor, image: Any) -> None:
    code = """
        import os, socket, sys
        channel = socket.socket(fileno=int(os.environ["NIGHTLAB_CHANNEL_FD"]))
        channel.sendall(sys.argv[1].encode())
        print(channel.fileno(), channel.recv(100).decode())
    """
    argv = ("python3", "-c", textwrap.dedent(code))
    near, far = socket.socketpair()
    with near, far, ThreadPoolExecutor() as pool:
        model, scorer = (
            pool.submit(executor.run, box_spec(*argv, word, image=image.image_id), channel=end)
            for word, end in (("logits", near), ("tokens", far))
        )
        logs = [model.result().log.head, scorer.result().log.head]
    assert ["3 tokens\n", "3 logits\n"] == logs


@pytest.mark.docker
def test_a_box_sees_the_end_of_its_channel(executor: DockerExecutor, image: Any) -> None:
    code = "import socket; print(socket.socket(fileno=3).recv(1))"
    near, far = socket.socketpair()
    with near, far:
        near.shutdown(socket.SHUT_WR)
        result = executor.run(python_spec(code, image=image.image_id), channel=far)
        assert b"" == near.recv(0)
    assert "b''\n" == result.log.head


@pytest.mark.docker
def test_data_loader_workers_and_threads_work_in_the_box(
    executor: DockerExecutor, image: Any
) -> None:
    code = """
        import torch
        from torch.utils.data import DataLoader
        loader = DataLoader(torch.arange(100.0), num_workers=2, batch_size=10)
        print(sum(batch.sum().item() for batch in loader))
    """
    spec = python_spec(
        textwrap.dedent(code),
        image=image.image_id,
        wall_seconds=60,
        memory_bytes=2048 * MEBIBYTE,
        tmp_bytes=64 * MEBIBYTE,
        shm_bytes=64 * MEBIBYTE,
        pids=128,
        cpus=2,
    )
    result = executor.run(spec)
    assert ("ok", "4950.0\n") == (result.outcome, result.log.head)


GLOO = """
import os, torch, torch.distributed as dist
rank = 0 if os.fork() else 1
dist.init_process_group("gloo", init_method="tcp://localhost:29500", rank=rank, world_size=2)
total = torch.tensor([1.0 + rank])
dist.all_reduce(total)
if rank == 0:
    print(total.item())
    os.wait()
"""


@pytest.mark.docker
@pytest.mark.parametrize("has_loopback", [True, False])
def test_gloo_works_with_loopback_and_says_what_to_set_without(
    executor: DockerExecutor, image: Any, has_loopback: bool
) -> None:
    spec = python_spec(
        GLOO,
        image=image.image_id,
        wall_seconds=60,
        memory_bytes=2048 * MEBIBYTE,
        pids=128,
        cpus=2,
        loopback=has_loopback,
    )
    result = executor.run(spec)
    log = result.log.head + result.log.tail
    assert ("ok" if has_loopback else "failed") == result.outcome, log
    assert has_loopback == ("3.0" in log)
    assert has_loopback != ("loopback = true under [limits]" in evidence_of(result)), log


COMPILED = """
import torch
def loss(x):
    return (torch.sin(x) * x.relu()).sum()
x = torch.linspace(-1, 1, 1000, requires_grad=True)
expected = torch.autograd.grad(loss(x), x)[0]
found = torch.autograd.grad(torch.compile(loss)(x), x)[0]
print(torch.allclose(expected, found, atol=1e-5))
from torch._inductor import metrics
print(metrics.generated_kernel_count > 0)
"""
COMPILER = '#!/bin/sh\nexec /host/usr/bin/g++ --sysroot=/host "$@"\n'


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None or not list(Path("/usr/include").glob("python3*/Python.h")),
    reason="the image has no compiler, and this host has no g++ with Python's headers to lend",
)
def test_inductor_compiles_and_loads_its_kernels_in_the_box(
    executor: DockerExecutor, image: Any, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "g++").write_text(COMPILER)
    (tmp_path / "bin" / "g++").chmod(0o755)
    (headers,) = Path("/usr/include").glob("python3*/Python.h")
    lent = {Path("/usr"): "/host/usr", Path("/usr/lib"): "/host/lib", tmp_path / "bin": "/lent"}
    if Path("/usr/lib64").is_dir():
        lent[Path("/usr/lib64")] = "/host/lib64"
    spec = python_spec(
        COMPILED,
        image=image.image_id,
        mounts=lent,
        wall_seconds=200,
        memory_bytes=3072 * MEBIBYTE,
        tmp_bytes=512 * MEBIBYTE,
        shm_bytes=64 * MEBIBYTE,
        pids=256,
        cpus=2,
        open_files=1024,
        log_bytes=2**16,
    )
    environment = box_environment(find_profile("cpu").variables, 2) | {
        "PATH": "/lent:/usr/local/bin:/usr/bin:/bin:/host/usr/bin",
        "LD_LIBRARY_PATH": "/host/usr/lib/x86_64-linux-gnu",
        "CPLUS_INCLUDE_PATH": f"/host{headers.parent}",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "PYTHONWARNINGS": "ignore",  # it looks for the headers in the image's own place first
    }
    result = executor.run(spec.model_copy(update={"environment": environment}))
    assert ("ok", "True\nTrue\n") == (result.outcome, result.log.head), result.log


@pytest.mark.docker
def test_an_unknown_image_is_our_failure_with_a_name(executor: DockerExecutor) -> None:
    with pytest.raises(ImageMissing):
        executor.run(box_spec(image="sha256:" + "1" * 64))


@pytest.mark.docker
def test_a_tag_is_no_image(executor: DockerExecutor) -> None:
    with pytest.raises(ImageMissing, match="digest"):
        executor.run(box_spec(image="python:3.11"))


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the SDK forgets a socket that failed
def test_an_engine_that_is_not_there_is_named(tmp_path: Path) -> None:
    executor = DockerExecutor(f"unix://{tmp_path}/none.sock", "1.41", tmp_path / "runs")
    with pytest.raises(EngineUnavailable):
        executor.run(box_spec())
    gc.collect()
    assert [] == list((tmp_path / "runs").iterdir())


@pytest.mark.docker
def test_a_mount_that_does_not_exist_is_our_failure(
    executor: DockerExecutor, image: Any, tmp_path: Path
) -> None:
    spec = box_spec(image=image.image_id, mounts={tmp_path / "none": "/data"})
    with pytest.raises(SandboxError, match="none"):
        executor.run(spec)


@pytest.mark.docker
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user for a moment")
def test_no_other_user_of_the_machine_gets_to_the_link_before_pid_1(
    engine: Any, image: Any
) -> None:
    knocked: list[type[BaseException]] = []

    def knock(spec: RunSpec, lease: Lease) -> Settings:
        os.seteuid(65533)
        try:
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.connect(str(lease.run_directory / "link.sock"))
        except OSError as error:
            knocked.append(type(error))
        finally:
            os.seteuid(0)
        return container_settings(spec, lease)

    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        executor = DockerExecutor(engine.base_url, engine.api_version, Path(name) / "r", knock)
        assert Outcome.OK == executor.run(box_spec(image=image.image_id)).outcome
    assert [PermissionError] == knocked


# --- walls taken away ---


def weakened(**walls: Any) -> Callable[[RunSpec, Lease], Settings]:
    """Return a builder of settings in which these walls are replaced, or made from what was."""

    def build(spec: RunSpec, lease: Lease) -> Settings:
        settings = copy.deepcopy(container_settings(spec, lease))
        for name, wall in walls.items():
            place = settings if name in CONTAINER_WALLS else settings["HostConfig"]
            if callable(wall):
                place[name] = wall(place[name])
            else:
                place[name] = place[name] | wall if name == "Tmpfs" else wall
        return settings

    return build


CONTAINER_WALLS = ("User", "Labels", "Healthcheck", "Volumes", "Hostname", "NetworkDisabled")
NULL_UNDER_ANOTHER_NAME = {
    "PathOnHost": "/dev/null",
    "PathInContainer": "/dev/kvm",
    "CgroupPermissions": "r",
}


def without(name: str) -> Callable[[list[Settings]], list[Settings]]:
    """Return what leaves one rlimit out."""
    return lambda limits: [limit for limit in limits if limit["Name"] != name]


def no_core_at_all(limits: list[Settings]) -> list[Settings]:
    """Return limits of none, at which a pipe in `core_pattern` is started all the same."""
    return [*without("core")(limits), {"Name": "core", "Soft": 0, "Hard": 0}]


def writable(mounts: list[Settings]) -> list[Settings]:
    """Return mounts that a box may write to."""
    return [mount | {"ReadOnly": False} for mount in mounts]


def and_one_more(mounts: list[Settings]) -> list[Settings]:
    """Return mounts with one that nobody asked for."""
    return [*mounts, {"Type": "tmpfs", "Target": "/extra"}]


WEAKENED = [
    ("capabilities", weakened(CapDrop=[])),
    ("user: asked", weakened(User="0:0")),
    ("user: asked", weakened(User="65534:65534")),
    ("gids", weakened(User=lambda user: user.split(":")[0] + ":65534")),
    ("not_hidden", weakened(MaskedPaths=[])),
    ("not_hidden", weakened(MaskedPaths=lambda hidden: [p for p in hidden if p != "/proc/stat"])),
    ("not_hidden", weakened(MaskedPaths=list(HIDDEN_PATHS))),
    ("groups", weakened(GroupAdd=["999"])),
    ("seccomp", weakened(SecurityOpt=["no-new-privileges", "seccomp=unconfined"])),
    ("no_new_privileges", weakened(SecurityOpt=[])),
    ("memory_bytes", weakened(Memory=0, MemorySwap=0)),
    ("memory_and_swap_bytes", weakened(MemorySwap=-1)),
    ("pids", weakened(PidsLimit=0)),
    ("cpus", weakened(NanoCpus=0)),
    ("core", weakened(Ulimits=[])),
    ("core", weakened(Ulimits=without("core"))),
    ("core", weakened(Ulimits=no_core_at_all)),
    ("fsize", weakened(Ulimits=without("fsize"))),
    ("nofile", weakened(Ulimits=without("nofile"))),
    ("/: ", weakened(ReadonlyRootfs=False)),
    ("/out: ", weakened(Tmpfs={"/out": "size=4194304,exec"})),
    ("/out bytes", weakened(Tmpfs={"/out": "noexec,nr_inodes=40"})),
    ("/out inodes", weakened(Tmpfs={"/out": "noexec,size=4194304"})),
    ("/tmp: ", weakened(Tmpfs={"/tmp": "exec,suid,dev,size=16777216,nr_inodes=65536"})),
    ("/tmp bytes", weakened(Tmpfs={"/tmp": "exec,mode=1777"})),
    ("/tmp inodes", weakened(Tmpfs={"/tmp": "exec,mode=1777,size=16777216"})),
    ("/dev/shm bytes", weakened(ShmSize=64 * MEBIBYTE)),
    ("net namespace", weakened(NetworkMode="host", NetworkDisabled=False, Hostname="")),
    ("ipc namespace", weakened(IpcMode="host")),
    ("pid namespace", weakened(PidMode="host")),
    ("uts namespace", weakened(UTSMode="host", Hostname="")),
    ("cgroup namespace", weakened(CgroupnsMode="host")),
    ("devices", weakened(Privileged=True)),
    ("devices", weakened(Devices=[NULL_UNDER_ANOTHER_NAME])),
    ("/nightlab: ", weakened(Mounts=writable)),
    ("mounts: /extra is writable", weakened(Mounts=and_one_more)),
    ("/proc/sys: ", weakened(ReadonlyPaths=[])),
    ("mounts: /volume is writable", weakened(Volumes={"/volume": {}})),
    ("Labels", weakened(Labels={LABEL_SESSION: f"weak-{os.getpid()}"})),
    ("AutoRemove", weakened(AutoRemove=True)),
    ("OomKillDisable", weakened(OomKillDisable=True)),
    ("RestartPolicy", weakened(RestartPolicy={"Name": "always"})),
    ("LogConfig", weakened(LogConfig={"Type": "none"})),
    ("Healthcheck", weakened(Healthcheck={"Test": ["CMD", "true"]})),
]


@pytest.mark.docker
@pytest.mark.parametrize(("wall", "build"), WEAKENED, ids=[wall for wall, _ in WEAKENED])
def test_a_run_with_a_wall_taken_away_is_refused_by_the_wall_s_name(
    wall: str,
    build: Callable[[RunSpec, Lease], Settings],
    engine: Any,
    image: Any,
    client: docker.APIClient,
    tmp_path: Path,
) -> None:
    executor = DockerExecutor(engine.base_url, engine.api_version, tmp_path / "runs", build)
    session = f"weak-{os.getpid()}"
    spec = in_session(python_spec("print('ran')", image=image.image_id), session)
    with pytest.raises(LimitNotEnforced) as refusal:
        executor.run(spec)
    assert wall in refusal.value.message
    # The engine itself may be removing it still.
    assert wait_until(lambda: boxes_of(client, session) == [])


@pytest.mark.docker
def test_an_image_that_declares_volumes_is_refused(
    executor: DockerExecutor, image: Any, client: docker.APIClient
) -> None:
    made = client.create_container_from_config(  # type: ignore[no-untyped-call]
        {"Image": image.image_id, "Entrypoint": ["true"], "HostConfig": {"NetworkMode": "none"}}
    )
    changed = client.commit(made["Id"], changes=["VOLUME /data"])
    client.remove_container(made["Id"])
    try:
        with pytest.raises(SandboxError, match="declares volumes"):
            executor.run(box_spec(image=changed["Id"]))
    finally:
        client.remove_image(changed["Id"])


# --- stopped because enough was seen ---

DEAF = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    while True: pass
for step in range(10000):
    print("step", step, flush=True)
    time.sleep(0.05)
"""


@pytest.mark.docker
def test_a_run_that_nightlab_has_seen_enough_of_is_stopped_and_accounted_for(
    executor: DockerExecutor, image: Any, client: docker.APIClient
) -> None:
    spec = in_session(python_spec(DEAF, image=image.image_id), f"stop-{os.getpid()}")
    seen = bytearray()
    result = executor.run(spec, on_log=seen.extend, should_stop=lambda: b"step 9" in seen)
    assert (Outcome.STOPPED, "nightlab") == (result.outcome, result.evidence["killed_by"])
    assert 0.4 < result.wall_seconds < 10
    assert result.cpu_seconds is not None
    assert result.log.head.startswith("step 0")
    assert [] == boxes_of(client, spec.session)


@pytest.mark.docker
def test_a_box_that_does_not_obey_a_stop_is_killed_and_still_not_the_program_s_doing(
    executor: DockerExecutor, image: Any, client: docker.APIClient
) -> None:
    spec = in_session(python_spec(DEAF, image=image.image_id), f"deaf-{os.getpid()}")

    def freeze_pid_1() -> bool:
        os.kill(running(client, spec.session)[0], signal.SIGSTOP)  # the host can
        return True

    result = executor.run(spec, should_stop=freeze_pid_1)
    assert (Outcome.STOPPED, "nightlab") == (result.outcome, result.evidence["killed_by"])
    assert result.wall_seconds < 10
    assert [] == boxes_of(client, spec.session)


@pytest.mark.docker
def test_a_program_that_ends_before_the_stop_arrives_has_ended_by_itself(
    executor: DockerExecutor, image: Any, client: docker.APIClient
) -> None:
    spec = in_session(python_spec("print('over')", image=image.image_id), f"late-{os.getpid()}")
    seen = bytearray()

    def wait_for_its_end() -> bool:
        return b"over" in seen and wait_until(lambda: len(running(client, spec.session)) <= 1, 8)

    result = executor.run(spec, on_log=seen.extend, should_stop=wait_for_its_end)
    assert Outcome.OK == result.outcome


@pytest.mark.docker
def test_a_program_that_says_nothing_is_stopped_too(executor: DockerExecutor, image: Any) -> None:
    spec = python_spec("import time; time.sleep(60)", image=image.image_id)
    began = time.monotonic()
    result = executor.run(spec, should_stop=lambda: time.monotonic() > began + 0.5)
    assert Outcome.STOPPED == result.outcome
    assert result.wall_seconds < 10


@pytest.mark.docker
def test_an_interrupt_ends_all_boxes_of_a_score_at_once(
    executor: DockerExecutor, image: Any, client: docker.APIClient, tmp_path: Path
) -> None:
    session = f"score-{os.getpid()}"
    code = "import time; time.sleep(60)"
    specs = [
        in_session(python_spec(code, image=image.image_id), session).model_copy(
            update={"run_id": f"{session}-{number}", "box": box}
        )
        for number, box in enumerate(("model", "model", "scorer"))
    ]

    def interrupt() -> None:
        wait_until(lambda: len(boxes_of(client, session)) == 2)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)  # to the process: its main thread wakes up

    output_dir = tmp_path / "sheet"
    output_dir.mkdir()
    began = time.monotonic()
    with ThreadPoolExecutor() as pool:
        pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            score_in_boxes(executor.run, specs[:2], specs[2], output_dir)
    assert time.monotonic() - began < 55  # the programs would go on for a minute
    assert [] == boxes_of(client, session)


@pytest.mark.docker
def test_a_scorer_whose_time_is_over_waited_for_a_slow_model(
    executor: DockerExecutor, image: Any, tmp_path: Path
) -> None:
    session, output_dir = f"slow-{os.getpid()}", tmp_path / "sheet"
    output_dir.mkdir()
    model = in_session(python_spec("pass", image=image.image_id), session)
    waits = python_spec("import time; time.sleep(60)", image=image.image_id, wall_seconds=1)
    scorer = in_session(waits, session).model_copy(update={"box": "scorer"})
    measured = score_in_boxes(executor.run, [model], scorer, output_dir, brings_boxes=False)
    assert measured.sheet is None
    found = read_score(None, [one.outcome for one in measured.models])
    assert (None, "too_slow") == (found.value, found.reason)


@pytest.mark.docker
@pytest.mark.parametrize("step", ["connected", "compared"])
def test_a_box_that_is_gone_before_its_program_is_our_fault_in_words(
    step: str, engine: Any, image: Any, client: docker.APIClient, tmp_path: Path
) -> None:
    spec = in_session(python_spec("pass", image=image.image_id), f"gone-{os.getpid()}")

    def kill_at(done: str) -> None:
        if done == step:
            client.kill(boxes_of(client, spec.session)[0]["Id"])

    executor = DockerExecutor(
        engine.base_url, engine.api_version, tmp_path / "runs", on_step=kill_at
    )
    with pytest.raises(SandboxError):
        executor.run(spec)
    assert [] == boxes_of(client, spec.session)


# --- deadlines, each alone ---


@pytest.mark.docker
def test_the_host_ends_a_box_whose_pid_1_lost_its_clock(
    executor: DockerExecutor, image: Any, client: docker.APIClient
) -> None:
    session = f"frozen-{os.getpid()}"
    code = "import time; print('up', flush=True); time.sleep(60)"
    spec = in_session(python_spec(code, image=image.image_id, wall_seconds=2), session)

    def stop_pid_1(piece: bytes) -> None:
        os.kill(running(client, session)[0], signal.SIGSTOP)  # the host can, the program cannot

    result = executor.run(spec, on_log=stop_pid_1)
    assert Outcome.TIMED_OUT == result.outcome
    assert "host_deadline" == result.evidence["killed_by"]
    assert result.wall_seconds < 20
    assert [] == boxes_of(client, session)


@pytest.mark.docker
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_pid_1_ends_the_box_of_a_controller_that_cannot(
    number: signal.Signals, engine: Any, image: Any, client: docker.APIClient, tmp_path: Path
) -> None:
    session = f"orphan-{os.getpid()}"
    spec = in_session(
        python_spec("import time; time.sleep(60)", image=image.image_id, wall_seconds=3), session
    )
    arguments = [engine.base_url, engine.api_version, str(tmp_path), spec.model_dump_json()]
    controller = subprocess.Popen(
        [sys.executable, "-c", CONTROLLER, *arguments], stderr=subprocess.DEVNULL
    )
    try:
        assert wait_until(lambda: len(running(client, session)) == 2)
        for watchdog in children(controller.pid):
            os.kill(watchdog, signal.SIGKILL)
        controller.send_signal(number)
        assert wait_until(lambda: running(client, session) == [], 40)
    finally:
        controller.kill()
        controller.wait()
        for box in boxes_of(client, session):
            remove_box(client, box["Id"])


@pytest.mark.docker
def test_the_watchdog_ends_and_removes_the_box_of_a_killed_controller_alone(
    executor: DockerExecutor, image: Any, client: docker.APIClient, engine: Any, tmp_path: Path
) -> None:
    session = f"watched-{os.getpid()}"
    spec = in_session(
        python_spec("import time; time.sleep(60)", image=image.image_id, wall_seconds=60), session
    )
    controller = subprocess.Popen(
        [
            *(sys.executable, "-c", CONTROLLER, engine.base_url, engine.api_version),
            *(str(tmp_path), spec.model_dump_json()),
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        assert wait_until(lambda: len(running(client, session)) == 2)
        os.kill(running(client, session)[0], signal.SIGSTOP)  # PID 1 cannot do it
        controller.kill()
        assert wait_until(lambda: boxes_of(client, session) == [], 40)
    finally:
        controller.kill()
        controller.wait()
        for box in boxes_of(client, session):
            remove_box(client, box["Id"])


# --- nothing left behind ---


@pytest.mark.docker
def test_an_interrupt_leaves_nothing_and_is_passed_on(
    executor: DockerExecutor, image: Any, client: docker.APIClient, tmp_path: Path
) -> None:
    session = f"interrupted-{os.getpid()}"
    code = "import time; print('up', flush=True); time.sleep(60)"

    def interrupt(piece: bytes) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        executor.run(in_session(python_spec(code, image=image.image_id), session), on_log=interrupt)
    assert [] == boxes_of(client, session)
    assert [] == list((tmp_path / "runs").iterdir())


@pytest.mark.docker
def test_a_box_killed_from_outside_is_interrupted(
    executor: DockerExecutor, image: Any, client: docker.APIClient
) -> None:
    session = f"killed-{os.getpid()}"
    spec = in_session(python_spec("import time; time.sleep(60)", image=image.image_id), session)
    with ThreadPoolExecutor() as pool:
        run = pool.submit(executor.run, spec)
        assert wait_until(lambda: len(running(client, session)) == 2)
        client.kill(boxes_of(client, session)[0]["Id"])
        result = run.result(timeout=20)
    assert Outcome.INTERRUPTED == result.outcome
    assert result.was_ended_by_somebody_else
    assert [] == boxes_of(client, session)


@pytest.mark.docker
def test_a_program_that_kills_itself_cannot_pass_for_somebody_else(
    executor: DockerExecutor, image: Any
) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    result = executor.run(python_spec(code, image=image.image_id))
    assert Outcome.INTERRUPTED == result.outcome
    assert not result.was_ended_by_somebody_else


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.docker
def test_runs_from_several_threads_leave_no_descriptor_and_no_thread(
    executor: DockerExecutor, image: Any
) -> None:
    spec = python_spec("print('hi')", image=image.image_id)
    executor.run(spec)
    before = open_descriptors(), threading.active_count()
    with ThreadPoolExecutor(4) as pool:
        outcomes = [result.outcome for result in pool.map(executor.run, [spec] * 8)]
    assert [Outcome.OK] * 8 == outcomes
    assert before == (open_descriptors(), threading.active_count())


FLOOD_BYTES = 2**30
FLOOD = f"""
import os
piece, left = "\\U0001f4a3".encode() * 2**15 + b"\\xff" * 2**15, {FLOOD_BYTES}
while left:
    left -= os.write(1, piece[:left])
"""
FLOODED = """
import resource, sys
from pathlib import Path
from sandbox import DockerExecutor, RunSpec
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
url, version, root, spec = sys.argv[1:]
executor, spec = DockerExecutor(url, version, Path(root)), RunSpec.model_validate_json(spec)
quiet = spec.model_copy(update={"argv": ("true",)})
executor.run(quiet)
before = peak()
result = executor.run(spec, on_log=lambda piece: None)
print(result.outcome, result.log.omitted_bytes, peak() - before)
"""


@pytest.mark.docker
def test_a_flood_of_log_costs_the_controller_at_most_64_mb(
    engine: Any, image: Any, tmp_path: Path
) -> None:
    largest = 2**22
    spec = python_spec(FLOOD, image=image.image_id, log_bytes=largest, wall_seconds=60)
    arguments = [engine.base_url, engine.api_version, str(tmp_path), spec.model_dump_json()]
    done = subprocess.run(
        [sys.executable, "-c", FLOODED, *arguments], capture_output=True, text=True, check=True
    )
    outcome, omitted, grown = done.stdout.split()
    assert ("ok", FLOOD_BYTES - 2 * largest) == (outcome, int(omitted))
    assert int(grown) <= 64 * MEBIBYTE


class EngineProxy:
    """Stands between executor and engine, until it is cut."""

    def __init__(self, engine_path: str, path: Path) -> None:
        self._engine_path = engine_path
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen()
        self._open: list[socket.socket] = [self._server]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect(self._engine_path)
                self._open += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                sink.sendall(piece)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """Be as a dead engine: nothing answers any more."""
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.mark.docker
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the SDK forgets a socket that failed
def test_an_engine_gone_while_a_run_goes_on_is_named_and_no_process_stays(
    engine: Any, image: Any, client: docker.APIClient, tmp_path: Path
) -> None:
    proxy = EngineProxy(engine.base_url.removeprefix("unix://"), tmp_path / "engine.sock")
    executor = DockerExecutor(
        f"unix://{tmp_path}/engine.sock", engine.api_version, tmp_path / "runs"
    )
    session = f"cut-{os.getpid()}"
    code = "import time; print('up', flush=True); time.sleep(60)"
    spec = in_session(python_spec(code, image=image.image_id, wall_seconds=2), session)
    try:
        with pytest.raises(EngineUnavailable):
            executor.run(spec, on_log=lambda _: proxy.cut())
        assert [] == running(client, session)
    finally:
        for box in boxes_of(client, session):
            remove_box(client, box["Id"])
    gc.collect()


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ('OCI runtime create failed: exec: "python3": executable file not found in $PATH', "PATH"),
        ('could not select device driver "" with capabilities: [[gpu]]', "nvidia"),
        ("Range of CPUs is from 0.01 to 2.00, as there are only 2 CPUs available", "cpus"),
        ("error setting rlimits for ready process: error setting rlimit type 7", "open_files"),
        ("runc create failed: error setting rlimit type 4: operation not permitted", "LimitCORE"),
        ("mkdir /var/lib/docker/overlay2/x-init: no space left on device", "docker system df"),
        ("failed to create task: OCI runtime create failed: unable to apply cgroup", ""),
    ],
)
def test_a_hint_fits_what_the_engine_said(words: str, hint: str) -> None:
    assert hint.lower() in hint_for(words).lower()
    assert bool(hint) == bool(hint_for(words))


@pytest.mark.parametrize("step", ["created", "started", "compared", "reported"])
def test_a_container_that_somebody_cleans_away_is_never_the_program_s_fault(
    engine: Any, image: Any, tmp_path: Path, step: str
) -> None:
    spec = in_session(python_spec("pass", image=image.image_id), f"pruned-{step}-{os.getpid()}")

    def clean(reached: str) -> None:
        if reached == step:
            with contextlib.closing(connect(engine)) as client:
                for box in boxes_of(client.api, spec.session):
                    remove_box(client.api, box["Id"])

    executor = DockerExecutor(engine.base_url, engine.api_version, tmp_path, on_step=clean)
    try:
        outcome = executor.run(spec).outcome
    except SandboxError:
        return  # ours, and the run is made again
    assert outcome in (Outcome.INTERRUPTED, Outcome.OK)
