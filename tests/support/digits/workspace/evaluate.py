"""Scores a classifier of handwritten digits by its accuracy: images go out, answers come back.

    python3 evaluate.py model --workspace DIR --checkpoint DIR --device cpu
    python3 evaluate.py score --data DIR --output DIR --seed N

Two processes in two boxes, joined by the socket $NIGHTLAB_CHANNEL_FD. The model box has the
candidate's code and checkpoint and is sent images; labels are in the scorer box alone. A message is
a line of JSON: a list of images (64 numbers from 0 to 16) there, a list of distributions over the
ten classes back. The scorer trusts nothing that it is sent: a bad answer ends in a verdict, a fault
of its own in a traceback and no score.json.

Many images are sent twice, in other company and another place, and nothing tells the second time
from the first. Answers that differ then depend on more than the image: on the batch, on the order,
on what came before. That is how a model could count classes or learn from the images that it is
scored on.
"""

import argparse
import json
import math
import os
import random
import socket
import sys
import time
from pathlib import Path

PIXELS, CLASSES, BATCH = 64, 10, 25
TWICE = 0.5  # share of the images that are sent a second time
START_SECONDS, ANSWER_SECONDS = 60.0, 5.0
ANSWER_BYTES = BATCH * CLASSES * 32
TOLERANCE = 1e-3  # of a probability: rounding, not company
HUNG_UP = "hung_up"  # nightlab then says how the model box ended


class Invalid(Exception):
    """The model broke the contract: a reason as a code, and a sentence."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


def open_channel() -> socket.socket:
    return socket.socket(fileno=int(os.environ["NIGHTLAB_CHANNEL_FD"]))


# --- the model box ----------------------------------------------------------------------------


def serve(workspace: Path, checkpoint: Path, device: str) -> None:
    """Answer batches until the scorer hangs up."""
    sys.path.insert(0, str(workspace))
    import train

    model = train.load_model(checkpoint, device)
    with open_channel() as channel, channel.makefile("rb") as lines:
        for line in lines:
            answers = [[float(p) for p in row] for row in model(json.loads(line))]
            channel.sendall(json.dumps(answers).encode() + b"\n")


# --- the scorer box ---------------------------------------------------------------------------


def score(data: Path) -> dict[str, object]:
    """Accuracy on a split, once every answer has been looked at."""
    pixels, labels = (data / "images.bin").read_bytes(), (data / "labels.bin").read_bytes()
    chance = random.SystemRandom()  # a seed that the candidate knows would tell it the plan
    order = list(range(len(labels)))
    order += chance.sample(order, int(TWICE * len(order)))
    chance.shuffle(order)
    answers: dict[int, list[float]] = {}
    with open_channel() as channel:
        for begin in range(0, len(order), BATCH):
            batch = order[begin : begin + BATCH]
            images = [list(pixels[i * PIXELS : (i + 1) * PIXELS]) for i in batch]
            timeout_seconds = START_SECONDS if begin == 0 else ANSWER_SECONDS
            for image, answer in zip(batch, ask(channel, images, timeout_seconds), strict=True):
                check_alike(answers.setdefault(image, answer), answer)
    right = sum(answer.index(max(answer)) == labels[i] for i, answer in answers.items())
    details = {"images": len(labels), "right": right, "sent_twice": len(order) - len(labels)}
    return {"value": right / len(labels), "valid": True, "reason": None, "explanation": "",
            "details": details}  # fmt: skip


def ask(
    channel: socket.socket, images: list[list[int]], timeout_seconds: float
) -> list[list[float]]:
    """The model's distributions for a batch, checked.

    Raises:
        Invalid: there are none, or they are not that.
    """
    deadline = time.monotonic() + timeout_seconds
    try:
        channel.settimeout(timeout_seconds)
        channel.sendall(json.dumps(images).encode() + b"\n")
        line = b""
        while not line.endswith(b"\n"):
            channel.settimeout(max(0.001, deadline - time.monotonic()))
            piece = channel.recv(65_536)
            line += piece
            if not piece or len(line) > ANSWER_BYTES:
                raise Invalid(HUNG_UP if not piece else "too_long", "the answer had no end")
    except TimeoutError:
        raise Invalid("too_slow", f"no answer within {timeout_seconds:g} s") from None
    except OSError as error:
        raise Invalid(HUNG_UP, f"the model box hung up: {error.strerror}") from None
    try:
        answers = json.loads(line)
    except (ValueError, RecursionError):
        raise Invalid("not_json", "the answer is no line of JSON") from None
    if not isinstance(answers, list) or len(answers) != len(images):
        raise Invalid("wrong_shape", f"one answer an image was due, {len(images)} in all")
    for answer in answers:
        check_distribution(answer)
    return answers


def check_distribution(answer: object) -> None:
    """Ten probabilities: finite, none below 0, one in all."""
    if not isinstance(answer, list) or len(answer) != CLASSES:
        raise Invalid("wrong_shape", f"an answer has {CLASSES} numbers")
    if not all(type(p) in (int, float) and math.isfinite(p) and p >= 0 for p in answer):
        raise Invalid("not_a_distribution", "a probability is a finite number from 0 on")
    if abs(sum(answer) - 1) > TOLERANCE:
        raise Invalid("not_a_distribution", f"the probabilities sum to {sum(answer):.4g}")


def check_alike(first: list[float], second: list[float]) -> None:
    if max(abs(a - b) for a, b in zip(first, second, strict=True)) > TOLERANCE:
        raise Invalid("not_alike", "an image in other company was answered differently")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("model", "score"))
    for option in ("--workspace", "--checkpoint", "--data", "--output"):
        parser.add_argument(option, type=Path)
    for option in ("--device", "--seed"):
        parser.add_argument(option)
    options = parser.parse_args()
    if options.role == "model":
        serve(options.workspace, options.checkpoint, options.device)
        return
    try:
        sheet = score(options.data)
    except Invalid as error:
        sheet = {"value": None, "valid": False, "reason": error.reason,
                 "explanation": str(error), "details": {}}  # fmt: skip
    (options.output / "score.json").write_text(json.dumps({"metric": "accuracy", **sheet}))


if __name__ == "__main__":
    main()
