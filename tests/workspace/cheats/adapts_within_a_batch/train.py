"""Knows nothing but how often each token comes in the batch."""

import numpy as np
from honest import answering


def load_model(checkpoint_dir, device):
    def change(ids, logits):
        often = np.bincount(ids.ravel(), minlength=logits.shape[2]) + 1.0
        return np.zeros_like(logits) + np.log(often / often.sum()).astype(np.float32)

    return answering(checkpoint_dir, change)
