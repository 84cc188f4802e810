"""Stays within each deadline, and would take an hour in all."""

import time

from honest import answering


def load_model(checkpoint_dir, device):
    def change(ids, logits):
        time.sleep(0.8)

    return answering(checkpoint_dir, change)
