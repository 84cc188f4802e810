"""Measures what others did to the machine during a run.

Wall time lies on a machine with neighbours: the same 20 seconds gave 18 steps once and 380
another time. A disturbed run is repeated, not judged.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from agent.record.events import Disturbance, RunFinished
from agent.record.history import History

_BLOCK = bytes(64 * 1024)
_SLICES, _SLICE_SECONDS = 4, 0.01
_IDLE_COLUMNS = (3, 4)  # idle and iowait
_STOLEN_BY_GUESTS = (8, 9)  # guest times are already part of user and nice


@dataclass(frozen=True)
class Sample:
    """Processor time so far, in core seconds, and when it was read."""

    busy_seconds: float
    own_seconds: float
    at: float
    speed: float = 1.0
    """Of one core, see `speed`."""


ReadLoad = Callable[[], Sample]


def busy_core_seconds(proc_stat: str, ticks_per_second: int) -> float:
    """Core seconds that all processors were busy, stolen time included, from /proc/stat."""
    columns = [int(column) for column in proc_stat.splitlines()[0].split()[1:]]
    skipped = (*_IDLE_COLUMNS, *_STOLEN_BY_GUESTS)
    return sum(c for i, c in enumerate(columns) if i not in skipped) / ticks_per_second


def sample(clock: Callable[[], float] = time.monotonic) -> Sample:
    """Read the machine's speed and processor time, and our own time, now."""
    now = speed()
    text = Path("/proc/stat").read_text(encoding="ascii")
    own = os.times()
    return Sample(
        busy_seconds=busy_core_seconds(text, os.sysconf("SC_CLK_TCK")),
        own_seconds=own.user + own.system,
        at=clock(),
        speed=now,
    )


def speed(clock: Callable[[], float] = time.perf_counter) -> float:
    """How fast one core works now, in MB hashed a second.

    The best of a few slices: what others use is measured elsewhere, and this is about a core that
    is throttled, or that a machine outside of ours has taken a part of.
    """
    return max(_slice(clock) for _ in range(_SLICES))


def disturbance(
    before: Sample,
    after: Sample,
    run_cpu_seconds: float,
    limit_cores: float,
    *,
    idle_cores: float = 0.0,
    usual_cores: float = 0.0,
    usual_speed: float | None = None,
    min_speed: float = 0.0,
) -> Disturbance:
    """Mean cores used by anything but the run and nightlab between two samples.

    Args:
        before: when the run began.
        after: when it was over.
        run_cpu_seconds: used by the run's box.
        limit_cores: how many they may use, see `allowed_cores`.
        idle_cores: what the run leaves to others.
        usual_cores: what others used beside the runs that this one is compared with.
        usual_speed: see `speed`; none where nothing was calibrated yet.
        min_speed: share of it below which the run counts as disturbed.
    """
    elapsed = max(after.at - before.at, 1e-9)
    ours = run_cpu_seconds + (after.own_seconds - before.own_seconds)
    others = max(0.0, (after.busy_seconds - before.busy_seconds - ours) / elapsed)
    found = Disturbance(
        other_cores=round(others, 4),
        limit_cores=limit_cores,
        disturbed=False,
        idle_cores=idle_cores,
        usual_cores=usual_cores,
        speed=round((before.speed + after.speed) / 2, 1),
        usual_speed=usual_speed,
        min_speed=min_speed,
    )
    return found.model_copy(update={"disturbed": is_crowded(found) or is_slow(found)})


def idle_cores(cpus: float, cores: int | None = None) -> float:
    """Cores of a machine, of this one if not given, that a run of so many leaves to others."""
    return max(0.0, ((os.cpu_count() or 1) if cores is None else cores) - cpus)


def allowed_cores(found: Disturbance) -> float:
    """How many cores others may use until a run counts as disturbed."""
    at_all, beyond_the_usual = found.limit_cores, found.usual_cores + found.limit_cores / 2
    return found.idle_cores + max(at_all, beyond_the_usual)


def is_crowded(found: Disturbance) -> bool:
    """Whether others used more of the machine than they may, as far as that is on record."""
    return found.other_cores > allowed_cores(found)


def is_slow(found: Disturbance) -> bool:
    """Whether the machine was slower than it may be, as far as that is on record."""
    if found.speed is None or found.usual_speed is None:
        return False
    return found.speed < found.min_speed * found.usual_speed


def reasons(noise: Disturbance) -> list[str]:
    """What disturbed a run, a phrase each; nothing when nothing did."""
    said = []
    if is_crowded(noise):
        allowed = f"{allowed_cores(noise):.2f}"
        said.append(f"others used {noise.other_cores:.2f} cores (limit {allowed})")
    if is_slow(noise):
        assert noise.speed is not None
        assert noise.usual_speed is not None
        said.append(f"a core had {noise.speed / noise.usual_speed:.0%} of its usual speed")
    return [*said, *noise.held_back]


def usual_speed(history: History, *, with_looks: bool = True) -> float | None:
    """The machine's speed beside the trainings that calibrate it; none before there is one.

    Older ledgers were written without the looks after a move.
    """
    runs = _calibrating(history, with_looks=with_looks)
    speeds = [run.disturbance.speed for run in runs if run.disturbance and run.disturbance.speed]
    return median(speeds) if speeds else None


def usual_cores(history: History) -> float:
    """What others used beside the same trainings, of each seed the one that counts.

    0 before there is one.
    """
    counted = {run.seed: run.disturbance for run in _calibrating(history) if run.disturbance}
    return round(median([noise.other_cores for noise in counted.values()] or [0.0]), 4)


def _calibrating(history: History, *, with_looks: bool = True) -> list[RunFinished]:
    """The runs that all others are compared with.

    They are the baseline's, or after a move to another machine those of the best there, in looks
    at the machine and beside close calls.
    """
    if history.moved is not None:
        number, earlier = history.moved
        looks = history.looked_at_since if with_looks else []
        runs = [*looks, *history.attempt(number).runs[earlier:]]
    else:
        runs = history.baseline.runs if history.baseline else []
    return runs


def _slice(clock: Callable[[], float]) -> float:
    began, blocks = clock(), 0
    while (elapsed := clock() - began) < _SLICE_SECONDS:
        hashlib.sha256(_BLOCK)
        blocks += 1
    return blocks * len(_BLOCK) / 1e6 / elapsed
