"""The audit is silent about an honest session and names what was changed."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from agent.cli.app import app
from agent.morning.anchor import compare_heads
from agent.morning.audit import audit
from agent.morning.blob_checks import BLOB_FIELDS, BLOB_TABLES, named_blobs
from agent.morning.listing import asked_for, facts, table
from agent.record.chain import LEDGER_NAME, LedgerError, read_ledger
from agent.record.events import (
    EVENT_TYPES,
    AttemptFinished,
    AttemptStarted,
    Event,
    Noticed,
    Verdict,
)
from agent.record.ledger import Ledger
from agent.record.repeats import FIVE_DIGITS
from sandbox.contract.errors import UsageError
from tests.support import histories
from tests.support.labs import work
from tests.support.long_night import long_session
from tests.support.nights import Place
from tests.support.sessions import Lines, forge, found, only, restored, resumed, sampled, talked

ELSEWHERE = "0" * 64
NO_BLOBS = {"request"}
"""Hashes in events that name no blob."""


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return sampled(tmp_path_factory.mktemp("sampled"))


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return talked(tmp_path_factory.mktemp("talked"), attempts=2)


@pytest.fixture
def copy(tmp_path: Path, night: Place) -> Path:
    return Path(shutil.copytree(night.directory, tmp_path / night.directory.name))


def begun() -> histories.Night:
    made = histories.Night()
    histories.start(made)
    histories.baseline(made, random.Random(1))
    return made


def differences(made: histories.Night, directory: Path) -> list[tuple[int | None, str]]:
    made.write(directory)
    return [(d.seq, d.what) for d in audit(directory, read_ledger(directory))]


def test_an_honest_baseline_has_no_differences(tmp_path: Path) -> None:
    assert [] == differences(begun(), tmp_path)


def test_an_honest_night_with_its_morning_has_no_differences(night: Place, talk: Place) -> None:
    assert [] == found(night.directory)
    assert [] == found(talk.directory)


def test_an_honest_night_whose_baseline_hardly_differs_has_no_differences(tmp_path: Path) -> None:
    changes = {"session": {"attempts": 5}, "noise": {"check_best_every": 2}}
    place = Place(tmp_path, changes=changes)
    place.boxes.luck = lambda noise: noise / 10_000  # the scores differ in the seventh digit only
    lab = place.begin("tpe")
    work(lab, place.program)
    history = lab.ledger.history
    assert history.baseline is not None
    scores = history.baseline.values().values()
    assert 0 < max(scores) - min(scores) < FIVE_DIGITS
    assert {"noise_unknown"} == {a.finished.reason for a in history.candidates if a.finished}
    assert history.drift.checks
    assert [] == found(place.directory)


def test_a_night_broken_off_inside_a_run_and_resumed_has_no_differences(
    copy: Path, night: Place
) -> None:
    place = dataclasses.replace(night, root=copy.parent)

    def cut(lines: Lines) -> None:
        del lines[next(n for n, line in enumerate(lines) if is_run(line["event"], "model")) + 1 :]

    forge(place.directory, cut)
    shutil.rmtree(place.directory / "approved")  # of a later time than the cut
    place.resume().ledger.close()
    events = [entry.event.type for entry in read_ledger(place.directory)]
    assert "run_started" == events[-3]
    assert {"attempt_interrupted", "session_resumed"} == {*events[-2:]}
    assert [] == found(place.directory)


def test_a_long_session_as_it_is_made_for_the_benchmark_has_no_differences(tmp_path: Path) -> None:
    made = long_session(2000)
    assert [] == differences(made, tmp_path)
    assert 2000 <= len(made.entries)


@pytest.mark.slow
def test_a_lost_and_a_changed_blob_are_named_with_their_event(copy: Path) -> None:
    entries = read_ledger(copy)
    first = {sha: entry.seq for entry in reversed(entries) for sha in named_blobs(entry.event)}
    for sha, seq in first.items():
        path = copy / "blobs" / sha[:2] / sha[2:]
        with restored(path) as body:
            path.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
            assert seq in [d.seq for d in audit(copy, entries)]
            path.unlink()
            assert seq in [d.seq for d in audit(copy, entries)]


def test_every_hash_in_an_event_is_a_blob_that_is_checked() -> None:
    """Review, replay and decision included; a new field must take a side."""

    def hashes(model: Any) -> Iterator[tuple[str, bool]]:
        for name, schema in model.model_json_schema()["properties"].items():
            for choice in schema.get("anyOf", [schema]):
                inside = choice.get("additionalProperties")
                if choice.get("pattern") == "^[0-9a-f]{64}$":
                    yield name, False
                elif isinstance(inside, dict) and inside.get("pattern"):
                    yield name, True

    named = {pair for event in get_args(get_args(Event)[0]) for pair in hashes(event)}
    known = {(name, False) for name in BLOB_FIELDS} | {(name, True) for name in BLOB_TABLES}
    assert known == {pair for pair in named if pair[0] not in NO_BLOBS}


def test_a_blob_that_no_event_names_is_checked_too(copy: Path) -> None:
    with Ledger.open(copy) as ledger:
        sha = ledger.put_blob(b"stored just before a crash")
    assert [] == found(copy)
    (copy / "blobs" / sha[:2] / sha[2:]).write_bytes(b"and changed since")
    assert [f"blobs/{sha[:2]}/{sha[2:]} is not the blob that it is named after"] == found(copy)


def test_a_keep_without_arithmetic_is_found(tmp_path: Path) -> None:
    made = begun()
    made.add(
        AttemptStarted(
            attempt=1,
            kind="candidate",
            hypothesis="none",
            researcher="tpe",
            files=made.history.attempts[0].started.files,
            diff=made.put_blob(b""),
            parent=0,
            seeds=made.history.session.seeds if made.history.session else (),
        )
    )
    entry = made.add(
        AttemptFinished(
            attempt=1,
            verdict=Verdict.KEPT,
            reason="better",
            explanation="",
            value=None,
            arithmetic=None,
            seconds=1.0,
        )
    )
    what = "it is kept (better), and attempt 1 was still to be measured at seed 1"
    assert [(entry.seq, what)] == differences(made, tmp_path)


# --- what somebody with write access changes, chain and all --------------------------------------


def is_run(event: dict[str, Any], box: str) -> bool:
    return bool(event["type"] == "run_started" and event["spec"]["box"] == box)


def is_val(line: dict[str, Any]) -> bool:
    event = line["event"]
    return bool(event["type"] == "scored" and event["attempt"] == 0 and event["split"] == "val")


def place_of(lines: Lines, event: dict[str, Any]) -> int:
    return next(n for n, line in enumerate(lines) if line["event"] is event)


def drop(lines: Lines, event: dict[str, Any]) -> None:
    del lines[place_of(lines, event)]


def again(lines: Lines, event: dict[str, Any], **changes: Any) -> None:
    """Put an event in a second time, right behind itself."""
    place = place_of(lines, event)
    lines.insert(place + 1, {**lines[place], "event": {**event, **changes}})


def finished(lines: Lines, box: str) -> dict[str, Any]:
    events: list[dict[str, Any]] = [line["event"] for line in lines]
    runs = [e for e in events if e["type"] == "run_finished" and e["purpose"] == "attempt"]
    return next(run for run in reversed(runs) if run["result"]["box"] == box)


def asked(lines: Lines, box: str) -> dict[str, Any]:
    """The last time that such a box was asked for."""
    events: list[dict[str, Any]] = [line["event"] for line in reversed(lines)]
    return next(e for e in events if is_run(e, box) and e["purpose"] == "attempt")


def later(lines: Lines, kind: str, *, purpose: str) -> dict[str, Any]:
    events: list[dict[str, Any]] = [line["event"] for line in reversed(lines)]
    return next(e for e in events if e["type"] == kind and e["purpose"].startswith(purpose))


def start_another_model_box(lines: Lines) -> None:
    """Say that a second model box was asked for before the first one ended."""
    place = place_of(lines, asked(lines, "model"))
    other = json.loads(json.dumps(lines[place]))
    score = other["event"]["spec"]["run_id"].removesuffix("-model")
    other["event"]["spec"]["run_id"] = f"{score}-check-9"
    lines.insert(place + 1, other)


PLANTS: dict[str, tuple[Callable[[Lines], object], str]] = {
    "a limit above the settings": (
        lambda ls: only(ls, "run_started", purpose="attempt")["spec"]["limits"].update(
            memory_bytes=2**33
        ),
        "its limit memory_bytes is not the one in the settings",
    ),
    "a run with another limit than was asked": (
        lambda ls: finished(ls, "train")["result"]["limits"].update(wall_seconds=999.0),
        "its limit wall_seconds is not the one that was asked for",
    ),
    "a run without its end": (
        lambda ls: drop(ls, finished(ls, "model")),
        "has no end",
    ),
    "a run without its beginning": (
        lambda ls: drop(ls, only(ls, "run_started", purpose="attempt")),
        "ends without having started",
    ),
    "a run told twice": (
        lambda ls: again(ls, only(ls, "run_started", purpose="attempt")),
        "starts for the second time",
    ),
    "a run of another attempt": (
        lambda ls: finished(ls, "train").update(attempt=0),
        "was started for another attempt, seed or box",
    ),
    "the spec of another run": (
        lambda ls: only(ls, "run_started", purpose="attempt")["spec"].update(run_id="night-0-1"),
        "ends without having started",
    ),
    "a seed that nobody announced": (
        lambda ls: asked(ls, "train").update(seed=4),
        "seed 4 is none that was announced",
    ),
    "a seed that the program was not told": (
        lambda ls: asked(ls, "train")["spec"]["environment"].update(NIGHTLAB_SEED="4"),
        "the program was given seed 4",
    ),
    "another image than the session's": (
        lambda ls: ls[0]["event"]["image"].update(image_id="sha256:1"),
        "its image is not the session's",
    ),
    "a model box without files of its own": (
        lambda ls: ls[0]["event"]["image"]["copies"].update(model="sha256:9"),
        "its image is not the session's",
    ),
    "a model box on the files of the trainings": (
        lambda ls: asked(ls, "model")["spec"].update(image="sha256:0"),
        "its image is not the session's",
    ),
    "no copies of the image on record": (
        lambda ls: ls[0]["event"]["image"].pop("copies"),
        "its image is not the session's",
    ),
    "another image than was asked for": (
        lambda ls: finished(ls, "scorer")["result"].update(image_digest="sha256:1"),
        "its image is not the one that was asked for",
    ),
    "a run that was over its budget": (
        lambda ls: finished(ls, "train")["result"].update(wall_seconds=230.0),
        "its over_budget_seconds is not what the record comes to: 0.0, not 20",
    ),
    "a run that was disturbed": (
        lambda ls: finished(ls, "train")["disturbance"].update(other_cores=99.0),
        "its disturbance is not what the record comes to: disturbed False, not True",
    ),
    "an excerpt of another log": (
        lambda ls: finished(ls, "train")["result"]["log"].update(tail="all is well\n"),
        "its result is not what the record comes to: log",
    ),
    "a log that is something else": (
        lambda ls: finished(ls, "train").update(log=ls[0]["event"]["program"]),
        "its log is no log, or its curve is no curve",
    ),
    "a better score": (
        lambda ls: only(ls, "scored", purpose="attempt", split="val").update(value=0.1),
        "its value is not what the record comes to: 0.1, not",
    ),
    "a score without boxes of its own": (
        lambda ls: again(ls, only(ls, "scored", purpose="attempt", split="val"), value=0.1),
        "a value without a good end of: model, scorer",
    ),
    "a score after a training that failed": (
        lambda ls: finished(ls, "train")["result"].update(outcome="failed"),
        "a value without a good end of: train",
    ),
    "a score with a reason": (
        lambda ls: only(ls, "scored", purpose="attempt").update(reason="looks_ahead"),
        "has both or neither",
    ),
    "a better score on holdout": (
        lambda ls: only(ls, "scored", purpose="attempt", split="holdout").update(value=0.1),
        "its value is not what the record comes to: 0.1, not",
    ),
    "a score that the scorer refused": (
        lambda ls: only(ls, "scored", purpose="attempt").update(value=None, reason="looks_ahead"),
        "its reason is not what the record comes to: looks_ahead, not None",
    ),
    "a score with other details": (
        lambda ls: only(ls, "scored", purpose="attempt").update(details={"probes": 9999}),
        "its details is not what the record comes to: {'probes': 9999}",
    ),
    "a score without a sheet": (
        lambda ls: only(ls, "scored", purpose="attempt").update(sheet=None),
        "a value without the scorer's sheet",
    ),
    "a sheet that is something else": (
        lambda ls: only(ls, "scored", purpose="attempt").update(sheet=ls[0]["event"]["program"]),
        "its sheet is no score sheet",
    ),
    "a score with checks that no box made": (
        lambda ls: only(ls, "scored", purpose="attempt").update(checks=3),
        "its checks is not what the record comes to: 3, not 0",
    ),
    "a model box that starts while another one is alive": (
        start_another_model_box,
        "it starts while another model box is alive",
    ),
    "another verdict": (
        lambda ls: only(ls, "attempt_finished", verdict="discarded").update(verdict="kept"),
        "its verdict is not what the record comes to: kept, not discarded",
    ),
    "other arithmetic": (
        lambda ls: only(ls, "attempt_finished")["arithmetic"].update(required_gain=0.0),
        "its arithmetic is not what the record comes to: required_gain 0.0, not",
    ),
    "a failure that nothing shows": (
        lambda ls: only(ls, "attempt_finished").update(
            verdict="failed", reason="out_of_memory", arithmetic=None, value=None
        ),
        "its reason is not what the record comes to: out_of_memory, not",
    ),
    "a baseline of another value": (
        lambda ls: only(ls, "attempt_finished", reason="baseline").update(value=9.9),
        "its value is not what the record comes to: 9.9, not",
    ),
    "an attempt that began with other files": (
        lambda ls: only(ls, "attempt_started").update(parent=1),
        "its parent is 1, the best was",
    ),
    "an attempt closed twice": (
        lambda ls: again(ls, only(ls, "attempt_finished")),
        "an attempt is closed for the second time",
    ),
    "an answer to another tool": (
        lambda ls: only(ls, "tool_returned").update(name="finish"),
        "tool finish answers a call that is not on record",
    ),
    "a resume that changes what a verdict means": (
        lambda ls: resumed(ls, "noise", false_keep_rate_per_night=0.3),
        "the resume changed [noise]",
    ),
    "a better score in the review": (
        lambda ls: only(ls, "variant_measured").update(value=0.1),
        "its scores are not those of the runs of",
    ),
    "a better score in a run of the review": (
        lambda ls: later(ls, "scored", purpose="review-1").update(value=0.1),
        "its scores are not those of the runs of",
    ),
    "a run of the review with another limit": (
        lambda ls: later(ls, "run_started", purpose="review-1")["spec"]["limits"].update(pids=9),
        "its limit pids is not the one in the settings",
    ),
    "a replay that agrees": (
        lambda ls: only(ls, "replay_finished")["scores"][0].update(today=0.1),
        "its scores is not what the record comes to",
    ),
    "a replay of another score": (
        lambda ls: only(ls, "replay_finished")["scores"][0].update(recorded=0.1),
        "its scores is not what the record comes to",
    ),
    "a replay that came closer": (
        lambda ls: only(ls, "replay_finished").update(largest_difference=0.5),
        "its largest_difference is not what the record comes to: 0.5, not",
    ),
    "a replay that agrees in another way": (
        lambda ls: only(ls, "replay_finished").update(agrees=True, outcome="failed"),
        "its outcome is not what the record comes to: failed, not measured",
    ),
    "an approval of other files": (
        lambda ls: only(ls, "human_decided").update(
            files={"train.py": ls[0]["event"]["files"]["train.py"]}
        ),
        "its files are not those of best",
    ),
    "an approval of another attempt": (
        lambda ls: only(ls, "human_decided").update(attempt=1),
        "which was not the best",
    ),
    "an approval with a patch that is gone": (
        lambda ls: only(ls, "human_decided").update(patch=ELSEWHERE),
        f"blob {ELSEWHERE} cannot be read",
    ),
    "an attempt beyond the limit": (
        lambda ls: ls[0]["event"]["settings"]["session"].update(attempts=3),
        "attempt 4 starts although 3 attempts are done, the limit",
    ),
    "an end that did not come": (
        lambda ls: only(ls, "session_ended").update(reason="failures_in_a_row"),
        "it says that it ended for failures_in_a_row, and the record does not",
    ),
    "a diff that shows something else": (
        lambda ls: only(ls, "attempt_started", attempt=2).update(
            diff=only(ls, "attempt_started", attempt=1)["diff"]
        ),
        "its diff is not what changed in the files",
    ),
    "a diff that is left out": (
        lambda ls: only(ls, "attempt_started", attempt=2).update(diff=None),
        "its diff is not what changed in the files",
    ),
    "a change that shows something else": (
        lambda ls: only(ls, "file_changed").update(
            diff=only(ls, "attempt_started", attempt=1)["diff"]
        ),
        "its diff is not what changed in the files",
    ),
    "a patch that shows something else": (
        lambda ls: only(ls, "human_decided").update(
            patch=only(ls, "attempt_started", attempt=1)["diff"]
        ),
        "its diff is not what changed in the files",
    ),
    "files of a variant that are gone": (
        lambda ls: only(ls, "variant_planned").update(files={"train.py": ELSEWHERE}),
        f"blob {ELSEWHERE} cannot be read",
    ),
    "a log of a later run that is gone": (
        lambda ls: later(ls, "run_finished", purpose="replay-1").update(log=ELSEWHERE),
        f"blob {ELSEWHERE} cannot be read",
    ),
    "an attempt with another number": (
        lambda ls: only(ls, "attempt_started").update(attempt=99),
        "attempt 99 comes where 8 was due",
    ),
    "an attempt without its verdict": (
        lambda ls: drop(ls, only(ls, "attempt_finished", attempt=3)),
        "attempt 4 starts while the one before is open",
    ),
    "a verdict without scores": (
        lambda ls: drop(ls, only(ls, "scored", purpose="attempt", split="val")),
        "was still to be measured at seed",
    ),
    "a session without its beginning": (
        lambda ls: ls.pop(0),
        "it was decided before a session began",
    ),
    "a baseline whose seeds are one": (
        lambda ls: ls[0]["event"].update(seeds=[ls[0]["event"]["seeds"][0]] * 3),
        "the baseline's seeds are not the session's",
    ),
    "a best without a score": (
        lambda ls: [line["event"].update(value=None, reason="x") for line in ls if is_val(line)],
        "its value is not what the record comes to",
    ),
    "a variant that nobody planned": (
        lambda ls: drop(
            ls, only(ls, "variant_planned", variant=only(ls, "variant_measured")["variant"])
        ),
        "was never planned",
    ),
    "an attempt that never was": (
        lambda ls: only(ls, "run_started", purpose="attempt").update(attempt=77),
        "run_started names an attempt that was never started",
    ),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_what_was_planted_is_named(plant: str, copy: Path) -> None:
    change, words = PLANTS[plant]
    forge(copy, change)
    assert [what for what in found(copy) if words in what], found(copy)


@pytest.mark.parametrize(
    "plant",
    [
        "an attempt that never was",
        "an attempt with another number",
        "a session without its beginning",
    ],
)
def test_the_command_names_what_no_history_can_be_folded_from(plant: str, copy: Path) -> None:
    change, words = PLANTS[plant]
    forge(copy, change)
    shown = CliRunner().invoke(app, ["audit", copy.name, "--runs", str(copy.parent)])
    assert 1 == shown.exit_code
    assert words in shown.stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda ls: ls[0]["event"]["settings"]["noise"].update(false_keep_rate_per_night=2.0),
            "cannot read its session_started: event.session_started.settings.noise."
            "false_keep_rate_per_night",
        ),
        (
            lambda ls: only(ls, "run_started", purpose="attempt")["spec"].pop("limits"),
            "cannot read its run_started: event.run_started.spec.limits",
        ),
    ],
)
def test_settings_and_limits_that_nobody_could_have_had_are_not_read(
    change: Callable[[Lines], object], words: str, copy: Path
) -> None:
    forge(copy, change)
    with pytest.raises(LedgerError, match=words):
        found(copy)


TALK_PLANTS: dict[str, tuple[Callable[[Lines], object], str]] = {
    "a cheaper call": (
        lambda ls: only(ls, "model_called").update(cost_usd=0.0),
        "the call cost $0.000000; its usage comes to $",
    ),
    "a call beyond the money limit": (
        lambda ls: ls[0]["event"]["settings"]["session"].update(usd=0.01),
        "$0.00 of $0.01 are spent and the next call could cost",
    ),
    "a total that is less": (
        lambda ls: only(ls, "model_called").update(cost_usd=0.0),
        "the usage of its calls comes to $",
    ),
    "a call without a price": (
        lambda ls: only(ls, "model_called").update(cost_usd=None),
        "the call cost nothing; its usage comes to $",
    ),
    "another question": (
        lambda ls: only(ls, "message_added", role="user").update(
            message=only(ls, "conversation_opened")["tools"]
        ),
        "what the model was asked is not the conversation on record",
    ),
    "another answer": (
        lambda ls: only(ls, "message_added", role="assistant").update(
            message=only(ls, "conversation_opened")["tools"]
        ),
        "the message is not the reply that the model gave",
    ),
    "a conversation that nobody opened": (
        lambda ls: drop(ls, only(ls, "conversation_opened")),
        "was never opened",
    ),
}


@pytest.mark.parametrize("plant", TALK_PLANTS)
def test_what_was_planted_in_a_conversation_is_named(
    plant: str, tmp_path: Path, talk: Place
) -> None:
    change, words = TALK_PLANTS[plant]
    directory = Path(shutil.copytree(talk.directory, tmp_path / "night"))

    def but_for_the_last_messages(lines: Lines) -> None:
        """A question must be one that a later call asks."""
        last_call = place_of(lines, only(lines, "model_called"))
        kept = 2 if plant == "another answer" else 1
        del lines[last_call + kept :]
        change(lines)

    forge(directory, but_for_the_last_messages)
    assert [what for what in found(directory) if words in what], found(directory)


def test_a_resume_with_more_attempts_is_no_difference(copy: Path) -> None:
    forge(copy, lambda lines: resumed(lines, "session", attempts=99, usd=1.0))
    assert [] == found(copy)


def test_a_difference_by_a_newer_price_list_says_so(tmp_path: Path, talk: Place) -> None:
    directory = Path(shutil.copytree(talk.directory, tmp_path / "night"))

    def of_an_older_list(lines: Lines) -> None:
        lines[0]["event"]["machine"]["packages"]["genai-prices"] = "0.0.1"
        only(lines, "model_called").update(cost_usd=0.0)

    forge(directory, of_an_older_list)
    assert [what for what in found(directory) if what.endswith("then 0.0.1")]


# --- what somebody without the chain changes ----------------------------------------------------


def is_noticed(directory: Path, head: str) -> bool:
    """Whether `nightlab audit --head` says anything."""
    try:
        entries = read_ledger(directory)
    except LedgerError:
        return True
    heard = compare_heads(directory, entries, noted=head, anchor=None)
    return bool(audit(directory, entries, heard.differences))


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_any_changed_byte_of_the_ledger_is_found(night: Place, data: st.DataObject) -> None:
    path, head = night.directory / LEDGER_NAME, read_ledger(night.directory)[-1].hash
    with restored(path) as before:
        place = data.draw(st.integers(0, len(before) - 1))
        changed = bytearray(before)
        changed[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(changed)
        assert is_noticed(night.directory, head)


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_any_line_removed_swapped_doubled_or_appended_is_found(
    night: Place, data: st.DataObject
) -> None:
    path, head = night.directory / LEDGER_NAME, read_ledger(night.directory)[-1].hash
    with restored(path) as before:
        lines = before.splitlines(keepends=True)
        one = data.draw(st.integers(0, len(lines) - 1))
        other = data.draw(st.integers(0, len(lines) - 1).filter(lambda n: n != one))
        match data.draw(st.sampled_from(["removed", "swapped", "doubled", "appended"])):
            case "removed":
                del lines[one]
            case "swapped":
                lines[one], lines[other] = lines[other], lines[one]
            case "doubled":
                lines.insert(other, lines[one])
            case "appended":
                lines.append(data.draw(st.sampled_from([lines[one], lines[one][:-1], b"{}\n"])))
        path.write_bytes(b"".join(lines))
        assert is_noticed(night.directory, head)


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_any_changed_byte_of_a_blob_is_found(night: Place, data: st.DataObject) -> None:
    blobs = sorted(p for p in (night.directory / "blobs").rglob("*") if p.is_file())
    path = data.draw(st.sampled_from([p for p in blobs if p.stat().st_size]))
    with restored(path) as before:
        place = data.draw(st.integers(0, len(before) - 1))
        changed = bytearray(before)
        changed[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(changed)
        assert found(night.directory)


@given(st.data())
@settings(deadline=None, max_examples=15)
def test_a_tail_cut_at_a_line_is_found_by_the_head_alone(night: Place, data: st.DataObject) -> None:
    path, head = night.directory / LEDGER_NAME, read_ledger(night.directory)[-1].hash
    with restored(path) as before:
        lines = before.splitlines(keepends=True)
        path.write_bytes(b"".join(lines[: data.draw(st.integers(1, len(lines) - 1))]))
        read_ledger(night.directory)  # it verifies
        assert is_noticed(night.directory, head)


def test_a_torn_tail_is_named_until_it_is_repaired(copy: Path) -> None:
    with (copy / LEDGER_NAME).open("ab") as file:
        file.write(b'{"at":"2026')
    assert [what for what in found(copy) if what.startswith("11 bytes of a torn line follow")]
    Ledger.open(copy).close()
    assert [] == found(copy)


# --- what a person asks for ---------------------------------------------------------------------


def test_the_events_of_an_attempt_are_shown(night: Place) -> None:
    entries = read_ledger(night.directory)
    wanted = asked_for(entries, 2, "attempt_started,run_finished,attempt_finished", None)
    shown = [entry.event.type for entry in wanted]
    assert "attempt_started" == shown[0]
    assert {"attempt_started", "run_finished", "attempt_finished"} == set(shown)
    assert all("  2  " in line for line in list(table(wanted))[1:])


def test_runs_after_the_night_belong_to_their_attempt(night: Place) -> None:
    entries = read_ledger(night.directory)
    assert 7 <= len(asked_for(entries, 1, "run_started,run_finished,scored", None))


@pytest.mark.parametrize("since", ["2026-03-07T21:30:00+00:00", "30m", "1800s"])
def test_events_from_a_time_on_are_shown(night: Place, since: str) -> None:
    entries = read_ledger(night.directory)
    evening = histories.EVENING.replace(hour=22)
    shown = [entry.at for entry in asked_for(entries, None, None, since, now=lambda: evening)]
    assert [e.at for e in entries if e.at >= "2026-03-07T21:30:00"] == shown
    assert 0 < len(shown) < len(entries)


def test_events_are_json_lines_for_scripts(night: Place) -> None:
    entries = read_ledger(night.directory)
    words = ["audit", "night", "--runs", str(night.root), "--type", "human_decided", "--json"]
    shown, _audited = CliRunner().invoke(app, words).stdout.splitlines()
    assert entries[-1].model_dump(mode="json") == json.loads(shown)["entry"]


def test_nothing_is_shown_where_nothing_was_asked(night: Place) -> None:
    assert [] == asked_for(read_ledger(night.directory), None, None, None)
    shown = CliRunner().invoke(app, ["audit", "night", "--runs", str(night.root)])
    assert shown.stdout.startswith(f"{len(read_ledger(night.directory))} events, nothing differs")


@pytest.mark.parametrize(
    ("attempt", "types", "since", "words"),
    [
        (77, None, None, "there is no attempt 77"),
        (None, "scored,verdict", None, "there is no event of type verdict"),
        (None, None, "yesterday", "yesterday is neither a time nor a duration"),
        (None, None, "", "is neither a time nor a duration"),
    ],
)
def test_a_filter_that_cannot_be_meant_is_refused(
    night: Place, attempt: int | None, types: str | None, since: str | None, words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        asked_for(read_ledger(night.directory), attempt, types, since)
    assert caught.value.hint
    if types:
        assert ", ".join(EVENT_TYPES) in caught.value.hint


@pytest.mark.parametrize("text", histories.HOSTILE_TEXTS)
def test_hostile_text_is_one_visible_line_of_bounded_length(text: str) -> None:
    told = facts(Noticed(kind=text, explanation=text * 50))
    assert len(told) <= 160
    assert not {c for c in told if c in "\n\r\t\x1b\x07\u202e\u200b\ufeff"}


@pytest.mark.parametrize("made", [histories.night(40), histories.night(9, hostile=True)])
def test_every_event_fits_a_line(made: histories.Night) -> None:
    assert all(len(line) < 240 and "\n" not in line for line in table(made.entries))
