"""How an engine is asked for GPUs.

Pure: from a run's GPUs and what the engine says of itself to container settings. A GPU is always
asked for by the name that is its own for good, never by count or index: those mean the first ones.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from sandbox.contract.gpu import Devices
from sandbox.contract.record import ByteCount, Record

Form = Literal["none", "cdi", "hook", "nodes"]
"""How a request is worded: not at all; by CDI names; for the engine's NVIDIA hook; as plain device
nodes."""
CDI_KIND = "nvidia.com/gpu"
CAPABILITIES = ("gpu", "compute", "utility")
"""No graphics, video or display: CUDA and the driver's own tools are all that a training needs."""
NVIDIA_MAJOR = 195
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
