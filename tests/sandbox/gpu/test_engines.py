"""Requests by CDI on the engines that can be had: a newer Docker Engine, and Podman's Docker API.

The devices are stand-ins: nodes with NVIDIA's numbers and nothing behind them. What a spec brings
into a box is done by the engine itself.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import docker
import pytest

from sandbox import DockerExecutor, RunSpec
from sandbox.box.hardening import Lease, Settings, container_settings, seccomp_profile
from sandbox.contract.errors import LimitNotEnforced, SandboxError
from sandbox.engine.find import Engine
from sandbox.image.image import ImageRecord
from tests.support.boxes import python_spec, wait_until
from tests.support.facilities import missing
from tests.support.gpu_stand_ins import (
    GPU_0,
    GPU_1,
    Cards,
    CdiEngine,
    cdi_engine,
    cdi_spec,
    copy_image,
)

pytestmark = pytest.mark.docker

PROGRAMS = Path(__file__).parents[3] / ".engines"
"""Where `make engines` puts the programs of a newer engine."""
SEES = "import os; print(*sorted(n for n in os.listdir('/dev') if n.startswith('nvidia')))"


def spec_with(image: str, *gpus: str) -> RunSpec:
    given = {"devices": "nvidia" if gpus else "none", "gpus": gpus}
    return RunSpec.model_validate(python_spec(SEES, image=image).model_dump() | given)


@pytest.fixture(autouse=True)
def two_gpus(cards: Cards) -> None:
    for index, uuid in enumerate((GPU_0, GPU_1)):
        cards.add(index, uuid)


# --- Docker Engine 25 and later ---


class Newer(NamedTuple):
    """A newer engine with CDI and an image on it."""

    engine: CdiEngine
    image: str
    executor: DockerExecutor


@pytest.fixture(scope="module")
def _newer(
    engine: Engine,
    image: ImageRecord,
    tmp_path_factory: pytest.TempPathFactory,
    pytestconfig: pytest.Config,
) -> Iterator[Newer]:
    if os.geteuid() != 0 or not has_newer_dockerd():
        missing(pytestconfig, "engines", "no Docker Engine with CDI here: `make engines` as root")
    place = tmp_path_factory.mktemp("cdi")
    with cdi_engine(PROGRAMS, place / "engine") as running:
        base = copy_image(engine, running.url, image.base.image_id)
        with contextlib.closing(docker.APIClient(running.url, version="auto")) as client:
            version = client.api_version
        yield Newer(running, base, DockerExecutor(running.url, version, place / "runs"))


def has_newer_dockerd() -> bool:
    found = shutil.which("dockerd", path=f"{PROGRAMS}:{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        return False
    told = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    number = re.search(r"version (\d+)\.", told)
    return number is not None and int(number.group(1)) >= 25


@pytest.fixture
def newer(_newer: Newer) -> Newer:
    write_spec(_newer, {GPU_0: 0, GPU_1: 1})
    return _newer


def write_spec(newer: Newer, uuids: dict[str, int]) -> None:
    (newer.engine.specs / "nvidia.json").write_text(json.dumps(cdi_spec(uuids)))


def test_an_engine_with_cdi_is_asked_by_cdi_and_gives_that_gpu_alone(newer: Newer) -> None:
    result = newer.executor.run(spec_with(newer.image, GPU_1))
    assert ("nvidia1 nvidiactl\n", "cdi") == (result.log.head, result.evidence["gpus"]["form"])
    asked = result.evidence["container"]["asked"]["HostConfig"]["DeviceRequests"]
    assert [{"Driver": "cdi", "DeviceIDs": [f"nvidia.com/gpu={GPU_1}"]}] == asked


def test_cdi_gives_both_when_both_are_asked_for_and_none_when_none_is(newer: Newer) -> None:
    both = newer.executor.run(spec_with(newer.image, GPU_0, GPU_1))
    assert "nvidia0 nvidia1 nvidiactl\n" == both.log.head
    assert "\n" == newer.executor.run(spec_with(newer.image)).log.head


def test_a_spec_that_leads_to_another_gpu_refuses_the_run(newer: Newer) -> None:
    write_spec(newer, {GPU_0: 1, GPU_1: 0})
    with pytest.raises(LimitNotEnforced, match="PID 1 sees no /dev/nvidia1"):
        newer.executor.run(spec_with(newer.image, GPU_1))


def test_a_spec_that_does_not_name_the_gpu_by_its_uuid_says_how_to_write_one(
    newer: Newer,
) -> None:
    write_spec(newer, {"0": 0, "1": 1})
    with pytest.raises(SandboxError) as refusal:
        newer.executor.run(spec_with(newer.image, GPU_1))
    assert "--device-name-strategy=uuid" in refusal.value.hint


# --- Podman ---


class Podman(NamedTuple):
    """Podman with a storage of its own, and an image in it."""

    words: tuple[str, ...]
    image: str


@pytest.fixture(scope="module")
def podman(
    engine: Engine,
    image: ImageRecord,
    tmp_path_factory: pytest.TempPathFactory,
    pytestconfig: pytest.Config,
) -> Iterator[Podman]:
    if os.geteuid() != 0 or shutil.which("podman") is None:
        missing(pytestconfig, "engines", "no Podman here: `make engines` as root")
    # Podman takes no runroot of more than 50 characters.
    place = Path(tempfile.mkdtemp(prefix="podman-"))
    words = (
        # crun refuses a machine whose kernel has a controller that only the unified hierarchy took.
        *("podman", "--runtime=runc", "--cgroup-manager=cgroupfs", "--events-backend=file"),
        *("--root", str(place / "root"), "--runroot", str(place / "run")),
    )
    with contextlib.closing(
        docker.APIClient(base_url=engine.base_url, version=engine.api_version, timeout=120)
    ) as client:
        loading = subprocess.Popen([*words, "load", "-q"], stdin=subprocess.PIPE)
        assert loading.stdin is not None
        for piece in client.get_image(image.base.image_id):
            loading.stdin.write(piece)
        loading.stdin.close()
        assert 0 == loading.wait(120)
    yield Podman(words, image.base.image_id.removeprefix("sha256:"))
    subprocess.run([*words, "rm", "--all", "--force"], check=False, capture_output=True)
    subprocess.run(["umount", "-q", str(place / "root" / "overlay")], check=False)
    shutil.rmtree(place, ignore_errors=True)


def test_podman_s_docker_api_drops_the_request_and_the_read_back_finds_out(
    podman: Podman, tmp_path: Path
) -> None:
    socket = tmp_path / "podman.sock"
    words = [*podman.words, "system", "service", "--time=0", f"unix://{socket}"]
    (tmp_path / "seccomp.json").write_text(seccomp_profile(True))

    def build(spec: RunSpec, lease: Lease) -> Settings:
        """Leave out what Podman would stumble over before it came to the GPUs."""
        asked = copy.deepcopy(container_settings(spec, lease))
        walls = asked["HostConfig"]
        walls["SecurityOpt"] = ["no-new-privileges", f"seccomp={tmp_path / 'seccomp.json'}"]
        walls["Tmpfs"] = {
            place: re.sub(r",(nr_inodes|uid|gid)=\d+", "", options)
            for place, options in walls["Tmpfs"].items()
        }
        walls["Ulimits"] = [*walls["Ulimits"], {"Name": "nproc", "Soft": 1000, "Hard": 1000}]
        del walls["PidMode"], walls["UTSMode"]
        return asked

    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as service:
        try:
            assert wait_until(socket.exists)
            boxes = DockerExecutor(f"unix://{socket}", "1.41", tmp_path / "runs", build)
            with pytest.raises(LimitNotEnforced, match="GPU: PID 1 sees no /dev/nvidia1"):
                boxes.run(spec_with(f"sha256:{podman.image}", GPU_1))
        finally:
            service.terminate()
