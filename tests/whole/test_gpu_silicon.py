"""What only a real GPU can show; `make test-gpu` runs it, and says why where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox import DockerExecutor, Outcome, RunSpec
from sandbox.contract.gpu import GpuMemory
from sandbox.engine.find import Engine
from sandbox.gpu.nvml import Driver, DriverUnavailable, open_driver
from sandbox.gpu.request import Gpu
from sandbox.image.image import ImageRecord, find_image
from sandbox.image.profiles import find_profile
from sandbox.machine import box_environment, executor
from tests.support.boxes import python_spec, shipped_recipe
from tests.support.facilities import missing

pytestmark = pytest.mark.gpu

PROFILE = os.environ.get("NIGHTLAB_TEST_PROFILE", "cuda")
TRAINING_LIMITS = {
    "wall_seconds": 120,
    "memory_bytes": 16 * 2**30,
    "pids": 512,
    "cpus": 2,
    "tmp_bytes": 2**30,
    "shm_bytes": 2**28,
}


@pytest.fixture
def driver(pytestconfig: pytest.Config) -> Iterator[Driver]:
    try:
        with open_driver() as driver:
            if not driver.gpus():
                missing(pytestconfig, "gpu", "the driver knows of no GPU that a run could have")
            yield driver
    except DriverUnavailable as error:
        missing(pytestconfig, "gpu", error.message)


@pytest.fixture
def gpus(driver: Driver) -> tuple[Gpu, ...]:
    return driver.gpus()


@pytest.fixture
def cuda_image(gpus: tuple[Gpu, ...], engine: Engine, state_dir: Path) -> ImageRecord:
    return find_image(engine, shipped_recipe(PROFILE), state_dir=state_dir)


@pytest.fixture
def boxes(engine: Engine, state_dir: Path) -> DockerExecutor:
    return executor(engine, state_dir)


def cuda_spec(
    image: ImageRecord, code: str, *gpus: Gpu, memory: GpuMemory | None = None
) -> RunSpec:
    spec = python_spec(code, image=image.image_id, **TRAINING_LIMITS)
    given = {
        "devices": "nvidia",
        "gpus": [gpu.id for gpu in gpus],
        "gpu_memory": memory,
        "environment": box_environment(find_profile(PROFILE).variables, 2),
    }
    return RunSpec.model_validate(spec.model_dump() | given)


def test_the_driver_tells_memory_and_health_of_every_gpu(
    driver: Driver, gpus: tuple[Gpu, ...]
) -> None:
    for gpu in gpus:
        sample = driver.sample(gpu)
        assert gpu.memory_bytes is not None
        assert sample.memory_used_bytes is not None
        assert sample.memory_used_bytes <= gpu.memory_bytes
        assert driver.recovery(gpu) is None


def test_each_gpu_is_the_one_that_torch_sees_in_its_box(
    boxes: DockerExecutor, cuda_image: ImageRecord, gpus: tuple[Gpu, ...]
) -> None:
    code = (
        "import torch; print(torch.cuda.device_count(), torch.cuda.get_device_properties(0).uuid)"
    )
    for gpu in gpus:
        result = boxes.run(cuda_spec(cuda_image, code, gpu))
        assert Outcome.OK == result.outcome, result.log
        count, uuid = result.log.head.split()
        assert ("1", gpu.id.partition("-")[2]) == (count, uuid.removeprefix("GPU-"))


def test_a_matrix_product_uses_the_gpu_and_the_watch_sees_it(
    boxes: DockerExecutor, cuda_image: ImageRecord, gpus: tuple[Gpu, ...]
) -> None:
    code = """if True:
        import time, torch
        a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        end = time.monotonic() + 5
        while time.monotonic() < end:
            a @ a
            torch.cuda.synchronize()
    """
    (use,) = boxes.run(cuda_spec(cuda_image, code, gpus[0])).gpu
    assert (use.peak_memory_bytes or 0) > 8192 * 8192 * 2
    assert use.utilisation is None or use.utilisation > 0.2
    assert () == tuple(event for event in use.events if event.is_fault)


def test_more_memory_than_there_is_ends_as_out_of_gpu_memory(
    boxes: DockerExecutor, cuda_image: ImageRecord, gpus: tuple[Gpu, ...]
) -> None:
    code = "import torch; torch.empty(2**50, dtype=torch.uint8, device='cuda')"
    result = boxes.run(cuda_spec(cuda_image, code, gpus[0]))
    assert Outcome.OUT_OF_GPU_MEMORY == result.outcome


def test_a_run_is_held_to_its_gpu_memory_and_says_by_what(
    boxes: DockerExecutor, cuda_image: ImageRecord, gpus: tuple[Gpu, ...]
) -> None:
    code = """if True:
        import time, torch
        kept = [torch.empty(2**28, dtype=torch.uint8, device="cuda").zero_() for _ in range(8)]
        time.sleep(10)
    """
    asked = GpuMemory(bytes=2**30, at_least="watchdog")
    result = boxes.run(cuda_spec(cuda_image, code, gpus[0], memory=asked))
    assert Outcome.OUT_OF_GPU_MEMORY == result.outcome
    assert "none" != result.gpu[0].memory_bound
