"""A reporting program runs in a copy, finds its data where it looks, keeps what is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent.attempt.boxes import COPY, HOME, IN_A_COPY, WORKSPACE, training_command
from agent.attempt.lab import DATA, snapshot
from agent.candidate.own_files import folder_facts, refuse_unreadable
from agent.program import parse_program
from agent.record.reported import TIME_IS_OVER
from agent.settings import RESERVED_PLACES, Settings
from sandbox.box.hardening import RESERVED_TARGETS
from sandbox.contract.errors import UsageError
from sandbox.engine.find import Engine
from sandbox.image.image import ImageRecord
from tests.support.command_line import CommandLine

MANUAL = Path(__file__).parents[3] / "docs" / "own-repository.md"


def settings_with(**tables: Any) -> Settings:
    """The manual's program with tables changed."""
    text = MANUAL.read_text().split("````markdown\n")[1].split("````")[0]
    made = parse_program(text.encode(), "program.md").settings.model_dump(mode="json")
    for name, table in tables.items():
        made[name] = made[name] | table if isinstance(made[name], dict) else table
    return Settings.model_validate(made)


def launched(
    place: Path,
    code: str,
    *,
    keep: tuple[str, ...] = (),
    links: Any = (),
    report: str = "",
    cut: tuple[float, ...] = (),
) -> Any:
    """A program in a copy, as a box starts it, with places of this test."""
    (place / "snapshot").mkdir(exist_ok=True)
    (place / "snapshot" / "train.py").write_text(code)
    (place / "out").mkdir(exist_ok=True)
    copy = place / "copy"
    shown = [(str(there), str(copy / here)) for there, here in links]
    asked = [f"{place}/snapshot", str(copy), f"{place}/out", list(keep), shown, report, *cut]
    command = [sys.executable, "-I", "-S", "-c", IN_A_COPY, json.dumps(asked), sys.executable]
    command += ["-u", "train.py"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_it_writes_beside_itself_stays_in_the_copy_but_what_is_kept(tmp_path: Path) -> None:
    code = """
import os, pathlib
pathlib.Path("out/deep").mkdir(parents=True)
pathlib.Path("out/deep/model.pt").write_text("weights")
pathlib.Path("log.txt").write_text("noise")
"""
    done = launched(tmp_path, code, keep=("out/**/*.pt",))

    assert done.returncode == 0, done.stderr
    assert [p.name for p in (tmp_path / "snapshot").iterdir()] == ["train.py"]
    kept = [str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")]
    assert kept == ["out/deep/model.pt"]


def test_data_lies_where_the_program_looks_also_beside_files_of_its_own(tmp_path: Path) -> None:
    tracked, data = tmp_path / "snapshot" / "data" / "set", tmp_path / "theirs"
    tracked.mkdir(parents=True)
    (tracked / "prepare.py").write_text("mine")
    data.mkdir()
    (data / "train.bin").write_text("tokens")
    (data / "prepare.py").write_text("theirs")
    code = "import pathlib, sys; p = pathlib.Path('data/set')\n"
    code += "print((p / 'train.bin').read_text(), (p / 'prepare.py').read_text())"

    done = launched(tmp_path, code, links=[(data, "data/set")])

    assert done.stdout.split() == ["tokens", "mine"], done.stderr


@pytest.mark.parametrize("where", ["snapshot/results", "theirs", "theirs beside"])
def test_a_metric_file_that_was_there_before_is_no_score(tmp_path: Path, where: str) -> None:
    place, links = tmp_path / where.split()[0], [(tmp_path / "theirs", "results")]
    place.mkdir(parents=True)
    (place / "metrics.json").write_text('{"loss": 0}')
    if "beside" in where:
        (tmp_path / "snapshot" / "results").mkdir(parents=True)
    told: dict[str, Any] = {"keep": ("results/metrics.json",), "report": "results/metrics.json"}
    told["links"] = [] if "snapshot" in where else links

    done = launched(tmp_path, "pass", **told)

    assert (0, []) == (done.returncode, list((tmp_path / "out").iterdir())), done.stderr
    if "theirs" != where:  # the program may write there
        (tmp_path / "copy").rename(tmp_path / "done")
        launched(tmp_path, "open('results/metrics.json', 'w').write('{}')", **told)
        assert (tmp_path / "out" / "results" / "metrics.json").read_text() == "{}"


def test_the_file_of_the_goal_is_what_goes_first() -> None:
    settings = settings_with(goal={"file": "results/metrics.json", "key": "loss"})

    assert (
        "results/metrics.json" == json.loads(training_command(settings, 1, settings.budget)[5])[5]
    )


@pytest.mark.parametrize(
    ("code", "expected"),
    [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 11)", -11)],
)
def test_it_ends_as_the_program_ends(tmp_path: Path, code: str, expected: int) -> None:
    assert launched(tmp_path, code).returncode == expected


ENDLESS = """
import itertools, pathlib, signal, subprocess, time
HEEDS
pathlib.Path("model.pt").write_text("weights")
subprocess.Popen(["sleep", "60"])
for step in itertools.count():
    try:
        print("step", step, "loss", 1 / (1 + step), flush=True)
        time.sleep(0.01)
    except KeyboardInterrupt:
        print("last test loss 7.0")
        raise
"""


@pytest.mark.parametrize("heeds", ["", "signal.signal(signal.SIGINT, signal.SIG_IGN)"])
def test_a_program_without_an_end_is_cut_and_its_last_word_counts(
    tmp_path: Path, heeds: str
) -> None:
    code = ENDLESS.replace("HEEDS", heeds)

    done = launched(tmp_path, code, keep=("*.pt",), cut=(1.0, 1.0))

    assert done.returncode == 0
    assert TIME_IS_OVER in done.stderr
    assert ("last test loss 7.0" in done.stdout) is (not heeds)
    assert "loss 0." in done.stdout
    assert (tmp_path / "out" / "model.pt").read_text() == "weights"


def test_only_a_budget_of_the_kind_cut_cuts_and_only_what_scores_itself() -> None:
    wall, cut = settings_with(), settings_with(budget={"kind": "cut", "seconds": 30})

    assert len(json.loads(training_command(wall, 1, wall.budget)[5])) == 6
    assert json.loads(training_command(cut, 1, cut.budget)[5])[6:] == [30, 10]
    with pytest.raises(ValueError, match='which is for source = "reported"'):
        settings_with(
            budget={"kind": "cut"},
            goal={"source": "scored"},
            scoring={"wall_seconds": 60, "memory": "2g"},
        )


def test_seed_budget_output_and_data_stand_where_the_command_names_them() -> None:
    words = ["python3", "t.py", "--seed={seed}", "{budget}", "{output}/x", "{data}", "{other}{}"]
    settings = settings_with(
        workspace={"command": words}, data={"folders": [{"from": "/d", "at": "data"}]}
    )

    command = training_command(settings, 7, settings.budget)

    assert command[6:] == ("python3", "t.py", "--seed=7", "60", "/out/x", "/data/0", "{other}{}")
    links = json.loads(command[5])[4]
    assert links == [["/data/0", f"{COPY}/data"]]


def test_a_place_below_home_or_from_the_root_is_where_it_is_named() -> None:
    folders = [{"from": "/a", "at": "~/.cache/x"}, {"from": "/b", "at": "/sets/b"}, {"from": "/c"}]
    settings = settings_with(data={"folders": folders})

    links = json.loads(training_command(settings, 1, settings.budget)[5])[4]

    assert links == [["/data/0", f"{HOME}/.cache/x"]]


def test_several_tables_of_data_are_read_and_a_place_cannot_lead_out() -> None:
    text = MANUAL.read_text().split("````markdown\n")[1].split("````")[0]
    several = '[[data]]\nfrom = "/a"\nat = "data"\n[[data]]\nfrom = "/b"\n[session]'

    settings = parse_program(text.replace("[session]", several).encode(), "p").settings

    assert [(folder.source, folder.at) for folder in settings.folders] == [
        ("/a", "data"),
        ("/b", ""),
    ]
    with pytest.raises(ValueError, match="name the place itself"):
        settings_with(data={"folders": [{"from": "/a", "at": "../x"}]})


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        ([("/a", "one"), ("/a", "two")], "shows /a twice"),
        ([("/a", ""), ("/a", "")], "shows /a twice"),
        ([("/a", "data"), ("/b", "data/extra")], "none may lie in another"),
        ([("/a", "data/extra"), ("/b", "./data/")], "none may lie in another"),
        ([("/a", "data"), ("/b", "~/workspace//data")], "none may lie in another"),
        ([("/a", "."), ("/b", "data")], "none may lie in another"),
        ([("/a", "/sets/x"), ("/b", "/sets")], "none may lie in another"),
        ([("/a", "/etc/x")], "the box's own /etc"),
        ([("/a", "/workspace/d")], "the box's own /workspace"),
        ([("/a", "//data/1")], "the box's own /data"),
        ([("/a", "/")], "the box's own /"),
        ([("/a", "~/")], "whole home"),
    ],
)
def test_places_of_data_that_would_cover_one_another_or_the_box_are_refused(
    folders: list[tuple[str, str]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        settings_with(data={"folders": [{"from": path, "at": at} for path, at in folders]})


def test_places_side_by_side_are_taken_in_one_spelling() -> None:
    places = {"data/a/": "data/a", "./data/ab": "data/ab", "~/.x//y": "~/.x/y", "/s/z": "/s/z"}
    folders = [{"from": f"/{number}", "at": at} for number, at in enumerate(places)]

    settings = settings_with(data={"folders": folders})

    assert [folder.at for folder in settings.folders] == list(places.values())


def test_folders_are_refused_where_they_would_not_be_seen() -> None:
    bounds = {"wall_seconds": 60, "memory": "2g"}
    with pytest.raises(ValueError, match='only source = "reported"'):
        settings_with(goal={"source": "scored"}, scoring=bounds, data={"folders": [{"from": "/a"}]})


def test_what_the_sandbox_keeps_for_itself_is_refused_before_it_is_asked() -> None:
    assert {f"/{name}" for name in RESERVED_PLACES} >= {*RESERVED_TARGETS, WORKSPACE, DATA}


def test_data_that_a_box_could_not_read_is_refused_and_facts_tell_one_set_from_another(
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    (data / "sub" / "a").write_text("1")
    before = folder_facts({data: "data"})
    refuse_unreadable(data)
    (data / "sub" / "a").write_text("2")

    assert before["manifest_sha256"] != folder_facts({data: "data"})["manifest_sha256"]
    (data / "sub").chmod(0o700)
    with pytest.raises(UsageError) as caught:
        refuse_unreadable(data)
    assert "chmod -R o+rX" in caught.value.hint
    with pytest.raises(UsageError, match="is not there"):
        refuse_unreadable(tmp_path / "gone")


TRAIN = """\
import json, os, pathlib, random, sys

random.seed(int(sys.argv[1]))
rate = 0.3
target = float(pathlib.Path("data/target.txt").read_text())
cached = float(pathlib.Path("~/.cache/shift/value").expanduser().read_text())
pathlib.Path("results").mkdir()
pathlib.Path("results/weights.pt").write_bytes(b"w")
loss = abs(rate - target) + cached + random.gauss(0, 0.01)
pathlib.Path("results/metrics.json").write_text(json.dumps({"eval": {"loss": loss}}))
"""
SETTINGS = """
[goal]
metric = "loss"
source = "reported"
file = "results/metrics.json"
key = "eval/loss"

[workspace]
path = "."
command = ["python3", "train.py", "{seed}"]
editable = ["train.py"]
keep = ["results/*.pt"]

[[data]]
from = "DATA"
at = "data"

[[data]]
from = "CACHE"
at = "~/.cache/shift"
"""


@pytest.mark.docker
def test_a_program_that_writes_beside_itself_gets_its_baseline_in_a_real_box(
    tmp_path: Path, engine: Engine, image: ImageRecord
) -> None:
    root = tmp_path / "repo"
    for folder, name, text in (("sets", "target.txt", "0.5"), ("cache", "value", "1")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    root.mkdir()
    (root / "train.py").write_text(TRAIN)
    rest = MANUAL.read_text().split("[budget]")[1].split("```")[0]
    quiet = "[disturbance]\nmax_other_cores = 64\nmin_speed = 0\nmax_repeats = 0\n\n"
    own = SETTINGS.replace("DATA", f"{tmp_path}/sets").replace("CACHE", f"{tmp_path}/cache")
    text = f"Lower the loss.\n\n```toml\n{own}\n[budget]{rest}\n{quiet}```\n"
    (root / "program.md").write_text(text)
    place = CommandLine(root, engine)

    made = place.nightlab("setup")
    assert "can lock (`flock`)" in made.stdout, made.stderr
    done = place.nightlab("run", "--researcher", "tpe", "--attempts", "1", "--session", "n")

    history = place.history("n")
    assert history.baseline is not None, done.stdout + done.stderr
    value = history.baseline.finished.value if history.baseline.finished else None
    assert value == pytest.approx(1.2, abs=0.05)
    assert history.repeats.noise() is not None
    left = {file.name for file in history.baseline.runs[0].result.output}
    assert left == {"results/metrics.json", "results/weights.pt"}
    audited = place.nightlab("audit", "n")
    assert (audited.returncode, audited.stderr) == (0, "")


def test_a_script_that_names_its_interpreter_can_be_started(tmp_path: Path) -> None:
    files = {"run.sh": b"#!/bin/sh\nexit 0\n", "train.py": b"import torch\n"}
    with snapshot(tmp_path / "files", files) as place:
        modes = {path.name: path.stat().st_mode & 0o777 for path in place.iterdir()}
    assert {"run.sh": 0o755, "train.py": 0o644} == modes
