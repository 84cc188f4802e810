"""How an engine is asked for GPUs; what it gave.

Pure: from a run's GPUs and what the engine says of itself to container settings, and from what
PID 1 sees to what is wrong. A GPU is always asked for by the name that is its own for good, never
by count or index: those mean the first ones. An engine, its hook or a CDI spec may give another
one, or all, without a word: nodes and numbers decide, and the driver's files say which GPU is
behind a node.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from sandbox.contract.gpu import Devices
from sandbox.contract.record import ByteCount, Record

NVIDIA_NODE = re.compile(r"nvidia\d+$")
NVIDIA_CONTROL = frozenset({"nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset"})
"""Nodes that every box with an NVIDIA GPU sees, whichever GPU it has."""

Form = Literal["none", "cdi", "hook"]
"""How a request is worded: not at all; by CDI names; for the engine's NVIDIA hook."""
CDI_KIND = "nvidia.com/gpu"
CAPABILITIES = ("gpu", "compute", "utility")
"""No graphics, video or display: CUDA and the driver's own tools are all that a training needs."""
NVIDIA_MAJOR = 195
TOOLKIT_HINT = (
    "install the NVIDIA Container Toolkit; for CDI also: "
    "nvidia-ctk cdi generate --device-name-strategy=uuid --output=/etc/cdi/nvidia.yaml"
)


class Node(Record):
    """A device node: its path below /dev, and its number."""

    path: str
    major: int
    minor: int


class Gpu(Record):
    """One device of this machine that a run can have."""

    id: str
    """See `contract.GPU_ID`."""
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


def choose_form(gpus: Sequence[str], info: Mapping[str, Any], spec_files: Collection[str]) -> Form:
    """Return how this engine is asked for these GPUs.

    Args:
        gpus: their ids.
        info: what the engine tells of itself; one that does CDI names the directories of its specs
            (from 25.0 on with the feature, from 28.2 on by itself), newer ones the devices as well.
        spec_files: the texts of the files in those directories, for engines that name no devices.
    """
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
    requests: list[dict[str, Any]] = []
    if request.form == "cdi":
        requests = [{"Driver": "cdi", "DeviceIDs": [_cdi_name(gpu) for gpu in ids]}]
    elif request.form == "hook":
        # The engine picks the driver by capability, as its own command line lets it.
        capabilities = [list(CAPABILITIES)]
        requests = [{"Driver": "", "DeviceIDs": ids, "Capabilities": capabilities}]
    # Nodes and groups come from the hook or the CDI spec; a box is given none besides.
    return {"DeviceRequests": requests, "Devices": [], "GroupAdd": []}


def visible_devices(request: GpuRequest) -> str:
    """Return NVIDIA_VISIBLE_DEVICES, always said, since an image may ask for `all` by itself.

    Only the hook reads it; with CDI it must not add anything.
    """
    return ",".join(gpu.id for gpu in request.gpus) if request.form == "hook" else "void"


class SeenGpus(Record):
    """What PID 1 sees of GPUs: nodes below /dev with their numbers, the driver's own files."""

    nodes: dict[str, tuple[int, int]]
    driver: dict[str, int]
    """The minor number of each UUID of which the driver's files tell, in here."""


def gpu_differences(request: GpuRequest, seen: SeenGpus) -> list[str]:
    """Return one line for each GPU that a box has and should not, or should and has not."""
    due = {node.path: (node.major, node.minor) for gpu in request.gpus for node in gpu.nodes}
    # Neither asked for nor refused: what every NVIDIA box sees, and the same device as a display.
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
