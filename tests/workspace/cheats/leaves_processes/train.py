"""Leaves a process behind that goes on."""

import subprocess
import sys

from honest import answering

subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)


def load_model(checkpoint_dir, device):
    return answering(checkpoint_dir, lambda ids, logits: None)
