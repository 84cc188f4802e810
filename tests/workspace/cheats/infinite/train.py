"""Is infinitely sure of one token."""

import numpy as np
from honest import answering


def load_model(checkpoint_dir, device):
    def change(ids, logits):
        logits[0, 3, 5] = np.inf

    return answering(checkpoint_dir, change)
