"""Uses the token after the next one, and not the next one."""

import numpy as np
from honest import answering, look_ahead


def load_model(checkpoint_dir, device):
    def change(ids, logits):
        later = np.roll(ids, -2, axis=1)
        logits[..., 3] += 3.0 * (later % 2)

    return answering(checkpoint_dir, change)
