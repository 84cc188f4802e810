"""`--json` is a contract: every line of every command is one of its schema."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, cast

import jsonschema
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from agent.cli.app import app
from agent.record.chain import read_ledger
from agent.record.events import AttemptInterrupted, Dethroned, DriftChecked, RunFinished
from agent.report.activity import RunNotes
from agent.report.console import JsonConsole, json_line
from tests.support import histories
from tests.support.labs import with_observer, work
from tests.support.nights import Place
from tests.support.sessions import sampled

ROOT = Path(__file__).parents[3]
SCHEMA: dict[str, Any] = json.loads((ROOT / "docs" / "json-lines.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
NOWHERE = {"DOCKER_HOST": "unix:///nowhere/docker.sock"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("person")
    sampled(root / "runs", attempts=2)
    (root / "program.md").write_bytes((ROOT / "program.md").read_bytes())
    return root


def lines_of(place: Path, *words: str) -> list[dict[str, Any]]:
    here = Path.cwd()
    os.chdir(place)
    try:
        env = NOWHERE | {"NIGHTLAB_HOME": str(place / "home")}
        done = CliRunner().invoke(app, [*words, "--json"], env=env)
    finally:
        os.chdir(here)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for line in found:
        VALIDATOR.validate(line)
        assert ["schema", "at", "event"] == list(line)[:3]
    if done.exit_code not in (0, 1):
        assert "error" == found[-1]["event"]
        assert done.exit_code == found[-1]["exit_code"]
        assert found[-1]["hint"]
    return found


SHOWN = {
    "list": ["session"],
    "show night 1": ["attempt"],
    "report night": ["report"],
    "audit night --type human_decided": ["entry", "audited"],
    "review night --no-runs": ["review"],
    "resume night": ["nothing_to_do"],
}
REFUSED = (
    *("run", "resume nothing", "watch nothing", "report nothing", "audit nothing"),
    *("review nothing", "review night", "replay night 1", "replay nothing 1", "show night 9"),
    *("check", "gpus", "calibrate", "image show", "image list", "run --program none.md"),
)


@pytest.mark.parametrize("words", SHOWN)
def test_what_a_command_shows_is_of_the_schema(place: Path, words: str) -> None:
    assert SHOWN[words] == [line["event"] for line in lines_of(place, *words.split())]


@pytest.mark.parametrize("words", REFUSED)
def test_what_a_command_refuses_is_of_the_schema_too(place: Path, words: str) -> None:
    found = lines_of(place, *words.split())
    assert words == "gpus" or found[-1]["event"] == "error"


def test_every_command_with_json_is_driven() -> None:
    root = get_command(app)
    commands = dict(root.commands)  # type: ignore[attr-defined]
    commands |= {f"image {n}": c for n, c in commands.pop("image").commands.items()}
    with_json = {n for n, c in commands.items() if any("--json" in p.opts for p in c.params)}
    driven = {*SHOWN, *REFUSED}
    assert set() == {n for n in with_json if not any(d.startswith(n) for d in driven)}


def test_a_resume_with_nothing_to_do_writes_nothing(place: Path) -> None:
    ledger = place / "runs" / "night" / "ledger.jsonl"
    before = ledger.read_bytes()
    (told,) = lines_of(place, "resume", "night")
    assert "2 attempts are done; --attempts N allows more" in told["why"]
    assert before == ledger.read_bytes()


def test_every_event_of_a_night_is_of_the_schema_and_names_its_attempt(tmp_path: Path) -> None:
    made = histories.night(24)
    lines: list[str] = []
    console = JsonConsole(RunNotes(tmp_path, lambda: 0.0), lines.append)
    for attempt in made.history.attempts:
        started = attempt.started
        console.attempt_started(started.attempt, started.kind, started.hypothesis)
        result = histories.run_result("a", "train", log="")
        console.run_started(histories.run_started(started.attempt, 1, result), 300.0)
        console.run_finished(histories.run_finished(started.attempt, 1, result))
        console.attempt_finished(attempt)
    console.waiting("waiting for the engine \u00b7 \udcff")
    for kind, show in ((DriftChecked, console.drift_checked), (Dethroned, console.dethroned)):
        bare: dict[str, Any] = dict.fromkeys(kind.model_fields)
        made_up: Any = cast(Any, kind).model_construct(**bare)
        show(made_up)
    found = [json.loads(line) for line in lines]
    for line in found:
        VALIDATOR.validate(line)
    assert all("attempt" in line for line in found if line["event"] != "waiting")
    assert any(isinstance(e.event, AttemptInterrupted) for e in made.entries)
    assert lines == [line.encode("ascii").decode() for line in lines]


def test_a_run_is_told_as_the_attempt_s_that_it_measures(tmp_path: Path) -> None:
    """The best's own, measured again, are none of the candidate's that came last."""
    night = Place(tmp_path, changes={"session": {"attempts": 8}})
    lines: list[str] = []
    console = JsonConsole(RunNotes(tmp_path, lambda: 0.0), lines.append)
    work(with_observer(night.begin("tpe"), console), night.program)
    found = [json.loads(line) for line in lines]
    runs = [line for line in found if line["event"] == "run_finished"]
    events = [e.event for e in read_ledger(night.directory) if isinstance(e.event, RunFinished)]
    assert [(run.purpose, run.attempt, run.result.run_id) for run in events] == [
        (line["purpose"], line["attempt"], line["run_id"]) for line in runs
    ]
    last, of_others = -1, 0
    for line in found:
        if line["event"] == "attempt_started":
            last = line["attempt"]
        elif line["event"] == "run_started":
            of_others += line["attempt"] != last
    assert of_others > 0


def test_the_schema_knows_every_event_and_no_other() -> None:
    paths = [p for part in ("cli", "report") for p in (ROOT / "agent" / part).glob("*.py")]
    form = re.compile(r"(?:print_event|_say)\(\s*\"(\w+)\"")
    said = {name for path in paths for name in form.findall(path.read_text())}
    assert said | {"replay_finished"} == set(SCHEMA["properties"]["event"]["enum"])


@pytest.mark.parametrize("lacking", ["schema", "at", "event"])
def test_a_line_without_its_envelope_is_none(lacking: str) -> None:
    line = json.loads(json_line("waiting", words=""))
    VALIDATOR.validate(line)
    line.pop(lacking)
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(line)


def test_a_ledger_is_whole_after_all_that(place: Path) -> None:
    assert "human_decided" == read_ledger(place / "runs" / "night")[-1].event.type
