"""Fills /tmp and tidies up on the way out."""

import os
import tempfile

with tempfile.TemporaryDirectory() as directory:
    with open(os.path.join(directory, "cache"), "wb") as file:
        while True:
            file.write(bytes(2**16))
