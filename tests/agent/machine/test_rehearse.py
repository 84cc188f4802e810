"""A rehearsal in the real box says what a program lacks, and what would change it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox.engine.find import Engine
from sandbox.image.image import ImageRecord
from tests.support.command_line import CommandLine

BEGIN = "import random, sys\noptimizer = None\n"
GOOD = BEGIN + "random.seed(int(sys.argv[-1]))\nprint(f'val loss {random.random():.3f}')\n"
PINNED = BEGIN + "random.seed(7)\nprint(f'val loss {random.random():.3f}')\n"
ABSENT = "import lightning\n" + GOOD
DOWNLOADS = BEGIN + (
    "import urllib.request\nurllib.request.urlopen('http://example.org')\n"
    "print(f'val loss {1.5}')\n"
)


def program(code: str, command: str = '"train.py"') -> str:
    manual = Path(__file__).parents[3] / "docs" / "own-repository.md"
    text = manual.read_text().split("````markdown\n")[1].split("````")[0]
    text = text.replace('metric = "val_bpb"', "metric = \"val_loss\"\npattern = 'val loss (\\S+)'")
    return text.replace('"train.py"]', f"{command}]", 1)


@pytest.mark.docker
@pytest.mark.parametrize(
    ("code", "command", "rc", "said"),
    [
        (GOOD, '"train.py", "{seed}"', 0, ("all there", "it reaches the score", "ready")),
        (PINNED, '"train.py"', 1, ("the same: it does not reach the score", "NIGHTLAB_SEED")),
        (ABSENT, '"train.py", "1"', 1, ("the image lacks lightning", "base_image")),
        (DOWNLOADS, '"train.py"', 1, ("it asked the network", "[[data]]")),
        (GOOD.replace("val loss", "best acc"), '"train.py", "1"', 1, ("pattern = 'best", "[goal]")),
    ],
)
def test_what_is_missing_is_said_before_the_night(
    tmp_path: Path,
    engine: Engine,
    image: ImageRecord,
    code: str,
    command: str,
    rc: int,
    said: tuple[str, ...],
) -> None:
    (tmp_path / "train.py").write_text(code)
    (tmp_path / "program.md").write_text(program(code, command))

    done = CommandLine(tmp_path, engine).nightlab("try", COLUMNS="400")

    assert (rc, []) == (done.returncode, [w for w in said if w not in done.stdout]), done.stdout
    assert not (tmp_path / "runs").exists()
