"""What a long session costs: python -m tests.bench.bench_resume --attempts 1000.

A night with the tpe researcher whose boxes are pretended, so that what is measured is nightlab's
own work; the report is left out. An attempt costs this process's CPU, not the disk's syncs. Then a
fresh process resumes the session, up to where the researcher is asked again.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from agent.night.assemble import assemble, open_models
from agent.night.loop import run_session
from agent.night.turns import Turns
from tests.support.clock import Clock
from tests.support.nights import TOY, Place

WINDOW = 50
IDLE_KNOBS = 10
RESUME = """
import sys
from pathlib import Path
from tests.bench.bench_resume import measure_resume
measure_resume(Path(sys.argv[1]), int(sys.argv[2]))
"""


@dataclass
class Meter:
    """CPU seconds at the end of each attempt."""

    cpu: list[float] = field(default_factory=list)

    def tick(self) -> None:
        """Called after each attempt."""
        self.cpu.append(time.process_time())

    def cost_ms(self, first: int, last: int) -> float:
        """Median milliseconds of one attempt from `first` to `last`."""
        pairs = zip(self.cpu[first:last], self.cpu[first + 1 : last + 1], strict=True)
        return 1000 * median(after - before for before, after in pairs)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attempts", type=int, default=1000)
    parser.add_argument(
        "--directory", help="where the session is made; a temporary one if left out"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as root:
        figures = measure(Path(root), options.attempts)
        done = subprocess.run(
            [sys.executable, "-c", RESUME, root, str(options.attempts)],
            check=True,
            capture_output=True,
            text=True,
        )
    print(json.dumps(figures | json.loads(done.stdout), indent=1))  # noqa: T201


def measure(root: Path, attempts: int) -> dict[str, float]:
    """Run the night; what an attempt costs early and late."""
    place, meter = _place(root, attempts), Meter()
    lab = place.begin("tpe")
    with lab.ledger, open_models(lab, "tpe", {}) as models:
        run_session(assemble(lab, place.program, models), meter.tick)
    ends = sorted({2 * WINDOW, 6 * WINDOW, len(meter.cpu) - 1})
    costs = {
        f"cpu_ms_of_attempts_{end - WINDOW}_to_{end}": meter.cost_ms(end - WINDOW, end)
        for end in ends
        if end < len(meter.cpu)
    }
    return {
        "events": len(lab.ledger.entries),
        **costs,
        "night_peak_memory_mb": _peak_memory_mb(),
    }


def measure_resume(root: Path, attempts: int) -> None:
    """Bring the session back until the researcher would be asked, and print what it took."""
    place = _place(root, attempts + 1)
    started = time.perf_counter()
    lab = place.resume()
    with lab.ledger, open_models(lab, "tpe", {}) as models:
        turns: Turns = assemble(lab, place.program, models).turns
        turns.begin()
    seconds = time.perf_counter() - started
    figures = {"resume_seconds": seconds, "resume_peak_memory_mb": _peak_memory_mb()}
    print(json.dumps(figures))  # noqa: T201


def _peak_memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _place(root: Path, attempts: int) -> Place:
    session = {
        "attempts": attempts,
        "hours": 8000.0,
        "max_failures_in_a_row": attempts,
    }
    return Place(root, Clock(), {"session": session}, _workspace(root / "source"))


def _workspace(directory: Path) -> Path:
    """The toy with knobs enough for a long search; all but two of them do nothing."""
    if not directory.exists():
        shutil.copytree(TOY / "workspace", directory)
        knobs = "".join(f"KNOB_{n} = 0.5  # [0.0..1.0]\n" for n in range(IDLE_KNOBS))
        train = directory / "train.py"
        train.write_text(train.read_text().replace("PAUSE_SECONDS", knobs + "PAUSE_SECONDS", 1))
    return directory


if __name__ == "__main__":
    main()
