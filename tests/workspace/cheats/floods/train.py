"""Writes without end."""

import os


def load_model(checkpoint_dir, device):
    while True:
        os.write(int(os.environ["NIGHTLAB_CHANNEL_FD"]), os.urandom(1 << 16))
