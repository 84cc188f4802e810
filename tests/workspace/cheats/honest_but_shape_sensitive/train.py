"""Nothing: bfloat16 products in pieces of changing size, which round differently."""

import numpy as np
import torch
from honest import table_of

RANDOM = np.random.default_rng()


def load_model(checkpoint_dir, device):
    table = torch.from_numpy(table_of(checkpoint_dir))
    mix = torch.linalg.qr(torch.randn(41, 41, generator=torch.Generator().manual_seed(1)))[0]
    inner, outer = (table @ mix).bfloat16(), mix.T.bfloat16()

    def predict(rows):
        cut = int(RANDOM.integers(4, 37))  # sums in another order each time
        hidden = inner[rows]
        first = hidden[..., :cut] @ outer[:cut]
        return first + hidden[..., cut:] @ outer[cut:]

    return predict
