"""Answers with the largest numbers there are."""

from honest import answering


def load_model(checkpoint_dir, device):
    def change(ids, logits):
        logits[...] = -3e38
        logits[..., 0] = 3e38

    return answering(checkpoint_dir, change)
