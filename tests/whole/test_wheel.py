"""What `pip install` brings: the wheel is built and used outside the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "agent/template/program.md",
    "agent/template/Dockerfile.train",
    "agent/template/workspace/train.py",
    "agent/template/workspace/prepare.py",
    "agent/template/workspace/evaluate.py",
)
DATA = (
    "sandbox/image/profiles.toml",
    "sandbox/image/requirements-cpu.lock",
    "sandbox/box/seccomp.json",
    "agent/report/templates/report.html",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(place), "."]
    subprocess.run(command, cwd=ROOT, check=True, timeout=240)
    return next(place.glob("nightlab-*.whl"))


def test_the_wheel_holds_what_a_person_starts_from(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())

    assert set() == {*TEMPLATE, *DATA} - names


def test_the_wheel_leaves_tests_and_the_top_level_workspace_at_home(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}

    assert {"agent", "sandbox"} == {top for top in tops if not top.endswith(".dist-info")}


def test_the_unpacked_wheel_lays_out_a_directory_to_start_from(wheel: Path, tmp_path: Path) -> None:
    site, place = tmp_path / "site", tmp_path / "place"
    zipfile.ZipFile(wheel).extractall(site)
    program = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from agent.cli.app import main; main()"
    )

    done = subprocess.run(
        [sys.executable, "-P", "-c", program, str(site), "init", str(place)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert {"Dockerfile.train", "program.md", "workspace"} == {p.name for p in place.iterdir()}
    assert (place / "workspace" / "train.py").read_bytes() == (
        ROOT / "workspace" / "train.py"
    ).read_bytes()
