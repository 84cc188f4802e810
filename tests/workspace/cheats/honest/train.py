"""Nothing: the honest model in float32."""

from honest import answering


def load_model(checkpoint_dir, device):
    return answering(checkpoint_dir, lambda ids, logits: None)
