"""Why a run failed: the host's evidence decides, a program's own words name what is likely."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.causes import LINE_CHARACTERS, cause_of, cause_of_run
from sandbox.contract.run import Log, Outcome, RunResult
from tests.support.histories import HOSTILE_TEXTS, run_result

TRACEBACK = 'Traceback (most recent call last):\n  File "/tmp/workspace/train.py", line 3\n'


def ended(said: str = "", outcome: Outcome = Outcome.FAILED, **fields: Any) -> RunResult:
    log = Log(head=said, tail="", omitted_bytes=0)
    return run_result("run", "train", log="", outcome=outcome).model_copy(
        update={"log": log, **fields}
    )


@pytest.mark.parametrize(
    ("said", "what", "cure"),
    [
        (
            "ModuleNotFoundError: No module named 'lightning.pytorch'",
            "lightning.pytorch",
            "requirements",
        ),
        ("/usr/bin/python3: No module named torchrun", "no torchrun", "requirements"),
        (
            "Error in library(xgboost) : there is no package called \u2018xgboost\u2019",
            "xgboost",
            "requirements",
        ),
        (
            "ImportError: libGL.so.1: cannot open shared object file: No such file or directory",
            "libGL",
            "base_",
        ),
        (
            'File "/usr/lib/python3.12/subprocess.py", line 1955, in _execute_child\n'
            "    raise child_exception_type(errno_num, err_msg, err_filename)\n"
            "FileNotFoundError: [Errno 2] No such file or directory: 'git'",
            "the image has no git",
            "base_image",
        ),
        ("sh: 1: nvcc: not found", "no nvcc", "base_image"),
        ("bash: line 3: cmake: command not found", "no cmake", "base_image"),
        ("InvalidCxxCompiler: No working C++ compiler found in cpp.cxx", "C++ compiler", "base_"),
        (
            "nightlab: cannot start the program: [Errno 2] No such file or directory: 'uv'",
            "the image has no uv",
            "base_",
        ),
        ("uv cannot be started: No such file or directory; is it in the image?", "no uv", "base_"),
        ("OSError: [Errno 30] Read-only file system: '/data/x.pt'", "/data/x.pt", "keep"),
        (
            "mkdir: cannot create directory \u2018/opt/x\u2019: Read-only file system",
            "/opt/x",
            "keep",
        ),
        (
            "requests.exceptions.ConnectionError: Max retries exceeded with url",
            "network",
            "[[data]]",
        ),
        ("fatal: Could not resolve host: github.com", "network", "[[data]]"),
        ("socket.gaierror: [Errno -3] Temporary failure in name resolution", "network", "[[data]]"),
        (
            "FileNotFoundError: [Errno 2] No such file or directory: 'data/a.bin'",
            "data/a",
            "leave_",
        ),
        ("python3: can't open file '/tmp/workspace/tain.py': [Errno 2] …", "tain.py", "leave_out"),
        ("cat: data/b.txt: No such file or directory", "data/b.txt", "leave_out"),
        ("FileNotFoundError: data/c.csv does not exist.", "data/c.csv", "leave_out"),
        ("PermissionError: [Errno 13] Permission denied: '/data/0/x'", "/data/0/x", "chmod"),
        ("OSError: [Errno 28] No space left on device", "a place was full", "[limits]"),
        ("RuntimeError: DataLoader worker (pid 7) is killed by signal: Bus error.", "shm", "shm"),
        ("RuntimeError: can't start new thread", "processes and threads", "pids"),
        ("OSError: [Errno 24] Too many open files", "too many files", "open_files"),
        ("numpy._core._exceptions._ArrayMemoryError: Unable to allocate", "memory", "memory"),
        ("MemoryError", "memory", "memory under [limits]"),
        ("RuntimeError: DefaultCPUAllocator: can't allocate memory", "memory", "memory"),
        ("AssertionError: Torch not compiled with CUDA enabled", "GPU", "profile under"),
        ("train.py: error: unrecognized arguments: --seed=1", "flags of its command", "command"),
    ],
)
def test_what_programs_say_names_the_likely_cause(said: str, what: str, cure: str) -> None:
    found = cause_of_run(ended(f"step 1\n{TRACEBACK}{said}\n"))

    assert found is not None
    assert found.words.startswith("likely: ")
    assert (True, True) == (what in found.what, cure in found.cure), found


def full(place: str, taken: int, **evidence: Any) -> RunResult:
    report = {"fullest": {place: {"bytes": taken, "inodes": 1}}}
    return ended(outcome=Outcome.DISK_FULL, evidence={"report": report} | evidence)


@pytest.mark.parametrize(
    ("run", "what", "cure"),
    [
        (full("/dev/shm", 2**29, full=("/dev/shm",)), "/dev/shm was full", "raise shm under"),
        (full("/tmp", 2**30, still_full=("/tmp",)), "/tmp was full", "raise tmp under"),
        (full("/out", 2**29), "/out was full", "raise output under"),
        (full("/out", 2**10, still_full=("/out",)), "files", "raise output_files"),
        (ended("step 9, loss 2.1\n\n", Outcome.TIMED_OUT), "`step 9, loss 2.1`", "[budget]"),
        (ended("", Outcome.TIMED_OUT), "mute", "[budget]"),
        (ended("", Outcome.TIMED_OUT, box="model"), "mute", "wall_seconds under [scoring]"),
        (ended("", Outcome.OUT_OF_MEMORY), "more memory than", "memory under [limits]"),
        (ended("", Outcome.OUT_OF_MEMORY, box="model"), "more memory", "under [scoring]"),
        (ended("", Outcome.OUT_OF_GPU_MEMORY), "memory of a GPU", "batch"),
        (ended("", signal=signal.SIGSEGV), "SIGSEGV", "native code"),
        (ended("", evidence={"pids_refused": 7}), "refused 7 times", "pids"),
    ],
)
def test_what_the_host_saw_decides(run: RunResult, what: str, cure: str) -> None:
    words = run.log.head + "ModuleNotFoundError: No module named 'x'\n"
    lying = run.model_copy(update={"log": Log(head=words, tail="", omitted_bytes=0)})

    for one in (run, lying):
        found = cause_of_run(one)
        assert found is not None
        assert found.is_seen
        assert cure in found.cure
    assert what in str(cause_of_run(run))


def test_the_last_known_word_counts_and_none_is_guessed() -> None:
    first, last = "OSError: Read-only file system: '/x'", "ModuleNotFoundError: No module named 'y'"

    found = cause_of_run(ended(f"{first}\nwarned\n{last}\n"))
    assert found is not None
    assert "no y" in found.what
    assert (
        cause_of_run(ended(f"{first}\n" + "step 1\n" * 100 + "ValueError: shapes differ")) is None
    )
    assert cause_of_run(ended(last, Outcome.OK)) is None
    assert cause_of_run(ended(last, Outcome.STOPPED)) is None


def test_a_verdict_without_a_bad_box_has_the_cure_of_its_reason() -> None:
    found = cause_of("over_budget", [ended("No module named 'x'", Outcome.OK)])

    assert found is not None
    assert found.sentence.endswith("propose them")
    assert cause_of("looks_ahead", [ended("", Outcome.OK)]) is None


@given(st.sampled_from(HOSTILE_TEXTS) | st.text(), st.sampled_from(list(Outcome)))
def test_no_log_breaks_it(said: str, outcome: Outcome) -> None:
    found = cause_of_run(ended(said, outcome))

    assert found is None or len(found.sentence) < 3 * LINE_CHARACTERS
    assert found is None or "\n" not in found.sentence


def test_a_long_line_costs_little() -> None:
    for piece in ("a: ", "lib.so", "x", "_execute_child ", "'"):
        began = time.monotonic()
        cause_of_run(ended((piece * (65536 // len(piece)) + "\n") * 80))
        cause_of_run(ended((piece * (400 // len(piece)) + "\n") * 100))
        assert time.monotonic() - began < 5
