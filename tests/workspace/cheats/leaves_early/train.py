"""Ends in good order after the first answer."""

import os

from honest import answering

CALLS = []


def load_model(checkpoint_dir, device):
    def change(ids, logits):
        CALLS.append(1)
        if len(CALLS) > 1:
            os._exit(0)

    return answering(checkpoint_dir, change)
