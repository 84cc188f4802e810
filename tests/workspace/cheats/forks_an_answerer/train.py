"""Has a second process answer on the same socket."""

import os

from honest import answering


def load_model(checkpoint_dir, device):
    os.fork()
    return answering(checkpoint_dir, lambda ids, logits: None)
