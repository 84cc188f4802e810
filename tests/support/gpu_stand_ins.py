"""Stand-ins for what a machine without a GPU lacks: driver library, engine hook, CDI specs."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import docker

from sandbox.box.watchdog import ask
from sandbox.engine.find import Engine, find_engine
from sandbox.engine.host import own_places
from sandbox.engine.own import install_and_start, stop_own_engine
from sandbox.gpu.request import Gpu

SOURCES = Path(__file__).parent / "gpu"
NO_SOCKET = Path("/nonexistent/docker.sock")
GIBIBYTE = 2**30
GPU_0, GPU_1, GPU_2 = (f"GPU-8a6e0a5e-0000-4000-8000-00000000000{n}" for n in range(3))
MIG_0, MIG_1 = (f"MIG-3c5f1b2d-0000-4000-8000-00000000000{n}" for n in range(2))


def gpu(uuid: str, parent: str | None = None) -> Gpu:
    """Return a device without nodes, as leases know it."""
    return Gpu(id=uuid, index="0", name="a GPU", parent=parent, memory_bytes=1, nodes=())


BOTH = [gpu(GPU_0), gpu(GPU_1)]


class Cards:
    """The GPUs of a pretended machine: a directory that library and hook read."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, index: int, uuid: str, **fields: object) -> None:
        """Put in a GPU whose every answer can be replaced by keyword."""
        usual = {
            "uuid": uuid,
            "name": "NVIDIA Stand-in 80GB",
            "minor": index,
            "memory_total": 80 * GIBIBYTE,
            "memory_used": GIBIBYTE // 2,
            "utilisation": 0,
            "power_mw": 70_000,
            "energy_mj": 1_000_000,
            "sm_clock": 1980,
            "memory_clock": 2619,
            "temperature": 41,
            "throttle": 1,
            "ecc": 0,
            "recovery": 0,
            "processes": "",
            "drawing": "",
        }
        for name, value in (usual | fields).items():
            self.set(f"{index}/{name}", value)

    def add_instance(self, index: int, number: int, uuid: str, **fields: object) -> None:
        """Put a GPU into MIG mode, with one more instance."""
        usual = {
            "uuid": uuid,
            "name": "NVIDIA Stand-in 80GB MIG 1g.10gb",
            "memory_total": 10 * GIBIBYTE,
            "memory_used": 0,
            "gi": 7 + number,
            "ci": 0,
            "caps": f"{66 + 9 * number} {67 + 9 * number}",
            "processes": "",
        }
        for name, value in (usual | fields).items():
            self.set(f"{index}/mig/{number}/{name}", value)

    def set(self, path: str, value: object) -> None:
        """Write one answer; readers see the old one or the new one."""
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f".{place.name}")
        partial.write_text(f"{value}\n")
        partial.replace(place)

    def forget(self, path: str) -> None:
        """Take one answer away: the card does not offer it."""
        (self.root / path).unlink(missing_ok=True)

    def fail(self, path: str, error: int) -> None:
        """Let the library fail with this number of NVML's."""
        self.set(path, f"!{error}")

    def report(self, index: int, xid: int) -> None:
        """Let the driver report an error."""
        with (self.root / "xids").open("a") as file:
            file.write(f"{index} {xid}\n")

    def clear(self) -> None:
        """Take every card out."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(parents=True)


def build_library(directory: Path) -> Path:
    """Compile the stand-in for NVIDIA's library; whoever loads it finds it under the real name."""
    library = directory / "libnvidia-ml.so.1"
    words = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    soname = "-Wl,-soname,libnvidia-ml.so.1"
    subprocess.run(
        ["gcc", *words, soname, "-o", library, SOURCES / "nvml.c"], check=True, timeout=60
    )
    return library


def load_library(library: Path) -> None:
    """Load it into this process; the next load of that name gets this very one."""
    ctypes.CDLL(str(library), mode=os.RTLD_GLOBAL)


def install_hook(directory: Path, root: Path) -> None:
    """Write the stand-in hook, pointed at a directory of cards."""
    name = "nvidia-container-runtime-hook"
    text = (SOURCES / name).read_text().replace("@ROOT@", str(root))
    hook = directory / name
    hook.write_text(f"#!{sys.executable} -IS\n{text}")
    hook.chmod(0o755)


@contextlib.contextmanager
def hook_engine(state_dir: Path, cards: Path, environ: Mapping[str, str]) -> Iterator[Engine]:
    """Start an engine of its own, beside the one in use, that has the stand-in hook."""
    programs = state_dir / "programs"
    programs.mkdir(parents=True)
    install_hook(programs, cards)
    plain = {name: value for name, value in environ.items() if not name.startswith("DOCKER_")}
    plain |= {"PATH": f"{programs}:{plain.get('PATH', '')}", "DOCKER_CONFIG": str(state_dir)}
    try:
        install_and_start(state_dir, environ=plain, say=lambda _: None)
        yield find_engine(
            state_dir, environ={"DOCKER_HOST": own_places(state_dir).url}, default_socket=NO_SOCKET
        )
    finally:
        stop_own_engine(state_dir)
        shutil.rmtree(state_dir, ignore_errors=True)


def copy_image(source: Engine, target_url: str, image: str) -> str:
    """Bring an image from one engine to another; return its id there."""
    near = docker.APIClient(base_url=source.base_url, version=source.api_version, timeout=120)
    far = docker.APIClient(base_url=target_url, version="auto", timeout=120)
    with contextlib.closing(near), contextlib.closing(far):
        for answer in far.load_image(near.get_image(image)):  # type: ignore[no-untyped-call]
            assert "error" not in answer, answer
        return str(far.inspect_image(image)["Id"])  # type: ignore[no-untyped-call]


def cdi_spec(uuids: Mapping[str, int]) -> dict[str, Any]:
    """Return a CDI spec as NVIDIA's toolkit writes it, but for libraries that are not here."""
    control = [{"path": "/dev/nvidiactl", "type": "c", "major": 195, "minor": 255}]
    return {
        "cdiVersion": "0.5.0",
        "kind": "nvidia.com/gpu",
        "devices": [
            {
                "name": uuid,
                "containerEdits": {
                    "deviceNodes": [
                        {"path": f"/dev/nvidia{n}", "type": "c", "major": 195, "minor": n}
                    ]
                },
            }
            for uuid, n in uuids.items()
        ],
        "containerEdits": {"env": ["NVIDIA_VISIBLE_DEVICES=void"], "deviceNodes": control},
    }


class CdiEngine(NamedTuple):
    """A dockerd that knows CDI, and where it looks for specs."""

    url: str
    specs: Path


@contextlib.contextmanager
def cdi_engine(programs: Path, directory: Path) -> Iterator[CdiEngine]:
    """Start a dockerd of 25.0 or later from a folder of programs, with CDI switched on."""
    specs, socket = directory / "cdi", directory / "docker.sock"
    specs.mkdir(parents=True)
    settings = directory / "daemon.json"
    settings.write_text(json.dumps({"features": {"cdi": True}, "cdi-spec-dirs": [str(specs)]}))
    words = [
        *(f"--config-file={settings}", f"--host=unix://{socket}"),
        *(f"--data-root={directory / 'data'}", f"--exec-root={directory / 'exec'}"),
        *(f"--pidfile={directory / 'pid'}", "--bridge=none", "--iptables=false"),
        *("--ip6tables=false", "--ip-forward=false"),
    ]
    environ = {"PATH": f"{programs}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin", "HOME": "/root"}
    with (directory / "log").open("wb") as log:
        dockerd = subprocess.Popen(
            [shutil.which("dockerd", path=environ["PATH"]) or "dockerd", *words],
            env=environ,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            _await_socket(dockerd, socket, directory / "log")
            yield CdiEngine(f"unix://{socket}", specs)
        finally:
            dockerd.terminate()
            dockerd.wait(60)
            shutil.rmtree(directory, ignore_errors=True)


def _await_socket(dockerd: subprocess.Popen[bytes], socket: Path, log: Path) -> None:
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up and dockerd.poll() is None:
        if ask(str(socket), "GET", "/_ping") == 200:
            return
        time.sleep(0.1)
    raise AssertionError(log.read_text(errors="replace")[-3000:])
