"""Watches a run's GPUs from the host: samples, limits, faults.

One thread a run asks the driver a few times a second. It ends the run when a GPU fails under it,
or when the run exceeds a limit that nothing stronger holds. What a run leaves behind on a GPU is
looked for once its box is gone.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from sandbox.contract.gpu import GpuEvent, GpuSample
from sandbox.gpu.account import Account
from sandbox.gpu.nvml import Driver, DriverFault, XidWatch
from sandbox.gpu.request import Gpu

PERIOD_SECONDS = 0.25
LEFT_BYTES = 256 * 2**20
"""More than a driver's own needs may move between two looks at an idle GPU."""
LEFT_SECONDS = 5.0
"""How long the driver may take to give back the memory of processes that are gone."""
STOP_SECONDS = 10.0
"""How long a question may hang in the driver before the run ends without the answer."""
PROC = Path("/proc")
EndReason = Literal["gpu_memory", "gpu_fault"]
End = Callable[[EndReason], None]


class GpuWatch:
    """The watch over one run.

    Args:
        driver: where GPUs are asked.
        gpus: those of the run.
        period_seconds: between two samples.
        proc: where processes tell their control group.
        stop_seconds: how long the end of the watch waits for an answer that hangs in the driver.
        left_seconds: how long the driver may take to give back the memory of the dead.

    Raises:
        DriverFault: a GPU does not even answer before the run.
    """

    def __init__(
        self,
        driver: Driver,
        gpus: Sequence[Gpu],
        period_seconds: float = PERIOD_SECONDS,
        proc: Path = PROC,
        stop_seconds: float = STOP_SECONDS,
        left_seconds: float = LEFT_SECONDS,
    ) -> None:
        self._driver = driver
        self._stop_seconds = stop_seconds
        self._left_seconds = left_seconds
        self._hangs = False
        self._period_seconds = period_seconds
        self._proc = proc
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self.accounts = [self._opened(gpu) for gpu in gpus]
        self._xids: XidWatch = driver.xids(gpus)
        self._end: End = lambda _: None
        self._limit_bytes: int | None = None
        self._must_see = False
        self._cgroup = ""
        self.exceeded: str = ""
        """Which GPU's limit the run exceeded, and by how much."""

    def _opened(self, gpu: Gpu) -> Account:
        first = self._driver.sample(gpu)
        unaccounted = _unaccounted(first, self._driver.processes(gpu)) or 0
        return Account(gpu=gpu, first=first, last=first, first_unaccounted_bytes=unaccounted)

    @property
    def can_see_memory(self) -> bool:
        """Tell whether the driver says how much memory is in use on every one of them."""
        return all(account.first.memory_used_bytes is not None for account in self.accounts)

    def begin(self, pid: int, end: End, limit_bytes: int | None, *, is_only_bound: bool) -> None:
        """Watch from now on.

        Args:
            pid: of the box's PID 1 on the host; its processes share its control group.
            end: ends the run at once, from another thread.
            limit_bytes: of each GPU; None for no limit.
            is_only_bound: nothing but this watch holds the limit, so a driver that no longer
                answers ends the run as well.
        """
        self._cgroup = text_of(self._proc / str(pid) / "cgroup")
        self._end, self._limit_bytes, self._must_see = end, limit_bytes, is_only_bound
        # A daemon: a question that hangs in the driver must not keep this process alive.
        self._thread = threading.Thread(target=self._watch, name="gpu-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no more; may be called again."""
        self._stopped.set()
        if self._thread is None:
            return
        self._thread.join(self._stop_seconds)
        self._hangs = self._thread.is_alive()
        self._thread = None
        if self._hangs:
            words = f"a question about it hangs in the driver for {self._stop_seconds:g} s"
            for account in self.accounts:
                event = GpuEvent(kind="unreadable", words=words, is_fault=True)
                account.events.append(event)

    def close(self) -> None:
        """Stop, and let go of the driver."""
        self.stop()
        if not self._hangs:  # or this call would hang as well
            self._xids.close()

    def look_back(self) -> None:
        """Look, once the box is gone, whether the GPUs look as healthy ones do now."""
        if self._hangs:
            return
        self._hear()
        give_up = time.monotonic() + self._left_seconds
        while (
            any(self._left(account) > LEFT_BYTES for account in self.accounts)
            and time.monotonic() < give_up
        ):
            time.sleep(self._period_seconds)
        for account in self.accounts:
            left = self._left(account)
            if left > LEFT_BYTES and not account.has_fault:
                words = f"{left / 2**20:.0f} MiB are still taken after the run"
                account.events.append(GpuEvent(kind="memory_left", words=words, is_fault=True))
            recovery = self._recovery(account)
            if recovery is not None:
                account.events.append(recovery)

    def _recovery(self, account: Account) -> GpuEvent | None:
        try:
            return self._driver.recovery(account.gpu)
        except DriverFault as fault:
            account.fail(fault.event)
            return None

    def _left(self, account: Account) -> int:
        """Return how much more memory is taken by no living process than before the run.

        Other work may come and go beside a run. In doubt nothing is left: while the driver does not
        say how much one of the GPU's processes takes.
        """
        try:
            sample = self._driver.sample(account.gpu)
            now = _unaccounted(sample, self._driver.processes(account.gpu))
        except DriverFault as fault:
            account.fail(fault.event)
            return 0
        return 0 if now is None else now - account.first_unaccounted_bytes

    def _watch(self) -> None:
        try:
            self._look_on()
        except Exception as error:  # noqa: BLE001 - whatever it is, a limit must not stand open
            words = f"the watch broke: {type(error).__name__}: {error}"[:300]
            for account in self.accounts:
                event = GpuEvent(kind="unreadable", words=words, is_fault=False)
                account.events.append(event)
            self._end_run("gpu_fault")

    def _end_run(self, why: EndReason) -> None:
        """End the run, unless it is over: then its process id may be somebody else's."""
        if not self._stopped.is_set():
            self._end(why)

    def _look_on(self) -> None:
        next_look = time.monotonic()
        while not self._stopped.is_set():
            self._look()
            next_look = max(next_look + self._period_seconds, time.monotonic())
            self._stopped.wait(next_look - time.monotonic())

    def _look(self) -> None:
        for account in self.accounts:
            try:
                sample = self._driver.sample(account.gpu)
                used = self._used(account, sample)
            except DriverFault as fault:
                account.fail(fault.event)
            else:
                account.add(sample, used)
                self._hold(account, used)
        self._hear()
        if any(self._ends_a_run(event) for a in self.accounts for event in a.events):
            self._end_run("gpu_fault")

    def _ends_a_run(self, event: GpuEvent) -> bool:
        """Tell whether waiting on would only waste the rest of the budget, or a limit is open."""
        return event.is_fault and (event.kind != "unreadable" or self._must_see)

    def _hear(self) -> None:
        for gpu, event in self._xids.reports():
            for account in self.accounts:
                if account.gpu.id == gpu:
                    account.events.append(event)

    def _used(self, account: Account, sample: GpuSample) -> int | None:
        """Return the run's memory on a GPU: its processes' where the driver tells, else the growth.

        Raises:
            DriverFault: the GPU does not answer.
        """
        processes = self._driver.processes(account.gpu)
        seen = processes if self._cgroup else ()
        groups = {pid: text_of(self._proc / str(pid) / "cgroup") for pid in seen}
        own = [
            memory
            for pid, group in groups.items()
            if group == self._cgroup and (memory := processes[pid]) is not None
        ]
        if own:
            return sum(own)
        if groups and all(group not in ("", self._cgroup) for group in groups.values()):
            return 0  # every one is somebody else's
        if sample.memory_used_bytes is None:
            return None
        return max(0, sample.memory_used_bytes - (account.first.memory_used_bytes or 0))

    def _hold(self, account: Account, used: int | None) -> None:
        if self._limit_bytes is None or used is None or used <= self._limit_bytes or self.exceeded:
            return
        self.exceeded = f"{used} of {self._limit_bytes} bytes on {account.gpu.id}"
        self._end_run("gpu_memory")


def text_of(path: Path) -> str:
    """Return a file's text; empty where it cannot be seen from here."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _unaccounted(sample: GpuSample, processes: Mapping[int, int | None]) -> int | None:
    """Return what of a GPU's memory no process takes that the driver names; None if in doubt."""
    if sample.memory_used_bytes is None or None in processes.values():
        return None
    return max(0, sample.memory_used_bytes - sum(memory or 0 for memory in processes.values()))
