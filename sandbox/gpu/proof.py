"""Compares the GPUs PID 1 sees with those asked for.

An engine, its hook or a CDI spec may give another GPU than asked, or all of them, without a word.
Nodes and their numbers decide; the driver's own files say which GPU is behind a node.
"""

import re

from sandbox.contract.record import Record
from sandbox.gpu.request import GpuRequest

NVIDIA_NODE = re.compile(r"nvidia\d+$")
NVIDIA_CONTROL = frozenset({"nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset"})
"""Nodes that every box with an NVIDIA GPU sees, whichever GPU it has."""


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
