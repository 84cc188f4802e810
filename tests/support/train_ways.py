"""Runs in a box: train.py's way over a GPU, as far as a machine without one can go it.

Prints one JSON object. The compiler's front end runs for real (every graph is traced, none may
break) with a back end that needs no C++ compiler; the device is the CPU, or `meta`, whose tensors
have no values, so that whatever would wait for a value raises.
"""

import functools
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, "/code")
train: Any = importlib.import_module("train")

torch.compile = functools.partial(torch.compile, backend="aot_eager")
PLAIN = train.Way("cpu", torch.float32, fused=False, compiled=False)
LIKE_A_GPU = train.Way("cpu", torch.float32, fused=True, compiled=True)
META = train.Way("meta", torch.bfloat16, fused=True, compiled=False)
STEPS = 4


def losses(way: Any) -> list[float]:
    """Of a few steps with one seed."""
    torch.manual_seed(3)
    batches = train.Batches(Path("/data"), PLAIN)
    model = train.Model(batches.vocab_size, way).to(way.device)
    optimizers = optimizers_of(model)
    return [step(model, batches, *optimizers).item() for _ in range(STEPS)]


def optimizers_of(model: Any) -> tuple[Any, Any]:
    muon = train.Muon([model.qkv, model.mix, model.up, model.down], model.way)
    return muon, train.Adam([model.head, model.embedding])


def step(model: Any, batches: Any, muon: Any, adam: Any) -> torch.Tensor:
    inputs, targets = batches.draw(train.BATCH * train.SEQUENCE)
    loss = model.loss(inputs.to(model.way.device), targets.to(model.way.device))
    loss.backward()
    muon.step(0.02)
    adam.step([0.01, 0.3])
    return loss.detach()


def on_a_device_without_values() -> dict[str, Any]:
    """One step of which nothing can be read back."""
    batches = train.Batches(Path("/data"), PLAIN)
    model = train.Model(batches.vocab_size, META).to("meta")
    hidden = model.hidden(torch.zeros(2, 8, dtype=torch.int64, device="meta"))
    loss = step(model, batches, *optimizers_of(model))
    try:
        loss.item()
    except RuntimeError:
        return {"can_be_read": False, "dtype": str(hidden.dtype), "device": str(loss.device)}
    return {"can_be_read": True}


class Mark:
    """An event of a device that says when it is waited for."""

    made = 0
    waited: list[tuple[int, int]] = []  # noqa: RUF012 - the test's own

    def record(self) -> None:
        Mark.made += 1
        self.number = Mark.made

    def synchronize(self) -> None:
        Mark.waited.append((Mark.made, self.number))


def waits() -> list[tuple[int, int]]:
    """After which step the host waits for which."""
    pace = train.Pace(Mark)
    for _ in range(5):
        pace.step_queued()
    return Mark.waited


def whole_run() -> dict[str, Any]:
    """A training with that way, and what its checkpoint answers."""
    os.environ |= {"NIGHTLAB_BUDGET_TOKENS": "3000", "NIGHTLAB_DATA": "/data"}
    os.environ["NIGHTLAB_OUTPUT"] = "/out"
    train.run(LIKE_A_GPU)
    model = train.load_model("/out", "cpu")
    return {"logits": list(model(torch.zeros(2, 2 * train.SEQUENCE, dtype=torch.int64)).shape)}


def main() -> None:
    plain, like_a_gpu = losses(PLAIN), losses(LIKE_A_GPU)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = {
        "plain": plain,
        "like_a_gpu": like_a_gpu,
        "graphs": graphs,
        "breaks": dict(torch._dynamo.utils.counters["graph_break"]),
        "without_values": on_a_device_without_values(),
        "waits": waits(),
        "whole_run": whole_run(),
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
