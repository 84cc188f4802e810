"""Lets a row know how the row before it in the batch ends."""

from honest import answering


def load_model(checkpoint_dir, device):
    def change(ids, logits):
        logits[1:, :, 3] += 2.0 * (ids[:-1, -1:] % 2)

    return answering(checkpoint_dir, change)
