"""Lets every position know something about the last token of its row."""

from honest import answering


def load_model(checkpoint_dir, device):
    def change(ids, logits):
        logits[..., 7] += 2.0 * (ids[:, -1:] % 2)

    return answering(checkpoint_dir, change)
