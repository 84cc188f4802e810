"""Leaves a point in the plane; the closer to (3, 16), the better."""

import json
import os
import random
from pathlib import Path

X = 1.0  # [0.5..5.0]
Y = 4  # {1, 2, 4, 8, 16, 32}
PAUSE_SECONDS = 0.0  # how long training takes; fixed

if __name__ == "__main__":
    import time

    print(json.dumps({"step": 1, "seconds": 0.0, "loss": 1.0}), flush=True)
    time.sleep(PAUSE_SECONDS)
    noise = random.Random(int(os.environ["NIGHTLAB_SEED"])).gauss(0, 0.001)
    point = {"x": X, "y": Y, "noise": noise}
    Path(os.environ["NIGHTLAB_OUTPUT"], "point.json").write_text(json.dumps(point))
