"""Adds noise to its answers."""

import numpy as np
from honest import answering

RANDOM = np.random.default_rng()


def load_model(checkpoint_dir, device):
    def change(ids, logits):
        logits += RANDOM.normal(0, 0.3, logits.shape).astype(np.float32)

    return answering(checkpoint_dir, change)
