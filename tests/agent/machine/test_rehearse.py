"""A rehearsal in the real box says what a program lacks, and what would change it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from agent.attempt.lab import Worker
from agent.machine.rehearse import Rehearsed, before_training, rehearse
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
        (ABSENT, '"train.py", "1"', 1, ("the image has no lightning", "requirements =")),
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


@pytest.mark.docker
def test_run_stops_before_its_first_training_with_the_words_of_try(
    tmp_path: Path, engine: Engine, image: ImageRecord
) -> None:
    (tmp_path / "train.py").write_text(ABSENT)
    (tmp_path / "program.md").write_text(program(ABSENT))
    place = CommandLine(tmp_path, engine)

    done = place.nightlab("run", "--researcher", "tpe", "--attempts", "1", COLUMNS="400")

    assert 2 == done.returncode, done.stderr
    assert "imports: the image has no lightning" in done.stderr
    assert "named under [hardware]: requirements =" in done.stderr
    assert not (tmp_path / "runs").exists()

    (tmp_path / "train.py").write_text("open('/opt/x', 'w') if 0 else None\n" + GOOD)
    going = place.nightlab("run", "--researcher", "tpe", "--attempts", "1", "--session", "n")
    assert "val_loss is read from a match of the pattern" in going.stdout
    assert "it writes where nothing can be written: /opt/x (train.py, line 1)" in going.stderr
    assert 1 <= len(place.history("n").attempts)


# --- boxes that do not come to a good end ---------------------------------------------------------

ANSWER = "nightlab try: []\n"


@dataclass
class Ended:
    """Boxes that print what a test says, and end as it says."""

    prints: dict[str, str]
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    seen: Callable[[RunSpec], None] = lambda _spec: None

    def answers(self) -> bool:
        return True

    def run(self, spec: RunSpec, **how: Any) -> RunResult:
        self.seen(spec)
        result = FakeExecutor(Clock(), prints=self.prints).run(spec, **how)
        return result.model_copy(update={"outcome": self.outcomes.get(spec.run_id, Outcome.OK)})


def worker_for(place: Path, boxes: Ended, *command: str) -> Worker:
    asked = IN_FORCE.model_dump() | {"goal": {"source": "reported"}, "scoring": None, "data": None}
    asked["workspace"] = {"command": command or ("python3", "train.py")}
    settings, image = Settings.model_validate(asked), f"sha256:{64 * '0'}"
    return Worker("try", place, settings, boxes, image, {}, "cpu", {}, None, place)


def rehearsed(
    place: Path, boxes: Ended, *command: str, more: dict[str, bytes] | None = None
) -> dict[str, Rehearsed]:
    worker = worker_for(place, boxes, *command)
    files = {"train.py": b"import torch", "run.sh": b"python3 train.py"} | (more or {})
    source = place / "source"
    for name, text in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(text)
    return {one.about: one for one in rehearse(worker, source, files, None, (1, 2))}


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


# --- what is said without a training --------------------------------------------------------------


def test_a_module_that_is_missing_ends_it_before_a_training(tmp_path: Path) -> None:
    found = rehearsed(tmp_path, Ended({"try-imports": 'nightlab try: ["torch"]\n'}))

    assert ["imports"] == list(found)
    assert found["imports"].is_certain
    assert "the image has no torch" == found["imports"].seen


def test_a_folder_that_the_script_puts_on_its_path_is_no_module_of_others(tmp_path: Path) -> None:
    code = b"import sys\nsys.path.insert(0, 'src')\nimport mine\nimport own_one\nimport torch\n"
    more = {"train.py": code, "src/mine/__init__.py": b"", "lib/own_one.py": b""}

    found = rehearsed(tmp_path, Ended(GOOD_LOGS), more=more)

    assert "all there: torch" == found["imports"].seen


def test_the_commands_own_python_is_asked(tmp_path: Path) -> None:
    boxes = Ended(GOOD_LOGS)
    asked: list[RunSpec] = []
    boxes.seen = asked.append

    rehearsed(tmp_path, boxes, "env", "PYTHONPATH=/opt", "/opt/py/bin/python3.12", "-u", "train.py")
    rehearsed(tmp_path, boxes, "torchrun", "train.py")
    rehearsed(tmp_path, boxes, "python3", "-m", "pkg.train", more={"pkg/train.py": b"import jax"})

    looks = [spec.argv for spec in asked if spec.run_id == "try-imports"]
    assert ("env", "PYTHONPATH=/opt", "/opt/py/bin/python3.12", "-c") == looks[0][:4]
    assert ("python3", "-c") == looks[1][:2]
    assert '["jax"]' == looks[2][-1]


CODE = b"""import json, os, numpy as np, torch
torch.save(model, "/data/model.pt")
os.makedirs("/opt/results", exist_ok=True)
open("/log.txt", "w").write("x")
open("/etc/passwd").read()
with open("/tmp/fine", mode="w") as file: pass
open(path, "w")
np.savetxt(path, rows, fmt="%d")
torch.save(model, "here.pt")
np.load("data/rows.npy"), np.load("shown/rows.npy"), open("tracked.txt"), open("out/log.txt")
"""


def test_places_that_no_box_has_are_told_from_the_code(tmp_path: Path) -> None:
    code = {"train.py": CODE, ".gitignore": b"data\nout\n", "tracked.txt": b""}
    (source := tmp_path / "source").mkdir()
    subprocess.run(["git", "init", "-q"], cwd=source, check=True)
    for name, text in (code | {"data/rows.npy": b"1", "out/log.txt": b"1"}).items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(text)

    found = list(before_training(worker_for(tmp_path, Ended(GOOD_LOGS)), source))

    told = [one.seen for one in found if one.about in ("writes", "paths")]
    places = ["/data/model.pt", "/opt/results", "/log.txt", "data/rows.npy"]
    assert [True] * 4 == [place in said for place, said in zip(places, told, strict=True)], told
    assert not any(one.is_certain for one in found)
    assert "val_bpb is read from a line `val_bpb: number`" == found[-1].seen
