"""Share of the device's peak that a training used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent.record.curves import Curve, is_storable
from agent.record.events import SessionStarted
from sandbox.contract.run import RunResult


def mfu_of(session: SessionStarted, result: RunResult, curve: Curve) -> float | None:
    """Share of its device's peak that a training used, by the training's own word.

    None where the program named no operations per token, the profile knows no peak for a device of
    exactly that name, several devices were used, or the share would be more than all of it.
    """
    peak = peak_of(session.image.get("peak_flops"), _device(session, result))
    said = next((point for point in reversed(curve) if "flops_per_token" in point), {})
    flops = said.get("flops_per_token", 0.0) * said.get("tokens_per_second", 0.0)
    if peak is None or not 0 < flops <= peak:
        return None
    return flops / peak


def peak_of(peaks: object, device: str | None) -> float | None:
    """The peak that a recorded table knows for the device of that name."""
    peak: Any = peaks.get(device) if isinstance(peaks, Mapping) else None
    return float(peak) if is_storable(peak) and peak > 0 else None


def _device(session: SessionStarted, result: RunResult) -> str | None:
    if not result.gpus:
        return session.machine.get("cpu")
    return result.gpu[0].name if len(result.gpu) == len(result.gpus) == 1 else None
