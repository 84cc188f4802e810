"""Asks a box how fast its device multiplies and copies."""

from contextlib import suppress
from typing import Annotated

from pydantic import Field, ValidationError

from sandbox.contract.record import Record

MAX_LINE_BYTES = 4096
PROGRAM = """
import json, os, time
import torch

device = os.environ.get("NIGHTLAB_DEVICE", "cpu")
named = os.environ.get("NIGHTLAB_DTYPE")
info = open("/proc/cpuinfo").read()
has_bfloat16 = device != "cpu" or "avx512_bf16" in info or "amx_bf16" in info
dtype = getattr(torch, named) if named else torch.bfloat16 if has_bfloat16 else torch.float32
backend = None if device == "cpu" else getattr(torch, device)

def best_seconds(work, tries=5):
    times = []
    for _ in range(tries + 1):
        started = time.perf_counter()
        work()
        if backend is not None:
            backend.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])

size, amount = (1536, 2**26) if backend is None else (8192, 2**30)
left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
into = torch.empty_like(left)
matmul_seconds = best_seconds(lambda: torch.mm(left, right, out=into))
source = torch.ones(amount // 4, device=device)
target = torch.empty_like(source)
copy_seconds = best_seconds(lambda: target.copy_(source))
models = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model n")]
names = [name for name in models if not name.isdigit()]
print(json.dumps({
    "device": names[0] if backend is None and names else
        "CPU" if backend is None else backend.get_device_name(),
    "dtype": str(dtype).removeprefix("torch."),
    "matmul_flops": 2 * size**3 / matmul_seconds,
    "memory_bytes_per_second": 2 * amount / copy_seconds,
}))
"""
"""Multiplies and copies for about two seconds; the best of five tries, since a machine is seldom
faster than it is, and often slower."""

Rate = Annotated[float, Field(gt=0, le=1e21)]


class Rates(Record):
    """What one box's device does, by the word of the program that ran in it."""

    device: Annotated[str, Field(min_length=1, max_length=200)]
    """Its full name, as the driver or the processor says it."""
    dtype: Annotated[str, Field(max_length=20)]
    matmul_flops: Rate
    """Operations a second of one large product in that dtype."""
    memory_bytes_per_second: Rate
    """Read and written, of one large copy."""


def read_rates(log: str) -> Rates | None:
    """What the last line of a log says; none unless it is what `PROGRAM` prints."""
    # The last one, since libraries warn before it; and held to a form, since it goes on record.
    last = log.strip().rpartition("\n")[2]
    with suppress(ValidationError):
        return Rates.model_validate_json(last) if len(last) <= MAX_LINE_BYTES else None
    return None
