"""A small network that reads handwritten digits, in numpy."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

HIDDEN = 12  # {8, 12, 16, 24, 32, 64, 128}
RATE = 0.1  # [0.005..1.0 log]
MOMENTUM = 0.5  # [0.0..0.95]
DECAY = 0.001  # [0.00001..0.1 log]
BATCH = 32  # {16, 32, 64, 128}
STEPS = 400  # {200, 400, 800, 1600}
SHIFT = 0.0  # share of the images that are moved by a pixel [0.0..0.5]

Weights = dict[str, np.ndarray]


def load_model(checkpoint_dir: Path, device: str) -> Callable[[list[list[int]]], np.ndarray]:
    """A function from images (n lists of 64 numbers) to distributions [n, 10]."""
    weights = dict(np.load(Path(checkpoint_dir) / "weights.npz", allow_pickle=False))
    return lambda images: answer(weights, np.asarray(images, dtype=np.float64) / 16)[1]


def answer(weights: Weights, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The hidden layer and the distributions of a batch; each row on its own."""
    hidden = np.maximum(0, x @ weights["w1"] + weights["b1"])
    logits = hidden @ weights["w2"] + weights["b2"]
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return hidden, powers / powers.sum(axis=1, keepdims=True)


def moved(x: np.ndarray, chance: np.random.Generator) -> np.ndarray:
    """The images, some of them moved by a pixel to a side."""
    x = x.reshape(-1, 8, 8).copy()
    for i in np.flatnonzero(chance.random(len(x)) < SHIFT):
        x[i] = np.roll(x[i], chance.integers(-1, 2, size=2), axis=(0, 1))
    return x.reshape(-1, 64)


def train(images: np.ndarray, labels: np.ndarray, chance: np.random.Generator) -> Weights:
    weights = {
        "w1": chance.normal(0, 64**-0.5, (64, HIDDEN)),
        "b1": np.zeros(HIDDEN),
        "w2": chance.normal(0, HIDDEN**-0.5, (HIDDEN, 10)),
        "b2": np.zeros(10),
    }
    speed = {name: np.zeros_like(value) for name, value in weights.items()}
    began = time.monotonic()
    for step in range(STEPS):
        chosen = chance.integers(0, len(images), BATCH)
        x, y = moved(images[chosen], chance), labels[chosen]
        hidden, p = answer(weights, x)
        if step % 50 == 0:
            loss = float(-np.log(p[np.arange(BATCH), y] + 1e-12).mean())
            seconds = time.monotonic() - began
            print(json.dumps({"step": step, "seconds": seconds, "loss": loss}), flush=True)
        p[np.arange(BATCH), y] -= 1
        back = (p @ weights["w2"].T) * (hidden > 0)
        slope = {
            "w1": x.T @ back / BATCH,
            "b1": back.mean(axis=0),
            "w2": hidden.T @ p / BATCH,
            "b2": p.mean(axis=0),
        }
        for name, value in weights.items():
            speed[name] = MOMENTUM * speed[name] - RATE * (slope[name] + DECAY * value)
            value += speed[name]
    return weights


if __name__ == "__main__":
    data = Path(os.environ["NIGHTLAB_DATA"])
    images = np.fromfile(data / "images.bin", dtype=np.uint8).reshape(-1, 64) / 16
    labels = np.fromfile(data / "labels.bin", dtype=np.uint8)
    chance = np.random.default_rng(int(os.environ["NIGHTLAB_SEED"]))
    np.savez(Path(os.environ["NIGHTLAB_OUTPUT"], "weights.npz"), **train(images, labels, chance))
