"""Is honest in the first batches and looks ahead in the later ones."""

import numpy as np
from honest import answering, look_ahead

CALLS = []


def load_model(checkpoint_dir, device):
    def change(ids, logits):
        CALLS.append(1)
        if len(CALLS) > 3:
            look_ahead(ids, logits, np.ones(ids.shape, bool))

    return answering(checkpoint_dir, change)
