"""A second task, with another metric, direction and data: its parts, its cheats, a whole night."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from agent.record.chain import read_ledger
from agent.report.summary import summary
from sandbox.engine.find import Engine
from sandbox.image.image import ImageRecord
from sandbox.machine import state_directory
from tests.support.command_line import CommandLine

DIGITS = Path(__file__).parents[2] / "tests/support/digits"
WORKSPACE = DIGITS / "workspace"
SPLITS = {"train": 1197, "val": 300, "holdout": 300}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The splits, made from the wheel that pip fetches once into nightlab's own downloads."""
    output = tmp_path_factory.mktemp("digits")
    cache = state_directory(os.environ) / "downloads"
    script = WORKSPACE / "prepare.py"
    options = ("--source", "digits", "--output", str(output), "--cache", str(cache))
    subprocess.run([sys.executable, "-P", str(script), *options], check=True)
    return output


def images(data: Path, split: str) -> list[bytes]:
    pixels = (data / split / "images.bin").read_bytes()
    return [pixels[i : i + 64] for i in range(0, len(pixels), 64)]


def test_no_image_is_in_two_splits(data: Path) -> None:
    found = {split: set(images(data, split)) for split in SPLITS}

    assert {split: len(kept) for split, kept in found.items()} == SPLITS
    assert len(set.union(*found.values())) == sum(SPLITS.values())


def test_every_split_has_every_class(data: Path) -> None:
    for split, size in SPLITS.items():
        labels = (data / split / "labels.bin").read_bytes()
        assert (len(labels), set(labels)) == (size, set(range(10)))


# --- the score --------------------------------------------------------------------------------

HONEST = "return [[0.91 if c == sum(x) % 10 else 0.01 for c in range(10)] for x in images]"
CHEATS = {
    "counts_its_company": (
        "n = sum(map(sum, images)) % 10\n"
        "    return [[0.91 if c == n else 0.01 for c in range(10)] for x in images]",
        "not_alike",
    ),
    "answers_by_place": (
        "return [[0.91 if c == i % 10 else 0.01 for c in range(10)] for i, x in enumerate(images)]",
        "not_alike",
    ),
    "remembers": (
        "SEEN.extend(images); n = SEEN.count\n"
        "    return [[0.91 if c == n(x) % 10 else 0.01 for c in range(10)] for x in images]",
        "not_alike",
    ),
    "sums_to_ten": ("return [[1.0] * 10 for x in images]", "not_a_distribution"),
    "below_zero": ("return [[2.0, -1.0] + [0.0] * 8 for x in images]", "not_a_distribution"),
    "nan": ("return [[float('nan')] * 10 for x in images]", "not_a_distribution"),
    "nine_classes": ("return [[1.0] + [0.0] * 8 for x in images]", "wrong_shape"),
    "one_too_few": ("return [[1.0] + [0.0] * 9 for x in images[1:]]", "wrong_shape"),
    "floods": ("return [[0.1] * 100_000 for x in images]", "too_long"),
    "hangs_up": ("raise SystemExit(3)", "hung_up"),
    "stalls": (
        f"SEEN.append(1)\n    import time; time.sleep(60 * (len(SEEN) > 1))\n    {HONEST}",
        "too_slow",
    ),
}


def scored(tmp_path: Path, split: Path, body: str) -> dict[str, object]:
    """What evaluate.py says of a model whose answer to a batch is `body`."""
    candidate, output = tmp_path / "candidate", tmp_path / "out"
    candidate.mkdir()
    output.mkdir()
    source = (
        f"SEEN = []\n\ndef answer(images):\n    {body}\n\ndef load_model(*_):\n    return answer\n"
    )
    (candidate / "train.py").write_text(source)
    model, scorer = socket.socketpair()
    with model, scorer:
        boxes = [
            _role(model, "model", "--workspace", str(candidate), "--checkpoint", str(candidate)),
            _role(scorer, "score", "--data", str(split), "--output", str(output)),
        ]
    boxes[1].wait(timeout=60)
    boxes[0].kill()
    boxes[0].wait()
    sheet: dict[str, object] = json.loads((output / "score.json").read_text())
    return sheet


def _role(channel: socket.socket, role: str, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(WORKSPACE / "evaluate.py"), role, *options],
        pass_fds=[channel.fileno()],
        env=os.environ | {"NIGHTLAB_CHANNEL_FD": str(channel.fileno())},
        stderr=subprocess.DEVNULL,
    )


def test_accuracy_is_the_share_of_right_answers(data: Path, tmp_path: Path) -> None:
    labels = (data / "val" / "labels.bin").read_bytes()
    right = sum(sum(x) % 10 == label for x, label in zip(images(data, "val"), labels, strict=True))

    sheet = scored(tmp_path, data / "val", HONEST)

    assert (sheet["value"], sheet["reason"]) == (right / len(labels), None)


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_gets_its_verdict_and_no_value(cheat: str, data: Path, tmp_path: Path) -> None:
    body, reason = CHEATS[cheat]

    sheet = scored(tmp_path, data / "val", body)

    assert (sheet["value"], sheet["reason"]) == (None, reason)


def test_rounding_is_no_company(data: Path, tmp_path: Path) -> None:
    shaken = HONEST.replace("[0.91 if", "[0.91 + 1e-6 * len(SEEN) if")

    sheet = scored(tmp_path, data / "val", f"SEEN.append(1)\n    {shaken}")

    assert sheet["reason"] is None


# --- a night ----------------------------------------------------------------------------------


@pytest.mark.docker
def test_a_whole_night_runs_and_more_is_better(
    tmp_path: Path, engine: Engine, image: ImageRecord
) -> None:
    shutil.copytree(DIGITS, tmp_path / "night", ignore=shutil.ignore_patterns("__pycache__"))
    place = CommandLine(tmp_path / "night", engine)

    made = place.nightlab("setup")
    assert made.returncode == 0, made.stderr
    done = place.nightlab("run", "--researcher", "tpe", "--session", "n", "--seed", "2")

    assert done.returncode == 0, done.stderr
    numbers = summary(read_ledger(place.session("n")))
    assert (numbers.metric, numbers.direction) == ("accuracy", "maximize")
    assert (numbers.attempts, numbers.invalid, numbers.failed) == (6, 0, 0)
    assert numbers.baseline is not None
    assert numbers.baseline > 0.8
    finished = [a.finished for a in place.history("n").completed if a.finished]
    judged = [end.arithmetic for end in finished if end.arithmetic is not None]
    assert judged
    for told in judged:
        assert told.gain == pytest.approx(told.candidate_mean - told.best_mean)
    assert place.nightlab("audit", "n").returncode == 0
    assert "higher is better" in (place.session("n") / "report.html").read_text()
