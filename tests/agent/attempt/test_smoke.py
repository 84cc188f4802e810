"""A short training first: what it catches, what it lets pass, what it costs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent.attempt.experiment import run_attempt
from agent.attempt.lab import Lab, hashes_of
from agent.attempt.smoke import is_due, run_smoke
from agent.candidate.knobs import without_knobs
from agent.morning.audit import audit
from agent.morning.replay import replay
from agent.night.waiting import run_with_retries, with_retries
from agent.record.chain import read_ledger
from agent.record.events import (
    ATTEMPT,
    AttemptFinished,
    AttemptStarted,
    RunFinished,
    RunStarted,
    SmokeFinished,
    SmokeStarted,
    Verdict,
)
from agent.report.tables import time_spent
from agent.settings import Budget
from sandbox.contract.errors import SandboxError, UsageError
from sandbox.contract.run import Outcome, RunResult, RunSpec
from sandbox.engine.find import Engine
from sandbox.image.image import ImageRecord
from tests.support.clock import Clock
from tests.support.command_line import CommandLine
from tests.support.executors import FakeExecutor
from tests.support.labs import with_executor, with_settings
from tests.support.messages_server import MessagesServer, say, tool
from tests.support.nights import TOY, Place
from tests.support.sessions import Lines, forge, found, only

TRAIN = (TOY / "workspace" / "train.py").read_text()


def rewritten(lab: Lab, line: str) -> dict[str, bytes]:
    """The best's files with one more line at the end."""
    source = lab.workspace.read_text("train.py")
    lab.workspace.write("train.py", f"{source}{line}\n".encode())
    return lab.workspace.candidate()


def a_lab(root: Path, **economy: Any) -> Lab:
    """A session whose baseline is measured."""
    place = Place(root, changes={"economy": economy})
    lab = place.begin("claude")
    run_attempt(lab, "baseline", "as it is", "nightlab")
    return lab


# --- when it is worth its time ---


@pytest.mark.parametrize(
    ("economy", "budget_seconds", "line", "due"),
    [
        ({}, 200, "# new code", True),
        ({}, 60, "# new code", False),
        ({"smoke": "always"}, 60, "# new code", True),
        ({"smoke": "off"}, 200, "# new code", False),
        ({"smoke_seconds": 3}, 60, "# new code", True),
        ({"smoke_seconds": 3}, 59, "# new code", False),
    ],
)
def test_new_code_is_smoked_where_that_costs_a_twentieth_of_the_budget_at_most(
    tmp_path: Path, economy: dict[str, Any], budget_seconds: float, line: str, due: bool
) -> None:
    with (lab := a_lab(tmp_path, **economy)).ledger:
        files = rewritten(lab, line)
        budget = lab.settings.budget.model_copy(update={"seconds": budget_seconds})
        lab = with_settings(lab, lab.settings.model_copy(update={"budget": budget}))
        assert due == is_due(lab, files)


@pytest.mark.parametrize(("kind", "due"), [("auto", False), ("always", True)])
def test_turned_knobs_alone_are_not_new_code(tmp_path: Path, kind: str, due: bool) -> None:
    with (lab := a_lab(tmp_path, smoke=kind)).ledger:
        text = lab.workspace.read_text("train.py").replace("X = 1.0", "X = 2.5")
        lab.workspace.write("train.py", text.encode())
        assert due == is_due(lab, lab.workspace.candidate())


def test_files_without_their_knobs_are_equal_exactly_when_only_knobs_differ() -> None:
    turned = TRAIN.replace("X = 1.0", "X = 3.25").replace("Y = 4", "Y = 16").encode()
    assert without_knobs("train.py", TRAIN.encode()) == without_knobs("train.py", turned)
    for other in (TRAIN + "#", TRAIN.replace("PAUSE_SECONDS = 0.0", "PAUSE_SECONDS = 9.0")):
        assert without_knobs("train.py", TRAIN.encode()) != without_knobs(
            "train.py", other.encode()
        )


def test_what_passed_once_is_not_smoked_again(tmp_path: Path) -> None:
    with (lab := a_lab(tmp_path)).ledger:
        files = rewritten(lab, "# new code")
        assert is_due(lab, files)
        assert run_smoke(lab, files, asked_by="researcher", attempt=1).finished is not None
        assert not is_due(lab, files)
        run_attempt(lab, "candidate", "new code", "claude")
        smokes = [e.event for e in lab.ledger.entries if isinstance(e.event, SmokeStarted)]
        assert ["nightlab", "researcher"] == [event.asked_by for event in smokes]
    assert [] == found(lab.worker.directory)


def test_a_smoke_run_gets_its_part_of_the_budget_whatever_that_counts(tmp_path: Path) -> None:
    settings = Place(tmp_path).program.settings
    tokens = Budget(kind="tokens", seconds=100, tokens=1000, grace_seconds=10)
    wall = settings.smoke_budget()
    assert ("wall", 5.0, None) == (wall.kind, wall.seconds, wall.tokens)
    counted = settings.model_copy(update={"budget": tokens}).smoke_budget()
    assert ("tokens", 5.0, 50) == (counted.kind, counted.seconds, counted.tokens)
    assert 10.0 == settings.train_limits(is_smoke=True).wall_seconds


# --- what becomes of it ---


def test_a_failed_smoke_run_fails_the_attempt_before_its_budget_is_spent(tmp_path: Path) -> None:
    with (lab := a_lab(tmp_path)).ledger:
        rewritten(lab, "X = 4.9")
        attempt = run_attempt(lab, "candidate", "too far", "claude")
    finished = attempt.finished
    assert finished is not None
    assert (Verdict.FAILED, "out_of_memory") == (finished.verdict, finished.reason)
    assert finished.explanation.startswith("in a smoke run of 5 s: the training: out_of_memory")
    assert [] == attempt.runs
    assert [Outcome.OUT_OF_MEMORY] == [run.result.outcome for run in attempt.telling_runs]
    assert [] == found(lab.worker.directory)


def test_a_replay_of_what_failed_in_its_smoke_run_says_so(tmp_path: Path) -> None:
    with (lab := a_lab(tmp_path)).ledger:
        rewritten(lab, "X = 4.9")
        run_attempt(lab, "candidate", "too far", "claude")
        with pytest.raises(UsageError, match=r"failed in its smoke run \(out_of_memory\)"):
            replay(lab, 1, lambda _: None)


def test_a_smoke_run_is_no_attempt_and_no_score(tmp_path: Path) -> None:
    with (lab := a_lab(tmp_path)).ledger:
        before = [a.values() for a in lab.ledger.history.attempts]
        files = rewritten(lab, "# new code")
        run_smoke(lab, files, asked_by="researcher", attempt=1)
        assert before == [a.values() for a in lab.ledger.history.attempts]
        assert files == lab.workspace.candidate()
        assert not any((lab.worker.directory / "boxes").iterdir())


def test_a_smoke_run_is_part_of_where_the_time_went(tmp_path: Path) -> None:
    with (lab := a_lab(tmp_path)).ledger:
        entries = lab.ledger.entries
        before = dict(time_spent(entries))
        run_smoke(lab, rewritten(lab, "# new code"), asked_by="researcher", attempt=1)
        after = dict(time_spent(entries))
    spent = {name: after[name] - before.get(name, 0.0) for name in after}
    assert 5.0 == spent["smoke runs"]  # by the clock, which does not move while a box scores
    assert 0.0 == spent["training"] == spent["scoring"]


def test_the_number_of_smokes_counts_from_the_last_attempt(tmp_path: Path) -> None:
    with (lab := a_lab(tmp_path)).ledger:
        for number in range(3):
            run_smoke(lab, rewritten(lab, f"# {number}"), asked_by="researcher", attempt=1)
            assert number + 1 == lab.ledger.history.smokes_in_a_row
        run_attempt(lab, "candidate", "new code", "claude")
        assert 0 == lab.ledger.history.smokes_in_a_row


def test_a_smoke_run_that_somebody_ended_is_nobodys_failure(tmp_path: Path) -> None:
    def killed(_spec: RunSpec, result: RunResult, _: Path | None) -> RunResult:
        return result.model_copy(update={"outcome": Outcome.INTERRUPTED})

    with (lab := a_lab(tmp_path)).ledger:
        lab = with_executor(lab, FakeExecutor(Clock(), outcome=killed))
        files = rewritten(lab, "# new code")
        with pytest.raises(SandboxError, match="ended by somebody else"):
            run_smoke(lab, files, asked_by="researcher", attempt=1)
        assert lab.ledger.history.find_smoke(hashes_of(files)) is None


@pytest.mark.parametrize("box", ["train", "model"])
def test_a_night_outlives_a_box_that_somebody_ended(tmp_path: Path, box: str) -> None:
    outcomes = [Outcome.INTERRUPTED]

    def killed_once(spec: RunSpec, result: RunResult, _: Path | None) -> RunResult:
        is_due = spec.box == box and outcomes
        return result.model_copy(update={"outcome": outcomes.pop()} if is_due else {})

    with (lab := a_lab(tmp_path)).ledger:
        lab = with_executor(lab, FakeExecutor(Clock(), outcome=killed_once))
        rewritten(lab, "")
        attempt = run_with_retries(lab, "candidate", "the same again", "claude")
        assert attempt.finished is not None
        assert Verdict.FAILED is not attempt.finished.verdict
        assert lab.ledger.history.attempts[-2].interrupted is not None


@pytest.mark.parametrize("box", ["train", "model"])
def test_a_smoke_run_is_tried_again_after_a_fault_of_the_engine_and_the_audit_agrees(
    tmp_path: Path, box: str
) -> None:
    faults = [SandboxError("the engine is gone", "start it")]

    def faulty_once(spec: RunSpec) -> SandboxError | None:
        return faults.pop() if spec.box == box and faults else None

    with (lab := a_lab(tmp_path)).ledger:
        lab = with_executor(lab, FakeExecutor(Clock(), fault=faulty_once))
        files = rewritten(lab, "# new code")
        smoked = with_retries(lab, lambda: run_smoke(lab, files, asked_by="researcher", attempt=1))
        assert smoked.finished is not None
        assert smoked.finished.passed
        assert [None] == [s.finished for s in lab.ledger.history.smokes[1:-1]]
    assert [] == found(lab.worker.directory)


@pytest.mark.parametrize("box", ["train", "model"])
def test_a_program_that_kills_itself_fails_and_the_night_goes_on(tmp_path: Path, box: str) -> None:
    def kills_itself(spec: RunSpec, result: RunResult, _: Path | None) -> RunResult:
        own = {"reported": True, "killed_by": None}
        killed = {"outcome": Outcome.INTERRUPTED, "signal": 9, "evidence": own}
        return result.model_copy(update=killed if spec.box == box else {})

    with (lab := a_lab(tmp_path)).ledger:
        lab = with_executor(lab, FakeExecutor(Clock(), outcome=kills_itself))
        rewritten(lab, "")
        attempt = run_with_retries(lab, "candidate", "kills itself", "claude")
        assert attempt.finished is not None
        assert Verdict.FAILED is attempt.finished.verdict
        assert [] == audit(lab.worker.directory, read_ledger(lab.worker.directory))


# --- the audit ---


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda lines: only(lines, "smoke_finished").update(passed=True, reason=None),
            "True, not False",
        ),
        (
            lambda lines: only(lines, "smoke_finished").update(reason="failed"),
            "failed, not out_of_memory",
        ),
        (
            lambda lines: only(lines, "smoke_started", smoke=1).update(
                files=only(lines, "attempt_started", attempt=0)["files"]
            ),
            "not those of the attempt",
        ),
        (
            lambda lines: only(lines, "attempt_finished", attempt=1).update(reason="failed"),
            "its reason is not what the record comes to: failed, not",
        ),
        (
            lambda lines: only(lines, "run_finished", purpose="smoke-1")["result"]["limits"].update(
                wall_seconds=999.0
            ),
            "not the one that was asked for",
        ),
    ],
    ids=["passed", "other reason", "other files", "other verdict", "other limits"],
)
def test_the_audit_sees_a_smoke_run_that_was_not_so(
    tmp_path: Path, change: Callable[[Lines], Any], said: str
) -> None:
    with (lab := a_lab(tmp_path)).ledger:
        rewritten(lab, "X = 4.9")
        run_attempt(lab, "candidate", "too far", "claude")
    assert [] == found(lab.worker.directory)
    forge(lab.worker.directory, change)
    assert any(re.search(said, what) for what in found(lab.worker.directory)), found(
        lab.worker.directory
    )


# --- in real boxes ---

WRONG = {
    "crash": ("raise SystemExit(5)", "failed"),
    "nothing left": ("import os; os._exit(0)", "no_checkpoint"),
    "memory": ("hog = bytearray(2**30)", "out_of_memory"),
    "other file": (
        "Path(os.environ['NIGHTLAB_OUTPUT'], 'other').write_text(''); os._exit(0)",
        "model_box_failed",
    ),
}


@pytest.mark.docker
def test_real_boxes_show_what_is_wrong_before_the_budget_is_spent(
    place: CommandLine,
    messages_server: Callable[..., MessagesServer],
    engine: Engine,
    image: ImageRecord,
) -> None:
    """Crash, no checkpoint, memory, a checkpoint that cannot be loaded; a deaf script passes."""
    economy = '[economy]\nsmoke = "always"\nsmoke_seconds = 1\n\n[session]'
    place.rewrite("program.md", "[session]", economy)
    place.rewrite("program.md", "attempts = 4", "attempts = 7")
    place.rewrite("program.md", "max_failures_in_a_row = 3", "max_failures_in_a_row = 9")
    place.rewrite("program.md", "seconds = 20\ngrace_seconds = 5", "seconds = 4\ngrace_seconds = 1")
    guard = 'if __name__ == "__main__":'
    lines = [line for line, _ in WRONG.values()]
    turns = [
        say(
            tool("edit", file_path="train.py", old_string=guard, new_string=f"{guard}\n    {line}"),
            tool("run", hypothesis=f"case {number}", smoke=True),
            tool("run", hypothesis=f"case {number}"),
        )
        for number, line in enumerate([*lines, "import time; time.sleep(60)", "pass"])
    ]
    server = messages_server([*turns, say(tool("finish", reason="enough"))])

    done = place.nightlab(
        "run", "--researcher", "claude", "--session", "smoke",
        ANTHROPIC_API_KEY="k", ANTHROPIC_BASE_URL=server.url,
    )  # fmt: skip

    assert 0 == done.returncode, done.stderr
    attempts = place.history("smoke").candidates
    ends = [attempt.finished for attempt in attempts if attempt.finished is not None]
    assert [reason for _, reason in WRONG.values()] == [end.reason for end in ends[:4]]
    assert [[]] * 4 == [attempt.runs for attempt in attempts[:4]]
    assert "timed_out" == ends[4].reason, "deaf to its budget: passed, then killed at its limit"
    assert attempts[5].values()
    smokes = place.events("smoke", SmokeFinished)
    # The baseline's, then each researcher's own; one that failed is not believed without another.
    assert [True, *[False, False] * 4, True, True] == [smoked.passed for smoked in smokes]
    assert all(smoked.seconds < 6 for smoked in smokes)
    assert [] == found(place.session("smoke"))
    assert [] == place.containers("smoke")


def test_events_of_smoke_runs_are_their_own(tmp_path: Path) -> None:
    """What counts attempts, runs or scores must not stumble over them."""
    with (lab := a_lab(tmp_path)).ledger:
        events = [entry.event for entry in lab.ledger.entries]
    kinds = [type(event) for event in events]
    runs = [event for event in events if isinstance(event, RunStarted | RunFinished)]
    assert kinds.index(AttemptStarted) < kinds.index(SmokeStarted) < kinds.index(SmokeFinished)
    mine = [event.purpose for event in runs if event.purpose != ATTEMPT]
    assert ["smoke-0"] * 4 == mine, "two boxes, each with a beginning and an end"
    assert all(events.index(run) > kinds.index(SmokeFinished) for run in runs[4:])
    assert kinds.count(AttemptFinished) == 1
