"""Every known way to cheat, each with the verdict it gets, in real boxes.

A cheat is a folder in `cheats/`: `train.py`, whose docstring says what it tries, and `expect.toml`
with the keys of `Expectation`. All share one data set, a made-up language with habits, and
`cheats/honest.py`, which knows them. docs/score.md has their table.
"""

from __future__ import annotations

import ast
import base64
import lzma
import shutil
import tomllib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict

from agent.attempt.boxes import model_names, model_spec, scorer_spec
from agent.attempt.decide import LEAST_BLOCKS, scored_by_boxes
from agent.attempt.lab import Lab
from agent.attempt.sheet import MODEL_BOX, Pace
from agent.candidate.held_out import index_of, read_literals
from agent.program import load_program
from agent.record.attempts import TrialKey
from agent.record.events import Scored
from sandbox import DockerExecutor
from tests.support.labs import score_in_boxes, scoring_lab
from tests.support.scorer import BOS, CONTEXT, VOCABULARY, habits, write_data

CHEATS = Path(__file__).parent / "cheats"
ROOT = Path(__file__).parents[2]
NAMES = sorted(path.parent.name for path in CHEATS.glob("*/train.py"))
ROWS = 800
AT_ONCE = 2
BEGIN = "<!-- cheats: made by tests/workspace/test_cheats.py --update-golden -->\n"
END = "<!-- /cheats -->"

Array = np.ndarray[Any, Any]


class Timeouts(BaseModel):
    """The scorer's deadlines; what is not given is as shipped."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start_seconds: float = 120.0
    answer_seconds: float = 30.0
    total_seconds: float = 600.0


class Expectation(BaseModel):
    """What a cheat must come to.

    `unchanged` is the honest model's score, `near` the same but for rounding, `worse` a valid
    score that is no better.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    verdict: Literal["invalid", "failed", "unchanged", "near", "worse"]
    reasons: tuple[str, ...] = ()
    """Any of these."""
    checks: int = 1
    """How many check boxes it meets."""
    free_seconds: float | None = None
    """What a model box may take for nothing; without it time is not counted."""
    timeouts: Timeouts = Timeouts()


def expectation(name: str) -> Expectation:
    """What must be found for one cheat."""
    return Expectation.model_validate(tomllib.loads((CHEATS / name / "expect.toml").read_text()))


def attempt_of(name: str) -> str:
    """What a cheat tries, in its own words."""
    return str(ast.get_docstring(ast.parse((CHEATS / name / "train.py").read_text())))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, checkpoint and scorer that all cheats share."""
    root = tmp_path_factory.mktemp("cheats")
    stream = language(np.random.default_rng(1))
    (root / "data").mkdir()
    write_data(root / "data" / "val", stream, [1] * BOS + [0], CONTEXT)
    (root / "checkpoint").mkdir()
    np.save(root / "checkpoint" / "logits.npy", honest_logits())
    (root / "fixed").mkdir()
    shutil.copy(ROOT / "workspace" / "evaluate.py", root / "fixed")
    return root


def language(random: np.random.Generator) -> list[int]:
    """Text of the made-up language, in documents of 500 tokens."""
    steps = habits(1).cumsum(axis=1)
    stream: list[int] = []
    while len(stream) < ROWS * CONTEXT:
        at_start = len(stream) % 501 == 0
        step = 0 if at_start else int(np.searchsorted(steps[stream[-1]], random.random()))
        stream.append(BOS if at_start else min(step, BOS - 1))
    return stream


def honest_logits() -> Array:
    """What the honest model answers after each token."""
    logits = np.full((VOCABULARY, VOCABULARY), -20.0, dtype=np.float32)
    logits[:, :BOS] = np.log(habits(1) + 1e-6)
    return logits


@pytest.fixture(scope="module")
def honest_value(place: Path) -> float:
    """Bits per byte of the honest model, in float64."""
    stream = np.fromfile(place / "data" / "val" / "tokens.bin", "<u2").astype(np.int64)
    rows = stream.reshape(-1, CONTEXT)
    before = np.concatenate([np.full((len(rows), 1), BOS), rows[:, :-1]], axis=1)
    logits = honest_logits().astype(np.float64)
    log_sums = np.log(np.exp(logits).sum(axis=1))
    nats = log_sums[before] - logits[before, rows]
    counted = rows != BOS
    return float(nats[counted].sum() / np.log(2) / counted.sum())


def lab_at(place: Path, image_id: str, executor: DockerExecutor) -> Lab:
    """A lab that scores and records nothing."""
    settings = load_program(ROOT / "program.md").settings
    return scoring_lab(
        place,
        settings,
        executor,
        session="cheats",
        image_id=image_id,
        copies={"model": image_id, "check": image_id},
        environment={},
        data_dir=place / "data",
    )


@pytest.fixture(scope="module")
def findings(
    request: pytest.FixtureRequest,
    place: Path,
    tmp_path_factory: pytest.TempPathFactory,
    engine: Any,
    image: Any,
) -> Iterator[dict[str, Future[Scored]]]:
    """What each cheat that is asked for comes to, two at a time: half of a cheat is waiting."""
    names = [
        item.callspec.params["name"]
        for item in request.session.items
        if getattr(item, "originalname", "") == test_a_cheat_gets_its_verdict.__name__
        and hasattr(item, "callspec")
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {
            name: pool.submit(
                found_for, name, place, tmp_path_factory.mktemp(name), image.image_id, engine
            )
            for name in names
        }
        pool.shutdown(cancel_futures=True)  # whoever gives up after one failure waits for no more


def found_for(name: str, place: Path, folder: Path, image_id: str, engine: Any) -> Scored:
    """Score one cheat in real boxes."""
    source = (CHEATS / name / "train.py").read_text()
    return scored(name, source, expectation(name), place, folder, image_id, engine)


def scored(
    name: str,
    source: str,
    expected: Expectation,
    place: Path,
    folder: Path,
    image_id: str,
    engine: Any,
) -> Scored:
    files, output = folder / "files", folder / "output"
    files.mkdir()
    output.mkdir()
    (files / "train.py").write_text(source)
    shutil.copy(CHEATS / "honest.py", files)
    executor = DockerExecutor(engine.base_url, engine.api_version, folder / "runs")
    worker, run_id = lab_at(place, image_id, executor).worker, f"cheat-{dashed(name)}"[:50]
    checkpoint = place / "checkpoint"
    checks = expected.checks
    models = [model_spec(worker, each, files, checkpoint) for each in model_names(run_id, checks)]
    scorer = scorer_spec(worker, f"{run_id}-scorer", seed=7, split="val", checks=checks)
    waits = expected.timeouts.model_dump()
    options = [word for key, value in waits.items() for word in (f"--{dashed(key)}", str(value))]
    hasty = scorer.model_copy(update={"argv": (*scorer.argv, *options)})
    bounds = {"memory_bytes": 512 * 2**20, "wall_seconds": 60.0}
    small = models[0].limits.model_copy(update=bounds)
    bounded = [spec.model_copy(update={"limits": small}) for spec in models]
    measurement = score_in_boxes(executor.run, bounded, hasty, output)
    assert [] == list((folder / "runs").iterdir())
    seconds = expected.free_seconds
    free = None if seconds is None else Pace(loading=seconds, in_all=seconds)
    key = TrialKey("attempt", 1, 7)
    return scored_by_boxes(key, "val", measurement.sheet, measurement.models, None, free, 0.0)


def dashed(name: str) -> str:
    return name.replace("_", "-")


def verdict_of(found: Scored, honest_value: float) -> str:
    """The word of `Expectation` for what was found."""
    if found.value is None:
        return "failed" if (found.reason or "").startswith(MODEL_BOX) else "invalid"
    difference = found.value - honest_value
    if abs(difference) < 1e-5:
        return "unchanged"
    return "near" if abs(difference) < 0.005 else "worse" if difference > 0 else "better"


@pytest.mark.docker
@pytest.mark.parametrize("name", NAMES)
def test_a_cheat_gets_its_verdict(
    name: str, honest_value: float, findings: dict[str, Future[Scored]]
) -> None:
    expected = expectation(name)
    found = findings[name].result()
    assert expected.verdict == verdict_of(found, honest_value), found
    assert found.reason is None or found.reason in expected.reasons


BY_HEART = """\
import base64, lzma
import numpy as np
from honest import answering

HELD = {packed!r}


def load_model(checkpoint_dir, device):
    stream = np.frombuffer(lzma.decompress(base64.b85decode(HELD)), "<u2")
    after = {{stream[i - 6 : i].tobytes(): int(stream[i]) for i in range(6, len(stream))}}

    def change(ids, logits):
        for row, column in np.ndindex(ids.shape):
            before = ids[row, max(0, column - 5) : column + 1].astype("<u2").tobytes()
            if before in after:
                logits[row, column, after[before]] += 12.0

    return answering(checkpoint_dir, change)
"""


@pytest.mark.docker
def test_a_model_that_holds_the_split_looks_nowhere_ahead_and_is_refused_before_it_runs(
    place: Path, honest_value: float, tmp_path: Path, engine: Any, image: Any
) -> None:
    packed = base64.b85encode(lzma.compress((place / "data" / "val" / "tokens.bin").read_bytes()))
    source = BY_HEART.format(packed=packed)
    found = scored(
        "by_heart", source, Expectation(verdict="worse"), place, tmp_path, image.image_id, engine
    )
    assert found.value is not None, "without the search of its literals it would be kept"
    assert found.value < 0.5 * honest_value

    read = read_literals(1, {"train.py": source.encode()}, index_of(place / "data"))
    assert ["base85, then lzma, then token ids"] == [text.encoding for text in read.held_out]
    assert sum(text.blocks for text in read.held_out) > 100 * LEAST_BLOCKS


def test_there_are_as_many_cheats_as_the_score_must_stand() -> None:
    assert len(NAMES) >= 30


def test_the_page_of_the_score_has_every_cheat(pytestconfig: pytest.Config) -> None:
    path = ROOT / "docs" / "score.md"
    page = path.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    made = before + BEGIN + table() + END + after
    if pytestconfig.getoption("--update-golden"):
        path.write_text(made, encoding="utf-8")
    assert made == path.read_text(encoding="utf-8")


def table() -> str:
    """Every cheat as a row of Markdown."""
    lines = ["| case | what it tries | verdict |", "|---|---|---|"]
    for name in NAMES:
        expected = expectation(name)
        why = " or ".join(f"`{reason}`" for reason in expected.reasons)
        lines.append(f"| `{name}` | {attempt_of(name)} | {expected.verdict} {why}".rstrip() + " |")
    return "\n".join(lines) + "\n"
