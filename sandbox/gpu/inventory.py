"""Finds the GPUs of this machine, by their own names."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from sandbox.contract.errors import SandboxError
from sandbox.contract.gpu import Devices
from sandbox.gpu.nvml import open_driver
from sandbox.gpu.request import Gpu, GpuRequest, Node, choose_form

RENDER_CLASS = Path("/sys/class/drm")
DEVICES = Path("/dev")
VENDORS: dict[Devices, str] = {"rocm": "0x1002", "xpu": "0x8086"}
SHARED_NODES: dict[Devices, tuple[str, ...]] = {"rocm": ("kfd",), "xpu": ()}
"""Nodes that every box with such a GPU needs beside the GPU's own."""


class GpuUnavailable(SandboxError):
    """A GPU that was asked for is not on this machine, or not now."""


def find_gpus(devices: Devices) -> tuple[Gpu, ...]:
    """Return every device of a kind that a run on this machine can have.

    Raises:
        SandboxError: the driver does not answer.
    """
    if devices == "none":
        return ()
    if devices == "nvidia":
        with open_driver() as driver:
            return driver.gpus()
    return find_render_nodes(devices)


def find_render_nodes(
    devices: Devices, render_class: Path = RENDER_CLASS, device_root: Path = DEVICES
) -> tuple[Gpu, ...]:
    """Return the GPUs of AMD or Intel, named by their PCI address, in that order."""
    found: list[Gpu] = []
    for entry in render_class.glob("renderD*"):
        device = entry / "device"
        if _words(device / "vendor") == VENDORS[devices]:
            shared = [_node(device_root, name) for name in SHARED_NODES[devices]]
            own = _node(device_root, f"dri/{entry.name}")
            gpu = Gpu(
                id=device.resolve().name,
                index="",
                name=f"{_words(device / 'vendor')}:{_words(device / 'device')}",
                parent=None,
                memory_bytes=_number(device / "mem_info_vram_total"),
                nodes=(own, *shared),
            )
            found.append(gpu)
    # By address and not by the kernel's number, which follows the order of loading.
    found.sort(key=lambda gpu: gpu.id)
    return tuple(gpu.model_copy(update={"index": str(n)}) for n, gpu in enumerate(found))


def named_gpus(devices: Devices, words: Sequence[str]) -> tuple[Gpu, ...]:
    """Return the GPUs that a person names by index or id; all of the kind for no names.

    Raises:
        GpuUnavailable: there is none at all.
        SandboxError: one is not here, or the driver does not answer.
    """
    there = find_gpus(devices)
    if devices != "none" and not there:
        raise GpuUnavailable(
            f"there is no {devices} GPU on this machine that a run could have",
            "see what the driver says; a GPU in MIG mode without instances offers nothing",
        )
    if devices == "none" and words:
        raise GpuUnavailable(
            f"GPUs were asked for ({', '.join(words)[:100]}), and the profile's boxes have none",
            'choose a profile with GPUs, such as profile = "cuda" in [hardware]',
        )
    return chosen(there, words)


def leased_gpus(devices: Devices, ids: Sequence[str]) -> tuple[Gpu, ...]:
    """Return the GPUs of a run, as they are now.

    Raises:
        GpuUnavailable: one is not there any more.
    """
    there = {gpu.id: gpu for gpu in find_gpus(devices)}
    gone = [one for one in ids if one not in there]
    if gone:
        raise GpuUnavailable(
            f"GPU {gone[0]} does not answer any more",
            "see what the driver says; another one is named by --gpus or in [hardware]",
        )
    return tuple(there[one] for one in ids)


def request_for(devices: Devices, gpus: Sequence[Gpu], info: dict[str, object]) -> GpuRequest:
    """Return how an engine is asked for these GPUs, from what it tells of itself."""
    form = choose_form(devices, [gpu.id for gpu in gpus], info, spec_files(info))
    return GpuRequest(form=form, devices=devices, gpus=tuple(gpus))


def spec_files(info: dict[str, object]) -> list[str]:
    """Return the texts of the CDI specs that an engine on this machine reads."""
    directories = info.get("CDISpecDirs")
    paths = [
        path
        for directory in (directories if isinstance(directories, list) else [])
        for path in sorted(Path(str(directory)).glob("*.*"))
    ]
    suffixes = (".yaml", ".yml", ".json")
    return [p.read_text(errors="replace") for p in paths if p.suffix in suffixes and p.is_file()]


def _node(root: Path, path: str) -> Node:
    try:
        about = (root / path).stat()
    except OSError as error:
        raise GpuUnavailable(f"{root / path}: {error.strerror}", "load the GPU's driver") from error
    if not stat.S_ISCHR(about.st_mode):
        raise GpuUnavailable(f"{root / path} is no device", "load the GPU's driver")
    number = about.st_rdev
    return Node(path=path, major=os.major(number), minor=os.minor(number), group=about.st_gid)


def _words(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    words = _words(path)
    return int(words) if words.isdigit() else None


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
