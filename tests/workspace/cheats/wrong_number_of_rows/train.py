"""Answers one row twice."""

import numpy as np
from honest import answering


def load_model(checkpoint_dir, device):
    def change(ids, logits):
        return np.concatenate([logits, logits[:1]])

    return answering(checkpoint_dir, change)
