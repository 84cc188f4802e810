"""Has one logit that is no number."""

import numpy as np
from honest import answering


def load_model(checkpoint_dir, device):
    def change(ids, logits):
        logits[-1, -1, -1] = np.nan

    return answering(checkpoint_dir, change)
