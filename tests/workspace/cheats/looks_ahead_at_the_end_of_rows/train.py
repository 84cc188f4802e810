"""Looks ahead only at the last eight positions."""

import numpy as np
from honest import answering, look_ahead


def load_model(checkpoint_dir, device):
    def change(ids, logits):
        look_ahead(ids, logits, np.broadcast_to(np.arange(ids.shape[1]) >= 24, ids.shape))

    return answering(checkpoint_dir, change)
