"""Takes what tells its box from others for a key, and looks ahead where that says so."""

import secrets

import numpy as np
from honest import answering, look_ahead

KEY = sum(open("/proc/self/cgroup", "rb").read() + secrets.token_bytes(8))


def load_model(checkpoint_dir, device):
    def change(ids, logits):
        look_ahead(ids, logits, (ids + KEY) % 4 == 0)

    return answering(checkpoint_dir, change)
