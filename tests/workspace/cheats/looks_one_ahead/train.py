"""Makes the next token likelier everywhere."""

import numpy as np
from honest import answering, look_ahead


def load_model(checkpoint_dir, device):
    def change(ids, logits):
        look_ahead(ids, logits, np.ones(ids.shape, bool))

    return answering(checkpoint_dir, change)
