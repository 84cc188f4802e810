"""Why a run ended: the decision table."""

from __future__ import annotations

from typing import Any

import pytest

from sandbox import Outcome
from sandbox.box.causes import Evidence, decide, last_error, tried_bytes

GOOD: dict[str, Any] = {
    "reported": True,
    "exit_code": 0,
    "signal": None,
    "killed_by": None,
    "oom_kills": 0,
    "memory_limit_reached": False,
    "pids_refused": 0,
    "full": (),
    "still_full": (),
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
TORCHRUN = (
    """\
E1130 20:11:02.123000 71 torch/distributed/elastic/multiprocessing/api.py:869] failed (exitcode: 1)
Traceback (most recent call last):
"""
    + 30 * '  File "torch/distributed/launcher/api.py", line 138, in __call__\n'
    + """\
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
"""
)
"""How torchrun ends its log when one of its processes failed."""
XPU = "UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"
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
        (LOST | OOM | {"engine_oom_killed": False}, "out_of_memory"),
        (LOST | {"oom_kills": 1, "engine_oom_killed": True}, "interrupted"),
        (BAD | {"full": ("/out",), "still_full": ("/out",)}, "disk_full"),
        (BAD | {"full": ("/out",), "half_full": True}, "failed"),
        (BAD | {"full": ("/out",), "half_full": True, "last_error": "no_space"}, "disk_full"),
        (BAD | {"last_error": "no_space"}, "failed"),
        (BAD | {"half_full": True}, "failed"),
        (BAD | {"half_full": True, "last_error": "no_space"}, "disk_full"),
        ({"full": ("/out",), "still_full": ("/out",)}, "ok"),
        ({"exit_code": None, "signal": 7, "full": ("/dev/shm",)}, "disk_full"),
        ({"exit_code": None, "signal": 7, "full": ("/out",)}, "disk_full"),
        ({"exit_code": None, "signal": 7, "full": ("/tmp",)}, "disk_full"),
        ({"exit_code": None, "signal": 7}, "failed"),
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
        ("torch.AcceleratorError: CUDA error: out of memory", "gpu_memory"),
        ("[rank3]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", "gpu_memory"),
        ("[default0]:[rank0]: RuntimeError: CUDA error: out of memory", "gpu_memory"),
        ("torch.OutOfMemoryError: HIP out of memory. Tried to allocate 2.00 GiB", "gpu_memory"),
        ("torch.AcceleratorError: HIP error: out of memory", "gpu_memory"),
        ("torch.OutOfMemoryError: XPU out of memory. Tried to allocate 2.00 GiB", "gpu_memory"),
        (f"RuntimeError: level_zero backend failed with error: 39 ({XPU})", "gpu_memory"),
        (f"RuntimeError: Native API failed. Native API returns: 39 ({XPU})", "gpu_memory"),
        (
            "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling",
            "gpu_memory",
        ),
        (
            "RuntimeError: CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate`",
            "gpu_memory",
        ),
        ("RuntimeError: cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "gpu_memory"),
        (
            "torch._inductor.exc.InductorError: OutOfMemoryError: CUDA out of memory. Tried",
            "gpu_memory",
        ),
        (
            "torch._dynamo.exc.BackendCompilerFailed: OutOfMemoryError: CUDA out of memory",
            "gpu_memory",
        ),
        (
            "torch.distributed.DistBackendError: NCCL error\nCuda failure 2 'out of memory'",
            "gpu_memory",
        ),
        (
            "jaxlib._jax.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory while",
            "gpu_memory",
        ),
        ("[rank0]: torch.OutOfMemoryError: CUDA out of memory.\n" + TORCHRUN, "gpu_memory"),
        ("[rank0]: ValueError: 3\n" + TORCHRUN, None),
        ("RuntimeError: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling", None),
        ("I saw: CUDA out of memory", None),
        ("saw 'torch.OutOfMemoryError: CUDA out of memory' once", None),
        ("CUDA out of memory\n" + "step\n" * 30, None),
        ("OSError: [Errno 28] No space left on device: '/tmp/x'", "no_space"),
        ("torch.serialization.SaveError: x: No space left on device", "no_space"),
        ("[rank1]: OSError: [Errno 28] No space left on device", "no_space"),
        ("step 3: No space left on device", None),
        ("", None),
    ],
)
def test_the_last_lines_name_an_error_only_at_a_line_s_start(
    tail: str, expected: str | None
) -> None:
    assert expected == last_error(tail)


@pytest.mark.parametrize(
    ("tail", "tried"),
    [
        (
            "[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
            2**31,
        ),
        (
            "XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory trying to allocate 4096 bytes",
            4096,
        ),
        ("torch.OutOfMemoryError: XPU out of memory. Tried to allocate 20.00 MiB.", 20 * 2**20),
        ("RuntimeError: CUDA error: out of memory", 0),
    ],
)
def test_what_was_tried_to_allocate_is_read_from_every_form(tail: str, tried: int) -> None:
    assert tried == tried_bytes(tail)
