"""How long an audit takes: a synthetic session of many events, checked by the real command.

`python -m tests.bench.bench_record [--events N] [--json]`: an honest session of a language model,
about 50 events and 30 blobs an attempt, is made and `nightlab audit` checks all of it: chain,
blobs, runs, verdicts, diffs and prices. Prints seconds and peak memory of that process, start
included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.support.long_night import long_session

MEASURED = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss]), file=sys.stderr)
sys.exit(done.returncode)
"""
"""Runs a command from a small process: a child's peak counts what its parent held at the fork."""


def measured(events: int) -> dict[str, Any]:
    """What the audit of so many events takes."""
    with tempfile.TemporaryDirectory() as directory:
        made = long_session(events)
        made.write(Path(directory) / "night")
        size_bytes = (Path(directory) / "night" / "ledger.jsonl").stat().st_size
        audit = [sys.executable, "-P", "-m", "agent.cli", "audit", "night", "--runs", directory]
        command = [sys.executable, "-c", MEASURED, *audit]
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - started
    processor_seconds, peak_kib = json.loads(done.stderr.splitlines()[-1])
    return {
        "events": len(made.entries),
        "attempts": len(made.history.attempts) - 1,
        "blobs": len(made.blobs),
        "ledger_mb": round(size_bytes / 1e6, 1),
        "seconds": round(seconds, 2),
        "processor_seconds": round(processor_seconds, 2),
        "peak_memory_mb": round(peak_kib * 1024 / 1e6),
        "exit_code": done.returncode,
        "said": done.stdout[:200].strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    figures = measured(arguments.events)
    lines = [f"{name:<16} {value}" for name, value in figures.items()]
    sys.stdout.write((json.dumps(figures) if arguments.json else "\n".join(lines)) + "\n")
    sys.exit(figures["exit_code"])


if __name__ == "__main__":
    main()
