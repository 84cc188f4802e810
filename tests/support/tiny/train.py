"""Fits a few hidden units to a curve by stochastic gradient descent; for the study of noise.

Start and batches come from the seed that the host sets, the examples are always the same: so scores
of equal files differ as those of large models do, only that a training takes half a second.
"""

import os
from pathlib import Path

import numpy as np

RATE = 0.05  # of learning [0.01..0.2 log]
STEPS = 2500  # of eight examples each
HIDDEN = 48  # units; fixed


def examples(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points on a noisy surface over eight dimensions."""
    chance = np.random.default_rng(seed)
    inputs = chance.normal(size=(count, 8))
    targets = np.sin(inputs[:, :1]) + inputs[:, 1:2] * inputs[:, 2:3]
    return inputs, targets + 0.1 * chance.normal(size=(count, 1))


def predict(weights: dict[str, np.ndarray], inputs: np.ndarray) -> np.ndarray:
    """What the fitted model says."""
    return np.tanh(inputs @ weights["first"] + weights["bias"]) @ weights["second"]


def train(seed: int) -> dict[str, np.ndarray]:
    """Takes the steps."""
    chance = np.random.default_rng(seed)
    inputs, targets = examples(2000, 0)
    first, bias = chance.normal(size=(8, HIDDEN)) * 0.3, np.zeros(HIDDEN)
    second = chance.normal(size=(HIDDEN, 1)) * 0.3
    for _ in range(STEPS):
        rows = chance.integers(len(inputs), size=8)
        x, hidden = inputs[rows], np.tanh(inputs[rows] @ first + bias)
        error = hidden @ second - targets[rows]
        back = error @ second.T * (1 - hidden**2)
        second -= RATE * hidden.T @ error / 8
        first -= RATE * x.T @ back / 8
        bias -= RATE * back.mean(axis=0)
    return {"first": first, "bias": bias, "second": second}


if __name__ == "__main__":
    np.savez(
        Path(os.environ["NIGHTLAB_OUTPUT"], "model.npz"), **train(int(os.environ["NIGHTLAB_SEED"]))
    )
