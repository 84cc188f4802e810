"""Hostile and unlucky programs, each with the outcome that must be found for it.

A case is a folder in `cases/`: `train.py`, and `expect.toml` with the keys of `Expectation`.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sandbox import DockerExecutor, RunResult
from tests.support.cases import CASES, asked_and_found, case_spec, read_case
from tests.support.pools import asked_for, run_together

AT_ONCE = 3
"""Most of a case is waiting, for its deadline or for the engine."""
BUSY_SECONDS = 6.0
"""What a busy machine may add. How fast a box dies on a quiet one is what `bench_kill` measures."""


class Ended(NamedTuple):
    """What a case came to, and what it left in its run directory."""

    result: RunResult
    left: list[Path]


@pytest.fixture(scope="module")
def ended(
    request: pytest.FixtureRequest,
    engine: Any,
    image: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Future[Ended]]]:
    """What each case that is asked for comes to, a few at a time, the longest first."""
    cases = asked_for(request.session, test_a_case_ends_as_expected)
    longest = sorted(cases, key=lambda name: -read_case(name).limits.get("wall_seconds", 0))

    def run(case: dict[str, str]) -> Ended:
        name = case["name"]
        root = tmp_path_factory.mktemp(name)
        executor = DockerExecutor(engine.base_url, engine.api_version, root / "runs")
        spec = case_spec(name, read_case(name), image.image_id)
        (root / "output").mkdir()
        result = executor.run(spec, output_dir=root / "output")
        return Ended(result, list((root / "runs").iterdir()))

    with run_together({name: cases[name] for name in longest}, run, AT_ONCE) as results:
        yield results


@pytest.mark.docker
@pytest.mark.parametrize("name", sorted(path.name for path in CASES.iterdir()))
def test_a_case_ends_as_expected(name: str, ended: dict[str, Future[Ended]]) -> None:
    expected = read_case(name)
    result, left = ended[name].result()
    asked, found = asked_and_found(expected, result)
    assert asked == found, result.model_dump_json(indent=1)[:4000]
    bound = expected.max_wall_seconds or expected.limits.get("wall_seconds", 10)
    assert result.wall_seconds <= bound + BUSY_SECONDS
    assert [] == left
