"""Takes all the memory there is."""

import numpy as np

KEPT = []


def load_model(checkpoint_dir, device):
    while True:
        KEPT.append(np.ones(1 << 22))
