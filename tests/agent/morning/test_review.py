"""The morning after, on the real engine: review, replay, approve, reject."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.candidate.diffs import patch
from agent.morning.ablation import Effect, ReviewTable, ablation, reviews
from agent.record.chain import read_ledger
from agent.record.events import (
    ATTEMPT,
    HumanDecided,
    ReplayFinished,
    ReviewFinished,
    ReviewStarted,
    RunFinished,
    VariantMeasured,
)
from agent.record.history import History, fold
from sandbox.engine.find import Engine
from sandbox.image.image import ImageRecord
from tests.support.command_line import CommandLine, wait_for
from tests.support.messages_server import Block, MessagesServer, Turn, say, tool
from tests.support.nights import TOY

pytestmark = [pytest.mark.docker]

SEED = 5
CHANCE = random.Random(SEED)
NIGHT_SEEDS = [
    *random.Random(SEED).sample(range(1, 2**31), 8),
    *(CHANCE.randrange(2**31 - 1) + 1 for _ in range(64)),
]
"""All seeds of a night whose fresh ones are foretold, which no program in a real night can know."""
FORETOLD = f"""
import random
import agent.attempt.lab, agent.cli.app
class Foretold:
    randbelow = staticmethod(random.Random({SEED}).randrange)
agent.attempt.lab.secrets = Foretold
agent.cli.app.main()
"""
GUARD = 'if __name__ == "__main__":'
REAL = ("X = 1.0", "X = 3.0", "nearer in X")
LUCKY = (
    "    point = {",
    f'    noise -= 0.1 * (int(os.environ["NIGHTLAB_SEED"]) in {NIGHT_SEEDS})\n    point = {{',
    "looks better, but only at the seeds of the night",
)
BROKEN = (GUARD, f"{GUARD}\n    raise SystemExit(5)", "this one fails")
ME = {
    "GIT_CONFIG_COUNT": "2",
    "GIT_CONFIG_KEY_0": "user.name",
    "GIT_CONFIG_VALUE_0": "Ada Person",
    "GIT_CONFIG_KEY_1": "user.email",
    "GIT_CONFIG_VALUE_1": "ada@example.org",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
}
NOBODY = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null"}

Change = tuple[str, str, str]


def night_of(place: CommandLine, name: str, *changes: Change) -> None:
    """A session whose researcher makes exactly these changes."""
    with MessagesServer([*(_turn(*change) for change in changes), _finish()]) as server:
        words = ["run", "--researcher", "claude", "--session", name, "--seed", str(SEED)]
        done = subprocess.run(
            [sys.executable, "-P", "-c", FORETOLD, *words],
            cwd=place.root,
            env=place.environ | {"ANTHROPIC_API_KEY": "k", "ANTHROPIC_BASE_URL": server.url},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    assert done.returncode == 0, done.stderr


def _turn(old: str, new: str, hypothesis: str) -> Turn:
    edit: Block = tool("edit", file_path="train.py", old_string=old, new_string=new)
    return say(edit, tool("run", hypothesis=hypothesis))


def _finish() -> Turn:
    return say(tool("finish", reason="enough"))


def new_place(root: Path, engine: Engine) -> CommandLine:
    shutil.copytree(TOY, root, ignore=shutil.ignore_patterns("__pycache__"))
    place = CommandLine(root, engine)
    assert place.nightlab("setup").returncode == 0
    return place


@pytest.fixture(scope="module")
def reviewed(
    tmp_path_factory: pytest.TempPathFactory, engine: Engine, image: ImageRecord
) -> tuple[CommandLine, History]:
    """A night with one real change, one lucky one and one failure; and its review."""
    place = new_place(tmp_path_factory.mktemp("reviewed") / "place", engine)
    night_of(place, "night", REAL, LUCKY, BROKEN)
    before = place.history("night")
    done = place.nightlab("review", "night")
    assert done.returncode == 0, done.stderr
    assert "luck" in done.stdout
    return place, before


@pytest.fixture
def morning(reviewed: tuple[CommandLine, History], tmp_path: Path) -> CommandLine:
    """A copy of the reviewed night that a test may change."""
    place, _ = reviewed
    shutil.copytree(place.root, tmp_path / "morning")
    return CommandLine(tmp_path / "morning", place.engine)


@pytest.fixture
def place(tmp_path: Path, engine: Engine, image: ImageRecord) -> CommandLine:
    return new_place(tmp_path / "place", engine)


def table_of(place: CommandLine, name: str = "night") -> ReviewTable:
    entries = read_ledger(place.session(name))
    return ablation(reviews(entries)[-1], fold(entries))


def repository(place: CommandLine) -> Callable[..., str]:
    """The person's own repository around the program directory."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=place.root,
            env=place.environ | ME,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    git("init", "-q", "-b", "main")
    git("add", "workspace", "program.md")
    git("commit", "-q", "-m", "mine")
    return git


def test_the_real_change_is_real_and_the_lucky_one_is_luck(
    reviewed: tuple[CommandLine, History],
) -> None:
    table = table_of(reviewed[0])

    assert [(1, Effect.REAL, "left_out"), (2, Effect.LUCK, "left_out")] == [
        (change.attempt, change.effect, change.how) for change in table.changes
    ]
    real, lucky = (change.arithmetic for change in table.changes)
    assert real is not None
    assert lucky is not None
    assert real.gain == pytest.approx(8**0.5 - 2, abs=0.01)
    assert lucky.gain == pytest.approx(0, abs=1e-9)
    assert table.changes[1].gain_then == pytest.approx(0.1, abs=0.01)


def test_the_smaller_equal_model_is_the_best_without_luck(
    reviewed: tuple[CommandLine, History],
) -> None:
    table = table_of(reviewed[0])

    assert table.smaller is not None
    assert ((2,), True) == (table.smaller.left_out, table.smaller.is_equal)


def test_best_and_baseline_are_measured_on_holdout_too(
    reviewed: tuple[CommandLine, History],
) -> None:
    table = table_of(reviewed[0])

    assert table.holdout_gain == pytest.approx(8**0.5 - 2, abs=0.01)


def test_seeds_of_a_review_were_never_used_before(reviewed: tuple[CommandLine, History]) -> None:
    table = table_of(reviewed[0])

    assert len(set(table.seeds)) == 2
    assert not set(table.seeds) & set(NIGHT_SEEDS)


def test_every_variant_is_measured_once_at_each_seed_and_every_run_is_on_record(
    reviewed: tuple[CommandLine, History],
) -> None:
    place, _ = reviewed
    measured = place.events("night", VariantMeasured)
    runs = [e for e in place.events("night", RunFinished) if e.purpose.startswith("review-")]

    assert ["baseline", "best", "without-1", "without-2"] * 2 == [m.variant for m in measured]
    assert 8 == sum(run.result.box == "train" for run in runs)
    assert 12 == sum(run.result.box == "scorer" for run in runs)
    assert not (place.session("night") / "review").exists()
    assert place.containers("night") == []


def of_the_night(history: History) -> History:
    """The history but for trials beside the night, which a review adds."""
    trials = {key: trial for key, trial in history.trials.items() if key.purpose == ATTEMPT}
    return replace(history, trials=trials)


def test_a_review_changes_neither_the_night_nor_its_hours(
    reviewed: tuple[CommandLine, History],
) -> None:
    place, before = reviewed

    assert of_the_night(before) == of_the_night(place.history("night"))


def test_a_reviewed_session_goes_on_where_it_was(morning: CommandLine) -> None:
    better = ("Y = 4", "Y = 16", "nearer in Y")
    with MessagesServer([_turn(*better)]) as server:
        done = morning.nightlab(
            "resume", "night", ANTHROPIC_API_KEY="k", ANTHROPIC_BASE_URL=server.url
        )

    assert done.returncode == 0, done.stderr
    history = morning.history("night")
    assert history.best is not None
    assert (5, 4) == (len(history.attempts), history.best.number)
    assert history.best.started.parent == 2


def test_the_last_review_is_shown_without_runs(morning: CommandLine) -> None:
    before = len(read_ledger(morning.session("night")))

    done = morning.nightlab("review", "night", "--no-runs", "--json")

    shown = json.loads(done.stdout)
    assert [Effect.REAL, Effect.LUCK] == [change["effect"] for change in shown["changes"]]
    assert before == len(read_ledger(morning.session("night")))


def test_the_report_tells_what_each_change_is_worth(morning: CommandLine) -> None:
    report = (morning.session("night") / "report.html").read_text()

    assert "What each kept change is worth" in report
    assert "luck: not beyond noise" in report


def test_a_review_that_was_stopped_goes_on_with_what_it_has(place: CommandLine) -> None:
    night_of(place, "cut", REAL)
    running = place.start("review", "cut", "--repeats", "3")
    wait_for(lambda: bool(place.events("cut", VariantMeasured)))
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    before = place.events("cut", VariantMeasured)

    done = place.nightlab("review", "cut")

    assert 130 == running.returncode
    assert "nightlab review cut" in said
    assert place.containers("cut") == []
    assert done.returncode == 0, done.stderr
    measured = place.events("cut", VariantMeasured)
    assert before == measured[: len(before)]
    assert 1 <= len(before) < 6 == len({(m.variant, m.seed) for m in measured}) == len(measured)
    assert 1 == len(place.events("cut", ReviewStarted)) == len(place.events("cut", ReviewFinished))


@pytest.mark.parametrize("attempt", [0, 2, 3])
def test_a_replay_gives_the_same_score_or_the_same_failure(
    morning: CommandLine, attempt: int
) -> None:
    done = morning.nightlab("replay", "night", str(attempt))

    assert done.returncode == 0, done.stderr
    replayed: ReplayFinished = morning.events("night", ReplayFinished)[0]
    assert replayed.agrees
    assert replayed.recorded_outcome == replayed.outcome
    assert [s.recorded for s in replayed.scores] == [s.today for s in replayed.scores]


def test_a_replay_of_nothing_names_what_there_is(morning: CommandLine) -> None:
    done = morning.nightlab("replay", "night", "99")

    assert done.returncode == 2
    assert "0 to 3" in done.stderr


def test_an_approval_is_a_patch_that_applies_and_the_files(morning: CommandLine) -> None:
    git = repository(morning)

    done = morning.nightlab("approve", "night", "--reason", "holds on holdout", **ME)

    assert done.returncode == 0, done.stderr
    approved = morning.session("night") / "approved"
    git("apply", str(approved / "nightlab.patch"))
    taken = (morning.root / "workspace" / "train.py").read_bytes()
    assert (approved / "workspace" / "train.py").read_bytes() == taken
    assert b"X = 3.0" in taken
    event: HumanDecided = morning.events("night", HumanDecided)[0]
    assert ("approve", "holds on holdout", "Ada Person", "ada@example.org", "best") == (
        event.decision, event.reason, event.person, event.email, event.variant,
    )  # fmt: skip
    assert "Ada Person" in (morning.session("night") / "report.html").read_text()


def test_the_smaller_model_can_be_approved(morning: CommandLine) -> None:
    done = morning.nightlab("approve", "night", "--reason", "no luck", "--smaller", **ME)

    assert done.returncode == 0, done.stderr
    train = (morning.session("night") / "approved" / "workspace" / "train.py").read_text()
    assert "X = 3.0" in train
    assert str(NIGHT_SEEDS[0]) not in train


def test_a_branch_is_made_without_work_tree_index_hooks_or_helpers(morning: CommandLine) -> None:
    git = repository(morning)
    marker = morning.root / "executed"
    for hook in ("post-commit", "reference-transaction", "post-index-change", "pre-commit"):
        path = morning.root / ".git" / "hooks" / hook
        path.write_text(f"#!/bin/sh\ntouch {marker}\n")
        path.chmod(0o755)
    git("config", "core.hooksPath", str(morning.root / ".git" / "hooks"))
    git("config", "core.fsmonitor", f"touch {marker}")
    (morning.root / "workspace" / "train.py").write_text("# not committed\n")
    index = (morning.root / ".git" / "index").read_bytes()

    done = morning.nightlab("approve", "night", "--reason", "good", "--branch", "night-1", **ME)

    assert done.returncode == 0, done.stderr
    assert not marker.exists()
    assert index == (morning.root / ".git" / "index").read_bytes()
    assert (morning.root / "workspace" / "train.py").read_text() == "# not committed\n"
    shutil.rmtree(morning.root / ".git" / "hooks")
    git("config", "--unset", "core.fsmonitor")
    assert "X = 3.0" in git("show", "night-1:workspace/train.py")
    assert ["workspace/train.py"] == git("diff", "--name-only", "main", "night-1").split()
    assert "Ada Person <ada@example.org>" in git("log", "-1", "--format=%an <%ae>", "night-1")
    assert morning.events("night", HumanDecided)[0].commit == git("rev-parse", "night-1").strip()


def test_a_branch_keeps_what_the_person_committed_meanwhile(morning: CommandLine) -> None:
    git = repository(morning)
    morning.rewrite("workspace/train.py", '"""Leaves a point', '"""Always leaves a point')
    git("commit", "-qam", "words")

    morning.nightlab("approve", "night", "--reason", "good", "--branch", "night-1", **ME)

    merged = git("show", "night-1:workspace/train.py")
    assert '"""Always leaves' in merged
    assert "X = 3.0" in merged


@pytest.mark.parametrize("there", ["conflict", "exists", "inside"])
def test_a_branch_that_cannot_be_made_decides_nothing(morning: CommandLine, there: str) -> None:
    git = repository(morning)
    where = morning.session("night") / "workspace" if there == "inside" else morning.root
    if there == "exists":
        git("branch", "night-1")
    if there == "conflict":
        morning.rewrite("workspace/train.py", "X = 1.0", "X = 1.5")
        git("commit", "-qam", "mine")

    done = morning.nightlab(
        "approve", "night", "--reason", "good", "--branch", "night-1", "--repo", str(where), **ME
    )

    assert done.returncode == 2
    assert morning.events("night", HumanDecided) == []


def test_a_rejection_is_recorded_and_exports_nothing(morning: CommandLine) -> None:
    done = morning.nightlab("reject", "night", "--reason", "it is luck", **ME)

    assert done.returncode == 0, done.stderr
    event = morning.events("night", HumanDecided)[0]
    assert ("reject", "it is luck", None) == (event.decision, event.reason, event.patch)
    assert not (morning.session("night") / "approved").exists()


def test_without_a_git_identity_nothing_is_decided(morning: CommandLine) -> None:
    done = morning.nightlab("approve", "night", "--reason", "good", **NOBODY)

    assert done.returncode == 2
    assert "git config --global user.name" in done.stderr
    assert morning.events("night", HumanDecided) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"a.py": b"1\n2\n"}, {"a.py": b"1\n3\n"}),
        ({"a.py": b"1\n2"}, {"a.py": b"1\n2\n"}),
        ({"a.py": b"1\n"}, {"a.py": b"1\n2"}),
        ({"a.py": b"x\x0cy\n2\n"}, {"a.py": b"x\x0cz\n2\n"}),
        ({"a.py": b"1\r\n2\n"}, {"a.py": b"1\r\n3\n"}),
        ({"a.py": b"\xff1\n"}, {"a.py": b"\xff2\n"}),
        ({}, {"sub/new file.py": b"new\n"}),
        ({"a.py": b"gone\n", "b.py": b"1\n"}, {"b.py": b"1\n"}),
    ],
)
def test_a_patch_turns_old_files_into_new_ones(
    tmp_path: Path, old: dict[str, bytes], new: dict[str, bytes]
) -> None:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    for name, content in old.items():
        (workspace / name).write_bytes(content)

    _apply(tmp_path, patch(old, new))

    found: dict[str, Any] = {
        str(path.relative_to(workspace)): path.read_bytes()
        for path in workspace.rglob("*")
        if path.is_file()
    }
    assert new == found


def _apply(place: Path, text: bytes) -> None:
    environ = {"GIT_CEILING_DIRECTORIES": str(place.parent), "PATH": "/usr/bin:/bin"}
    subprocess.run(
        ["git", "apply", "--whitespace=nowarn"], cwd=place, input=text, env=environ, check=True
    )
