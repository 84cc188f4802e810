"""A rehearsal in the real box says what a program lacks, and what would change it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from agent.attempt.lab import Worker
from agent.machine.rehearse import Rehearsed, rehearse
from agent.settings import Settings
from sandbox.contract.run import Outcome, RunResult, RunSpec
from sandbox.engine.find import Engine
from sandbox.image.image import ImageRecord
from tests.support.clock import Clock
from tests.support.command_line import CommandLine
from tests.support.executors import FakeExecutor
from tests.support.histories import IN_FORCE

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
        (ABSENT, '"train.py", "1"', 1, ("the image lacks lightning", "requirements =")),
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


# --- boxes that do not come to a good end ---------------------------------------------------------

ANSWER = "nightlab try: []\n"


@dataclass
class Ended:
    """Boxes that print what a test says, and end as it says."""

    prints: dict[str, str]
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def answers(self) -> bool:
        return True

    def run(self, spec: RunSpec, **how: Any) -> RunResult:
        result = FakeExecutor(Clock(), prints=self.prints).run(spec, **how)
        return result.model_copy(update={"outcome": self.outcomes.get(spec.run_id, Outcome.OK)})


def rehearsed(place: Path, boxes: Ended, *command: str) -> dict[str, Rehearsed]:
    asked = IN_FORCE.model_dump() | {"goal": {"source": "reported"}, "scoring": None, "data": None}
    asked["workspace"] = {"command": command or ("python3", "train.py")}
    settings, image = Settings.model_validate(asked), f"sha256:{64 * '0'}"
    worker = Worker("try", place, settings, boxes, image, {}, "cpu", {}, None, place)
    files = {"train.py": b"import torch", "run.sh": b"python3 train.py"}
    return {one.about: one for one in rehearse(worker, files, None, (1, 2))}


GOOD_LOGS = {"try-imports": ANSWER, "try-1": "val_bpb: 1\n", "try-2": "val_bpb: 2\n"}


def test_boxes_that_do_well_are_ready(tmp_path: Path) -> None:
    warned = GOOD_LOGS | {"try-imports": f"warning: old\n{ANSWER}bye [\n"}

    for logs in (GOOD_LOGS, warned):
        found = rehearsed(tmp_path, Ended(logs))
        assert "all there: torch" == found["imports"].seen
        assert [] == [one for one in found.values() if one.cure]


@pytest.mark.parametrize(
    ("said", "outcome"),
    [(ANSWER, Outcome.TIMED_OUT), ("warning: old\n", Outcome.OK), ("", Outcome.FAILED)],
)
def test_a_box_that_did_not_answer_is_not_believed(
    tmp_path: Path, said: str, outcome: Outcome
) -> None:
    boxes = Ended(GOOD_LOGS | {"try-imports": said}, {"try-imports": outcome})

    found = rehearsed(tmp_path, boxes)

    assert ["imports"] == list(found)
    assert "did not answer" in found["imports"].seen
    assert found["imports"].cure


def test_a_second_training_that_fails_is_said(tmp_path: Path) -> None:
    found = rehearsed(tmp_path, Ended(GOOD_LOGS, {"try-2": Outcome.OUT_OF_MEMORY}))

    assert "seed" not in found
    assert found["end"].seen.startswith("out_of_memory")
    assert found["end"].cure


def test_a_command_without_a_script_says_that_nothing_was_looked_at(tmp_path: Path) -> None:
    found = rehearsed(tmp_path, Ended(GOOD_LOGS), "sh", "run.sh")

    assert "not looked at" in found["imports"].seen
    assert not found["imports"].cure
