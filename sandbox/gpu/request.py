"""How GPUs are asked for, proven and bounded.

Pure: from a run's GPUs and what the engine says of itself to container settings, and to what PID 1
must then see. A GPU is always asked for by the name that is its own for good, never by count or
index: those mean the first ones.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

from sandbox.contract.errors import LimitNotEnforced, SandboxError
from sandbox.contract.gpu import Devices, GpuMemory, MemoryBound
from sandbox.contract.record import ByteCount, Record

Form = Literal["none", "cdi", "hook", "nodes"]
"""How a request is worded: not at all; by CDI names; for the engine's NVIDIA hook; as plain device
nodes."""

CDI_KIND = "nvidia.com/gpu"
CAPABILITIES = ("gpu", "compute", "utility")
"""No graphics, video or display: CUDA and the driver's own tools are all that a training needs."""
NVIDIA_MAJOR = 195
NVIDIA_NODE = re.compile(r"nvidia\d+$")
NVIDIA_CONTROL = frozenset({"nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset"})
"""Nodes that every box with an NVIDIA GPU sees, whichever GPU it has."""
CONTEXT_BYTES = 768 * 2**20
"""What a process takes on a GPU beside its allocator; more than contexts are usually seen to."""
TOOLKIT_HINT = (
    "install the NVIDIA Container Toolkit; for CDI also: "
    "nvidia-ctk cdi generate --device-name-strategy=uuid --output=/etc/cdi/nvidia.yaml"
)


class Node(Record):
    """A device node: its path below /dev, its number, the group that may use it."""

    path: str
    major: int
    minor: int
    group: int


class Gpu(Record):
    """One device of this machine that a run can have."""

    id: str
    """See `contract.GPU_ID_PATTERNS`."""
    index: str
    """What a person may call it: `0`, or `0:1` for a MIG instance."""
    name: str
    parent: str | None
    """Of a MIG instance, the GPU it is a part of."""
    memory_bytes: ByteCount | None
    nodes: tuple[Node, ...]
    """Those that a box sees if and only if it has this device, or a part of the same GPU."""
    display_nodes: tuple[str, ...] = ()
    """Paths below /dev that are the same device as a display; a CDI spec may bring them along."""


class GpuRequest(Record):
    """A run's GPUs, and how the engine is asked for them."""

    form: Form
    devices: Devices
    gpus: tuple[Gpu, ...]


NO_GPUS = GpuRequest(form="none", devices="none", gpus=())


# --- the request ------------------------------------------------------------------------------


def choose_form(
    devices: Devices, gpus: Sequence[str], info: Mapping[str, Any], spec_files: Collection[str]
) -> Form:
    """Return how this engine is asked for these GPUs.

    Args:
        devices: the kind of them.
        gpus: their ids.
        info: what the engine tells of itself; one that does CDI names the directories of its specs
            (from 25.0 on with the feature, from 28.2 on by itself), newer ones the devices as well.
        spec_files: the texts of the files in those directories, for engines that name no devices.
    """
    if devices == "none":
        return "none"
    if devices != "nvidia":
        return "nodes"
    names = {entry.get("ID") for entry in info.get("DiscoveredDevices") or ()}
    if info.get("CDISpecDirs") and all(
        _cdi_name(gpu) in names or any(_names(text, gpu) for text in spec_files) for gpu in gpus
    ):
        return "cdi"
    return "hook"


def _cdi_name(gpu: str) -> str:
    return f"{CDI_KIND}={gpu}"


def _names(spec_file: str, gpu: str) -> bool:
    """Tell whether a CDI spec, YAML or JSON, has a device of this name and is NVIDIA's."""
    entry = rf"""\bname["']?\s*:\s*["']?{re.escape(gpu)}(?![\w-])"""
    return CDI_KIND in spec_file and re.search(entry, spec_file) is not None


def device_settings(request: GpuRequest) -> dict[str, list[Any]]:
    """Return the part of the engine's create call that brings GPUs into a box."""
    ids = [gpu.id for gpu in request.gpus]
    nodes = [node for gpu in request.gpus for node in gpu.nodes] if request.form == "nodes" else []
    requests: list[dict[str, Any]] = []
    if request.form == "cdi":
        requests = [{"Driver": "cdi", "DeviceIDs": [_cdi_name(gpu) for gpu in ids]}]
    elif request.form == "hook":
        # The engine picks the driver by capability, as its own command line lets it.
        capabilities = [list(CAPABILITIES)]
        requests = [{"Driver": "", "DeviceIDs": ids, "Capabilities": capabilities}]
    return {
        "DeviceRequests": requests,
        "Devices": [_mapping(path) for path in sorted({node.path for node in nodes})],
        "GroupAdd": [str(group) for group in sorted({node.group for node in nodes})],
    }


def _mapping(path: str) -> dict[str, str]:
    place = f"/dev/{path}"
    # Without "m": a box makes no nodes.
    return {"PathOnHost": place, "PathInContainer": place, "CgroupPermissions": "rw"}


def visible_devices(request: GpuRequest) -> str:
    """Return NVIDIA_VISIBLE_DEVICES, always said, since an image may ask for `all` by itself.

    Only the hook reads it; with CDI it must not add anything.
    """
    return ",".join(gpu.id for gpu in request.gpus) if request.form == "hook" else "void"


# --- the read-back ----------------------------------------------------------------------------


class SeenGpus(Record):
    """What PID 1 sees of GPUs: nodes below /dev with their numbers, the driver's own files."""

    nodes: dict[str, tuple[int, int]]
    driver: dict[str, int]
    """The minor number of each UUID of which the driver's files tell, in here."""


def gpu_differences(request: GpuRequest, seen: SeenGpus) -> list[str]:
    """Return one line for each GPU that a box has and should not, or should and has not."""
    due = {node.path: (node.major, node.minor) for gpu in request.gpus for node in gpu.nodes}
    also = _may_be_seen(request)
    own = {path: number for path, number in seen.nodes.items() if path not in also}
    wrong = [f"GPU: PID 1 sees no /dev/{path}" for path in sorted(due.keys() - own.keys())]
    wrong += [
        f"GPU: PID 1 sees /dev/{path}, not asked for" for path in sorted(own.keys() - due.keys())
    ]
    wrong += [
        f"GPU: /dev/{path} has number {own[path]}, asked {due[path]}"
        for path in sorted(due.keys() & own.keys())
        if own[path] != due[path]
    ]
    return wrong + _driver_differences(request, seen)


def _may_be_seen(request: GpuRequest) -> set[str]:
    displays = {path for gpu in request.gpus for path in gpu.display_nodes}
    return displays | (NVIDIA_CONTROL if request.devices == "nvidia" else frozenset())


def _driver_differences(request: GpuRequest, seen: SeenGpus) -> list[str]:
    """Compare the UUIDs of the GPUs whose nodes are there; the driver may tell of others too."""
    asked = {gpu.parent or gpu.id for gpu in request.gpus}
    there = {minor for path, (_, minor) in seen.nodes.items() if NVIDIA_NODE.match(path)}
    return [
        f"GPU: PID 1 sees {uuid} behind /dev/nvidia{minor}, asked {', '.join(sorted(asked))}"
        for uuid, minor in sorted(seen.driver.items())
        if minor in there and uuid not in asked
    ]


# --- what holds a run to its memory -----------------------------------------------------------


class MemoryMeans(Record):
    """The means at hand to hold one run to its GPU memory."""

    instances: bool
    """All of its devices are MIG instances no larger than asked."""
    kernel: bool
    library: bool
    watchdog: bool


def strongest_bound(means: MemoryMeans) -> MemoryBound:
    """Return the strongest means at hand."""
    at_hand: dict[MemoryBound, bool] = {
        "hardware": means.instances,
        "kernel": means.kernel,
        "library": means.library,
        "watchdog": means.watchdog,
    }
    return next((bound for bound, there in at_hand.items() if there), "none")


def require_bound(asked: GpuMemory, bound: MemoryBound) -> None:
    """Refuse a bound that is weaker than asked.

    Raises:
        LimitNotEnforced: it is.
    """
    order = get_args(MemoryBound)
    if order.index(bound) < order.index(asked.at_least):
        raise LimitNotEnforced(
            f"GPU memory can be bounded by {bound!r} here, asked at least {asked.at_least!r}",
            "see which means are at hand with `nightlab check`, or ask for less in [hardware]",
        )


def are_instances_within(gpus: Sequence[Gpu], bytes_asked: int) -> bool:
    """Tell whether all of these are MIG instances that have no more memory than asked."""
    return bool(gpus) and all(
        gpu.parent is not None and gpu.memory_bytes is not None and gpu.memory_bytes <= bytes_asked
        for gpu in gpus
    )


def allocator_environment(asked: GpuMemory, gpus: Sequence[Gpu], given: str) -> dict[str, str]:
    """Return the variable that tells the program's allocator its share of the smallest GPU.

    Args:
        asked: names the variable.
        gpus: all of them of known size.
        given: what the program's environment says in that variable already.
    """
    smallest = min(gpu.memory_bytes or 0 for gpu in gpus)
    usable = max(asked.bytes - CONTEXT_BYTES, asked.bytes // 2)
    share = f"per_process_memory_fraction:{min(1.0, usable / smallest):.4f}"
    return {asked.allocator_variable: f"{given},{share}" if given else share}


# --- which ones a person means ----------------------------------------------------------------


def chosen(gpus: Sequence[Gpu], words: Sequence[str]) -> tuple[Gpu, ...]:
    """Return the GPUs that a person names by index or id, in that order; all for no names.

    Raises:
        SandboxError: there is none of that name, or one is named twice.
    """
    if not words:
        return tuple(gpus)
    known = {name: gpu for gpu in gpus for name in (gpu.id.lower(), gpu.index)}
    unknown = [word for word in words if word.lower() not in known]
    if unknown:
        there = ", ".join(f"{gpu.index} ({gpu.id})" for gpu in gpus) or "none"
        raise SandboxError(f"there is no GPU {unknown[0][:60]!r} here", f"there is: {there}")
    found = tuple(known[word.lower()] for word in words)
    if len({gpu.id for gpu in found}) < len(found):
        raise SandboxError(f"a GPU is named twice: {', '.join(words)}", "name each once")
    return found
