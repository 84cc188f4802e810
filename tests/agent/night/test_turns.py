"""Refusals, circles, stop and pause, limits: how a session goes on, or ends."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agent.cli.app import app
from agent.cli.night import begin_again, never_replied
from agent.morning.audit import audit
from agent.night.assemble import check_models, open_models
from agent.night.session import recover
from agent.night.waiting import (
    PAUSE,
    STOP,
    ask_to_continue,
    ask_to_pause,
    ask_to_stop,
    forget_wishes,
    is_asked_to_pause,
)
from agent.record.chain import read_blob, read_ledger
from agent.record.events import (
    ConversationOpened,
    FileChanged,
    MessageAdded,
    ModelCalled,
    Noticed,
    SessionResumed,
    StopReason,
    ToolCalled,
    ToolReturned,
)
from agent.record.history import fold
from agent.record.usage import Spend
from agent.report.console import attempt_line
from agent.report.summary import summary
from sandbox.contract.errors import UsageError
from sandbox.contract.run import RunResult, RunSpec
from tests.support.held_out import PACKED, write_data
from tests.support.labs import play, quiet_lab, with_sleep, work
from tests.support.messages_server import (
    CATALOGUE,
    Cut,
    MessagesServer,
    Raw,
    Request,
    Status,
    Turn,
    say,
    text,
    thinking,
    tool,
)
from tests.support.minds import DETAILS, Scene, work_with_claude
from tests.support.nights import TOY, Crash, CrashingLedger, Place

REFUSED = Turn((text("I"),), "refusal", DETAILS)
READ = say(tool("read", file_path="train.py"))
ALONE: dict[str, Any] = {"then": []}


ENDINGS: dict[str, Turn] = {
    "without a word": Turn((), "end_turn"),
    "with words": Turn((text("Shall I go on?"),), "end_turn"),
    "with thoughts alone": Turn((thinking("Hm."),), "end_turn"),
    "in the middle of a call": Turn((tool("run", hypothesis="x"),), "max_tokens", None, None, 9),
    "at a stop sequence": Turn((text("I"),), "stop_sequence"),
    "for a pause": Turn((text("I"), tool("run", hypothesis="x")), "pause_turn"),
    "with its window full": Turn((tool("run", hypothesis="x"),), "model_context_window_exceeded"),
    "as no reply ended before": Turn((tool("run", hypothesis="x"),), "tea_break", odd=True),
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS.keys())
def test_a_night_goes_on_however_a_reply_ends(tmp_path: Path, ending: Turn) -> None:
    """What may be half a call is not done; the strict server refuses no request."""
    scene = Scene(tmp_path, session={"attempts": 1})
    assert scene.play(scene.then(ending)).reason is StopReason.ATTEMPTS
    assert [] == scene.server.unplanned
    assert 1 == len(scene.history.completed)
    is_whole = ending.stop_reason in ("pause_turn", "tea_break")
    assert 1 + is_whole == sum(event.name == "run" for event in scene.events(ToolCalled))


def test_a_service_that_rejects_every_conversation_ends_the_session(tmp_path: Path) -> None:
    """The same 400 for hours costs money and brings nothing."""
    scene = Scene(tmp_path, researcher=ALONE)
    places = itertools.count(1)

    def looks_elsewhere(request: Request) -> Turn:
        return say(tool("read", file_path="train.py", view_range=[1, next(places)]))

    rejected = Status(400, "invalid_request_error", "messages.1: it is not good")
    ended = scene.play(itertools.chain.from_iterable(itertools.repeat([looks_elsewhere, rejected])))
    assert StopReason.API_REFUSED is ended.reason
    assert "nightlab resume" in ended.explanation
    assert 4 == scene.notices().count("history_rejected")
    assert 8 == len(scene.server.requests)


def test_one_refusal_opens_a_conversation_without_what_was_refused(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    assert scene.play(scene.then(REFUSED)).reason is StopReason.ATTEMPTS
    reasons = [(e.researcher, e.reason) for e in scene.events(ConversationOpened)]
    assert ("claude-sonnet-5-5", "the model refused") == reasons[1]
    assert {"claude-sonnet-5-5"} == {name for name, _ in reasons}


def test_a_second_refusal_asks_the_next_model_and_two_more_hand_over_to_tpe(
    tmp_path: Path,
) -> None:
    scene = Scene(tmp_path, researcher={"then": ["claude-opus-5-5", "tpe"]})
    ended = scene.play([REFUSED] * 4)
    assert ended.reason is StopReason.ATTEMPTS
    assert [
        "claude-sonnet-5-5",
        "claude-sonnet-5-5",
        "claude-opus-5-5",
        "claude-opus-5-5",
        "tpe",
    ] == [event.researcher for event in scene.events(ConversationOpened)]
    assert ["claude-sonnet-5-5"] * 2 + ["claude-opus-5-5"] * 2 == [
        request["model"] for request in scene.server.requests
    ]
    assert {"tpe"} == {a.started.researcher for a in scene.history.completed}
    assert 4 == scene.notices().count("refusal")
    assert 2 == scene.notices().count("stand_in")


HANDED_OVER: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "agent_idle": ([say(text("Hm."))] * 4, {}),
    "stuck": ([READ] * 12, {}),
    "money": ([READ], {"usd": 0.34}),
    "calls": ([READ] * 2, {"calls": 2}),
    "tokens": ([READ], {"tokens": 38_000}),
    "api_refused": ([Status(401, "authentication_error")], {}),
}


@pytest.mark.parametrize("reason", HANDED_OVER)
def test_whoever_cannot_go_on_hands_over_and_the_night_is_used(tmp_path: Path, reason: str) -> None:
    script, limits = HANDED_OVER[reason]
    scene = Scene(tmp_path, session=limits)
    assert scene.play(script).reason is StopReason.ATTEMPTS
    assert {"tpe"} == {a.started.researcher for a in scene.history.completed}
    kind = "stand_in_meanwhile" if reason in ("money", "calls", "tokens") else "stand_in"
    assert {reason, kind} <= set(scene.notices())
    assert [] == audit(scene.place.directory, read_ledger(scene.place.directory))


@pytest.mark.parametrize("reason", HANDED_OVER)
def test_a_night_whose_person_wants_no_stand_in_ends(tmp_path: Path, reason: str) -> None:
    script, limits = HANDED_OVER[reason]
    scene = Scene(tmp_path, session=limits, researcher=ALONE)
    assert reason == scene.play(script).reason.value


def test_the_sampler_works_during_an_outage_and_the_model_comes_back(tmp_path: Path) -> None:
    scene = Scene(tmp_path, session={"attempts": 5})
    clock = scene.place.clock

    def outage() -> Iterator[Any]:
        yield scene.mind.answer
        yield scene.mind.answer
        while len(scene.history.completed) < 3:
            yield Status(529, "overloaded_error")
        yield from itertools.repeat(scene.mind.answer)

    began = clock.seconds
    assert scene.play(outage()).reason is StopReason.ATTEMPTS
    by = [a.started.researcher for a in scene.history.completed]
    model = "claude-sonnet-5-5"
    assert [model, "tpe", "tpe", model, model] == by
    assert 1 == scene.notices().count("stand_in_meanwhile")
    asked = [e.reason for e in scene.events(ConversationOpened)].count("the service is asked again")
    assert 2 == asked
    assert clock.seconds - began < 3600


def knobless(root: Path) -> Path:
    """The toy's workspace, in which a sampler finds nothing to turn."""
    shutil.copytree(TOY / "workspace", root)
    path = root / "train.py"
    lines = path.read_text().splitlines()
    fixed = [line + "; fixed" if re.match("[XY] = ", line) else line for line in lines]
    path.write_text("\n".join(fixed) + "\n")
    return root


def test_an_outage_is_waited_out_where_the_sampler_has_nothing_left(tmp_path: Path) -> None:
    """`exhausted` is a planned stop: of an outage it would make a night that went well."""
    scene = Scene(tmp_path / "runs")
    scene.place.workspace = knobless(tmp_path / "own")
    away = [Status(529, "overloaded_error")] * 40
    stop = Status(401, "authentication_error", "the end of the script")
    ended = scene.play([*away, READ, stop, stop])
    assert StopReason.API_REFUSED is ended.reason, ended
    assert [] == scene.history.completed
    assert 42 == len(scene.server.requests)
    assert ["api_outage", "exhausted"] == [
        kind for kind in scene.notices() if kind in ("api_outage", "exhausted")
    ]


def test_an_outage_that_does_not_end_ends_no_night_as_planned(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "runs", session={"hours": 2.0})
    scene.place.workspace = knobless(tmp_path / "own")
    ended = scene.play(itertools.repeat(Status(529, "overloaded_error")))
    assert StopReason.API_OUTAGE is ended.reason, ended
    assert scene.history.time.active_seconds > 7000


def test_all_models_of_a_common_outage_come_back_in_their_order(tmp_path: Path) -> None:
    models = ["claude-sonnet-5-5", "claude-opus-5-5"]
    scene = Scene(
        tmp_path, session={"attempts": 4}, researcher={"then": ["claude-opus-5-5", "tpe"]}
    )

    def outage() -> Iterator[Any]:
        while len(scene.history.completed) < 2:
            yield Status(529, "overloaded_error")
        yield from itertools.repeat(scene.mind.answer)

    assert scene.play(outage()).reason is StopReason.ATTEMPTS
    by = [a.started.researcher for a in scene.history.completed]
    assert ["tpe", "tpe", models[0], models[0]] == by
    asked = [request["model"] for request in scene.server.requests]
    first = asked.index(models[1])
    again = asked[first:].index(models[0]) + first
    # Each of them is waited for once; after an attempt each is asked once, and nobody waits.
    assert [models[0], models[1], models[0]] == asked[again : again + 3]
    assert 2 == scene.notices().count("stand_in_meanwhile")


UNUSABLE: dict[str, Any] = {
    "a page": Raw(200, b"<html>We are back soon</html>", {"content-type": "text/html"}),
    "streams that end too early": Turn((text("half of it " * 50),), cut=Cut(4, "end")),
}


@pytest.mark.parametrize("answer", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_a_gateway_s_maintenance_is_an_outage(tmp_path: Path, answer: Any) -> None:
    scene = Scene(tmp_path, session={"attempts": 4})

    def outage() -> Iterator[Any]:
        yield scene.mind.answer
        while len(scene.history.completed) < 2:
            yield answer
        yield from itertools.repeat(scene.mind.answer)

    assert scene.play(outage()).reason is StopReason.ATTEMPTS
    by = [a.started.researcher for a in scene.history.completed]
    assert ["tpe", "tpe", "claude-sonnet-5-5", "claude-sonnet-5-5"] == by
    assert {"api_outage", "history_rejected", "stand_in_meanwhile"} <= set(scene.notices())
    assert [] == audit(scene.place.directory, read_ledger(scene.place.directory))


def test_an_hour_of_a_gateway_s_maintenance_is_waited_out_without_a_stand_in(
    tmp_path: Path,
) -> None:
    scene = Scene(tmp_path, researcher=ALONE)
    ended = scene.play(scene.then(scene.mind.answer, *[UNUSABLE["a page"]] * 40))
    assert StopReason.ATTEMPTS is ended.reason, ended
    assert {"claude-sonnet-5-5"} == {a.started.researcher for a in scene.history.completed}
    assert 1 == scene.notices().count("history_rejected")
    assert scene.history.time.active_seconds > 3600


def test_an_outage_without_a_stand_in_is_waited_out(tmp_path: Path) -> None:
    scene = Scene(tmp_path, researcher=ALONE)
    away = [Status(529, "overloaded_error")] * 40
    assert scene.play(scene.then(*away)).reason is StopReason.ATTEMPTS
    assert {"claude-sonnet-5-5"} == {a.started.researcher for a in scene.history.completed}


def test_a_resume_with_more_money_asks_the_model_first(tmp_path: Path) -> None:
    scene = Scene(tmp_path, session={"usd": 0.34})
    scene.play([READ])
    settings = scene.place.program.settings
    more = settings.session.model_copy(update={"attempts": 4, "usd": 5.0})
    scene.place.program = type(scene.place.program)(
        "", settings.model_copy(update={"session": more}), scene.place.program.source
    )
    with MessagesServer(scene.then(), endless=True) as server:
        work_with_claude(scene.place.resume(), scene.place, server)
    by = [a.started.researcher for a in scene.history.completed]
    assert ["tpe", "tpe", "claude-sonnet-5-5", "claude-sonnet-5-5"] == by


def test_a_resumed_session_goes_on_with_the_researcher_that_stood_in(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.play([REFUSED] * 2)
    settings = scene.place.program.settings
    more = settings.session.model_copy(update={"attempts": 3})
    scene.place.program = type(scene.place.program)(
        "", settings.model_copy(update={"session": more}), scene.place.program.source
    )
    with MessagesServer([], endless=True) as server:
        work_with_claude(scene.place.resume(), scene.place, server)
    assert {"tpe"} == {a.started.researcher for a in scene.history.completed}
    assert 3 == len(scene.history.completed)


def test_a_session_goes_on_with_another_researcher(tmp_path: Path) -> None:
    scene = Scene(tmp_path, session={"attempts": 3})
    change = {"old_string": "import json\n", "new_string": "import json  # untried\n"}

    def edit_and_stop(_: Request) -> Turn:
        ask_to_stop(scene.place.directory)
        return say(tool("edit", file_path="train.py", **change))

    assert StopReason.STOPPED is scene.play([READ, edit_and_stop]).reason
    place, settings = scene.place, scene.place.program.settings
    place.program = dataclasses.replace(
        place.program, settings=settings.with_overrides(researcher="tpe")
    )
    lab = place.open()
    with lab.ledger:
        recover(lab, removed_containers=(), engine={}, researcher="tpe")
        ended = play(lab, place.program)
    assert StopReason.ATTEMPTS is ended.reason
    assert {"tpe"} == {attempt.started.researcher for attempt in scene.history.completed}
    entries = read_ledger(place.directory)
    assert "tpe" == summary(entries).researcher
    assert [] == audit(place.directory, entries)
    for attempt in scene.history.completed:
        tried = read_blob(place.directory, attempt.started.files["train.py"])
        assert b"# untried" not in tried


def test_a_sampler_s_session_goes_on_with_the_model_that_the_person_names(tmp_path: Path) -> None:
    scene = Scene(tmp_path, session={"attempts": 1})
    place = scene.place
    work(place.begin("tpe"), place.program)
    more = place.program.settings.with_overrides(attempts=2)
    place.program = dataclasses.replace(place.program, settings=more)
    lab = place.open()
    recover(lab, removed_containers=(), engine={}, researcher="claude")
    with MessagesServer(scene.then(), endless=True) as server:
        assert StopReason.ATTEMPTS is work_with_claude(lab, place, server).reason
    assert server.requests
    first, second = (attempt.started.researcher for attempt in scene.history.completed)
    assert "tpe" == first != second
    assert [] == audit(place.directory, read_ledger(place.directory))


def test_a_sampler_that_stands_in_starts_from_the_best_and_not_from_untried_edits(
    tmp_path: Path,
) -> None:
    scene = Scene(tmp_path, session={"attempts": 1})
    change = {"old_string": "import json\n", "new_string": "import json  # untried\n"}
    edit = say(tool("edit", file_path="train.py", **change))
    ended = scene.play([READ, edit, *[REFUSED] * 9])
    assert StopReason.ATTEMPTS is ended.reason
    (attempt,) = scene.history.completed
    assert "tpe" == attempt.started.researcher
    written = scene.events(FileChanged)[0].after
    assert b"# untried" in read_blob(scene.place.directory, written)
    tried = read_blob(scene.place.directory, attempt.started.files["train.py"])
    assert b"# untried" not in tried


def cheats(request: Request) -> Turn:
    """A reply whose candidate holds held-out text, another one each time."""
    number = len(request["messages"])
    line = f"TEXT = {PACKED!r}  # {number}\n"
    edit = {"old_string": "import json\n", "new_string": f"import json\n{line}"}
    return say(tool("edit", file_path="train.py", **edit), tool("run", hypothesis="by heart"))


def test_a_researcher_whose_scores_are_refused_too_often_is_stood_in_for(tmp_path: Path) -> None:
    scene = Scene(tmp_path, session={"attempts": 5})
    write_data(tmp_path / "data")
    ended = scene.play([READ, cheats, cheats, cheats, cheats])
    assert StopReason.ATTEMPTS is ended.reason
    by = [attempt.started.researcher for attempt in scene.history.completed]
    assert ["claude-sonnet-5-5"] * 3 + ["tpe"] * 2 == by
    assert ["refused_scores", "stand_in"] == scene.notices()[-2:]
    assert 4 == len(scene.server.requests)
    told = str(scene.server.requests[-1]["messages"][-1]["content"])
    assert "2; after 3 of them you try nothing more" in told
    entries = read_ledger(scene.place.directory)
    assert "refused_scores" in {item.kind for item in summary(entries).attention}
    assert [] == audit(scene.place.directory, entries)


def test_runs_of_one_reply_are_bounded_as_well_and_a_crash_is_no_cheat(tmp_path: Path) -> None:
    scene = Scene(tmp_path, session={"attempts": 9, "max_refused_scores": 2})
    write_data(tmp_path / "data")
    bad = {"file_path": "train.py", "old_string": "X = 1.0 ", "new_string": "X = 900.0 "}
    crash = say(tool("edit", **bad), tool("run", hypothesis="too far out"))
    replies = [cheats({"messages": [0] * n}).blocks for n in range(4)]
    several = Turn(tuple(block for blocks in replies for block in blocks))
    scene.play([READ, crash, several])
    mine = [a for a in scene.history.completed if a.started.researcher != "tpe"]
    assert ["out_of_memory", *["holds_held_out_text"] * 2] == [
        a.finished.reason for a in mine if a.finished
    ]


def test_a_sampler_whose_scores_are_refused_ends_its_night(tmp_path: Path) -> None:
    place = Place(tmp_path, changes={"session": {"attempts": 5, "max_refused_scores": 2}})
    lab = place.begin("tpe")

    def refused(spec: RunSpec, result: RunResult, output: Path | None) -> RunResult:
        if spec.box == "scorer" and output is not None and "-0-" not in spec.run_id:
            sheet = json.loads((output / "score.json").read_text())
            sheet |= {"value": None, "valid": False, "reason": "looks_ahead"}
            (output / "score.json").write_text(json.dumps(sheet))
        return result

    place.boxes.outcome = refused
    ended = work(lab, place.program, "tpe")
    assert StopReason.REFUSED_SCORES is ended.reason
    assert ended.explanation.startswith("2 scores of tpe were refused")
    refused_first = fold(read_ledger(place.directory)).completed[0].finished
    assert refused_first is not None
    assert "likely attention or a convolution" in refused_first.explanation
    again = work(place.resume(), place.program, "tpe")
    assert StopReason.REFUSED_SCORES is again.reason
    assert [] == audit(place.directory, read_ledger(place.directory))


def test_circles_are_named_once_then_left_then_end_the_session(tmp_path: Path) -> None:
    scene = Scene(tmp_path, researcher=ALONE)
    ended = scene.play([READ] * 12)
    assert (StopReason.STUCK, 12) == (ended.reason, len(scene.server.requests))
    assert 3 == scene.notices().count("stuck")
    assert 2 == len(scene.events(ConversationOpened))
    said = str(scene.server.requests[4]["messages"][-1]["content"])
    assert "You are going in circles: read was called 4 times" in said


def test_a_researcher_that_leaves_its_circle_is_forgiven(tmp_path: Path) -> None:
    scene = Scene(tmp_path, session={"attempts": 3})

    def works(request: Request) -> Turn:
        return scene.mind.answer(request)

    one_round = [READ] * 4 + [works] * 2
    assert scene.play(itertools.cycle(one_round)).reason is StopReason.ATTEMPTS
    assert 1 == len(scene.events(ConversationOpened))


def test_stop_ends_the_session_after_the_attempt_that_runs(tmp_path: Path) -> None:
    scene = Scene(tmp_path, session={"attempts": 50})

    def stop_now(request: Request) -> Turn:
        ask_to_stop(scene.place.directory)
        return say(tool("list"))

    ended = scene.play([scene.mind.answer, scene.mind.answer, stop_now])
    assert StopReason.STOPPED is ended.reason
    assert 1 == len(scene.history.completed)
    assert 3 == len(scene.server.requests)


def test_stop_lets_a_reply_end_before_its_next_training(tmp_path: Path) -> None:
    scene = Scene(tmp_path, session={"attempts": 50})

    def stop_and_run(request: Request) -> Turn:
        ask_to_stop(scene.place.directory)
        return scene.mind.answer(request)

    assert scene.play([READ, stop_and_run]).reason is StopReason.STOPPED
    assert [] == scene.history.completed
    assert scene.events(ToolReturned)[-1].name == "edit"
    assert scene.events(MessageAdded)[-1].role == "user"  # every call is answered


def test_a_pause_waits_longer_than_the_hours_and_costs_none_of_them(tmp_path: Path) -> None:
    scene = Scene(tmp_path, session={"attempts": 1, "hours": 0.75})
    clock, directory = scene.place.clock, scene.place.directory

    def pause(request: Request) -> Turn:
        ask_to_pause(directory)
        return say(tool("list"))

    lab = scene.place.begin("claude")
    end = 0.0

    def sleep(seconds: float) -> None:
        nonlocal end
        end = end or clock.seconds + 3000
        clock.advance(seconds)
        if clock.seconds >= end:
            ask_to_continue(directory)

    lab = with_sleep(lab, sleep)
    with MessagesServer(scene.then(pause), endless=True) as server:
        ended = work_with_claude(lab, scene.place, server)
    assert StopReason.ATTEMPTS is ended.reason
    assert ["paused", "continued"] == [k for k in scene.notices() if k in ("paused", "continued")]
    assert scene.history.time.active_seconds == pytest.approx(clock.seconds - 3000)


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ("Try a wider model.", "Try a deeper model.", "Try a deeper model."),
        ("Try a wider model.", "", "no guidance for this session now"),
    ],
    ids=["changed", "withdrawn"],
)
def test_guidance_that_changed_while_nobody_was_at_work_is_told(
    tmp_path: Path, before: str, now: str, told: str
) -> None:
    scene = Scene(tmp_path, session={"attempts": 2})
    path = scene.place.directory / "guidance.md"
    lab = scene.place.begin("claude")
    path.write_text(before)

    def stop(_: Request) -> Turn:
        ask_to_stop(scene.place.directory)
        return READ

    with MessagesServer(scene.then(stop, READ), endless=True) as server:
        assert StopReason.STOPPED is work_with_claude(lab, scene.place, server).reason
        path.write_text(now)
        work_with_claude(scene.place.resume(), scene.place, server)
    first, resumed, later, last = server.requests[:4]
    assert before in str(first["messages"][0])
    assert told not in str(resumed["messages"])
    assert told in str(later["messages"][-1])
    assert told not in str(last["messages"][-1])


def test_wishes_of_an_earlier_evening_do_not_bind_a_resume(tmp_path: Path) -> None:
    ask_to_stop(tmp_path)
    ask_to_pause(tmp_path)
    forget_wishes(tmp_path)
    assert not is_asked_to_pause(tmp_path)
    assert not ask_to_continue(tmp_path)


LIMITS: dict[str, tuple[dict[str, Any], StopReason]] = {
    "calls": ({"calls": 5}, StopReason.CALLS),
    "tokens": ({"tokens": 200_000}, StopReason.TOKENS),
    "money": ({"usd": 0.45}, StopReason.MONEY),
    "discards": ({"max_discards_in_a_row": 2}, StopReason.DISCARDS_IN_A_ROW),
}


@pytest.mark.parametrize(("limits", "reason"), LIMITS.values(), ids=LIMITS.keys())
def test_a_limit_holds_against_the_services_own_account(
    tmp_path: Path, limits: dict[str, Any], reason: StopReason
) -> None:
    scene = Scene(tmp_path, session={"attempts": 60, **limits}, researcher=ALONE)

    def cut(request: Request) -> Turn:
        return Turn(scene.mind.answer(request).blocks, cut=Cut(4, "end"))

    script = itertools.cycle([scene.mind.answer, scene.mind.answer, cut])
    assert scene.play(script).reason is reason
    bills = scene.server.bills
    assert len(bills) <= limits.get("calls", 1000)
    assert scene.server.billed_usd <= limits.get("usd", 1000.0)
    used = sum(
        b.input_tokens + b.output_tokens + b.cache_read_tokens + b.cache_write_tokens for b in bills
    )
    assert used <= limits.get("tokens", 10**9)


def test_streams_that_are_always_cut_end_at_the_money_limit(tmp_path: Path) -> None:
    # Little more than the most that one call can cost, so that few of them are cut.
    scene = Scene(tmp_path, session={"usd": 0.42, "hours": 24.0}, researcher=ALONE)
    cut = say(text("half of it " * 50), cut=Cut(6, "fin"))
    assert scene.play(itertools.repeat(cut)).reason is StopReason.MONEY
    assert 0.0 < scene.server.billed_usd <= 0.42
    assert len(scene.server.bills) > 1


def test_a_sweep_hands_attempts_to_the_sampler_within_the_limits(tmp_path: Path) -> None:
    scene = Scene(tmp_path, session={"attempts": 3})
    ended = scene.play([say(tool("sweep", attempts=5, knobs=["X"]))])
    assert ended.reason is StopReason.ATTEMPTS
    attempts = scene.history.completed
    assert ["tpe"] * 3 == [a.started.researcher for a in attempts]
    assert all("X " in a.started.hypothesis for a in attempts)
    assert not any("Y " in a.started.hypothesis for a in attempts)


def test_what_the_service_says_of_the_model_is_on_record(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.play(scene.then())
    facts = next(e.explanation for e in scene.events(Noticed) if e.kind == "model_facts")
    assert '"max_tokens": 128000' in facts


def test_a_model_that_retires_during_the_session_is_told_and_on_record(tmp_path: Path) -> None:
    scene = Scene(tmp_path, session={"hours": 10.0})
    leaving = CATALOGUE["claude-sonnet-5-5"] | {"retires_at": "2026-03-08T04:00:00Z"}
    lab, told = scene.place.begin("claude"), list[str]()
    with (
        MessagesServer([], catalogue=CATALOGUE | {"claude-sonnet-5-5": leaving}) as server,
        lab.ledger,
        open_models(lab, "claude", environ(server), on_warning=told.append),
    ):
        pass
    warning = "claude-sonnet-5-5 retires at 2026-03-08 04:00 UTC, before this session has to end"
    assert [warning] == told
    assert [warning] == [e.explanation for e in scene.events(Noticed) if e.kind == "model_retires"]


def test_the_console_tells_what_each_attempt_cost(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.play(scene.then())
    history, settings = scene.history, scene.place.program.settings
    lines = [attempt_line(attempt, history, settings) for attempt in history.attempts]
    assert "$" not in lines[0]
    for attempt, line in zip(history.completed, lines[1:], strict=True):
        assert f" s  ${attempt.cost_usd:.3f}  " in line


def test_a_model_that_stays_is_no_cause_for_a_warning(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.play(scene.then())
    assert "model_retires" not in scene.notices()


def environ(server: MessagesServer) -> dict[str, str]:
    return {"ANTHROPIC_API_KEY": "not-a-real-key", "ANTHROPIC_BASE_URL": server.url}


def test_a_sampler_s_replies_are_none_of_the_service_s(tmp_path: Path) -> None:
    """A night that only tpe worked through ends with exit code 3; docs/researchers.md says so."""
    away, there = Scene(tmp_path / "away"), Scene(tmp_path / "there")
    down = Status(529, "overloaded_error")
    assert away.play(itertools.repeat(down)).reason is StopReason.ATTEMPTS
    assert any(call.reply for call in away.events(ModelCalled))
    there.play(itertools.chain([READ], itertools.repeat(down)))
    unasked = Place(tmp_path / "unasked")
    work(unasked.begin("tpe"), unasked.program)
    for place, expected in ((away.place, True), (there.place, False), (unasked, False)):
        events = [entry.event for entry in read_ledger(place.directory)]
        assert expected == never_replied(events)


TWO: dict[str, Any] = {"then": ["claude-opus-5-5", "tpe"]}
LOST = Turn((text("half of it"),), cut=Cut(4, "end"))


@pytest.mark.parametrize(
    ("limits", "spend", "answers", "asked"),
    [
        ({"calls": 3}, Spend(calls=3), [], 0),
        ({"usd": 1.0}, Spend(usd=0.95), [], 0),
        ({"tokens": 90_000}, Spend(output_tokens=89_000), [], 0),
        ({"calls": 3}, Spend(calls=2), [READ], 1),
        ({"calls": 2}, Spend(), [LOST] * 2, 2),
    ],
    ids=["calls", "money", "tokens", "calls of the first model", "calls that were cut"],
)
def test_the_first_call_keeps_the_limits_of_what_the_session_has_spent(
    tmp_path: Path, limits: dict[str, Any], spend: Spend, answers: list[Any], asked: int
) -> None:
    program = Scene(tmp_path, session=limits, researcher=TWO).place.program
    paid: list[ModelCalled] = []
    with MessagesServer(answers, helpful=False) as server:
        check_models(program, environ(server), paid, spend, sleep=lambda _: None)
    assert asked == len(server.requests) == len(paid)


def test_a_first_call_of_a_resume_is_on_record_although_the_next_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, session={"attempts": 1}, researcher=TWO)
    place = scene.place
    work(place.begin("tpe"), place.program)
    before = read_ledger(place.directory)
    refused = Status(401, "authentication_error")
    scripts: list[list[Any]] = [[refused], [READ, refused]]
    for made, script in enumerate(scripts):
        with MessagesServer(script, helpful=False) as server, place.open().ledger as ledger:
            for name, value in environ(server).items():
                monkeypatch.setenv(name, value)
            lab = quiet_lab(ledger, place.program.settings, place.runtime, place.clock)
            with pytest.raises(UsageError):
                begin_again(lab, place.program, "claude", (), {})
        entries = read_ledger(place.directory)
        assert [] == audit(place.directory, entries)
        new = [entry.event for entry in entries[len(before) :]]
        assert [SessionResumed, ModelCalled][: 2 * made] == [type(event) for event in new]
    assert scene.history.spend.usd > 0


def test_a_mistyped_stand_in_is_found_before_the_session_begins(tmp_path: Path) -> None:
    scene = Scene(tmp_path, researcher={"then": ["claude-opos-5-5"]})
    with MessagesServer([]) as server, pytest.raises(UsageError, match="knows no claude-opos-5-5"):
        check_models(scene.place.program, environ(server), [], Spend())


def test_a_mistyped_model_begins_no_session(tmp_path: Path) -> None:
    program = (Path(__file__).parents[3] / "program.md").read_text()
    mistyped = program.replace("claude-sonnet-5-5", "claude-sonet-5-5").replace("usd = 20.0", "")
    (tmp_path / "program.md").write_text(mistyped)
    command = ["run", "--program", str(tmp_path / "program.md"), "--runs", str(tmp_path / "runs")]
    with MessagesServer([]) as server:
        done = CliRunner().invoke(app, [*command, "--researcher", "claude"], env=environ(server))
    assert 2 == done.exit_code, done.output
    assert "knows no claude-sonet-5-5" in done.output
    assert "It offers claude-sonnet-5-5" in done.output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ANTHROPIC_BASE_URL": "http://127.0.0.1:9"}, "nobody answers at 127.0.0.1"),
        ({"ANTHROPIC_BASE_URL": "ftp://127.0.0.1"}, "ANTHROPIC_BASE_URL is no address"),
        ({"ANTHROPIC_API_KEY": "not a real key"}, "ANTHROPIC_API_KEY holds a blank"),
        ({"ALL_PROXY": "socks5://127.0.0.1:9"}, "ALL_PROXY"),
        ({"NO_PROXY": "fd00::/8"}, "NO_PROXY"),
        ({"SSL_CERT_FILE": "/nowhere/ca.pem"}, "SSL_CERT_FILE"),
    ],
    ids=["address", "no address", "key", "proxy", "no proxy", "certificates"],
)
def test_a_key_or_an_address_that_cannot_work_begins_no_session(
    tmp_path: Path, changed: dict[str, str], said: str
) -> None:
    with MessagesServer([]) as server:
        env = environ(server) | changed
        command = ["run", "--runs", str(tmp_path / "runs"), "--attempts", "1"]
        done = CliRunner().invoke(app, [*command, "--researcher", "claude"], env=env)
    assert 2 == done.exit_code, done.output
    assert said in done.output
    assert "--researcher tpe" in done.output
    assert not (tmp_path / "runs").exists()


def test_random_draws_everywhere_and_needs_no_service(tmp_path: Path) -> None:
    scene = Scene(tmp_path, session={"attempts": 6})
    ended = work(scene.place.begin("random"), scene.place.program, "random")
    assert ended.reason is StopReason.ATTEMPTS
    assert {"random"} == {a.started.researcher for a in scene.history.completed}
    assert 0.0 == scene.history.spend.usd


def test_a_study_goes_on_after_a_stop_as_if_there_had_been_none(tmp_path: Path) -> None:
    whole = Place(tmp_path / "whole", changes={"session": {"attempts": 9}})
    work(whole.begin("tpe"), whole.program)
    halves = Place(tmp_path / "halves", changes={"session": {"attempts": 4}})
    work(halves.begin("tpe"), halves.program)
    halves.program = whole.program
    work(halves.resume(), halves.program)
    tried = [
        [attempt.started.files for attempt in fold(read_ledger(place.directory)).attempts]
        for place in (whole, halves)
    ]
    assert 10 == len(tried[0])
    assert tried[0] == tried[1]


@pytest.mark.parametrize("seed", range(3))
def test_a_crash_at_any_event_loses_and_doubles_nothing(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    scene = Scene(tmp_path, session={"attempts": 4, "hours": 24.0})
    lab = scene.place.begin("claude")
    at, crashes = 2, 0
    with MessagesServer(scene.then(), endless=True) as server:
        while True:
            at = len(lab.ledger.entries) + chance.randint(1, 150)
            assert isinstance(lab.ledger, CrashingLedger)
            lab.ledger.crash_at = at
            lab.ledger.crash_after_writing = chance.random() < 0.5
            try:
                ended = work_with_claude(lab, scene.place, server)
            except Crash:
                crashes += 1
                lab = scene.place.resume()
                continue
            break
    assert (StopReason.ATTEMPTS, 4) == (ended.reason, len(scene.history.completed))
    assert crashes > 1
    assert not any(attempt.open for attempt in scene.history.attempts)
    assert server.billed_usd <= scene.history.spend.usd + 1e-9


COMMANDS = [("pause", "pauses after"), ("continue", "goes on"), ("stop", "ends after")]


def test_a_command_stops_only_a_session_that_has_not_ended(tmp_path: Path) -> None:
    scene = Scene(tmp_path, session={"attempts": 1})
    with scene.place.begin("claude").ledger:
        for command, said in COMMANDS:
            done = CliRunner().invoke(app, [command, "night", "--runs", str(tmp_path)])
            assert 0 == done.exit_code, done.output
            assert said in done.output


def test_a_command_for_a_session_that_was_cut_off_says_that_nobody_is_at_work(
    tmp_path: Path,
) -> None:
    scene = Scene(tmp_path, session={"attempts": 1})
    scene.place.begin("claude").ledger.close()
    for command, _ in COMMANDS:
        done = CliRunner().invoke(app, [command, "night", "--runs", str(tmp_path)])
        assert 2 == done.exit_code, done.output
        assert "nobody is at work on night" in done.output
        assert "nightlab resume night" in done.output
    assert [] == [path for path in scene.place.directory.iterdir() if path.name in (PAUSE, STOP)]


def test_a_command_for_a_session_that_ended_says_so(tmp_path: Path) -> None:
    scene = Scene(tmp_path, session={"attempts": 1})
    scene.play(scene.then())
    done = CliRunner().invoke(app, ["stop", "night", "--runs", str(tmp_path)])
    assert 2 == done.exit_code
    assert "has ended already (attempts)" in done.output
