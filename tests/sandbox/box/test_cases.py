"""Hostile and unlucky programs, each with the outcome that must be found for it.

A case is a folder in `cases/`: `train.py`, and `expect.toml` with the keys of `Expectation`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sandbox import DockerExecutor
from tests.support.cases import CASES, asked_and_found, case_spec, read_case


@pytest.mark.docker
@pytest.mark.parametrize("name", sorted(path.name for path in CASES.iterdir()))
def test_a_case_ends_as_expected(name: str, engine: Any, image: Any, tmp_path: Path) -> None:
    expected = read_case(name)
    output = tmp_path / "output"
    output.mkdir()
    executor = DockerExecutor(engine.base_url, engine.api_version, tmp_path / "runs")
    result = executor.run(case_spec(name, expected, image.image_id), output_dir=output)
    asked, found = asked_and_found(expected, result)
    assert asked == found, result.model_dump_json(indent=1)[:4000]
    assert result.wall_seconds <= (
        expected.max_wall_seconds or expected.limits.get("wall_seconds", 10)
    )
    assert [] == list((tmp_path / "runs").iterdir())
