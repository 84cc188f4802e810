"""A program that prints its own score: what counts of its log, and that its word is called that."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from agent.morning.ablation import ablation, reviews
from agent.morning.replay import replay
from agent.morning.review import review
from agent.program import parse_program
from agent.record.chain import Follower, read_blob, read_ledger
from agent.record.events import ReplayFinished, Scored, Verdict
from agent.record.history import History, fold
from agent.record.logs import packed_log
from agent.record.reported import MISSING, NOT_A_NUMBER, NOT_FINITE, UNCERTAIN, read_reported
from agent.report.ablation_table import replay_lines, result_lines
from agent.report.console import attempt_line, closing_lines
from agent.report.report import results_tsv
from agent.report.summary import summary
from agent.report.tui import screen
from agent.researcher.answers import history_answer, run_answer
from agent.researcher.arguments import ShowHistory
from agent.researcher.prompt import brief, system_prompt
from agent.settings import Goal, ProgramError, Settings
from agent.trackers.attempts import tracked_runs
from sandbox.contract.run import Log, RunResult, RunSpec
from sandbox.engine.find import Engine
from sandbox.image.image import ImageRecord
from tests.support import sessions
from tests.support.clock import EVENING
from tests.support.command_line import CommandLine
from tests.support.labs import play
from tests.support.nights import Place
from tests.support.reports import render_html, render_markdown

ROOT = Path(__file__).parents[3]
SUMMARY = """\
step 12 | loss 3.1\rstep 13 | loss 3.0
---
val_bpb:          0.997900
training_seconds: 300.1
"""


def read(text: str, tail: str = "", omitted: int = 0, metric: str = "val_bpb") -> object:
    goal = Goal(metric=metric, source="reported")
    said = read_reported(Log(head=text, tail=tail, omitted_bytes=omitted), goal)
    return said.reason if said.value is None else said.value


# --- what counts of a log ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SUMMARY, 0.9979),
        ("val_bpb: 3\n", 3.0),
        ("  val_bpb :\t-1.5e-3 \r\n", -0.0015),
        ("val_bpb: .5\n", 0.5),
        ("val_bpb: 2\nval_bpb: 1\nloss: 7\n", 1.0),
        ("old\rval_bpb: 4\rval_bpb: 5\n", 5.0),
        ("", MISSING),
        ("val_bpb: 1", 1.0),  # whoever ends well without a newline has said all
        ("\x1b[1mval_bpb:\x1b[0m \x1b[32m1\x1b[0m\n", 1.0),
        ("val_bpb: 1,234.5\n", 1234.5),
        ("final val_bpb: 1\n", MISSING),
        ("val_bpb_ema: 1\nVAL_BPB: 1\nval_bpb = 1\n", MISSING),
        ("val_bpb: nan\n", NOT_FINITE),
        ("val_bpb: -Infinity\n", NOT_FINITE),
        ("val_bpb: 1e999\n", NOT_FINITE),
        ("val_bpb: 1\nval_bpb: nan\n", NOT_FINITE),
        ("val_bpb: 1\nval_bpb: crashed\n", NOT_A_NUMBER),
        ("val_bpb:\n", NOT_A_NUMBER),
        ("val_bpb: 1,5\n", NOT_A_NUMBER),
        ("val_bpb: 1_000\n", NOT_A_NUMBER),
        ("val_bpb: 0x10\n", NOT_A_NUMBER),
        ("val_bpb: 97%\n", NOT_A_NUMBER),
        ("val_bpb: \u0661\n", NOT_A_NUMBER),  # a digit, though not one of these ten
        ("val_bpb: 1\x1b[2K\n", MISSING),  # the terminal wiped it out
        ("val_bpb: " + "1" * 100_000 + "\n", NOT_A_NUMBER),
    ],
)
def test_the_last_complete_line_about_the_metric_decides(text: str, expected: object) -> None:
    assert expected == read(text)


def test_head_and_tail_of_a_whole_log_are_one_text() -> None:
    assert read("val_bpb: 1\nval_", "bpb: 2\n") == 2.0


def test_a_log_without_its_middle_counts_from_the_first_whole_line_of_its_end() -> None:
    assert read("val_bpb: 1\n", "xx\nval_bpb: 2\n", omitted=10) == 2.0
    assert read("val_bpb: 1\n", "val_bpb: 2\nend\n", omitted=10) == UNCERTAIN
    assert read("val_bpb: 1\n", "end\n", omitted=10) == UNCERTAIN  # a later one may be lost


def test_what_is_reported_is_bounded_and_visible() -> None:
    log = Log(head="m: \x1b[31m\x07" + "A" * 9000 + "\n", tail="", omitted_bytes=0)
    said = read_reported(log, Goal(metric="m", source="reported"))

    assert len(said.explanation) < 200
    assert "\x1b" not in said.explanation + json.dumps(said.details)


@given(before=st.text(), value=st.floats(allow_nan=False, allow_infinity=False))
def test_whatever_stands_before_the_last_line_does_not_matter(before: str, value: float) -> None:
    assert value == read(before + f"\nval_bpb: {value!r}\n")


@given(head=st.text(), tail=st.text(), omitted=st.integers(0, 5))
def test_no_log_breaks_the_reader(head: str, tail: str, omitted: int) -> None:
    log = Log(head=head, tail=tail, omitted_bytes=omitted)
    said = read_reported(log, Goal(metric="a", source="reported"))

    assert (said.value is None) != (said.reason is None)


# --- the settings -----------------------------------------------------------------------------


def minimal_program() -> str:
    """The program.md that the manual shows, word for word."""
    section = (ROOT / "docs" / "own-repository.md").read_text()
    return section.split("````markdown\n")[1].split("````")[0]


def changed_program(old: str, new: str) -> Settings:
    text = minimal_program()
    assert old in text
    return parse_program(text.replace(old, new, 1).encode(), "program.md").settings


def test_a_reported_score_needs_neither_scoring_nor_data() -> None:
    settings = changed_program("", "")

    assert (settings.scoring, settings.data) == (None, None)
    assert settings == Settings.model_validate(settings.model_dump(mode="json"), strict=False)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('source = "reported"', 'source = "scored"', "[scoring] is missing"),
        ("[session]", '[scoring]\nwall_seconds = 9\nmemory = "1g"\n[session]', "remove it"),
        ("[session]", '[data]\nsource = "shakespeare"\n[session]', "folder:PATH"),
        ('path = "."', 'path = "../other"', "plain relative path"),
        ('path = "."', 'path = "/etc"', "plain relative path"),
        ('command = ["python3", "train.py"]', "command = []", "at least 1 item"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(old: str, new: str, said: str) -> None:
    with pytest.raises(ProgramError) as caught:
        changed_program(old, new)

    assert said in caught.value.message


# --- a night without boxes --------------------------------------------------------------------


def reporting(spec: RunSpec, result: RunResult, output_dir: Path | None) -> RunResult:
    """The toy as a program that prints its distance."""
    assert spec.box == "train"
    assert "NIGHTLAB_DATA" not in spec.environment
    if not result.output:
        return result
    assert output_dir is not None
    point = json.loads((output_dir / "point.json").read_text())
    value = abs(point["x"] - 3.0) + point["noise"]
    log = Log(head=f"distance: 99\ndistance: {value!r}\n", tail="", omitted_bytes=0)
    return result.model_copy(update={"log": log})


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A night of the sampler over a program that reports, with its review and a replay."""
    place = Place(
        tmp_path_factory.mktemp("reported"),
        changes={
            "goal": {"source": "reported"},
            "scoring": None,
            "data": None,
            "session": {"attempts": 6},
        },
    )
    place.boxes.outcome = reporting
    lab = place.begin("tpe")
    with lab.ledger:
        play(lab, place.program)
        review(lab, 2, lambda _: None)
        replay(lab, 1, lambda _: None)
    return place


@pytest.fixture
def history(night: Place) -> History:
    return fold(read_ledger(night.directory))


def test_every_score_is_the_programs_word_and_judged_as_any_other(
    night: Place, history: History
) -> None:
    scores = [e.event for e in read_ledger(night.directory) if isinstance(e.event, Scored)]

    assert {("reported", "val")} == {(score.source, score.split) for score in scores}
    assert history.best is not history.baseline
    assert history.repeats
    assert not list((night.directory / "fixed").iterdir())


def test_the_audit_reads_every_log_again(night: Place) -> None:
    assert sessions.found(night.directory) == []


def test_a_forged_score_is_not_what_its_log_says(night: Place) -> None:
    def forge(lines: sessions.Lines) -> None:
        score = sessions.only(lines, "scored", attempt=0)
        score["value"] -= 0.1

    ledger = night.directory / "ledger.jsonl"
    with sessions.restored(ledger):
        sessions.forge(night.directory, forge)
        found = sessions.found(night.directory)

    assert any(what.startswith("its value is not what the record comes to: ") for what in found)


def test_a_forged_log_is_found_where_its_excerpt_was_forged_along(night: Place) -> None:
    def forge(lines: sessions.Lines) -> None:
        training = sessions.only(lines, "run_finished", attempt=0)
        log = Log(head="distance: 0.5\n", tail="", omitted_bytes=0)
        sha = _store(night.directory, packed_log(log))
        training |= {"log": sha}
        training["result"]["log"] = log.model_dump()

    with sessions.restored(night.directory / "ledger.jsonl"):
        sessions.forge(night.directory, forge)
        found = sessions.found(night.directory)

    assert any(what.endswith(", not 0.5") for what in found)


def test_a_read_only_file_that_changed_is_found(night: Place) -> None:
    def forge(lines: sessions.Lines) -> None:
        attempt = sessions.only(lines, "attempt_started", attempt=1)
        attempt["files"]["prepare.py"] = attempt["files"]["train.py"]

    with sessions.restored(night.directory / "ledger.jsonl"):
        sessions.forge(night.directory, forge)
        found = sessions.found(night.directory)

    assert any("its prepare.py is not the one that the session began with" in w for w in found)


def test_the_word_self_reported_stands_wherever_the_number_does(
    night: Place, history: History
) -> None:
    entries, settings = read_ledger(night.directory), night.program.settings
    numbers = summary(entries)
    assert history.best is not None

    def blob(sha: str) -> bytes:
        return read_blob(night.directory, sha)

    follower = Follower(night.directory)
    terminal = Console(width=100, record=True, file=io.StringIO())
    terminal.print(screen(night.directory, follower, EVENING, 100, None))
    replayed = next(e.event for e in entries if isinstance(e.event, ReplayFinished))
    tracked = next(iter(tracked_runs(entries)))
    shown = {
        "console": attempt_line(history.best, history, settings),
        "closing lines": "\n".join(closing_lines(numbers, night.directory)),
        "html": render_html(entries, blob),
        "markdown": render_markdown(entries, blob),
        "summary": numbers.model_dump_json(),
        "terminal": terminal.export_text(),
        "review": "\n".join(result_lines(ablation(reviews(entries)[-1], history))),
        "replay": "\n".join(replay_lines(replayed, is_self_reported=True)),
        "brief": brief(settings, history, blob, guidance="", hours_left=1.0),
        "system prompt": system_prompt("prose", settings),
        "run": run_answer(history.best, history, repeated=False),
        "history": history_answer(history, blob, ShowHistory(select="best")),
        "tracker": " ".join(tracked.metrics) + tracked.facts["source"],
    }

    assert [] == [
        name for name, text in shown.items() if not re.search("self.reported", text, re.IGNORECASE)
    ]
    assert "distance_self_reported" in tracked.metrics
    measured = [attempt for attempt in history.completed if attempt.values()]
    assert shown["html"].count('<span class="dim">self-reported</span>') == 1 + len(measured)
    for place in ("<h2>Best distance (self-reported)", ">distance (self-reported) (lower is"):
        assert place in shown["html"]
    rows = results_tsv(history).splitlines()[1:]
    scored = [row for row in rows if "\tnan\t" not in row]
    assert scored
    assert all("[self-reported]" in row for row in scored)


def test_no_holdout_is_claimed(night: Place, history: History) -> None:
    text = render_markdown(
        read_ledger(night.directory), lambda sha: read_blob(night.directory, sha)
    )

    assert history.best is not None
    assert history.best.values("holdout") == {}
    assert "on the holdout:" not in text


def _store(directory: Path, content: bytes) -> str:

    sha = hashlib.sha256(content).hexdigest()
    path = directory / "blobs" / sha[:2] / sha[2:]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return sha


# --- a metric in a file -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def night_of_files(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Attempts of a program that writes its metric into a file among its output."""
    goal = {"source": "reported", "file": "point.json", "key": "x", "direction": "maximize"}
    place = Place(
        tmp_path_factory.mktemp("files"),
        changes={"goal": goal, "scoring": None, "data": None, "session": {"attempts": 2}},
    )
    place.boxes.outcome = reporting
    lab = place.begin("tpe")
    with lab.ledger:
        play(lab, place.program)
    return place


def test_a_metric_in_a_file_is_on_record_with_the_file(night_of_files: Place) -> None:
    history = fold(read_ledger(night_of_files.directory))

    assert history.baseline is not None
    score = history.baseline.scores[0]
    assert score.sheet is not None
    assert score.value == json.loads(read_blob(night_of_files.directory, score.sheet))["x"]
    assert sessions.found(night_of_files.directory) == []


def test_a_file_that_no_training_left_is_found(night_of_files: Place) -> None:
    def forge(lines: sessions.Lines) -> None:
        score = sessions.only(lines, "scored", attempt=0)
        content = json.dumps({"x": 7.0}).encode()
        score |= {"sheet": _store(night_of_files.directory, content), "value": 7.0}

    with sessions.restored(night_of_files.directory / "ledger.jsonl"):
        sessions.forge(night_of_files.directory, forge)
        found = sessions.found(night_of_files.directory)

    assert any("is none that its training left" in what for what in found)


def test_a_file_that_a_training_left_and_that_was_not_read_is_found(night_of_files: Place) -> None:
    goal = Goal(metric="distance", source="reported", file="point.json", key="x")
    absent = read_reported(Log(head="", tail="", omitted_bytes=0), goal)

    def forge(lines: sessions.Lines) -> None:
        score = sessions.only(lines, "scored", attempt=0)
        score |= {"sheet": None, "value": None, "reason": absent.reason}
        score |= {"explanation": absent.explanation, "details": absent.details}

    with sessions.restored(night_of_files.directory / "ledger.jsonl"):
        sessions.forge(night_of_files.directory, forge)
        found = sessions.found(night_of_files.directory)

    assert any("is none that its training left" in what for what in found)


# --- the manual's repository, on the real engine ----------------------------------------------

TRAIN = '''\
"""Somebody's script, as autoresearch's: it measures itself and prints a summary."""

import os
import random
import time

from measure import distance

RATE = 0.2  # [0.05..0.9]
STEPS = 20  # {10, 20, 40}

random.seed(int(os.environ["NIGHTLAB_SEED"]))
for step in range(20_000):
    print(f"step {step:05d} | loss {distance(RATE):.4f}")  # more than a box keeps of a log
print("---")
print(f"val_bpb:          {distance(RATE) + random.gauss(0, 0.001):.6f}")
print(f"num_steps:        {STEPS}")
'''
MEASURE = "def distance(rate: float) -> float:\n    return 1 + abs(rate - 0.5)\n"
NO_DATA = re.compile(r"data: none; the program reports its own score")


@pytest.mark.docker
def test_a_repository_of_ones_own_runs_by_the_readmes_program(
    tmp_path: Path, engine: Engine, image: ImageRecord
) -> None:
    place = repository(tmp_path / "repo", engine)

    made = place.nightlab("setup")
    assert made.returncode == 0, made.stderr
    assert NO_DATA.search(made.stdout)
    done = place.nightlab("run", "--researcher", "tpe", "--attempts", "4", "--session", "n",
                          "--seed", "3")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "runs" not in _git(place.root, "status", "--short", "--ignored=no")
    history = place.history("n")
    assert history.session is not None
    assert {".gitignore", "train.py", "measure.py", "program.md"} == set(history.session.files)
    assert history.best is not history.baseline
    assert "self-reported" in done.stdout
    audited = place.nightlab("audit", "n")
    assert (audited.returncode, audited.stderr) == (0, "")
    assert "self-reported" in audited.stdout
    resumed = place.nightlab("resume", "n", "--attempts", "5")
    assert resumed.returncode == 0, resumed.stderr
    checked = place.nightlab("review", "n", "--repeats", "1")
    assert "val_bpb (self-reported)" in checked.stdout, checked.stderr
    again = place.nightlab("replay", "n", str(history.best.number))  # type: ignore[union-attr]
    assert "agrees" in again.stdout, again.stderr
    approved = place.nightlab("approve", "n", "--reason", "better", "--branch", "won", **ME)
    assert approved.returncode == 0, approved.stderr
    changed = _git(place.root, "diff", "--name-only", "main", "won").split()
    # The program was never committed, and lay beside what was measured.
    assert changed == ["program.md", "train.py"]


@pytest.mark.docker
def test_a_program_that_prints_no_score_is_told_so_before_the_night(
    tmp_path: Path, engine: Engine, image: ImageRecord
) -> None:
    place = repository(tmp_path / "repo", engine)
    place.rewrite("train.py", "val_bpb: ", "val_loss: ")

    done = place.nightlab("run", "--researcher", "tpe", "--session", "n")

    assert done.returncode == 1
    baseline = place.history("n").attempts[0]
    assert baseline.finished is not None
    assert (baseline.finished.verdict, baseline.finished.reason) == (Verdict.INVALID, MISSING)
    assert "a line `val_bpb: number` was not there" in done.stdout
    assert "begin anew with `nightlab run`" in done.stdout
    assert "\nlog      " in done.stdout  # what it did print
    refused = place.nightlab("resume", "n")
    assert (2, "") == (refused.returncode, refused.stdout)
    assert "the baseline of n failed" in refused.stderr


QUIET_ENOUGH = "[disturbance]\nmax_other_cores = 64\nmin_speed = 0\nmax_repeats = 0\n\n[session]"
"""Other tests run on this machine, too: that must not cost repeats."""
ME = {
    "GIT_CONFIG_COUNT": "2",
    "GIT_CONFIG_KEY_0": "user.name",
    "GIT_CONFIG_VALUE_0": "Ada Person",
    "GIT_CONFIG_KEY_1": "user.email",
    "GIT_CONFIG_VALUE_1": "ada@example.org",
}


def repository(root: Path, engine: Engine) -> CommandLine:
    """Somebody's repository, with the manual's program.md put in."""
    root.mkdir()
    (root / "train.py").write_text(TRAIN)
    (root / "measure.py").write_text(MEASURE)
    (root / ".gitignore").write_text("data/\n")
    (root / "data").mkdir()
    (root / "data" / "large.bin").write_bytes(bytes(20 * 2**20))
    _git(root, "init", "-q", "-b", "main")
    _git(root, "add", ".")
    _git(root, "commit", "-q", "-m", "mine")
    (root / "program.md").write_text(minimal_program().replace("[session]", QUIET_ENOUGH))
    return CommandLine(root, engine)


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *arguments],
        env=os.environ | ME,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
