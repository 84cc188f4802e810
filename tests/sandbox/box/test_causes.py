"""Why a run ended: the decision table."""

from __future__ import annotations

from typing import Any

import pytest

from sandbox import Outcome
from sandbox.box.causes import Evidence, decide, last_error

GOOD: dict[str, Any] = {
    "reported": True,
    "exit_code": 0,
    "signal": None,
    "killed_by": None,
    "oom_kills": 0,
    "memory_limit_reached": False,
    "pids_refused": 0,
    "full": (),
    "half_full": False,
    "last_error": None,
    "gpus_leased": False,
    "gpu_memory_reached": None,
    "engine_oom_killed": None,
}
BAD = {"exit_code": 1}
KILLED: dict[str, Any] = {"exit_code": None, "signal": 9}
LOST: dict[str, Any] = {"reported": False, "exit_code": None}
OOM = {"oom_kills": 1, "memory_limit_reached": True}
GPU_OOM = {"last_error": "gpu_memory"}


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, "ok"),
        (BAD, "failed"),
        ({"exit_code": 137}, "failed"),
        ({"exit_code": None, "signal": 11}, "failed"),
        ({"exit_code": None, "signal": 15}, "failed"),
        (KILLED, "interrupted"),
        (KILLED | OOM, "out_of_memory"),
        (BAD | OOM, "out_of_memory"),
        (OOM, "ok"),
        ({"exit_code": None, "signal": 11} | OOM, "failed"),
        (KILLED | {"oom_kills": 1}, "interrupted"),
        (KILLED | {"killed_by": "deadline"}, "timed_out"),
        (KILLED | OOM | {"killed_by": "deadline"}, "timed_out"),
        ({"killed_by": "deadline"}, "timed_out"),
        (LOST | {"killed_by": "host_deadline"}, "timed_out"),
        (KILLED | OOM | {"killed_by": "nightlab"}, "stopped"),
        (LOST | {"killed_by": "nightlab"}, "stopped"),
        (LOST | {"engine_oom_killed": True}, "out_of_memory"),
        (LOST | {"engine_oom_killed": False}, "interrupted"),
        (BAD | {"full": ("/out",)}, "disk_full"),
        (BAD | {"last_error": "no_space"}, "failed"),
        (BAD | {"half_full": True}, "failed"),
        (BAD | {"half_full": True, "last_error": "no_space"}, "disk_full"),
        ({"full": ("/out",)}, "ok"),
        ({"exit_code": None, "signal": 7, "full": ("/dev/shm",)}, "disk_full"),
        ({"exit_code": None, "signal": 7, "full": ("/out",)}, "failed"),
        ({"exit_code": None, "signal": 7, "half_full": True, "last_error": "no_space"}, "failed"),
        ({"exit_code": None, "signal": 25}, "failed"),
        (BAD | GPU_OOM | {"gpus_leased": True}, "out_of_gpu_memory"),
        (BAD | GPU_OOM, "failed"),
        (BAD | GPU_OOM | {"gpus_leased": True, "gpu_memory_reached": True}, "out_of_gpu_memory"),
        (BAD | GPU_OOM | {"gpus_leased": True, "gpu_memory_reached": False}, "failed"),
        (BAD | {"gpus_leased": True, "gpu_memory_reached": True}, "failed"),
        (BAD | {"killed_by": "gpu_memory"}, "out_of_gpu_memory"),
        ({"killed_by": "gpu_memory"}, "out_of_gpu_memory"),
        (BAD | {"killed_by": "gpu_fault"}, "interrupted"),
        (GPU_OOM | {"gpus_leased": True}, "ok"),
        (BAD | GPU_OOM | {"gpus_leased": True} | OOM, "out_of_memory"),
        (BAD | {"pids_refused": 5}, "failed"),
    ],
)
def test_the_outcome_follows_from_the_evidence(changes: dict[str, Any], outcome: str) -> None:
    assert Outcome(outcome) == decide(Evidence.model_validate(GOOD | changes))


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ("Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried to…\n", "gpu_memory"),
        ("torch.cuda.OutOfMemoryError: CUDA out of memory.\n[W] shutdown", "gpu_memory"),
        ("RuntimeError: CUDA error: out of memory", "gpu_memory"),
        ("RuntimeError: CUDA driver error: out of memory", "gpu_memory"),
        ("saw 'torch.OutOfMemoryError: CUDA out of memory' once", None),
        ("CUDA out of memory\n" + "step\n" * 30, None),
        ("OSError: [Errno 28] No space left on device: '/tmp/x'", "no_space"),
        ("torch.serialization.SaveError: x: No space left on device", "no_space"),
        ("step 3: No space left on device", None),
        ("", None),
    ],
)
def test_the_last_lines_name_an_error_only_at_a_line_s_start(
    tail: str, expected: str | None
) -> None:
    assert expected == last_error(tail)
