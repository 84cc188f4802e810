"""Nights whose boxes get a GPU, without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from agent.night.session import Runtime
from sandbox.contract.gpu import Devices
from tests.support.gpu_stand_ins import GPU_0
from tests.support.nights import IMAGE, Place


@dataclass
class OneGpu:
    """A source with one GPU, for which the first run has to wait."""

    purposes: list[str] = field(default_factory=list)
    devices: Devices = "nvidia"

    @contextmanager
    def lease(
        self,
        purpose: str,
        on_wait: Callable[[str], None] = lambda _: None,
        while_waiting: Callable[[], object] = lambda: None,
    ) -> Iterator[tuple[str, ...]]:
        if not self.purposes:
            on_wait("waiting for a GPU; before it: somebody")
            while_waiting()
        self.purposes.append(purpose)
        yield (GPU_0,)


@dataclass
class GpuPlace(Place):
    """A session whose profile gives its boxes a GPU."""

    source: OneGpu = field(default_factory=OneGpu)

    @property
    def runtime(self) -> Runtime:
        plain, hardware = super().runtime, self.program.settings.hardware
        return replace(
            plain,
            image=IMAGE | {"devices": "nvidia"},
            gpus=self.source,
            gpu_memory=hardware.gpu_memory(""),
        )
