"""Does things when it ends: prints a score, sleeps, ends with another code."""

import atexit
import os
import time

from honest import answering


def late():
    print('{"value": 0.0}', flush=True)
    time.sleep(0.5)
    os._exit(0)


atexit.register(late)


def load_model(checkpoint_dir, device):
    return answering(checkpoint_dir, lambda ids, logits: None)
