"""Programs that press a box to its end.

Each gets a box of its own and is judged by the host from the `RunResult`, never by what it says. A
program first says that it began; one that never began proves nothing. Each presses a few times the
limit and then stops by itself, so that a missing wall does not cost the machine anything.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from sandbox.contract.run import Outcome, RunResult

BEGAN = "began"
FLOOD_BYTES = 8 * 2**20
TRAPS_LEFT = ("lone",)
DEADLINE_SLACK_SECONDS = 1.5


class StressTest(NamedTuple):
    """One program, and how the host tells that the wall held."""

    family: str
    tried: str
    held: Callable[[RunResult], bool]
    program: str
    limits: Mapping[str, float] = MappingProxyType({})
    """What differs from the ordinary limits of a check."""


def _ended_for_memory(result: RunResult) -> bool:
    peak = result.peak_memory_bytes or 0
    return result.outcome == Outcome.OUT_OF_MEMORY and 0 < peak <= result.limits.memory_bytes


def _filled(place: str) -> Callable[[RunResult], bool]:
    return lambda r: r.outcome == Outcome.DISK_FULL and place in r.evidence.get("full", ())


def _refused_processes(result: RunResult) -> bool:
    return result.outcome == Outcome.FAILED and result.evidence.get("pids_refused", 0) > 0


def _ended_in_time(result: RunResult) -> bool:
    bound = result.limits.wall_seconds + DEADLINE_SLACK_SECONDS
    return result.outcome == Outcome.TIMED_OUT and result.wall_seconds <= bound


def _told_by_pid_1(result: RunResult) -> bool:
    return result.outcome == Outcome.OK and result.evidence.get("reported") is True


def _log_is_bounded(result: RunResult) -> bool:
    log, bound = result.log, result.limits.log_bytes
    kept = len(log.head) + len(log.tail)
    counted = kept + log.omitted_bytes == FLOOD_BYTES + len(BEGAN) + 1
    return counted and len(log.head) <= bound and len(log.tail) <= bound


def _traps_stayed_inside(result: RunResult) -> bool:
    names = tuple(file.name for file in result.output)
    return names == TRAPS_LEFT and bool(result.evidence.get("output_skipped"))


FILL = """
room = os.statvfs("{0}")
size = min(4 * room.f_blocks * room.f_frsize, 2**26)
with open("{0}/filler", "wb", buffering=0) as file:
    while size > 0:
        size -= file.write(bytes(2**20))
"""
"""A program that writes four times what a place may hold."""
STRESS_TESTS = (
    StressTest(
        "memory",
        "four times the memory",
        _ended_for_memory,
        "kept = [b'x' * 2**20 for _ in range(4 * memory // 2**20)]",
    ),
    StressTest(
        "memory",
        "four times the memory, in a file of no file system",
        _ended_for_memory,
        "fd = os.memfd_create('m')\n"
        "for _ in range(4 * memory // 2**20): os.write(fd, bytes(2**20))",
        {"tmp_bytes": 2**29},
    ),
    StressTest("memory", "fill /dev/shm", _filled("/dev/shm"), FILL.format("/dev/shm")),  # noqa: S108
    StressTest("files", "fill /tmp", _filled("/tmp"), FILL.format("/tmp")),  # noqa: S108
    StressTest("files", "fill the output", _filled("/out"), FILL.format("/out")),
    StressTest(
        "files",
        "ten thousand files in the output",
        _filled("/out"),
        "for n in range(10_000): open(f'/out/f{n}', 'w').close()",
    ),
    StressTest(
        "processes",
        "four times the processes",
        _refused_processes,
        """
for _ in range(4 * pids):
    if os.fork() == 0:
        time.sleep(2)
        os._exit(0)
""",
    ),
    StressTest(
        "processes",
        "four times the threads",
        _refused_processes,
        "for _ in range(4 * pids): threading.Thread(target=time.sleep, args=(0.5,), daemon=True)"
        ".start()",
    ),
    StressTest(
        "processes",
        "kill everything",
        _told_by_pid_1,
        "if os.fork() == 0: time.sleep(30)\n"
        "os.kill(-1, signal.SIGKILL)\n"
        "try: os.kill(1, signal.SIGKILL)\n"
        "except OSError: pass",
    ),
    StressTest(
        "time",
        "outlive the deadline, deaf to signals and out of its session",
        _ended_in_time,
        """
for number in range(1, 32):
    if number not in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    os.fork()
time.sleep(4)
""",
        {"wall_seconds": 0.7},
    ),
    StressTest(
        "time",
        "outlive the deadline by stopping everything",
        _ended_in_time,
        """
if os.fork() == 0:
    os.kill(1, signal.SIGSTOP)
    os.kill(-1, signal.SIGSTOP)
    os._exit(0)
time.sleep(4)
""",
        {"wall_seconds": 0.7},
    ),
    StressTest(
        "record",
        "flood the log",
        _log_is_bounded,
        f"for _ in range({FLOOD_BYTES // 2**16}): os.write(1, b'y' * 2**16)",
    ),
    StressTest(
        "record",
        "output that leads out: links, a pipe, a hard link, a sparse file",
        _traps_stayed_inside,
        """
os.chdir('/out')
open('lone', 'w').write('x')
open('good', 'w').write('x')
os.link('good', 'other')
os.symlink('/etc/passwd', 'link')
os.symlink('/proc/self/mem', 'memory')
os.mkfifo('pipe')
with open('sparse', 'wb') as file: file.truncate(2**23)
""",
        {"output_files": 20},
    ),
)


def program_text(test: StressTest, memory_bytes: int, pids: int) -> str:
    """Return the program with what it has to know of its limits."""
    return (
        "import os, signal, sys, threading, time\n"
        f"memory, pids = {memory_bytes}, {pids}\n"
        f"os.write(1, b'{BEGAN}\\n')\n{test.program}\n"
    )
