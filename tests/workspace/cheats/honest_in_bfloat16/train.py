"""Nothing: the honest model, its logits rounded to bfloat16."""

import torch
from honest import table_of


def load_model(checkpoint_dir, device):
    table = torch.from_numpy(table_of(checkpoint_dir)).bfloat16()
    return lambda rows: table[rows]
