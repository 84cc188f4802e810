"""Fails in the middle."""

from honest import answering

CALLS = []


def load_model(checkpoint_dir, device):
    def change(ids, logits):
        CALLS.append(1)
        assert len(CALLS) < 3

    return answering(checkpoint_dir, change)
