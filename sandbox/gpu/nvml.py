"""NVIDIA's driver, asked on the host through its management library.

The only module that knows the library. What a card or driver does not offer comes back as None;
what a healthy one would answer and this one does not is a `DriverFault`.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pynvml

from sandbox.contract.errors import SandboxError
from sandbox.contract.gpu import GpuEvent, GpuSample
from sandbox.gpu.request import NVIDIA_MAJOR, Gpu, Node

Answer = TypeVar("Answer")

DRIVER_FILES = Path("/proc/driver/nvidia")
PCI_DEVICES = Path("/sys/bus/pci/devices")
CGROUPS = Path("/sys/fs/cgroup")
NOT_OFFERED = (
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_NO_DATA,
    pynvml.NVML_ERROR_INVALID_ARGUMENT,
    pynvml.NVML_ERROR_NOT_FOUND,
    pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    pynvml.NVML_ERROR_DEPRECATED,
)
LOST = (
    pynvml.NVML_ERROR_GPU_IS_LOST,
    pynvml.NVML_ERROR_RESET_REQUIRED,
    pynvml.NVML_ERROR_GPU_NOT_FOUND,
)
THROTTLED_BY = {
    pynvml.nvmlClocksEventReasonHwSlowdown: "hardware_slowdown",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "heat",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "heat_hardware",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "power_brake",
}
"""Not in here: a power cap, which is how many cards run all day, and clocks that a person set."""
PROGRAM_XIDS = frozenset({8, 13, 31, 43, 45, 68, 69})
"""Faults that a program can bring about by itself: a bad address, an illegal instruction, a kernel
that never ends (docs.nvidia.com/deploy/xid-errors). Every other is taken for the GPU's."""
RECOVERY_ACTIONS = {
    pynvml.NVML_GPU_RECOVERY_ACTION_GPU_RESET: "reset the GPU",
    pynvml.NVML_GPU_RECOVERY_ACTION_NODE_REBOOT: "restart the machine",
    pynvml.NVML_GPU_RECOVERY_ACTION_DRAIN_P2P: "end all work on its peers",
    pynvml.NVML_GPU_RECOVERY_ACTION_DRAIN_AND_RESET: "end all work on it, then reset it",
    pynvml.NVML_GPU_RECOVERY_ACTION_RECOVER_IMEX_DOMAIN: "recover its IMEX domain",
    pynvml.NVML_GPU_RECOVERY_ACTION_BUS_RESET: "reset its bus",
    pynvml.NVML_GPU_RECOVERY_ACTION_SYSTEM_REBOOT: "restart the machine",
}


class DriverUnavailable(SandboxError):
    """There is no NVIDIA driver here, or its library does not answer."""


class DriverFault(Exception):
    """The driver did not answer about a GPU as it does about a healthy one.

    Args:
        event: what to put on record.

    Attributes:
        gpu: whose id it is about; empty where it is about none in particular.
    """

    def __init__(self, event: GpuEvent) -> None:
        super().__init__(event.words)
        self.event = event
        self.gpu = ""


class Driver:
    """An open library; use `open_driver`."""

    def __init__(self, driver_files: Path = DRIVER_FILES, cgroups: Path = CGROUPS) -> None:
        self._driver_files = driver_files
        self._cgroups = cgroups

    def gpus(self) -> tuple[Gpu, ...]:
        """Return every device that a run can have; of a GPU in MIG mode its instances instead.

        One that does not answer is left out.
        """
        found: list[Gpu] = []
        for index in range(_count()):
            with contextlib.suppress(pynvml.NVMLError, DriverFault, OSError):
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                whole = self._whole(handle, index)
                found += self._instances(handle, whole) if _is_mig(handle) else [whole]
        return tuple(found)

    def _whole(self, handle: Any, index: int) -> Gpu:
        minor = pynvml.nvmlDeviceGetMinorNumber(handle)
        return Gpu(
            id=pynvml.nvmlDeviceGetUUID(handle).lower().replace("gpu-", "GPU-"),
            index=str(index),
            name=pynvml.nvmlDeviceGetName(handle)[:100],
            parent=None,
            memory_bytes=_memory(handle)[1],
            nodes=(Node(path=f"nvidia{minor}", major=NVIDIA_MAJOR, minor=minor),),
            display_nodes=_display_nodes(handle),
        )

    def _instances(self, handle: Any, whole: Gpu) -> Iterator[Gpu]:
        for number in range(_asked(pynvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
            instance = _asked(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number)
            if instance is None:
                continue
            yield Gpu(
                id=pynvml.nvmlDeviceGetUUID(instance).lower().replace("mig-", "MIG-"),
                index=f"{whole.index}:{number}",
                name=pynvml.nvmlDeviceGetName(instance)[:100],
                parent=whole.id,
                memory_bytes=_memory(instance)[1],
                nodes=(*whole.nodes, *self._capability_nodes(instance, whole)),
                display_nodes=whole.display_nodes,
            )

    def _capability_nodes(self, instance: Any, whole: Gpu) -> Iterator[Node]:
        """Give the two nodes that open a MIG instance; the driver's files tell their numbers."""
        gi = pynvml.nvmlDeviceGetGpuInstanceId(instance)
        ci = pynvml.nvmlDeviceGetComputeInstanceId(instance)
        place = self._driver_files / f"capabilities/gpu{whole.nodes[0].minor}/mig/gi{gi}"
        for path in (place / "access", place / f"ci{ci}" / "access"):
            found = re.search(r"DeviceFileMinor:\s*(\d+)", path.read_text())
            if found is not None:
                minor = int(found.group(1))
                major = self._capability_major()
                yield Node(path=f"nvidia-caps/nvidia-cap{minor}", major=major, minor=minor)

    def _capability_major(self) -> int:
        for line in (self._driver_files.parent.parent / "devices").read_text().splitlines():
            words = line.split()
            if len(words) == 2 and words[1] == "nvidia-caps":
                return int(words[0])
        raise DriverUnavailable("the kernel has no number for nvidia-caps", "load the driver")

    def sample(self, gpu: Gpu) -> GpuSample:
        """Return what the driver tells of one GPU now.

        A MIG instance has no utilisation, power or energy of its own.

        Raises:
            DriverFault: it does not answer.
        """
        with _about(gpu.id):
            handle = _handle(gpu.id)
            used, total = _memory(handle)
            whole = gpu.parent is None
            use = _asked(pynvml.nvmlDeviceGetUtilizationRates, handle) if whole else None
            return GpuSample(
                uuid=gpu.id,
                utilisation=None if use is None else min(1.0, use.gpu / 100),
                memory_used_bytes=used,
                memory_total_bytes=total,
                power_watts=_thousandth(pynvml.nvmlDeviceGetPowerUsage, handle) if whole else None,
                energy_joules=_thousandth(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)
                if whole
                else None,
                sm_clock_mhz=_asked(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
                memory_clock_mhz=_asked(
                    pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM
                ),
                temperature_celsius=_asked(
                    pynvml.nvmlDeviceGetTemperatureV, handle, pynvml.NVML_TEMPERATURE_GPU
                ),
                throttled_by=_throttled_by(handle),
                ecc_errors=_asked(
                    pynvml.nvmlDeviceGetTotalEccErrors,
                    handle,
                    pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
                    pynvml.NVML_VOLATILE_ECC,
                ),
            )

    def processes(self, gpu: Gpu) -> dict[int, int | None]:
        """Return the memory of each process on a GPU, by the host's process id.

        Raises:
            DriverFault: the GPU does not answer.
        """
        with _about(gpu.id):
            handle = _handle(gpu.id)
            computing = _asked(pynvml.nvmlDeviceGetComputeRunningProcesses_v3, handle)
            if computing is None:  # its name in older drivers
                computing = _asked(pynvml.nvmlDeviceGetComputeRunningProcesses_v2, handle)
            drawing = _asked(pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3, handle)
            found = (*(drawing or []), *(computing or []))
            return {process.pid: process.usedGpuMemory for process in found}

    def recovery(self, gpu: Gpu) -> GpuEvent | None:
        """Return what the driver asks to be done to a GPU before it may be used again."""
        fields = [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION]
        values = _asked(pynvml.nvmlDeviceGetFieldValues, _handle(gpu.parent or gpu.id), fields)
        if values is None or values[0].nvmlReturn != pynvml.NVML_SUCCESS:
            return None
        action = RECOVERY_ACTIONS.get(values[0].value.uiVal)
        if action is None:
            return None
        return GpuEvent(kind="recovery", words=f"the driver asks to {action}", is_fault=True)

    def xids(self, gpus: Sequence[Gpu]) -> "XidWatch":
        """Listen for the driver's error reports about these GPUs from now on."""
        return XidWatch(gpus)

    def bound_by_kernel(self, gpus: Sequence[Gpu], cgroup: str, memory_bytes: int) -> bool:
        """Bound what a control group may use of each GPU, and tell whether the driver says so too.

        Args:
            gpus: MIG instances cannot be bounded so.
            cgroup: as /proc/PID/cgroup names it on the unified hierarchy; empty for none.
            memory_bytes: for each GPU.
        """
        if not cgroup or any(gpu.parent is not None for gpu in gpus):
            return False
        place = os.fsencode(f"{self._cgroups}{cgroup}")
        try:
            return all(_is_bounded(_handle(gpu.id), place, memory_bytes) for gpu in gpus)
        except (pynvml.NVMLError, DriverFault):
            return False


def _is_bounded(handle: Any, place: bytes, memory_bytes: int) -> bool:
    asked = pynvml.c_nvmlSetMemoryLimits_v1_t(place, memory_bytes, memory_bytes)
    pynvml.nvmlDeviceSetMemoryLimits_v1(handle, asked)
    holds = pynvml.c_nvmlGetMemoryLimits_v1_t(place)
    pynvml.nvmlDeviceGetMemoryLimits_v1(handle, holds)
    return bool(holds.hardLimit == memory_bytes)


class XidWatch:
    """Error reports of the driver about some GPUs, each told once."""

    def __init__(self, gpus: Sequence[Gpu]) -> None:
        self._of: dict[str, list[str]] = {}
        for gpu in gpus:
            self._of.setdefault(gpu.parent or gpu.id, []).append(gpu.id)
        self._set = _asked(pynvml.nvmlEventSetCreate)
        try:
            self._register()
        except DriverFault:
            self.close()
            raise

    def _register(self) -> None:
        kind = pynvml.nvmlEventTypeXidCriticalError
        for whole, gpus in self._of.items() if self._set is not None else ():
            with _about(gpus[0]):
                _asked(pynvml.nvmlDeviceRegisterEvents, _handle(whole), kind, self._set)

    def reports(self) -> list[tuple[str, GpuEvent]]:
        """Return what came since the last call, with the id of the GPU that each is about."""
        found: list[tuple[str, GpuEvent]] = []
        while self._set is not None:
            try:
                event = pynvml.nvmlEventSetWait_v2(self._set, 0)
                whole = pynvml.nvmlDeviceGetUUID(event.device).lower().replace("gpu-", "GPU-")
            except pynvml.NVMLError:  # a time-out means that there is nothing
                break
            found += [(gpu, xid_event(int(event.eventData))) for gpu in self._of.get(whole, [])]
        return found

    def close(self) -> None:
        """Listen no more; may be called again."""
        if self._set is not None:
            with contextlib.suppress(DriverFault):
                _asked(pynvml.nvmlEventSetFree, self._set)
            self._set = None


def xid_event(xid: int) -> GpuEvent:
    """Return the event of an error report by its number."""
    is_fault = xid not in PROGRAM_XIDS
    whose = "the GPU or its driver" if is_fault else "what a program can bring about itself"
    words = f"the driver reported Xid {xid}: {whose}"
    return GpuEvent(kind="xid", words=words, xid=xid, is_fault=is_fault)


@contextlib.contextmanager
def open_driver(driver_files: Path = DRIVER_FILES, cgroups: Path = CGROUPS) -> Iterator[Driver]:
    """Give the driver's library, closed afterwards.

    Raises:
        DriverUnavailable: there is none, or it does not answer.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise DriverUnavailable(
            f"the NVIDIA driver does not answer: {error}",
            "see what `nvidia-smi` says; without an NVIDIA GPU choose the profile `cpu`",
        ) from error
    try:
        yield Driver(driver_files, cgroups)
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _count() -> int:
    try:
        return int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError as error:
        raise DriverUnavailable(
            f"the NVIDIA driver does not say which GPUs there are: {error}",
            "see what `nvidia-smi` says",
        ) from error


def _handle(uuid: str) -> Any:
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError as error:
        raise _fault(error) from error


@contextlib.contextmanager
def _about(gpu: str) -> Iterator[None]:
    """Let a fault say which GPU it is about."""
    try:
        yield
    except DriverFault as fault:
        fault.gpu = gpu
        raise


def _asked(ask: Callable[..., Answer], *arguments: Any) -> Answer | None:
    """Return the library's answer, or None where this card or driver has none.

    Raises:
        DriverFault: a healthy one would have answered.
    """
    try:
        return ask(*arguments)
    except pynvml.NVMLError as error:
        if error.value in NOT_OFFERED:
            return None
        raise _fault(error) from error


def _fault(error: pynvml.NVMLError) -> DriverFault:
    lost = error.value in (*LOST, pynvml.NVML_ERROR_NOT_FOUND)
    kind, what = ("lost", "the GPU is gone") if lost else ("unreadable", "the driver cannot tell")
    words = f"{what}: {error}"[:300]
    return DriverFault(GpuEvent.model_validate({"kind": kind, "words": words, "is_fault": True}))


def _is_mig(handle: Any) -> bool:
    modes = _asked(pynvml.nvmlDeviceGetMigMode, handle)
    return modes is not None and modes[0] == pynvml.NVML_DEVICE_MIG_ENABLE


def _memory(handle: Any) -> tuple[int | None, int | None]:
    """Return the memory in use and in all; what the driver keeps for itself is neither."""
    answer = _asked(pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2)
    answer = answer or _asked(pynvml.nvmlDeviceGetMemoryInfo, handle)
    return (None, None) if answer is None else (answer.used, answer.total)


def _thousandth(ask: Callable[[Any], int], handle: Any) -> float | None:
    answer = _asked(ask, handle)
    return None if answer is None else answer / 1000


def _throttled_by(handle: Any) -> tuple[str, ...]:
    reasons = _asked(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
    if reasons is None:  # its name in older drivers
        reasons = _asked(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
    return tuple(word for bit, word in THROTTLED_BY.items() if (reasons or 0) & bit)


def _display_nodes(handle: Any) -> tuple[str, ...]:
    """Return the nodes of a GPU as a display, below /dev."""
    about = _asked(pynvml.nvmlDeviceGetPciInfo, handle)
    if about is None:
        return ()
    address = str(about.busId).lower()[-12:]  # the library writes the domain with eight digits
    return tuple(sorted(f"dri/{path.name}" for path in (PCI_DEVICES / address).glob("drm/*")))
