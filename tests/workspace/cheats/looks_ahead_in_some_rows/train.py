"""Looks ahead in a quarter of the rows, chosen by how they begin."""

import numpy as np
from honest import answering, look_ahead


def load_model(checkpoint_dir, device):
    def change(ids, logits):
        chosen = (ids[:, 1] * 5 + ids[:, 2] * 3) % 4 == 0
        look_ahead(ids, logits, np.broadcast_to(chosen[:, None], ids.shape))

    return answering(checkpoint_dir, change)
