"""A box from Python: the manual's three lines, and limits by name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sandbox import Limits, RunResult, SandboxError, run_box
from sandbox.machine import named_limits, state_directory
from tests.support.boxes import SMALL_LIMITS

PAGE = Path(__file__).parents[2] / "docs" / "boxes.md"


def example() -> str:
    """Return the code under "From Python"."""
    section = PAGE.read_text().partition("## From Python")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return str(code)


@pytest.mark.docker
def test_the_three_lines_of_the_manual_run_one_command_in_a_box(
    engine: Any, image: Any, tmp_path: Path
) -> None:
    assert 3 == len([line for line in example().splitlines() if line])
    done = subprocess.run(
        [sys.executable, "-c", example()],
        cwd=tmp_path,
        env=os.environ | {"NIGHTLAB_HOME": str(state_directory(os.environ))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ("ok hi\n\n", "") == (done.stdout, done.stderr)


@pytest.mark.docker
def test_mounts_output_and_limits_of_one_s_own_reach_the_box(
    engine: Any, image: Any, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "words").write_text("to be")
    code = "open('/out/copy', 'w').write(open('/data/words').read().upper())"
    limits = Limits.model_validate(SMALL_LIMITS)
    result = run_box(
        ["python3", "-c", code],
        limits,
        mounts={tmp_path / "data": "/data"},
        output_dir=tmp_path / "output",
        pids=16,
    )
    assert "ok" == result.outcome
    assert "TO BE" == (tmp_path / "output" / "copy").read_text()
    assert limits.model_copy(update={"pids": 16}) == result.limits


@pytest.mark.docker
def test_a_command_that_fails_is_a_result(engine: Any, image: Any) -> None:
    result = run_box(["python3", "-c", "raise SystemExit(3)"], "small")
    assert ("failed", 3) == (result.outcome, result.exit_code)


def test_every_set_of_limits_is_whole() -> None:
    sets = [named_limits(name, {}) for name in ("small", "training")]
    assert [60, 900] == [limits.wall_seconds for limits in sets]


def test_there_is_no_box_without_limits() -> None:
    with pytest.raises(TypeError, match="limits"):
        run_box(["true"])  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "changed", "words"),
    [
        ("tiny", {}, "no set of limits 'tiny'"),
        ("small", {"wall_seconds": float("inf")}, "wall_seconds"),
        ("small", {"memory": 2**30}, "memory: Extra inputs"),
        ("small", {"pids": 0}, "pids"),
    ],
)
def test_limits_that_cannot_be_are_refused_before_anything_runs(
    name: str, changed: dict[str, float], words: str
) -> None:
    with pytest.raises(SandboxError, match=words) as refusal:
        run_box(["true"], name, environ={"DOCKER_HOST": "unix:///nowhere"}, **changed)  # type: ignore[arg-type]
    assert "" != refusal.value.hint


@pytest.mark.docker
def test_the_command_line_runs_the_same_box(engine: Any, image: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "words").write_text("to be")
    code = "open('/out/copy', 'w').write(open('/data/words').read())"
    flags = ["--wall-seconds", "30", "--memory", "256m", "--pids", "16", "--output", "8m"]
    flags += ["--mount-ro", "data:/data", "--output-dir", "left"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "agent.cli", "box", *flags, "--", "python3", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    result = RunResult.model_validate_json(done.stdout)
    assert ("ok", "") == (result.outcome, done.stderr)
    assert ["copy"] == [file.name for file in result.output]
    assert "to be" == (tmp_path / "left" / "copy").read_text()
    limits = result.limits
    assert (30, 2**28, 16, 2**23) == (
        limits.wall_seconds,
        limits.memory_bytes,
        limits.pids,
        limits.output_bytes,
    )
