"""Finds the GPUs of this machine, by their own names."""

from collections.abc import Sequence
from pathlib import Path

from sandbox.contract.errors import SandboxError
from sandbox.contract.gpu import Devices
from sandbox.gpu.nvml import open_driver
from sandbox.gpu.request import Gpu, GpuRequest, choose_form


class GpuUnavailable(SandboxError):
    """A GPU that was asked for is not on this machine, or not now."""


def find_gpus(devices: Devices) -> tuple[Gpu, ...]:
    """Return every device of a kind that a run on this machine can have.

    Raises:
        SandboxError: the driver does not answer.
    """
    if devices == "none":
        return ()
    with open_driver() as driver:
        return driver.gpus()


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


def leased_gpus(ids: Sequence[str]) -> tuple[Gpu, ...]:
    """Return the GPUs of a run, as they are now.

    Raises:
        GpuUnavailable: one is not there any more.
    """
    there = {gpu.id: gpu for gpu in find_gpus("nvidia")}
    gone = [one for one in ids if one not in there]
    if gone:
        raise GpuUnavailable(
            f"GPU {gone[0]} does not answer any more",
            "see what the driver says; another one is named by --gpus or in [hardware]",
        )
    return tuple(there[one] for one in ids)


def request_for(gpus: Sequence[Gpu], info: dict[str, object]) -> GpuRequest:
    """Return how an engine is asked for these GPUs, from what it tells of itself."""
    form = choose_form([gpu.id for gpu in gpus], info, spec_files(info))
    return GpuRequest(form=form, devices="nvidia", gpus=tuple(gpus))


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
