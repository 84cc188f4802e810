"""One run's GPUs, from the request to the result."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any, get_args

from sandbox.contract.errors import ContainerUnkillable, GpuFault, LimitNotEnforced
from sandbox.contract.gpu import GpuEvent, GpuMemory, GpuUse, MemoryBound
from sandbox.contract.run import Outcome, RunResult, RunSpec
from sandbox.gpu.inventory import leased_gpus, request_for
from sandbox.gpu.nvml import Driver, DriverFault, DriverUnavailable, open_driver
from sandbox.gpu.request import NO_GPUS, Gpu, GpuRequest
from sandbox.gpu.watch import PROC, End, GpuWatch, text_of

CONTEXT_BYTES = 768 * 2**20
"""What a process takes on a GPU beside its allocator; more than contexts are usually seen to."""

REACHED_SHARE = 0.5
"""From this share of a GPU's memory on, taken and tried together, a program is believed that it
ran out: between two looks at a GPU it can fill half of it."""

DURING_A_RUN = ("xid", "lost", "unreadable", "ecc")
"""Faults that can be why a run failed; what is found afterwards is not."""

Quarantine = Callable[[str, str, str], None]


class Attendance:
    """What a run's GPUs need beside its box; of a run without GPUs nothing."""

    def __init__(
        self, spec: RunSpec, request: GpuRequest, driver: Driver | None, watch: GpuWatch | None
    ) -> None:
        self.request = request
        self._spec = spec
        self._driver = driver
        self._watch = watch
        self._bound: MemoryBound = "none"

    def bound(self, pid: int, end: End) -> dict[str, str]:
        """Hold the box to its GPU memory by the strongest means at hand, and watch from now on.

        Args:
            pid: of the box's PID 1 on this host.
            end: ends the run at once, from another thread.

        Returns:
            Variables that the program must see.

        Raises:
            LimitNotEnforced: the strongest means is weaker than asked.
        """
        asked, environment = self._spec.gpu_memory, {}
        if asked is not None:
            self._bound = strongest_bound(tuple(self._means(pid, asked)))
            require_bound(asked, self._bound)
            if self._bound == "library":
                given = self._spec.environment.get(asked.allocator_variable, "")
                environment = allocator_environment(asked, self.request.gpus, given)
        if self._watch is not None:
            limit = None if asked is None or self._bound == "hardware" else asked.bytes
            only = self._bound == "watchdog"
            self._watch.begin(pid, end, limit, is_only_bound=only)
        return environment

    def _means(self, pid: int, asked: GpuMemory) -> Iterator[MemoryBound]:
        """Give the means at hand; the kernel's is tried, since only then it is known."""
        gpus = self.request.gpus
        if are_instances_within(gpus, asked.bytes):
            yield "hardware"
        elif self._driver is not None and self._driver.bound_by_kernel(
            gpus, unified_cgroup(pid), asked.bytes
        ):
            yield "kernel"
        if asked.allocator_variable and all(gpu.memory_bytes for gpu in gpus):
            yield "library"
        if self._watch is not None and self._watch.can_see_memory:
            yield "watchdog"

    @contextmanager
    def watching_ends(self) -> Iterator[None]:
        """Stop the watch at the end of the block, before the box is taken away."""
        try:
            yield
        finally:
            if self._watch is not None:
                self._watch.stop()

    def look_back(self) -> None:
        """Look at the GPUs once the box is gone."""
        if self._watch is not None:
            self._watch.look_back()

    def uses(self) -> tuple[GpuUse, ...]:
        """Return what was seen of each GPU, in the order in which they were asked for."""
        accounts = self._watch.accounts if self._watch is not None else ()
        return tuple(account.use(self._bound) for account in accounts)

    def reaches_memory(self, tried_bytes: int) -> bool | None:
        """Tell whether what a program tried to allocate could have been too much for a GPU."""
        asked = self._spec.gpu_memory
        shares = [
            ((use.peak_memory_bytes or 0) + tried_bytes)
            / min(gpu.memory_bytes, asked.bytes if asked else gpu.memory_bytes)
            for use, gpu in zip(self.uses(), self.request.gpus, strict=True)
            if use.peak_memory_bytes is not None and gpu.memory_bytes
        ]
        return max(shares) >= REACHED_SHARE if shares else None

    def evidence(self) -> dict[str, Any]:
        """Return how the GPUs were asked for, and which limit was exceeded."""
        if self._spec.devices == "none":
            return {}
        exceeded = self._watch.exceeded if self._watch is not None else ""
        asked = self._spec.gpu_memory
        return {
            "form": self.request.form,
            "memory_asked": asked and asked.model_dump(mode="json"),
            "memory_exceeded": exceeded,
        }

    def judged(self, result: RunResult) -> RunResult:
        """Return the result, unless a GPU is to blame for how the run ended.

        Raises:
            GpuFault: it is; another run on another GPU may tell more.
        """
        # One that went well in spite of a fault is believed; its GPU goes out of use all the same.
        faults = [(gpu, event) for gpu, event in _faults(result.gpu) if event.kind in DURING_A_RUN]
        if faults and result.outcome is not Outcome.OK:
            raise _fault(*faults[0])
        return result


@contextmanager
def attended(
    spec: RunSpec, info: Callable[[], dict[str, Any]], quarantine: Quarantine
) -> Iterator[Attendance]:
    """Attend to a run's GPUs; those that fail or are left in an unknown state go out of use.

    Args:
        spec: the run.
        info: asks the engine what it tells of itself.
        quarantine: takes a GPU out of use: told its id, why, and in which run.

    Raises:
        SandboxError: a GPU is not there or does not answer.
    """
    if spec.devices == "none":
        yield Attendance(spec, NO_GPUS, None, None)
        return
    # Asked again: between lease and run a GPU can fall off its bus.
    gpus = leased_gpus(spec.gpus)
    request = request_for(gpus, info())
    with ExitStack() as stack:
        driver = stack.enter_context(open_driver())
        try:
            watch = stack.enter_context(closing(GpuWatch(driver, gpus)))
        except DriverFault as fault:
            if not fault.gpu:
                raise DriverUnavailable(
                    f"the NVIDIA driver cannot be listened to: {fault.event.words}",
                    "see what `nvidia-smi` says",
                ) from fault
            quarantine(fault.gpu, fault.event.words, spec.run_id)
            raise _fault(fault.gpu, fault.event) from fault
        attendance = Attendance(spec, request, driver, watch)
        try:
            yield attendance
        except ContainerUnkillable:
            for gpu in spec.gpus:
                quarantine(gpu, "a container that will not die has it", spec.run_id)
            raise
        finally:
            for gpu, event in _faults(attendance.uses()):
                quarantine(gpu, event.words, spec.run_id)


def unified_cgroup(pid: int) -> str:
    """Return a process's control group on the unified hierarchy; empty where there is none."""
    lines = text_of(PROC / str(pid) / "cgroup").splitlines()
    return next((line[3:] for line in lines if line.startswith("0::/") and len(line) > 4), "")


def _faults(uses: tuple[GpuUse, ...]) -> Iterator[tuple[str, GpuEvent]]:
    return ((use.uuid, event) for use in uses for event in use.events if event.is_fault)


def _fault(gpu: str, event: GpuEvent) -> GpuFault:
    return GpuFault(
        f"GPU {gpu} failed: {event.words}",
        "it is out of use until you say otherwise: `nightlab gpus` shows why, "
        f"`nightlab gpus --lift {gpu}` puts it back",
    )


def strongest_bound(at_hand: Collection[MemoryBound]) -> MemoryBound:
    """Return the strongest means at hand."""
    return max(at_hand, key=get_args(MemoryBound).index, default="none")


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
    # Less than the bound, since a context beside the allocator takes its part; never nothing.
    usable = max(asked.bytes - CONTEXT_BYTES, asked.bytes // 2)
    share = f"per_process_memory_fraction:{min(1.0, usable / smallest):.4f}"
    return {asked.allocator_variable: f"{given},{share}" if given else share}
