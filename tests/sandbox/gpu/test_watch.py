"""Requests for GPUs, what a box must then see, and what bounds their memory: all of it pure."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from sandbox.contract.errors import LimitNotEnforced, SandboxError
from sandbox.contract.gpu import Devices, GpuMemory
from sandbox.contract.run import RunSpec
from sandbox.gpu.inventory import chosen
from sandbox.gpu.request import (
    NO_GPUS,
    Form,
    Gpu,
    GpuRequest,
    Node,
    SeenGpus,
    choose_form,
    device_settings,
    gpu_differences,
    visible_devices,
)
from sandbox.gpu.run import (
    allocator_environment,
    are_instances_within,
    require_bound,
    strongest_bound,
)
from tests.support.boxes import box_spec
from tests.support.gpu_stand_ins import GIBIBYTE, GPU_0, GPU_1, MIG_0, MIG_1, cdi_spec


def whole(minor: int, uuid: str) -> Gpu:
    node = Node(path=f"nvidia{minor}", major=195, minor=minor)
    return Gpu(
        id=uuid,
        index=str(minor),
        name="a GPU",
        parent=None,
        memory_bytes=80 * GIBIBYTE,
        nodes=(node,),
        display_nodes=(f"dri/renderD{128 + minor}",),
    )


def instance(number: int, uuid: str, of: Gpu) -> Gpu:
    caps = (66 + 9 * number, 67 + 9 * number)
    nodes = [Node(path=f"nvidia-caps/nvidia-cap{n}", major=236, minor=n) for n in caps]
    return Gpu(
        id=uuid,
        index=f"{of.index}:{number}",
        name="an instance",
        parent=of.id,
        memory_bytes=10 * GIBIBYTE,
        nodes=(*of.nodes, *nodes),
    )


FIRST, SECOND = whole(0, GPU_0), whole(1, GPU_1)
PART, OTHER_PART = instance(0, MIG_0, FIRST), instance(1, MIG_1, FIRST)
REQUESTS: dict[str, tuple[Form, Devices, tuple[Gpu, ...]]] = {
    "none": ("none", "none", ()),
    "cdi": ("cdi", "nvidia", (FIRST, SECOND)),
    "cdi_mig": ("cdi", "nvidia", (PART,)),
    "hook": ("hook", "nvidia", (FIRST, SECOND)),
    "hook_mig": ("hook", "nvidia", (PART,)),
}


def request_of(name: str) -> GpuRequest:
    form, devices, gpus = REQUESTS[name]
    return GpuRequest(form=form, devices=devices, gpus=gpus)


def test_every_form_of_request_is_that_of_the_golden_file(
    golden: Callable[[str, str], None],
) -> None:
    requests: dict[str, Any] = {
        name: device_settings(request_of(name))
        | {"NVIDIA_VISIBLE_DEVICES": visible_devices(request_of(name))}
        for name in REQUESTS
    }
    golden("gpu_requests.json", json.dumps(requests, indent=2, sort_keys=True) + "\n")


@pytest.mark.parametrize("name", sorted(REQUESTS))
def test_no_request_is_by_count_and_what_is_visible_is_always_said(name: str) -> None:
    settings = device_settings(request_of(name))
    assert all("Count" not in request for request in settings["DeviceRequests"])
    assert "" != visible_devices(request_of(name))
    assert "all" not in json.dumps(settings) + visible_devices(request_of(name))


# --- which form ---

NAMED = [{"Source": "cdi", "ID": f"nvidia.com/gpu={uuid}"} for uuid in (GPU_0, GPU_1)]
ONE_LINE = json.dumps(cdi_spec({GPU_0: 0, GPU_1: 1}))
YAML = f"""cdiVersion: 0.5.0
devices:
- containerEdits:
    deviceNodes:
    - path: /dev/nvidia0
  name: {GPU_0}
- name: "{MIG_0}"
kind: nvidia.com/gpu
"""


@pytest.mark.parametrize(
    ("gpus", "info", "files", "form"),
    [
        ((GPU_0,), {}, [], "hook"),
        ((GPU_0,), {"CDISpecDirs": []}, [ONE_LINE], "hook"),
        ((GPU_0,), {"CDISpecDirs": ["/etc/cdi"]}, [], "hook"),
        ((GPU_0, GPU_1), {"CDISpecDirs": ["/etc/cdi"]}, [ONE_LINE], "cdi"),
        ((GPU_0,), {"CDISpecDirs": ["/etc/cdi"]}, [YAML], "cdi"),
        ((MIG_0,), {"CDISpecDirs": ["/etc/cdi"]}, [YAML], "cdi"),
        ((GPU_1,), {"CDISpecDirs": ["/etc/cdi"]}, [YAML], "hook"),
        ((GPU_0,), {"CDISpecDirs": ["/etc/cdi"]}, [YAML.replace("nvidia.com", "x.com")], "hook"),
        ((GPU_0, GPU_1), {"CDISpecDirs": ["/etc/cdi"], "DiscoveredDevices": NAMED}, [], "cdi"),
        ((MIG_0,), {"CDISpecDirs": ["/etc/cdi"], "DiscoveredDevices": NAMED}, [], "hook"),
    ],
)
def test_cdi_is_used_where_the_engine_has_it_and_it_names_every_gpu(
    gpus: tuple[str, ...], info: dict[str, Any], files: list[str], form: str
) -> None:
    assert form == choose_form(gpus, info, files)


# --- the read-back ---

NODES = {"nvidia0": (195, 0), "nvidiactl": (195, 255), "nvidia-uvm": (511, 0)}
CAPS = {"nvidia-caps/nvidia-cap66": (236, 66), "nvidia-caps/nvidia-cap67": (236, 67)}
OTHER_CAPS = {"nvidia-caps/nvidia-cap75": (236, 75), "nvidia-caps/nvidia-cap76": (236, 76)}


def seen(nodes: dict[str, tuple[int, int]], driver: dict[str, int] | None = None) -> SeenGpus:
    return SeenGpus(nodes=nodes, driver=driver or {})


@pytest.mark.parametrize(
    ("gpus", "sight"),
    [
        ((FIRST,), seen(NODES)),
        ((FIRST,), seen(NODES, {GPU_0: 0})),
        ((FIRST,), seen(NODES, {GPU_0: 0, GPU_1: 1})),  # with CDI all of /proc is to be seen
        ((FIRST,), seen(NODES | {"dri/renderD128": (226, 128)})),
        ((FIRST, SECOND), seen(NODES | {"nvidia1": (195, 1)})),
        ((PART,), seen(NODES | CAPS, {GPU_0: 0})),
        ((PART, OTHER_PART), seen(NODES | CAPS | OTHER_CAPS)),
    ],
)
def test_a_box_that_sees_its_own_gpus_passes(gpus: tuple[Gpu, ...], sight: SeenGpus) -> None:
    assert [] == gpu_differences(GpuRequest(form="hook", devices="nvidia", gpus=gpus), sight)


@pytest.mark.parametrize(
    ("gpus", "sight", "words"),
    [
        ((FIRST,), seen({}), "no /dev/nvidia0"),
        ((FIRST,), seen({"nvidiactl": (195, 255)}), "no /dev/nvidia0"),
        ((FIRST,), seen(NODES | {"nvidia1": (195, 1)}), "/dev/nvidia1, not asked for"),
        ((FIRST,), seen(NODES | {"nvidia0": (195, 1)}), "number (195, 1)"),
        ((FIRST,), seen(NODES, {GPU_1: 0}), f"{GPU_1} behind /dev/nvidia0"),
        ((FIRST,), seen(NODES | {"dri/renderD129": (226, 129)}), "renderD129, not asked"),
        ((FIRST,), seen(NODES | {"kfd": (510, 0)}), "kfd, not asked"),
        ((FIRST, SECOND), seen(NODES), "no /dev/nvidia1"),
        ((PART,), seen(NODES), "no /dev/nvidia-caps/nvidia-cap66"),
        ((PART,), seen(NODES | CAPS | OTHER_CAPS), "nvidia-cap75, not asked"),
        ((PART,), seen(NODES | OTHER_CAPS), "no /dev/nvidia-caps/nvidia-cap66"),
    ],
)
def test_a_box_that_sees_other_gpus_is_refused_by_name(
    gpus: tuple[Gpu, ...], sight: SeenGpus, words: str
) -> None:
    wrong = gpu_differences(GpuRequest(form="hook", devices="nvidia", gpus=gpus), sight)
    assert any(words in line for line in wrong)


def test_a_box_without_gpus_sees_none() -> None:
    assert [] == gpu_differences(NO_GPUS, seen({}))
    assert ["GPU: PID 1 sees /dev/nvidiactl, not asked for"] == gpu_differences(
        NO_GPUS, seen({"nvidiactl": (195, 255)})
    )


# --- what a run may ask ---


@pytest.mark.parametrize(
    ("devices", "gpus"),
    [
        ("none", (GPU_0,)),
        ("nvidia", ()),
        ("nvidia", ("0",)),
        ("nvidia", ("all",)),
        ("nvidia", (f"{GPU_0},{GPU_1}",)),
        ("nvidia", (GPU_0, GPU_0)),
        ("nvidia", ("/dev/dri/renderD128",)),
    ],
)
def test_a_run_cannot_ask_for_gpus_by_anything_but_their_own_names(
    devices: str, gpus: tuple[str, ...]
) -> None:
    with pytest.raises(ValidationError):
        RunSpec.model_validate(box_spec().model_dump() | {"devices": devices, "gpus": gpus})


@pytest.mark.parametrize("gpu", [GPU_0, MIG_0])
def test_a_run_names_gpus_by_uuid(gpu: str) -> None:
    given = box_spec().model_dump() | {"devices": "nvidia", "gpus": (gpu,)}
    assert (gpu,) == RunSpec.model_validate(given).gpus


def test_a_person_names_gpus_by_index_or_id() -> None:
    there = (FIRST, PART, SECOND)
    assert there == chosen(there, ())
    assert (SECOND, FIRST) == chosen(there, ("1", GPU_0.upper()))
    assert (PART,) == chosen(there, ("0:0",))
    with pytest.raises(SandboxError, match="no GPU '7'"):
        chosen(there, ("7",))
    with pytest.raises(SandboxError, match="named twice"):
        chosen(there, ("0", GPU_0))


# --- what bounds memory ---


def test_the_strongest_means_at_hand_is_taken() -> None:
    assert "hardware" == strongest_bound(["watchdog", "library", "kernel", "hardware"])
    assert "kernel" == strongest_bound(["kernel", "library", "watchdog"])
    assert "library" == strongest_bound(["library", "watchdog"])
    assert "watchdog" == strongest_bound(["watchdog"])
    assert "none" == strongest_bound([])


def test_a_bound_weaker_than_asked_refuses_the_run() -> None:
    asked = GpuMemory(bytes=GIBIBYTE, at_least="library")
    require_bound(asked, "library")
    require_bound(asked, "hardware")
    for weaker in ("watchdog", "none"):
        with pytest.raises(LimitNotEnforced, match=f"by '{weaker}' here, asked at least 'library'"):
            require_bound(asked, weaker)


def test_only_instances_no_larger_than_asked_are_a_bound_in_hardware() -> None:
    assert are_instances_within((PART, OTHER_PART), 10 * GIBIBYTE)
    assert not are_instances_within((PART,), 10 * GIBIBYTE - 1)
    assert not are_instances_within((PART, SECOND), 10 * GIBIBYTE)
    assert not are_instances_within((), GIBIBYTE)


def test_the_allocator_is_told_its_share_beside_what_it_was_told_already() -> None:
    asked = GpuMemory(bytes=20 * GIBIBYTE, at_least="library", allocator_variable="CONF")
    share = "per_process_memory_fraction:0.2406"  # 20 GiB without a context, of 80
    assert {"CONF": share} == allocator_environment(asked, (FIRST,), "")
    told = "expandable_segments:True"
    assert {"CONF": f"{told},{share}"} == allocator_environment(asked, (FIRST, SECOND), told)
