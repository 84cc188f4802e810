"""A box from Python: the manual's three lines, and limits by name."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from types import ModuleType
from typing import Any

import pytest

import agent
import sandbox
from sandbox import Limits, RunResult, SandboxError, run_box
from sandbox.contract.errors import NightlabError
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


@pytest.mark.parametrize(
    ("argv", "given", "words"),
    [
        ("echo hi", {}, "argv is a text"),
        (b"true", {}, "argv is a text"),
        (["true"], {"mounts": "data:/data"}, "mounts cannot be"),
        (["true"], {"mounts": ["data"]}, "mounts cannot be"),
        (["true"], {"mounts": {"data": "data"}}, "absolute path"),
        (["true"], {"mounts": {3: "/data"}}, "mounts cannot be"),
        (["true"], {"limits": {"pids": 3}}, "neither a set's name"),
    ],
)
def test_what_has_not_the_form_of_a_command_is_refused_in_a_sentence(
    argv: Any, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(NightlabError, match=words) as refusal:
        run_box(argv, environ={"DOCKER_HOST": "unix:///nowhere"}, **{"limits": "small"} | given)
    assert "" != refusal.value.hint


def test_no_help_shows_what_the_environment_holds() -> None:
    look = "import sandbox; help(sandbox.run_box); help(sandbox.DockerExecutor)"
    environ = os.environ | {"SOME_API_KEY": "not-to-be-seen"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", look], env=environ, capture_output=True, text=True, check=True
    )
    assert "argv" in done.stdout
    assert "not-to-be-seen" not in done.stdout


def test_no_function_of_nightlab_s_holds_the_environment_in_a_default() -> None:
    """Whatever is shown of a signature, in a help or a traceback's page, then shows keys."""
    names = [m.name for p in (agent, sandbox) for m in walk_packages(p.__path__, f"{p.__name__}.")]
    modules = [import_module(name) for name in names if ".template" not in name]
    functions = {
        f for m in modules for f in [*vars(m).values(), *_methods(m)] if inspect.isfunction(f)
    }
    held = [
        f.__qualname__
        for f in functions
        for default in [*(f.__defaults__ or ()), *(f.__kwdefaults__ or {}).values()]
        if default is os.environ or default == dict(os.environ)
    ]
    assert [] == held
    assert len(functions) > 500


def _methods(module: ModuleType) -> list[Any]:
    kinds = [kind for kind in vars(module).values() if inspect.isclass(kind)]
    return [found for kind in kinds for found in vars(kind).values()]


@pytest.mark.docker
def test_the_command_line_runs_the_same_box(engine: Any, image: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "words").write_text("to be")
    code = "open('/out/copy', 'w').write(open('/data/words').read())"
    flags = ["--wall-seconds", "30", "--memory", "256m", "--pids", "16", "--output", "8m"]
    flags += ["--program", str(PAGE.parents[1] / "program.md")]
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
