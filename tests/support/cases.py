"""Hostile programs as folders, each with what must become of it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sandbox import Outcome, RunResult, RunSpec
from tests.support.boxes import box_spec

CASES = Path(__file__).parents[1] / "sandbox/box/cases"


class Expectation(BaseModel):
    """What must be found; what is not given is not looked at."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    outcome: Outcome
    exit_code: int | None = None
    signal: int | None = None
    max_wall_seconds: float | None = None
    log: str | None = None
    """The whole log."""
    log_has: tuple[str, ...] = ()
    log_total_bytes: int | None = None
    output: tuple[str, ...] | None = None
    """The names of all output files."""
    output_files: int | None = None
    full: tuple[str, ...] | None = None
    """The file systems seen full."""
    skipped: dict[str, int] | None = None
    """What of the output was left out, by reason."""
    at_least: dict[str, int] = {}
    """Counters of the evidence."""
    limits: dict[str, float | bool] = {}


def observations(expected: Expectation, result: RunResult) -> dict[str, Any]:
    """Return what was found, under the names of what is expected."""
    log = result.log
    return {
        "outcome": result.outcome,
        "exit_code": result.exit_code,
        "signal": result.signal,
        "log": log.head + log.tail,
        "log_total_bytes": len(log.head) + len(log.tail) + log.omitted_bytes,
        "log_has": tuple(words for words in expected.log_has if words in log.head + log.tail),
        "output": tuple(file.name for file in result.output),
        "output_files": len(result.output),
        "full": result.evidence["full"],
        "skipped": result.evidence["output_skipped"],
        "at_least": {
            name: least
            for name, least in expected.at_least.items()
            if result.evidence[name] >= least
        },
    }


def read_case(name: str) -> Expectation:
    """Return what must be found for one case."""
    return Expectation.model_validate(tomllib.loads((CASES / name / "expect.toml").read_text()))


def case_spec(name: str, expected: Expectation, image: str) -> RunSpec:
    """Return the run of one case."""
    return box_spec(
        "python3",
        "train.py",
        image=image,
        mounts={CASES / name: "/workspace"},
        **expected.limits,
    ).model_copy(update={"working_directory": "/workspace"})


def asked_and_found(
    expected: Expectation, result: RunResult
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what was asked for and, under the same names, what was found."""
    asked = expected.model_dump(exclude_unset=True, exclude={"limits", "max_wall_seconds"})
    found = observations(expected, result)
    return asked, {key: found[key] for key in asked}
