"""What watching a run's GPUs costs on the host: `python -m tests.bench.bench_gpu_watch`.

Against the stand-in library, so without the driver's own time in the kernel; one GPU and eight.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from pathlib import Path

from sandbox.gpu.nvml import open_driver
from sandbox.gpu.watch import PERIOD_SECONDS, GpuWatch
from tests.support.gpu_stand_ins import Cards, build_library, load_library

SECONDS = 20.0


def cores_used(count: int, seconds: float) -> float:
    """Return the cores that a watch over so many GPUs takes."""
    with tempfile.TemporaryDirectory() as name:
        cards = Cards(Path(name) / "cards")
        for index in range(count):
            cards.add(index, f"GPU-8a6e0a5e-0000-4000-8000-{index:012d}")
        os.environ["NIGHTLAB_STUB_NVML"] = str(cards.root)
        load_library(build_library(Path(name)))
        with open_driver() as driver:
            watch = GpuWatch(driver, driver.gpus())
            before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
            watch.begin(os.getpid(), lambda _: None, None, is_only_bound=False)
            time.sleep(seconds)
            watch.close()
            after, took = resource.getrusage(resource.RUSAGE_SELF), time.monotonic() - began
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used / took


def main() -> None:
    for count in (1, 8):
        share = cores_used(count, SECONDS)
        sys.stdout.write(f"GPUs {count}, every {PERIOD_SECONDS} s: {share:.2%} of a core\n")


if __name__ == "__main__":
    main()
