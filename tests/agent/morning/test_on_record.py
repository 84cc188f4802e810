"""Everything that an auditor asks for is on record."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent.candidate.diffs import unified_diff
from agent.machine.runtime import find_runtime
from agent.morning.audit import audit
from agent.night.session import recover
from agent.night.waiting import ask_to_continue, ask_to_pause
from agent.record.chain import LedgerError, read_blob, read_ledger, request_sha
from agent.record.events import (
    AttemptFinished,
    AttemptInterrupted,
    AttemptStarted,
    ConversationOpened,
    Event,
    FileChanged,
    HumanDecided,
    MessageAdded,
    ModelCalled,
    Noticed,
    ReplayFinished,
    RetryWaited,
    ReviewStarted,
    RunFinished,
    RunStarted,
    Scored,
    SessionEnded,
    SessionResumed,
    SessionStarted,
    StopReason,
    ToolCalled,
    ToolReturned,
    VariantPlanned,
    Verdict,
)
from agent.record.ledger import Ledger
from sandbox.contract.run import RunResult, RunSpec
from sandbox.engine.find import Engine
from sandbox.image.image import ImageRecord
from tests.support import histories
from tests.support.labs import with_settings, with_sleep, work
from tests.support.messages_server import (
    Entry,
    MessagesServer,
    Status,
    Turn,
    say,
    text,
    tinker,
    tool,
)
from tests.support.nights import Place
from tests.support.sessions import sampled

DETAILS = {"type": "refusal", "category": "frontier_llm", "explanation": "It may compete."}


@dataclass
class Asked:
    """A night with one of everything: what went wrong, who was asked, what a person did."""

    place: Place

    def events(self, kind: type) -> list[Any]:
        entries = read_ledger(self.place.directory)
        return [entry.event for entry in entries if isinstance(entry.event, kind)]

    def blob(self, sha: str) -> bytes:
        return read_blob(self.place.directory, sha)

    def notices(self) -> list[str]:
        return [event.kind for event in self.events(Noticed)]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """Retry, refusal, nudge, cut reply, pause, a crash with its resume, and a limit at the end."""
    place = Place(tmp_path_factory.mktemp("asked"), changes={"session": {"attempts": 2}})

    def pausing(request: dict[str, Any]) -> Turn:
        ask_to_pause(place.directory)
        return tinker(request)

    def unpausing(seconds: float) -> None:
        place.clock.advance(seconds)
        ask_to_continue(place.directory)

    script: list[Entry] = [
        Status(529, "overloaded_error"),
        say(text("I would rather talk.")),
        Turn((text("I"),), "refusal", DETAILS),
        Turn((text("A long thought"),), "max_tokens"),
        pausing,
        *[tinker] * 40,
    ]
    server = MessagesServer(script, clock=place.clock.monotonic, endless=True)
    environ = {"ANTHROPIC_API_KEY": "not-a-real-key", "ANTHROPIC_BASE_URL": server.url}
    lab = place.begin("claude")
    lab = with_sleep(lab, unpausing)
    with server:
        for attempts in (1, 2):
            lab = with_settings(lab, lab.settings.with_overrides(attempts=attempts))
            work(lab, place.program, "claude", environ=environ, clock=place.clock.monotonic)
            if attempts == 1:
                lab = place.resume()
    return Asked(place)


def test_the_session_begins_with_program_settings_and_machine(asked: Asked) -> None:
    (begun,) = asked.events(SessionStarted)
    assert hashlib.sha256(asked.place.program.source).hexdigest() == begun.program
    assert {
        "profile": "cpu",
        "base_image": "",
    }.items() <= begun.settings.hardware.model_dump().items()
    assert begun.settings.limits.memory_bytes
    assert {"platform", "kernel", "python", "packages", "cpu", "cores", "memory_bytes"} <= (
        begun.machine.keys()
    )
    assert {"anthropic", "genai-prices", "optuna", "pydantic"} == begun.machine["packages"].keys()


@pytest.mark.docker
def test_the_versions_of_engine_and_runtime_and_the_images_digest_are_on_record(
    engine: Engine, image: ImageRecord
) -> None:
    runtime = find_runtime(histories.IN_FORCE, Path(), os.environ, print)
    versions = {part["name"]: part["version"] for part in runtime.engine["components"]}
    assert {"engine", "containerd", "runc", "kernel"} <= versions.keys()
    assert all(versions.values())
    assert image.image_id == runtime.image["image_id"]


def test_each_call_names_what_was_asked_and_answered(asked: Asked) -> None:
    opened = {e.conversation: [e.system, e.tools] for e in asked.events(ConversationOpened)}
    calls = 0
    for entry in read_ledger(asked.place.directory):
        match entry.event:
            case MessageAdded():
                opened[entry.event.conversation].append(entry.event.message)
            case ModelCalled():
                calls += 1
                assert request_sha(opened[entry.event.conversation]) == entry.event.request
                assert entry.event.reply is not None
                assert "assistant" == json.loads(asked.blob(entry.event.reply))["role"]
                assert entry.event.request_id
    assert calls > 5


def test_a_refused_and_a_cut_reply_are_kept_though_they_are_no_messages(asked: Asked) -> None:
    replies = {e.stop_reason: asked.blob(e.reply).decode() for e in asked.events(ModelCalled)}
    said = {e.message for e in asked.events(MessageAdded)}
    unsaid = [e.stop_reason for e in asked.events(ModelCalled) if e.reply not in said]
    assert "A long thought" in replies["max_tokens"]
    assert '"I"' in replies["refusal"]
    assert ["refusal", "max_tokens"] == unsaid


def test_retries_nudges_refusals_pauses_and_limits_are_on_record(asked: Asked) -> None:
    (waited,) = asked.events(RetryWaited)
    assert "529" in waited.error
    assert ["nudge", "refusal", "nudge", "paused", "continued"] == [
        kind for kind in asked.notices() if kind != "model_facts"
    ]
    first, last = asked.events(SessionEnded)
    assert (StopReason.ATTEMPTS, StopReason.ATTEMPTS) == (first.reason, last.reason)


def test_a_resume_says_on_what_and_with_which_settings(asked: Asked) -> None:
    place = asked.place
    lab = place.resume()
    with lab.ledger:
        recover(lab, removed_containers=("box",), engine={"version": "28.1"})
    resumed = asked.events(SessionResumed)[-1]
    assert ({"version": "28.1"}, ("box",)) == (resumed.engine, resumed.removed_containers)
    assert "kernel" in resumed.machine
    assert asked.events(SessionStarted)[0].settings == resumed.settings


def test_each_file_change_has_its_diff(asked: Asked) -> None:
    changes = asked.events(FileChanged)
    assert len(changes) >= 2
    for change in changes:
        assert change.before is not None
        assert change.after is not None
        before, after = asked.blob(change.before), asked.blob(change.after)
        diff = unified_diff({change.path: before}, {change.path: after})
        assert diff == asked.blob(change.diff)
        assert b"\n-" in diff


def test_a_new_file_has_no_before(tmp_path: Path) -> None:
    editable = {"editable": ("train.py", "notes.txt")}
    place = Place(tmp_path, changes={"workspace": editable, "researcher": {"then": []}})
    script: list[Entry] = [
        say(tool("write", file_path="notes.txt", content="hm\n")),
        say(text("done")),
    ]
    script += [Status(401)] * 9
    lab = place.begin("claude")
    with MessagesServer(script, endless=True) as server:
        environ = {"ANTHROPIC_API_KEY": "k", "ANTHROPIC_BASE_URL": server.url}
        work(lab, place.program, "claude", environ=environ, clock=place.clock.monotonic)
    (change,) = Asked(place).events(FileChanged)
    assert ("notes.txt", None) == (change.path, change.before)
    assert change.after is not None
    assert b"hm\n" == read_blob(place.directory, change.after)


def test_every_tool_call_has_its_arguments_and_its_answer(asked: Asked) -> None:
    called = {e.call_id: e for e in asked.events(ToolCalled)}
    returned = {e.call_id: e for e in asked.events(ToolReturned)}
    assert called.keys() == returned.keys()
    assert {"read", "edit", "run"} <= {e.name for e in called.values()}
    assert all(isinstance(json.loads(asked.blob(e.input)), dict) for e in called.values())
    assert all(asked.blob(e.output) for e in returned.values())


def tells_its_settings(spec: RunSpec, result: RunResult, _: Path | None) -> RunResult:
    """A run that tells its container's settings, as the real executor's do."""
    asked = {"HostConfig": {"Memory": spec.limits.memory_bytes}}
    return result.model_copy(update={"evidence": {"container": {"asked": asked}, "seen": 1}})


def test_the_containers_settings_are_a_blob_and_the_evidence_stays_in_the_line(
    tmp_path: Path,
) -> None:
    place = Place(tmp_path)
    place.boxes.outcome = tells_its_settings
    work(place.begin("tpe"), place.program)
    runs = Asked(place).events(RunFinished)
    assert {"train", "model", "scorer"} == {run.result.box for run in runs}
    for run in runs:
        container = json.loads(read_blob(place.directory, run.container))
        memory_bytes = container["asked"]["HostConfig"]["Memory"]
        assert (run.result.limits.memory_bytes, {"seen": 1}) == (memory_bytes, run.result.evidence)
    assert [] == audit(place.directory, read_ledger(place.directory))


def test_each_run_names_its_box_its_seed_and_its_limits(tmp_path: Path) -> None:
    place = sampled(tmp_path)
    night = Asked(place)
    announcing = (*night.events(AttemptStarted), *night.events(ReviewStarted))
    announced = {seed for event in announcing for seed in event.seeds}
    started = night.events(RunStarted)
    assert {"train", "model", "scorer"} == {run.box for run in started}
    assert announced >= {run.seed for run in started}
    assert all(run.spec.limits.memory_bytes for run in started)
    (decided,) = night.events(HumanDecided)
    assert ("approve", "Somebody") == (decided.decision, decided.person)


def _about(attempt: int) -> list[Event]:
    """Every event that must name an attempt that was started."""
    made = histories.night(1)
    of_the_night = [
        next(e.event for e in made.entries if isinstance(e.event, kind))
        for kind in (RunStarted, RunFinished, Scored, AttemptFinished)
    ]
    about: list[Event] = [event.model_copy(update={"attempt": attempt}) for event in of_the_night]
    run = about[0]
    assert isinstance(run, RunStarted)
    later: dict[str, Any] = {"attempt": attempt, "variant": "best", "files": {}}
    return [
        *about,
        AttemptInterrupted(attempt=attempt, is_box_lost=False, reason=""),
        run.model_copy(update={"purpose": "review-1 best"}),
        ReviewStarted(
            review=1, nightlab_version="", baseline=0, best=attempt, seeds=(), heeds_seeds=True
        ),
        VariantPlanned(review=1, left_out=(), problem="", **later),
        ReplayFinished(
            attempt=attempt,
            recorded_outcome="measured",
            outcome="measured",
            scores=(),
            noise=None,
            largest_difference=None,
            agrees=True,
            is_comparable=True,
            explanation="",
        ),
        HumanDecided(
            decision="reject",
            reason="",
            person="",
            email="",
            patch=None,
            branch=None,
            commit=None,
            unmeasured=(),
            **later,
        ),
    ]


@pytest.mark.parametrize("event", _about(7), ids=lambda event: event.type)
def test_an_event_about_an_unknown_attempt_is_refused_and_nothing_is_written(
    event: Event, tmp_path: Path
) -> None:
    histories.night(1).write(tmp_path)
    before = (tmp_path / "ledger.jsonl").read_bytes()
    with Ledger.open(tmp_path) as ledger:
        with pytest.raises(LedgerError, match="names an attempt that was never started"):
            ledger.append(event)
        assert before == (tmp_path / "ledger.jsonl").read_bytes()


@pytest.mark.parametrize("event", _about(1), ids=lambda event: event.type)
def test_an_event_about_a_known_attempt_is_taken(event: Event, tmp_path: Path) -> None:
    histories.night(1, ended=False).write(tmp_path)
    with Ledger.open(tmp_path) as ledger:
        assert event == ledger.append(event).event


def test_verdicts_have_their_arithmetic(tmp_path: Path) -> None:
    finished = Asked(sampled(tmp_path)).events(AttemptFinished)
    judged = [e for e in finished if e.reason != "baseline"]
    assert {Verdict.KEPT, Verdict.DISCARDED} == {e.verdict for e in judged}
    assert all(e.arithmetic is not None for e in judged)
