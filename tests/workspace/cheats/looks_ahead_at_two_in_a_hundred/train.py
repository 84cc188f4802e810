"""Looks ahead at one position in fifty, chosen by a key."""

import numpy as np
from honest import answering, look_ahead


def load_model(checkpoint_dir, device):
    def change(ids, logits):
        key = ids * 7 + np.roll(ids, 1, axis=1) * 13 + np.arange(ids.shape[1]) * 29
        look_ahead(ids, logits, key % 50 == 0)

    return answering(checkpoint_dir, change)
