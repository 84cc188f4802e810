"""Runs every case many times at random, and looks for wrong causes and for what is left.

`python -m tests.bench.soak [--runs N] [--at-once N] [--seed N]`: each run is a case drawn at
random, at a random moment, beside others. At the end comes one log of ten gigabytes. Exits 1 when a
cause was wrong or when a container, run directory, mount, file descriptor, thread or more memory
than `MEMORY_GROWTH_BYTES` stays behind.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from sandbox import DockerExecutor, Outcome, RunSpec, SandboxError
from sandbox.box.hardening import LABEL_SESSION
from sandbox.engine.find import connect, find_engine
from sandbox.image.image import find_image
from sandbox.machine import state_directory
from tests.bench.bench_overhead import Place
from tests.support.boxes import python_spec, shipped_recipe
from tests.support.cases import CASES, asked_and_found, case_spec, read_case

MEMORY_GROWTH_BYTES = 64 * 2**20
LONGEST_PAUSE_SECONDS = 0.5
SETTLING_SECONDS = 15
FLOOD_BYTES = 10 * 2**30
FLOOD_MEMORY_BYTES = 64 * 2**20
"""What ten gigabytes of log may cost this process at their worst moment."""
FLOOD = f"""
import os
piece, left = bytes(2**20), {FLOOD_BYTES}
while left:
    left -= os.write(1, piece[:left])
"""


class Footprint(NamedTuple):
    """What this process and its session hold at one moment."""

    containers: int
    run_directories: int
    mounts: int
    descriptors: int
    threads: int
    memory_bytes: int


class Soak:
    """One session of random runs."""

    def __init__(self, place: Place, run_root: Path, seed: int) -> None:
        self._place = place
        self._run_root = run_root
        self._session = f"soak-{os.getpid()}"
        self._random = random.Random(seed)
        self._executor = DockerExecutor(
            place.engine.base_url, place.engine.api_version, run_root / "runs"
        )
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.flood_memory_bytes = 0

    def run(self, runs: int, at_once: int) -> None:
        """Run cases drawn at random, some at a time; every case comes before one comes twice."""
        names = sorted(path.name for path in CASES.iterdir())
        drawn: list[str] = []
        while len(drawn) < runs:
            drawn += self._random.sample(names, len(names))
        pauses = [self._random.uniform(0, LONGEST_PAUSE_SECONDS) for _ in range(runs)]
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(self._case, drawn[:runs], pauses))

    def _case(self, name: str, pause_seconds: float) -> None:
        time.sleep(pause_seconds)
        expected = read_case(name)
        spec = self._in_session(case_spec(name, expected, self._place.image))
        try:
            with tempfile.TemporaryDirectory(dir=self._run_root) as output:
                result = self._executor.run(spec, output_dir=Path(output))
        except SandboxError as error:
            self.wrong.append(f"{name}: {error.message}"[:2000])
            return
        asked, found = asked_and_found(expected, result)
        self.outcomes[result.outcome] += 1
        if asked != found:
            evidence = json.dumps(result.evidence, default=str)
            self.wrong.append(f"{name}: asked {asked}, found {found}, {evidence}"[:4000])

    def flood(self) -> None:
        """Take in a log of ten gigabytes."""
        spec = python_spec(FLOOD, image=self._place.image, wall_seconds=300)
        gc.collect()
        before = peak_memory_bytes(anew=True)
        result = self._executor.run(self._in_session(spec))
        self.flood_memory_bytes = peak_memory_bytes() - before
        if self.flood_memory_bytes > FLOOD_MEMORY_BYTES:
            self.wrong.append(
                f"ten gigabytes of log cost {self.flood_memory_bytes} bytes of memory"
            )
        log = result.log
        seen = len(log.head) + len(log.tail) + log.omitted_bytes
        if (Outcome.OK, FLOOD_BYTES) != (result.outcome, seen):
            self.wrong.append(f"ten gigabytes of log: {result.outcome}, {seen} bytes counted")

    def _in_session(self, spec: RunSpec) -> RunSpec:
        return spec.model_copy(update={"session": self._session})

    def footprint(self) -> Footprint:
        """Return what is held now."""
        gc.collect()
        with contextlib.closing(connect(self._place.engine)) as client:
            label = f"{LABEL_SESSION}={self._session}"
            containers = len(client.containers.list(all=True, filters={"label": label}))
        runs = self._run_root / "runs"
        return Footprint(
            containers=containers,
            run_directories=len(list(runs.iterdir())) if runs.is_dir() else 0,
            mounts=len(Path("/proc/self/mountinfo").read_text().splitlines()),
            descriptors=len(list(Path("/proc/self/fd").iterdir())),
            threads=threading.active_count(),
            memory_bytes=int(Path("/proc/self/statm").read_text().split()[1]) * 4096,
        )


def peak_memory_bytes(*, anew: bool = False) -> int:
    """Return the most memory this process ever held, or has held since the count began anew."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(peak) * 1024


def leftovers(before: Footprint, now: Footprint) -> dict[str, int]:
    """Return what there is more of now than before."""
    more = {name: getattr(now, name) - count for name, count in before._asdict().items()}
    if more["memory_bytes"] <= MEMORY_GROWTH_BYTES:
        del more["memory_bytes"]
    return {name: count for name, count in more.items() if count > 0}


def settled(look: Callable[[], dict[str, int]]) -> dict[str, int]:
    """Return what is left once nothing goes away any more; mounts of others come and go."""
    give_up = time.monotonic() + SETTLING_SECONDS
    while (left := look()) and time.monotonic() < give_up:
        time.sleep(0.5)
    return left


def soak(runs: int, at_once: int, seed: int) -> dict[str, Any]:
    """Soak the engine and the image that set-up chose."""
    state_dir = state_directory(os.environ)
    engine = find_engine(state_dir, environ=os.environ)
    image = find_image(engine, shipped_recipe(), state_dir=state_dir)
    with tempfile.TemporaryDirectory() as directory:
        work = Soak(Place(engine, image.image_id), Path(directory), seed)
        work.run(at_once * 4, at_once)  # whatever loads or is cached once is there from here on
        before, started = work.footprint(), time.monotonic()
        work.run(runs, at_once)
        work.flood()
        left = settled(lambda: leftovers(before, work.footprint()))
        after = work.footprint()
    return {
        "runs": runs,
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "outcomes": dict(work.outcomes),
        "wrong": work.wrong,
        "left": left,
        "memory_bytes": {
            "before": before.memory_bytes,
            "after": after.memory_bytes,
            "ten_gigabytes_of_log": work.flood_memory_bytes,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--at-once", type=int, default=3)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    arguments = parser.parse_args()
    found = soak(arguments.runs, arguments.at_once, arguments.seed)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    sys.exit(1 if found["wrong"] or found["left"] else 0)


if __name__ == "__main__":
    main()
