"""Measures what a box costs beside a bare container.

`python -m tests.bench.bench_overhead [--pairs N] [--json]`: a program that does nothing, run in a
box with every wall, its read-back and its result, in turn with the docker SDK's bare create, start,
wait and remove of the same image, and with `docker run --rm --network none` where a docker command
is found. Ratios are taken pair by pair, since a machine's pace changes from minute to minute.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import docker

from sandbox import DockerExecutor, Outcome
from sandbox.engine.find import Engine, find_engine
from sandbox.image.image import find_image
from sandbox.machine import state_directory
from tests.support.boxes import box_spec, shipped_recipe

STEPS = {
    "prepared": "prepare",
    "created": "create",
    "started": "start",
    "connected": "connect",
    "inspected": "inspect",
    "compared": "compare",
    "reported": "run",
    "ended": "collect",
}
WARM_UPS = 2


class Place(NamedTuple):
    """An engine and the image that every way runs."""

    engine: Engine
    image: str


class BoxTimer:
    """Runs boxes and notes how long each of their steps took."""

    def __init__(self, place: Place, run_root: Path) -> None:
        self._spec = box_spec("true", image=place.image)
        self._executor = DockerExecutor(
            place.engine.base_url, place.engine.api_version, run_root, on_step=self._note
        )
        self._last = 0.0
        self.steps: dict[str, list[float]] = {name: [] for name in (*STEPS.values(), "remove")}

    def _note(self, step: str) -> None:
        now = time.monotonic()
        self.steps[STEPS[step]].append(now - self._last)
        self._last = now

    def run(self) -> None:
        """Run one box that does nothing."""
        self._last = time.monotonic()
        outcome = self._executor.run(self._spec).outcome
        self.steps["remove"].append(time.monotonic() - self._last)
        assert Outcome.OK == outcome


def bare_sdk(place: Place) -> Callable[[], None]:
    """Return a bare create, start, wait and remove through the docker SDK."""

    def run() -> None:
        client = docker.APIClient(place.engine.base_url, place.engine.api_version)
        settings = {"Image": place.image, "Entrypoint": ["true"], "NetworkDisabled": False}
        settings["HostConfig"] = {"NetworkMode": "none"}
        box = client.create_container_from_config(settings)["Id"]  # type: ignore[no-untyped-call]
        client.start(box)
        assert 0 == client.wait(box)["StatusCode"]
        client.remove_container(box)
        client.close()

    return run


def bare_command(place: Place) -> Callable[[], None] | None:
    """Return `docker run` with the docker command, or None where there is none that works."""
    program = shutil.which("docker")
    environ = os.environ | {"DOCKER_HOST": place.engine.base_url}
    if program is None or not _answers([program, "version"], environ):
        return None
    argv = [program, "run", "--rm", "--network", "none", "--entrypoint", "true", place.image]

    def run() -> None:
        subprocess.run(argv, env=environ, check=True)

    return run


def _answers(argv: list[str], environ: dict[str, str]) -> bool:
    done = subprocess.run(argv, env=environ, capture_output=True, check=False)
    return done.returncode == 0


def measure(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each way, taken in turn; who goes first changes every round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds):
        for name in names if number % 2 else reversed(names):
            started = time.monotonic()
            ways[name]()
            seconds[name].append(time.monotonic() - started)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Return median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 4), "q1": round(low, 4), "q3": round(high, 4)}


def summary(seconds: dict[str, list[float]], steps: dict[str, list[float]]) -> dict[str, Any]:
    """Return medians and quartiles of seconds, of ratios to each bare way, and of the steps."""
    box = seconds["box"]
    bare = {name: values for name, values in seconds.items() if name != "box"}
    return {
        "pairs": len(box),
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratio_to": {
            name: spread([ours / theirs for ours, theirs in zip(box, values, strict=True)])
            for name, values in bare.items()
        },
        "steps_seconds": {name: spread(values[-len(box) :]) for name, values in steps.items()},
    }


def table(found: dict[str, Any]) -> str:
    """Return the summary for a reader."""
    lines = [f"{'':<22}{'median':>9}{'quartiles':>20}"]
    for title, key in (("", "seconds"), ("box / ", "ratio_to"), ("step ", "steps_seconds")):
        for name, values in found[key].items():
            quartiles = f"{values['q1']:.3f} to {values['q3']:.3f}"
            lines.append(f"{title + name:<22}{values['median']:>9.3f}{quartiles:>20}")
    return "\n".join(lines)


def bench(pairs: int) -> dict[str, Any]:
    """Measure on the engine and the image that set-up chose."""
    state_dir = state_directory(os.environ)
    engine = find_engine(state_dir, environ=os.environ)
    image = find_image(engine, shipped_recipe(), state_dir=state_dir)
    place = Place(engine, image.image_id)
    with tempfile.TemporaryDirectory() as directory:
        timer = BoxTimer(place, Path(directory))
        ways = {"box": timer.run, "docker SDK, bare": bare_sdk(place)}
        if command := bare_command(place):
            ways["docker run"] = command
        measure(ways, WARM_UPS)
        return summary(measure(ways, pairs), timer.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    found = bench(arguments.pairs)
    sys.stdout.write((json.dumps(found, indent=1) if arguments.json else table(found)) + "\n")


if __name__ == "__main__":
    main()
