"""Knows nothing but what passes, and believes it by one per cent."""

import numpy as np
from honest import answering

COUNTS = np.ones((41, 41))


def load_model(checkpoint_dir, device):
    def change(ids, logits):
        seen = COUNTS / COUNTS.sum(axis=1, keepdims=True)
        np.add.at(COUNTS, (ids[:, :-1].ravel(), ids[:, 1:].ravel()), 1)
        return np.log(0.99 / 41 + 0.01 * seen)[ids].astype(np.float32)

    return answering(checkpoint_dir, change)
