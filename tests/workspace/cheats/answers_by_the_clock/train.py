"""Answers otherwise in every other tenth of a second."""

import time

from honest import answering


def load_model(checkpoint_dir, device):
    def change(ids, logits):
        logits[..., 5] += 3.0 * (time.monotonic_ns() // 1000 % 2)

    return answering(checkpoint_dir, change)
