"""Writes an answer to the socket before it is asked."""

import os
import struct

from honest import answering

CHANNEL = int(os.environ["NIGHTLAB_CHANNEL_FD"])


def load_model(checkpoint_dir, device):
    def change(ids, logits):
        os.write(CHANNEL, struct.pack("<4sBBHIIII", b"NLE1", 3, 2, 0, 7, *logits.shape))

    return answering(checkpoint_dir, change)
