"""What a test may need of its machine, and what happens where it is missing."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from sandbox.engine.find import Engine
from tests.support.gpu_stand_ins import Cards

FACILITIES = ("docker", "chromium", "engines", "gpu", "api", "recordings")


def required(config: pytest.Config) -> list[str]:
    names: list[str] = config.getoption("--require")
    return names


def missing(config: pytest.Config, facility: str, why: str) -> None:
    """Skip with the reason, or fail where the facility was required."""
    if facility in required(config):
        pytest.fail(f"{facility} was required: {why}", pytrace=False)
    pytest.skip(why)


class GpuMachine(NamedTuple):
    """An engine whose hook is a stand-in, an image on it, and two pretended GPUs."""

    engine: Engine
    image: str
    cards: Cards
    state_dir: Path
    library: Path
