"""Measures what others did to the machine during a run.

Wall time lies on a machine with neighbours: the same 20 seconds gave 18 steps once and 380
another time. A disturbed run is repeated, not judged.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agent.records import Disturbance

_IDLE_COLUMNS = (3, 4)  # idle and iowait
_STOLEN_BY_GUESTS = (8, 9)  # guest times are already part of user and nice


@dataclass(frozen=True)
class Sample:
    """Processor time so far, in core seconds, and when it was read."""

    busy_seconds: float
    own_seconds: float
    at: float


def busy_core_seconds(proc_stat: str, ticks_per_second: int) -> float:
    """Core seconds that all processors were busy, stolen time included, from /proc/stat."""
    columns = [int(column) for column in proc_stat.splitlines()[0].split()[1:]]
    skipped = (*_IDLE_COLUMNS, *_STOLEN_BY_GUESTS)
    return sum(c for i, c in enumerate(columns) if i not in skipped) / ticks_per_second


def sample(clock: Callable[[], float] = time.monotonic) -> Sample:
    """Read the machine's and our own processor time now."""
    text = Path("/proc/stat").read_text(encoding="ascii")
    own = os.times()
    return Sample(
        busy_seconds=busy_core_seconds(text, os.sysconf("SC_CLK_TCK")),
        own_seconds=own.user + own.system,
        at=clock(),
    )


def disturbance(
    before: Sample, after: Sample, run_cpu_seconds: float, limit_cores: float
) -> Disturbance:
    """Mean cores used by anything but the run and nightlab between two samples."""
    elapsed = max(after.at - before.at, 1e-9)
    ours = run_cpu_seconds + (after.own_seconds - before.own_seconds)
    others = max(0.0, (after.busy_seconds - before.busy_seconds - ours) / elapsed)
    return Disturbance(
        other_cores=round(others, 4), limit_cores=limit_cores, disturbed=others > limit_cores
    )
