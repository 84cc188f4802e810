"""Measures how long a box outlives its deadline, or its controller.

`python -m tests.bench.bench_kill [--runs N] [--json]`: hostile cases in turn, each with one second
of wall time. With a living controller the time runs from the deadline, with a killed one from the
kill; it ends when the host's kernel says that the last process of the box is gone, PID 1 included.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from sandbox import DockerExecutor, Outcome, RunSpec
from sandbox.box.hardening import LABEL_RUN
from sandbox.box.reaper import sweep, sweep_run_directories
from sandbox.engine.find import connect, find_engine
from sandbox.image.image import find_image
from sandbox.machine import state_directory
from tests.bench.bench_overhead import Place
from tests.support.boxes import MEBIBYTE, box_spec, shipped_recipe

CASES = Path(__file__).parents[2] / "tests/sandbox/box/cases"
HOSTILE = (
    "ignores_sigterm",
    "daemons_spin",
    "signals_everything",
    "fork_storm_at_the_deadline",
    "orphan_storm",
    "floods_into_the_deadline",
    "memory_thrash",
    "sleeps_in_exit_handler",
    "hangs_with_children",
)
WALL_SECONDS = 1.0
PIDS = 512
STORM_MEBIBYTES = 512
"""Hundreds of processes shall meet the deadline, not the memory limit."""
KILL_AFTER_SECONDS = 0.7
GIVE_UP_SECONDS = 30


def hostile_spec(case: str, image: str, run_id: str) -> RunSpec:
    """Return a run of one case with a second of wall time and room for a real storm."""
    spec = box_spec(
        "python3",
        "train.py",
        image=image,
        mounts={CASES / case: "/workspace"},
        wall_seconds=WALL_SECONDS,
        pids=PIDS,
        memory_bytes=(STORM_MEBIBYTES if "storm" in case else 128) * MEBIBYTE,
    )
    return spec.model_copy(update={"run_id": run_id, "working_directory": "/workspace"})


class Death(NamedTuple):
    """How one hostile run ended."""

    case: str
    seconds: float
    """From the deadline, or from the controller's death, to the last process gone."""
    clearing_seconds: float | None
    """What PID 1 itself says it took to kill everything."""


class InitWatch:
    """Opens PID 1 of a run as the host's kernel knows it, and sees it end."""

    def __init__(self, place: Place, run_id: str) -> None:
        self._place = place
        self._run_id = run_id
        self._ends: list[float] = []
        self._thread = threading.Thread(target=self._wait)
        self._init = -1
        self.go_at = 0.0

    def on_step(self, step: str) -> None:
        """Begin to watch just before the program exists."""
        if step == "compared":
            self.begin()
            self.go_at = time.monotonic()

    def begin(self) -> None:
        """Find the run's container and open its PID 1, which cannot come to mean another."""
        with contextlib.closing(connect(self._place.engine)) as client:
            (box,) = client.containers.list(filters={"label": f"{LABEL_RUN}={self._run_id}"})
            self._init = os.pidfd_open(box.attrs["State"]["Pid"])
        self._thread.start()

    def _wait(self) -> None:
        poller = select.poll()
        poller.register(self._init, select.POLLIN)
        if poller.poll(GIVE_UP_SECONDS * 1000):
            self._ends.append(time.monotonic())
        os.close(self._init)

    def ended_at(self) -> float:
        """Wait for PID 1, the last of its namespace to go, and return when that was."""
        self._thread.join()
        assert self._ends, "the box does not end"
        return self._ends[0]


def under_a_living_controller(place: Place, case: str, run_id: str, run_root: Path) -> Death:
    """Return how long a box outlives its deadline while the controller watches."""
    watch = InitWatch(place, run_id)
    executor = DockerExecutor(
        place.engine.base_url, place.engine.api_version, run_root, on_step=watch.on_step
    )
    result = executor.run(hostile_spec(case, place.image, run_id))
    assert Outcome.TIMED_OUT == result.outcome, (case, result)
    seconds = watch.ended_at() - watch.go_at - WALL_SECONDS
    report = result.evidence["report"]
    return Death(case, seconds, report and report["clearing_seconds"])


def controller(url: str, version: str, run_root: str, spec: str) -> None:
    """Be the controller that will be killed; says on stdout when the program is let go."""

    def on_step(step: str) -> None:
        if step == "compared":
            sys.stdout.write("go\n")
            sys.stdout.flush()

    executor = DockerExecutor(url, version, Path(run_root), on_step=on_step)
    executor.run(RunSpec.model_validate_json(spec))


def under_a_dead_controller(place: Place, case: str, run_id: str, run_root: Path) -> Death:
    """Return how long a box outlives a controller killed by SIGKILL."""
    spec = hostile_spec(case, place.image, run_id)
    arguments = (place.engine.base_url, place.engine.api_version, run_root, spec.model_dump_json())
    with subprocess.Popen(
        [sys.executable, "-m", "tests.bench.bench_kill", "--be-controller", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        assert b"go\n" == process.stdout.readline()
        watch = InitWatch(place, run_id)
        watch.begin()
        time.sleep(KILL_AFTER_SECONDS)
        process.kill()
        killed_at = time.monotonic()
    seconds = watch.ended_at() - killed_at
    with contextlib.closing(connect(place.engine)) as client:
        sweep(client.api)
    sweep_run_directories(run_root)
    return Death(case, seconds, None)


WAYS = {
    "living controller": under_a_living_controller,
    "killed controller": under_a_dead_controller,
}


def percentile(values: list[float], share: float) -> float:
    """Return the smallest value that this share of the values does not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def summary(deaths: list[Death]) -> dict[str, Any]:
    """Return p50, p99 and the worst of all, and the worst of each case."""
    seconds = [death.seconds for death in deaths]
    return {
        "runs": len(deaths),
        "p50": round(percentile(seconds, 0.5), 3),
        "p99": round(percentile(seconds, 0.99), 3),
        "max": round(max(seconds), 3),
        "worst_of_case": {
            case: round(max(death.seconds for death in deaths if death.case == case), 3)
            for case in dict.fromkeys(death.case for death in deaths)
        },
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the summaries for a reader."""
    lines = []
    for way, numbers in found.items():
        three = "  ".join(f"{name} {numbers[name]:.3f} s" for name in ("p50", "p99", "max"))
        lines.append(f"{way}, {numbers['runs']} runs: {three}")
        lines += [f"  {case:<28}{worst:>8.3f}" for case, worst in numbers["worst_of_case"].items()]
    return "\n".join(lines)


def bench(runs: int, cases: tuple[str, ...], ways: list[str]) -> dict[str, dict[str, Any]]:
    """Measure on the engine and the image that set-up chose."""
    state_dir = state_directory(os.environ)
    engine = find_engine(state_dir, environ=os.environ)
    image = find_image(engine, shipped_recipe(), state_dir=state_dir)
    place = Place(engine, image.image_id)
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        for way in ways:
            chosen = itertools.islice(itertools.cycle(cases), runs)
            deaths = [
                WAYS[way](place, case, f"kill-{os.getpid()}-{way[:6]}-{number}", Path(directory))
                for number, case in enumerate(chosen)
            ]
            found[way] = summary(deaths)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--case", action="append", choices=HOSTILE)
    parser.add_argument("--way", action="append", choices=list(WAYS))
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--be-controller", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.be_controller:
        controller(*arguments.be_controller)
        return
    found = bench(arguments.runs, tuple(arguments.case or HOSTILE), arguments.way or list(WAYS))
    sys.stdout.write((json.dumps(found, indent=1) if arguments.json else table(found)) + "\n")


if __name__ == "__main__":
    main()
