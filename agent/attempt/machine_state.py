"""What state the machine is in: clocks, heat, load, memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean

from agent.record.events import MachineState

ReadMachine = Callable[[], MachineState]

CPUS = "sys/devices/system/cpu"
THERMAL = "sys/class/thermal"
COUNTERS = ("core_throttle_count", "package_throttle_count")
MEMORY_LINE = "MemAvailable:"


def machine_state(root: Path = Path("/")) -> MachineState:
    """The machine as it is now; what it does not tell, as in most virtual machines, is None.

    Args:
        root: of the file system with /proc and /sys.
    """
    clocks = list(_numbers(root, f"{CPUS}/cpu[0-9]*/cpufreq/scaling_cur_freq"))
    highest = list(_numbers(root, f"{CPUS}/cpu[0-9]*/cpufreq/cpuinfo_max_freq"))
    heat = list(_numbers(root, f"{THERMAL}/thermal_zone*/temp"))
    counts = [
        n for name in COUNTERS for n in _numbers(root, f"{CPUS}/cpu*/thermal_throttle/{name}")
    ]
    governors = sorted(set(_texts(root, f"{CPUS}/cpu[0-9]*/cpufreq/scaling_governor")))
    return MachineState(
        load=os.getloadavg()[0],
        memory_available_bytes=_available_bytes(root),
        cpu_mhz=round(fmean(clocks) / 1000) if clocks else None,
        cpu_max_mhz=round(max(highest) / 1000) if highest else None,
        governor=", ".join(governors)[:60] or None,
        temperature_celsius=round(max(heat) / 1000, 1) if heat else None,
        throttle_events=int(sum(counts)) if counts else None,
    )


def held_back(before: MachineState, after: MachineState) -> tuple[str, ...]:
    """Why a run had less of the processor than it should have had; empty for a fair one.

    What held a GPU back is in the run's own result.
    """
    times = (after.throttle_events or 0) - (before.throttle_events or 0)
    if before.throttle_events is None or times <= 0:
        return ()
    return (f"the processor was held back by heat ({times} times)",)


def _numbers(root: Path, pattern: str) -> Iterator[float]:
    for text in _texts(root, pattern):
        try:
            yield float(text)
        except ValueError:
            continue


def _texts(root: Path, pattern: str) -> Iterator[str]:
    """What small files say; a sensor that cannot be read now says nothing."""
    for path in sorted(root.glob(pattern)):
        try:
            yield path.read_text(encoding="ascii", errors="replace").strip()
        except OSError:
            continue


def _available_bytes(root: Path) -> int | None:
    for text in _texts(root, "proc/meminfo"):
        for line in text.splitlines():
            if line.startswith(MEMORY_LINE):
                return int(line.split()[1]) * 1024
    return None
