"""Facilities that tests ask for by name, and what happens where one is missing."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.contract.errors import SandboxError
from sandbox.engine.find import Engine, find_engine
from sandbox.image.image import ImageRecord, find_image
from sandbox.machine import state_directory
from tests.support.boxes import shipped_recipe
from tests.support.command_line import CommandLine
from tests.support.facilities import FACILITIES, GpuMachine, missing, required
from tests.support.gpu_stand_ins import (
    GPU_0,
    GPU_1,
    Cards,
    build_library,
    copy_image,
    hook_engine,
    load_library,
)
from tests.support.messages_server import MessagesServer
from tests.support.nights import TOY

GOLDEN = Path(__file__).parent / "golden"
ENGINES = frozenset({"engine", "dockerd"})
"""Fixtures that find an engine or let a test start one; others ask for these."""
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")


# Tests serve themselves on loopback; a site's proxy must not stand between.
os.environ["NO_PROXY"] = "127.0.0.1,localhost"
# Hundreds of clients of the model are made, and each would read all certificates anew.
ssl.create_default_context = functools.cache(ssl.create_default_context)  # type: ignore[assignment]


# A shell starts background jobs deaf to Ctrl-C; tests of it need ears, and so do their children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        action="append",
        default=[],
        choices=FACILITIES,
        help="fail, do not skip, the tests whose facility is missing; may be repeated",
    )
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew")


@pytest.hookimpl(tryfirst=True)  # before -m looks for the marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs an engine by the fixtures it asks for, so that nobody keeps a list."""
    for item in items:
        if not ENGINES.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker("docker")
    # Files that take long come first, so that no process waits for another one's last file.
    with_boxes = {item.path for item in items if "docker" in item.keywords}
    items.sort(key=lambda item: (item.path not in with_boxes, item.path.parent.name != "whole"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for facility in ("gpu", "api"):
        if item.get_closest_marker(facility) and facility not in required(item.config):
            pytest.skip(f"needs {facility}; run with --require {facility}")


@pytest.fixture(autouse=True)
def no_credentials(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No test finds the person's own key or SDK configuration."""
    for name in [name for name in os.environ if name.startswith("ANTHROPIC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ANTHROPIC_CONFIG_DIR", str(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="session")
def state_dir() -> Path:
    """Where `nightlab setup` keeps things on this machine."""
    return state_directory(os.environ)


@pytest.fixture(scope="session")
def engine(state_dir: Path, pytestconfig: pytest.Config) -> Engine:
    """The engine that set-up found or started."""
    try:
        return find_engine(state_dir, environ=os.environ)
    except SandboxError as error:
        missing(pytestconfig, "docker", f"{error.message}; {error.hint}")
        raise


@pytest.fixture(scope="session")
def image(engine: Engine, state_dir: Path, pytestconfig: pytest.Config) -> ImageRecord:
    """The cpu image that set-up built."""
    try:
        return find_image(engine, shipped_recipe(), state_dir=state_dir)
    except SandboxError as error:
        missing(pytestconfig, "docker", f"{error.message}; {error.hint}")
        raise


@pytest.fixture(scope="session")
def dockerd(pytestconfig: pytest.Config) -> None:
    """That an engine of one's own can be started here."""
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        missing(pytestconfig, "engines", "only root can start dockerd, and it must be installed")


@pytest.fixture(scope="session")
def nvml(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    """The stand-in for NVIDIA's library, in this process; returns its directory."""
    if shutil.which("gcc") is None:
        missing(pytestconfig, "engines", "no gcc to build the stand-in for NVML with")
    directory = tmp_path_factory.mktemp("nvml")
    load_library(build_library(directory))
    return directory


@pytest.fixture
def cards(nvml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cards:
    """A pretended machine's GPUs, none at first."""
    cards = Cards(tmp_path / "cards")
    cards.clear()
    monkeypatch.setenv("NIGHTLAB_STUB_NVML", str(cards.root))
    return cards


@pytest.fixture(scope="session")
def _gpu_engine(
    dockerd: None,
    engine: Engine,
    image: ImageRecord,
    nvml: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[GpuMachine]:
    place = tmp_path_factory.mktemp("gpu-engine")
    cards = Cards(place / "cards")
    cards.clear()
    with hook_engine(place / "state", cards.root, os.environ) as second:
        base = copy_image(engine, second.base_url, image.base.image_id)
        yield GpuMachine(second, base, cards, place / "state", nvml)


@pytest.fixture
def gpu_machine(_gpu_engine: GpuMachine, monkeypatch: pytest.MonkeyPatch) -> GpuMachine:
    """A machine with two whole GPUs, idle and healthy."""
    _gpu_engine.cards.clear()
    for index, uuid in enumerate((GPU_0, GPU_1)):
        _gpu_engine.cards.add(index, uuid)
    shutil.rmtree(_gpu_engine.state_dir / "gpus", ignore_errors=True)
    monkeypatch.setenv("NIGHTLAB_STUB_NVML", str(_gpu_engine.cards.root))
    return _gpu_engine


@pytest.fixture(scope="session")
def chromium(pytestconfig: pytest.Config) -> Path:
    """A headless browser."""
    for name in CHROMIUM_NAMES:
        if found := shutil.which(name):
            return Path(found)
    missing(pytestconfig, "chromium", "no chromium on this machine; install Debian's chromium")
    raise AssertionError


@pytest.fixture
def golden(pytestconfig: pytest.Config) -> Callable[[str, str], None]:
    """Compare a text with the golden file of that name; `--update-golden` writes it."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if pytestconfig.getoption("--update-golden"):
            path.write_text(text, encoding="utf-8")
        assert path.read_text(encoding="utf-8") == text

    return compare


@pytest.fixture
def place(tmp_path: Path, engine: Engine, image: ImageRecord) -> CommandLine:
    """A person's directory with the toy task, set up."""
    shutil.copytree(TOY, tmp_path / "night", ignore=shutil.ignore_patterns("__pycache__"))
    place = CommandLine(tmp_path / "night", engine)
    made = place.nightlab("setup")
    assert made.returncode == 0, made.stderr
    return place


@pytest.fixture
def messages_server() -> Iterator[Callable[..., MessagesServer]]:
    """Start servers of the Messages API, each with a script; they end with the test."""
    servers: list[MessagesServer] = []

    def serve(script: Any, **options: Any) -> MessagesServer:
        server = MessagesServer(script, **options)
        servers.append(server.__enter__())
        return server

    yield serve
    for server in servers:
        server.__exit__(None, None, None)
