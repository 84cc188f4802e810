"""Wheels come by the host's own pip: pinned, checked, cached, and never a CUDA torch."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sandbox.image.profiles import TorchBuild, find_profile
from sandbox.image.wheels import (
    Pip,
    Target,
    Wheels,
    WheelsUnavailable,
    WrongTorchBuild,
    fetch_wheels,
    inspect_torch,
)
from tests.support.wheels import pip_that_knows, write_wheel

TARGET = Target(python="3.11", machine="x86_64")
CPU_SOURCE = "__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n"
CUDA_SOURCE = "__version__ = '2.13.0'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"
CUDA_NEEDS = "nvidia-cublas==13.0; platform_system == 'Linux'"


def lock_of(*wheels: Path) -> str:
    lines = []
    for wheel in wheels:
        name, version, *_ = wheel.name.split("-")
        sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
        lines.append(f"{name}=={version} \\\n    --hash=sha256:{sha256}")
    return "# made for a test\n" + "\n".join(lines) + "\n"


class Site:
    """A machine whose pip knows one folder of wheels and nothing else."""

    def __init__(self, root: Path) -> None:
        self.links = root / "links"
        self.cache = root / "state" / "wheels"
        self.tiny = write_wheel(self.links, "tiny", "1.0")
        self.lock = lock_of(self.tiny)
        build = find_profile("cpu").torch
        assert isinstance(build, TorchBuild)
        self.wanted = build
        self.said: list[str] = []
        self.torch_index = ""

    def fetch(self) -> Wheels:
        self.said.clear()
        # An address where nobody listens: nothing but the folder may be needed.
        nobody = {"PIP_INDEX_URL": "http://127.0.0.1:1/", "PIP_RETRIES": "0"}
        environ = pip_that_knows(self.links, **nobody)
        pip = Pip(TARGET, environ, self.torch_index, self.said.append)
        return fetch_wheels(self.wanted, self.lock, pip, folder=self.cache)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_the_cpu_build_in_a_local_folder_is_taken_and_its_hash_recorded(site: Site) -> None:
    torch = write_wheel(site.links, "torch", "2.13.0+cpu", source=CPU_SOURCE)
    wheels = site.fetch()
    assert hashlib.sha256(torch.read_bytes()).hexdigest() == wheels.torch.sha256
    assert ("2.13.0+cpu", torch.read_bytes()) == (
        wheels.torch.version,
        wheels.torch_path.read_bytes(),
    )
    assert [site.tiny.name] == [path.name for path in wheels.locked]


def test_an_unmarked_build_is_taken_when_it_is_a_cpu_build(site: Site) -> None:
    write_wheel(site.links, "torch", "2.13.0", source=CPU_SOURCE)
    assert "2.13.0" == site.fetch().torch.version


def test_a_second_fetch_asks_pip_for_nothing(site: Site) -> None:
    write_wheel(site.links, "torch", "2.13.0+cpu", source=CPU_SOURCE)
    first = site.fetch()
    for wheel in site.links.iterdir():
        wheel.unlink()
    assert (first, []) == (site.fetch(), site.said)


@pytest.mark.parametrize(
    ("version", "needs", "source"),
    [
        ("2.13.0", CUDA_NEEDS, CUDA_SOURCE),
        ("2.13.0", "", CUDA_SOURCE),
        ("2.13.0+cu130", CUDA_NEEDS, CUDA_SOURCE),
        ("2.13.0", "triton==3.5", CPU_SOURCE),
    ],
)
def test_a_cuda_build_is_refused_with_the_way_to_the_right_one(
    site: Site, version: str, needs: str, source: str
) -> None:
    write_wheel(site.links, "torch", version, needs, source)
    with pytest.raises(WrongTorchBuild) as refusal:
        site.fetch()
    assert "--torch-index" in refusal.value.hint
    assert [] == list(site.cache.rglob("torch-*.whl"))


def test_another_version_of_torch_is_not_taken(site: Site) -> None:
    write_wheel(site.links, "torch", "2.12.0+cpu", source=CPU_SOURCE)
    with pytest.raises(WheelsUnavailable, match=r"no torch 2\.13\.0"):
        site.fetch()


@pytest.mark.parametrize("pattern", ["tiny-*.whl", "torch-*.whl"])
def test_a_damaged_wheel_in_the_cache_is_fetched_again(site: Site, pattern: str) -> None:
    write_wheel(site.links, "torch", "2.13.0+cpu", source=CPU_SOURCE)
    first = site.fetch()
    (cached,) = site.cache.rglob(pattern)
    sound = cached.read_bytes()
    cached.write_bytes(sound[:-9])
    assert first == site.fetch()
    assert sound == cached.read_bytes()


def test_a_wheel_that_the_lock_does_not_know_is_refused(site: Site) -> None:
    write_wheel(site.links, "tiny", "1.0", source="changed = True\n")
    with pytest.raises(WheelsUnavailable, match="could not fetch"):
        site.fetch()
    assert [] == list(site.cache.rglob("*.whl"))


def test_what_an_interrupted_fetch_left_is_cleared_away(site: Site) -> None:
    write_wheel(site.links, "torch", "2.13.0+cpu", source=CPU_SOURCE)
    abandoned = site.cache / "cp311-x86_64" / "incoming-dead"
    abandoned.mkdir(parents=True)
    (abandoned / "tiny-1.0-py3-none-any.whl").write_bytes(b"half")
    site.fetch()
    assert not abandoned.exists()


def test_torch_recorded_but_never_finished_is_fetched_again(site: Site) -> None:
    write_wheel(site.links, "torch", "2.13.0+cpu", source=CPU_SOURCE)
    first = site.fetch()
    (first.torch_path.parent / "torch.json").unlink()
    assert first == site.fetch()


def test_something_that_is_no_wheel_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "torch-2.13.0+cpu-py3-none-any.whl"
    path.write_bytes(b"PK but not really")
    with pytest.raises(WheelsUnavailable, match="not a sound wheel"):
        inspect_torch(path)


@contextmanager
def index_of(wheel: Path, announced_bytes: int, asked: list[str]) -> Iterator[str]:
    """A package index with one torch, which claims to have so many bytes."""

    class Index(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path.endswith(".whl"):
                self.send_response(200)
                self.send_header("Content-Length", str(announced_bytes))
                self.end_headers()
                self.wfile.write(wheel.read_bytes())
                return
            page = f'<html><body><a href="/{wheel.name}">{wheel.name}</a></body></html>'.encode()
            self.send_response(200 if self.path == "/torch/" else 404)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (its name there)
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_torchs_own_index_is_asked_when_pip_as_configured_has_only_cuda(
    site: Site, tmp_path: Path
) -> None:
    write_wheel(site.links, "torch", "2.13.0", CUDA_NEEDS, CUDA_SOURCE)
    right = write_wheel(tmp_path / "index", "torch", "2.13.0+cpu", source=CPU_SOURCE)
    with index_of(right, right.stat().st_size, []) as address:
        site.torch_index = address
        assert "2.13.0+cpu" == site.fetch().torch.version


def test_a_download_too_large_for_a_cpu_build_is_stopped_at_its_start(
    site: Site, tmp_path: Path
) -> None:
    wheel = write_wheel(tmp_path / "index", "torch", "2.13.0+cpu", source=CPU_SOURCE)
    with index_of(wheel, 900_000_000, []) as address:
        site.torch_index = address
        with pytest.raises(WrongTorchBuild, match="its download was stopped"):
            site.fetch()
