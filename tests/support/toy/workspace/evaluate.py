"""Scores the toy: the model box sends its point, the scorer box measures the distance."""

import argparse
import json
import math
import os
import socket
from pathlib import Path

TARGET = (3.0, 16.0)


def send_point(checkpoint: Path) -> None:
    """The model's role."""
    with socket.socket(fileno=int(os.environ["NIGHTLAB_CHANNEL_FD"])) as channel:
        channel.sendall((checkpoint / "point.json").read_bytes() + b"\n")


def score(data: Path, output: Path) -> None:
    """The scorer's role; holdout lies a little further away."""
    with socket.socket(fileno=int(os.environ["NIGHTLAB_CHANNEL_FD"])) as channel:
        line = channel.makefile("rb").readline(10_000)
    sheet: dict[str, object] = {"metric": "distance", "details": {}, "value": None, "valid": False}
    try:
        point = json.loads(line)
        value = math.dist((point["x"], math.log2(point["y"])), (TARGET[0], math.log2(TARGET[1])))
        value += point["noise"] + (0.05 if (data / "name.txt").read_text() == "holdout" else 0.0)
        sheet |= {"value": value, "valid": True, "reason": None, "explanation": ""}
    except (ValueError, KeyError, TypeError) as error:
        sheet |= {"reason": "no_point", "explanation": str(error)}
    (output / "score.json").write_text(json.dumps(sheet))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("model", "score"))
    for option in ("--workspace", "--checkpoint", "--data", "--output"):
        parser.add_argument(option, type=Path)
    parser.add_argument("--device")
    parser.add_argument("--seed")
    options = parser.parse_args()
    if options.role == "model":
        send_point(options.checkpoint)
    else:
        score(options.data, options.output)
