"""Takes its time for each answer after the first."""

import time

from honest import answering

CALLS = []


def load_model(checkpoint_dir, device):
    def change(ids, logits):
        CALLS.append(1)
        if len(CALLS) > 1:
            time.sleep(3600)

    return answering(checkpoint_dir, change)
