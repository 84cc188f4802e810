"""Goes on training when it is asked for the first time, and not while it is loaded."""

import time

from honest import answering

asked = []


def load_model(checkpoint_dir, device):
    def train(ids, logits):
        if not asked:
            time.sleep(20)
        asked.append(len(ids))

    return answering(checkpoint_dir, train)
