"""What a machine cannot give is said by its name before anything trains."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from agent.machine.readiness import require_capacity, try_a_box
from agent.machine.setup import make_data
from agent.settings import Settings
from sandbox.box.executor import DockerExecutor
from sandbox.box.hardening import container_settings
from sandbox.contract.errors import LimitNotEnforced, SandboxError, UsageError
from sandbox.engine.find import Engine
from sandbox.machine import state_directory
from tests.support.histories import IN_FORCE
from tests.support.nights import TOY

TERABYTES = 2**44


def with_limits(**changes: Any) -> Settings:
    small = {"memory_bytes": 2**27, "cpus": 1, "pids": 32, "output_bytes": 2**22} | changes
    return IN_FORCE.model_copy(update={"limits": IN_FORCE.limits.model_copy(update=small)})


def boxes(engine: Engine, runs: Path, **options: Any) -> DockerExecutor:
    return DockerExecutor(engine.base_url, engine.api_version, runs, **options)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (with_limits(cpus=4096), "cpus under [limits] is 4096, and the engine has"),
        (with_limits(memory_bytes=TERABYTES), "memory under [limits] is 16384.0 GiB"),
    ],
)
def test_a_limit_beyond_the_machine_is_refused_by_its_name(
    engine: Engine, settings: Settings, words: str
) -> None:
    require_capacity(engine, with_limits())
    with pytest.raises(UsageError) as refusal:
        require_capacity(engine, settings)
    assert words in refusal.value.message


def test_scoring_has_a_memory_of_its_own_that_must_fit(engine: Engine) -> None:
    assert IN_FORCE.scoring is not None
    scoring = IN_FORCE.scoring.model_copy(update={"memory_bytes": TERABYTES})
    with pytest.raises(UsageError, match=r"memory under \[scoring\]"):
        require_capacity(engine, with_limits().model_copy(update={"scoring": scoring}))


def test_a_limit_that_only_a_box_shows_is_refused_before_anything_trains(
    engine: Engine, image: Any, tmp_path: Path
) -> None:
    executor = boxes(engine, tmp_path / "run")
    try_a_box(executor, image.image_id, with_limits(), None)
    with pytest.raises(LimitNotEnforced, match=r"\[limits\] of program.md did not run.*nproc"):
        try_a_box(executor, image.image_id, with_limits(pids=2**20), None)


def test_data_that_boxes_cannot_read_is_named(engine: Engine, image: Any, tmp_path: Path) -> None:
    data, executor = tmp_path / "data", boxes(engine, tmp_path / "run")
    (data / "train").mkdir(parents=True)
    data.chmod(0o755)
    secret = data / "train" / "tokens.bin"
    secret.write_text("x")
    secret.chmod(0o600)
    with pytest.raises(UsageError, match=r"boxes cannot read .*data/train/tokens.bin"):
        try_a_box(executor, image.image_id, with_limits(), data)
    secret.chmod(0o644)
    try_a_box(executor, image.image_id, with_limits(), data)


def test_folders_of_a_reporting_program_are_tried_where_it_finds_them(
    engine: Engine, image: Any, tmp_path: Path
) -> None:
    executor = boxes(engine, tmp_path / "run")
    (tmp_path / "sets").mkdir(mode=0o755)
    (tmp_path / "sets" / "elsewhere").symlink_to(tmp_path)  # nowhere in a box, which is known
    (tmp_path / "one.bin").write_text("x")
    asked = with_limits().model_dump() | {"goal": {"source": "reported"}, "scoring": None}
    places = ((tmp_path / "sets", "/sets/mine"), (tmp_path / "one.bin", "data/one.bin"))
    asked["data"] = {"folders": [{"from": str(source), "at": at} for source, at in places]}
    settings = Settings.model_validate(asked)

    try_a_box(executor, image.image_id, settings, None)
    (tmp_path / "one.bin").chmod(0o600)
    with pytest.raises(UsageError, match=f"boxes cannot read {tmp_path}/one.bin"):
        try_a_box(executor, image.image_id, settings, None)


def test_prepared_data_can_be_read_by_boxes_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        made = make_data(IN_FORCE, TOY / "workspace", tmp_path, lambda _: None)
    finally:
        os.umask(before)
    assert made is not None
    assert {0o755} == {path.stat().st_mode & 0o777 for path in (made, made / "train")}
    assert 0o644 == (made / "manifest.json").stat().st_mode & 0o777


def test_nobody_s_home_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)  # a user without a passwd entry and without HOME
    with pytest.raises(UsageError) as refusal:
        state_directory({})
    assert "NIGHTLAB_HOME" in refusal.value.hint
    assert Path("/srv/n") == state_directory({"NIGHTLAB_HOME": "/srv/n"})


@pytest.mark.parametrize("exists", [True, False])
def test_an_engine_that_sees_another_directory_under_the_path_is_noticed(
    engine: Engine, image: Any, tmp_path: Path, exists: bool
) -> None:
    elsewhere = tmp_path / "elsewhere"  # what a container's path means on the host
    if exists:
        elsewhere.mkdir()

    def build(*asked: Any) -> Any:
        settings = container_settings(*asked)
        settings["HostConfig"]["Mounts"][0]["Source"] = str(elsewhere)
        del settings["HostConfig"]["Mounts"][1]
        return settings

    executor = boxes(engine, tmp_path / "run", build=build)
    with pytest.raises(SandboxError) as refusal:
        try_a_box(executor, image.image_id, with_limits(), None)
    assert "mount a directory of the host at the same path" in refusal.value.hint
