"""Answers with something that is no tensor."""


def load_model(checkpoint_dir, device):
    return lambda rows: rows.tolist()
