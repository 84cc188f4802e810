"""What holds a run to its GPU memory, strongest first."""

from collections.abc import Collection, Sequence
from typing import get_args

from sandbox.contract.errors import LimitNotEnforced
from sandbox.contract.gpu import GpuMemory, MemoryBound
from sandbox.gpu.request import Gpu

CONTEXT_BYTES = 768 * 2**20
"""What a process takes on a GPU beside its allocator; more than contexts are usually seen to."""


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
