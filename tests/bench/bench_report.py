"""What the report and the watch page of a long night cost: CPU seconds, bytes, memory.

python -m tests.bench.bench_report --attempts 1000 [--json]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from agent.record.chain import read_blob, read_ledger
from agent.record.ledger import Ledger
from agent.report.live import LiveReport
from agent.report.report import Report, write_report
from tests.support import histories
from tests.support.browser import Browser


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--attempts", type=int, default=1000)
    arguments.add_argument("--json", action="store_true", help="one JSON object")
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), chosen.attempts)
    lines = [json.dumps(figures)] if chosen.json else [line(*item) for item in figures.items()]
    sys.stdout.write("\n".join(lines) + "\n")


def line(name: str, figure: float) -> str:
    return f"{name:<28}{figure:>14,.{3 if 'seconds' in name else 0}f}"


def measure(directory: Path, attempts: int) -> dict[str, float]:
    """All figures of one night that is written, watched, and goes on for one attempt."""
    # In a process of its own, so that its memory is not counted.
    writing = f"histories.night({attempts}, log_lines=120).write(Path({str(directory)!r}))"
    program = f"from pathlib import Path; from tests.support import histories; {writing}"
    subprocess.run([sys.executable, "-c", program], check=True)
    small = [entry.event for entry in histories.night(1, seed=1).entries]
    started = next(n for n, e in enumerate(small) if getattr(e, "attempt", 0) == 1)
    one_more = small[started:-1]
    figures = {"attempts": float(attempts)}

    def timed(name: str, work: Callable[[], object]) -> None:
        begun = time.process_time()
        work()
        figures[f"{name} seconds"] = time.process_time() - begun

    def get_blob(sha: str) -> bytes:
        return read_blob(directory, sha)

    timed("whole report", lambda: write_report(directory, read_ledger(directory), get_blob))
    live = LiveReport(directory, lambda: datetime.now(UTC))
    timed("first page", live.page)
    version = (live.news(-1) or {})["version"]
    timed("nothing new, 100 times", lambda: [live.news(version) for _ in range(100)])
    with Ledger.open(directory) as ledger:
        report = Report(get_blob)
        report.write(directory, ledger.history, ledger.entries)
        for event in one_more:
            ledger.append(event.model_copy(update={"attempt": attempts + 1}))
        timed("one attempt more", lambda: report.write(directory, ledger.history, ledger.entries))
    begun = time.process_time()
    news = live.news(version)
    figures["its news seconds"] = time.process_time() - begun
    figures["its news bytes"] = len(json.dumps(news))
    figures["report.html bytes"] = (directory / "report.html").stat().st_size
    if chromium := shutil.which("chromium"):
        figures["first paint seconds"] = first_paint(Path(chromium), directory)
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+)", status)
    figures["peak memory bytes"] = int(found[1]) * 1024 if found else 0
    return figures


def first_paint(chromium: Path, directory: Path) -> float:
    """Seconds from the page's address to the first of it that is seen."""
    with Browser(chromium, directory / "profile") as browser:
        browser.open((directory / "report.html").as_uri())
        painted = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
        return float(browser.wait_for(painted)) / 1000


if __name__ == "__main__":
    main()
