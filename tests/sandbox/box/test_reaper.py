"""The reaper: what dead sessions left goes, everything else stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from sandbox.box import reaper
from sandbox.box.hardening import LABEL_DEADLINE, LABEL_OWNER, LABEL_RUN
from sandbox.box.reaper import is_abandoned, is_alive, may_use_gpus, process_owner
from sandbox.contract.errors import ContainerUnkillable
from tests.support.boxes import remove_box
from tests.support.engine_proxy import EngineProxy, Fault


def dead_owner() -> str:
    """Return the mark of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = process_owner(process.pid)
    process.communicate(b"\n")
    return owner


def elsewhere(owner: str, *, boot: str | None = None, namespace: str | None = None) -> str:
    """Return a mark with its pid namespace or boot replaced."""
    pid, start, old_namespace, old_boot = owner.split(" ")
    return " ".join([pid, start, namespace or old_namespace, boot or old_boot])


def test_this_process_is_alive() -> None:
    assert is_alive(process_owner()) is True


def test_an_ended_process_is_dead() -> None:
    assert is_alive(dead_owner()) is False


def test_a_zombie_is_dead() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        owner = process_owner(process.pid)
        assert process.stdin is not None
        process.stdin.close()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert is_alive(owner) is False


def test_another_process_under_the_same_id_is_not_the_owner() -> None:
    pid, start, *rest = process_owner().split(" ")
    assert is_alive(" ".join([pid, str(int(start) - 1), *rest])) is False


def test_nobody_survives_a_boot() -> None:
    assert is_alive(elsewhere(process_owner(), boot="another-boot")) is False


@pytest.mark.parametrize("owner", ["", "1 2 3", "x 1 pid:[1] boot"])
def test_of_an_unreadable_mark_nothing_is_known(owner: str) -> None:
    assert is_alive(owner) is None


def test_of_another_pid_namespace_nothing_is_known() -> None:
    assert is_alive(elsewhere(process_owner(), namespace="pid:[1]")) is None


def test_a_container_that_is_not_ours_is_never_abandoned() -> None:
    assert not is_abandoned({LABEL_OWNER: dead_owner(), LABEL_DEADLINE: "0"}, time.monotonic())


@pytest.mark.parametrize(("deadline", "abandoned"), [("99", True), ("101", False), ("", False)])
def test_the_deadline_decides_where_the_owner_cannot_be_told(
    deadline: str, abandoned: bool
) -> None:
    labels = {LABEL_RUN: "run-1", LABEL_OWNER: "?", LABEL_DEADLINE: deadline}
    assert abandoned == is_abandoned(labels, now_monotonic_seconds=100)


def test_a_living_owner_keeps_a_container_past_its_deadline() -> None:
    labels = {LABEL_RUN: "run-1", LABEL_OWNER: process_owner(), LABEL_DEADLINE: "1"}
    assert not is_abandoned(labels, now_monotonic_seconds=100)


@pytest.mark.parametrize(
    ("state", "deadline", "may"),
    [
        ("running", "1", True),
        ("created", "101", True),
        ("created", "99", False),
        ("created", "", True),
        ("removing", "101", False),
        ("exited", "101", False),
    ],
)
def test_a_leftover_of_a_living_session_holds_no_gpu_for_ever(
    state: str, deadline: str, may: bool
) -> None:
    labels = {LABEL_OWNER: process_owner(), LABEL_DEADLINE: deadline}
    assert may is may_use_gpus(state, labels, now_monotonic_seconds=100)


def test_only_directories_of_dead_sessions_are_removed(tmp_path: Path) -> None:
    owners = {"dead": dead_owner(), "living": process_owner(), "unknown": "?"}
    for name, owner in owners.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / reaper.OWNER_FILE).write_text(owner)
    (tmp_path / "foreign").mkdir()
    assert [tmp_path / "dead"] == reaper.sweep_run_directories(tmp_path)
    assert {"living", "unknown", "foreign"} == {path.name for path in tmp_path.iterdir()}


def test_a_run_directory_without_a_mark_goes_once_the_machine_was_restarted(
    tmp_path: Path,
) -> None:
    for name in ("0" * 16, "1" * 16, "2" * 16, "foreign"):
        (tmp_path / name).mkdir()
    (tmp_path / ("1" * 16) / reaper.OWNER_FILE).touch()
    for name in ("0" * 16, "1" * 16, "foreign"):
        os.utime(tmp_path / name, (1, 1))
    removed = reaper.sweep_run_directories(tmp_path)
    assert ["0" * 16, "1" * 16] == [path.name for path in removed]
    assert {"2" * 16, "foreign"} == {path.name for path in tmp_path.iterdir()}


@pytest.fixture
def client(engine: Any) -> Iterator[docker.APIClient]:
    client = docker.APIClient(base_url=engine.base_url, version=engine.api_version)
    yield client
    client.close()


@pytest.fixture
def dead_to_us(monkeypatch: pytest.MonkeyPatch) -> str:
    """An owner of whom only this process knows that it is dead: other sweeps leave what it had."""
    mark, is_alive = f"dead to {os.getpid()}", reaper.is_alive
    monkeypatch.setattr(reaper, "is_alive", lambda o: False if o == mark else is_alive(o))
    return mark


@pytest.mark.docker
def test_a_sweep_takes_the_containers_of_the_dead_and_no_others(
    client: docker.APIClient, image: Any, dead_to_us: str
) -> None:
    labels = {
        "dead": {LABEL_RUN: "run-1", LABEL_OWNER: dead_to_us},
        "living": {LABEL_RUN: "run-1", LABEL_OWNER: process_owner()},
        "somebody else's": {"other.product": "run-1"},
    }
    made = {name: sleeper(client, image.image_id, these) for name, these in labels.items()}
    try:
        removed = reaper.sweep(client)
        present = {container["Id"] for container in client.containers(all=True)}
        assert {"living", "somebody else's"} == {n for n, box in made.items() if box in present}
        assert made["dead"] in removed
    finally:
        for box in set(made.values()) & {each["Id"] for each in client.containers(all=True)}:
            remove_box(client, box)


@pytest.mark.docker
def test_one_that_will_not_go_is_named_and_keeps_no_other(
    client: docker.APIClient, engine: Any, image: Any, tmp_path: Path, dead_to_us: str
) -> None:
    labels = {LABEL_RUN: "run-1", LABEL_OWNER: dead_to_us}
    stuck, other = (sleeper(client, image.image_id, labels) for _ in range(2))
    fault = Fault(None, "refuse", kind=f"DELETE .*{stuck}")
    try:
        with EngineProxy(engine.base_url, tmp_path / "proxy", fault) as proxy:
            through = docker.APIClient(base_url=proxy.url, version=engine.api_version)
            with pytest.raises(ContainerUnkillable, match=stuck[:12]) as unkillable:
                reaper.sweep(through)
            through.close()
        assert "" != unkillable.value.hint
        assert other not in {container["Id"] for container in client.containers(all=True)}
        assert stuck in reaper.sweep(client)
    finally:
        for box in {stuck, other} & {each["Id"] for each in client.containers(all=True)}:
            remove_box(client, box)


HIDDEN = """
import ctypes, os, subprocess, sys
from sandbox.box.reaper import is_alive
ctypes.CDLL(None).unshare(0x00020000)
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
subprocess.run(["mount", "-t", "proc", "-o", "hidepid=2", "proc", "/proc"], check=True)
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
print([is_alive(owner) for owner in sys.argv[1:]])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount /proc with hidepid")
def test_a_session_that_another_user_cannot_see_is_not_taken_for_dead() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN, process_owner(), dead_owner()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ("[None, False]\n", "") == (done.stdout, done.stderr)


def sleeper(client: docker.APIClient, image: str, labels: dict[str, str]) -> str:
    """Start a container that does nothing for a minute."""
    settings = {
        "Image": image,
        "Entrypoint": ["sleep", "60"],
        "Labels": labels,
        "HostConfig": {"NetworkMode": "none"},
    }
    created = client.create_container_from_config(settings)  # type: ignore[no-untyped-call]
    client.start(created["Id"])
    return str(created["Id"])
