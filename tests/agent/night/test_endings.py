"""How a night goes on after each of its endings, and with another model."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from agent.cli.app import app
from agent.cli.night import begin_again
from agent.morning.audit import audit
from agent.record.chain import read_ledger
from agent.record.events import ModelCalled, SessionEnded, SessionResumed, StopReason
from agent.record.history import fold
from agent.record.ledger import Ledger
from agent.report.console import ON, closing_lines
from agent.report.summary import summary
from agent.report.tables import machine_state
from agent.settings import ProgramError
from tests.support import histories
from tests.support.messages_server import MessagesServer, Status, Turn, say, text, tool
from tests.support.minds import Scene, work_with_claude
from tests.support.nights import Place

ALONE: dict[str, Any] = {"then": []}
READ = say(tool("read", file_path="train.py"))
COMMAND = re.compile(r"nightlab resume \w+((?: --[a-z-]+(?: \w+)?)*)")
RESUME = get_command(app).commands["resume"]  # type: ignore[attr-defined]
FLAGS = {flag for parameter in RESUME.params for flag in parameter.opts}
LIMIT = "input length and `max_tokens` exceed context limit"

ENDINGS: dict[str, tuple[Any, str, str]] = {
    "no credit, by status": (Status(402, "billing_error"), "no credit", "--researcher claude"),
    "no credit, in words": (
        Status(400, "invalid_request_error", "Your credit balance is too low"),
        "no credit",
        "--researcher claude",
    ),
    "a usage limit": (
        Status(400, "invalid_request_error", "You have reached your specified API usage limits."),
        "usage limit",
        "--researcher claude",
    ),
    "a spend cap": (
        Status(429, "rate_limit_error", error_code="enforced_spend_limit_reached"),
        "spend limit",
        "--researcher claude",
    ),
    "a key that is no more": (
        Status(401, "authentication_error"),
        "ANTHROPIC_API_KEY",
        "--researcher claude",
    ),
    "a model that is no more": (Status(404, "not_found_error"), "model's id", "--model OTHER"),
    "a model one may not use": (Status(403, "permission_error"), "may not", "--model OTHER"),
    "a window too small": (
        Status(400, "invalid_request_error", "prompt is too long: 9 tokens > 8 maximum"),
        "window",
        "--max-conversation-tokens N --max-output-tokens M",
    ),
    "replies too long": (
        Status(400, "invalid_request_error", "max_tokens: 32000 > 8192, the most for this model"),
        "what the server allows",
        "--max-output-tokens N",
    ),
    "no tools": (
        Status(400, "invalid_request_error", "this model does not support tools"),
        "calls tools",
        "--model OTHER",
    ),
    "no thinking": (
        Status(400, "invalid_request_error", "thinking is not supported by this model"),
        'thinking = "off"',
        "--model OTHER",
    ),
    "a window full in every conversation": (
        Turn((text("I"),), "model_context_window_exceeded"),
        "window",
        "--max-conversation-tokens N --max-output-tokens M",
    ),
    "words alone": (Turn((text("Shall I?"),), "end_turn"), "", "--model OTHER"),
    "refusals": (Turn((text("I"),), "refusal"), "", "--model OTHER"),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_a_night_that_the_service_ends_names_what_to_change_and_how_to_go_on(
    name: str, tmp_path: Path
) -> None:
    answer, cure, flags = ENDINGS[name]
    scene = Scene(tmp_path, researcher=ALONE)
    scene.play(itertools.chain([READ], itertools.repeat(answer)))
    said = closing_lines(summary(read_ledger(scene.place.directory)), scene.place.directory)
    assert cure in said[0]
    commands = [found[1].strip() for found in COMMAND.finditer("\n".join(said))]
    assert flags in commands, said
    named = {word for command in commands for word in command.split() if word.startswith("--")}
    assert named <= FLAGS
    assert f"nightlab resume {scene.place.directory.name}" in said[-1]


@pytest.mark.parametrize("reason", StopReason)
def test_every_ending_says_how_it_goes_on(reason: StopReason, tmp_path: Path) -> None:
    made = histories.night(3)
    entries = [e for e in made.entries if not isinstance(e.event, SessionEnded)]
    end = entries[-1].model_copy(update={"event": SessionEnded(reason=reason, explanation="so")})
    said = "\n".join(closing_lines(summary([*entries, end]), tmp_path / "night"))
    # Those that are over by their own count have nothing to go on with but other settings.
    is_over = reason in ON and ON[reason] is None
    assert is_over != ("nightlab resume night" in said)
    named = [word for match in COMMAND.finditer(said) for word in match[1].split()]
    assert {word for word in named if word.startswith("--")} <= FLAGS


def test_a_model_that_was_replaced_for_good_can_be_asked_again(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    ended = scene.play(itertools.chain([READ], itertools.repeat(Status(402, "billing_error"))))
    assert StopReason.ATTEMPTS is ended.reason
    said = closing_lines(summary(read_ledger(scene.place.directory)), scene.place.directory)
    assert "--attempts N; add --researcher claude to ask the model again" in said[-1]
    assert any("no credit: add some" in line for line in said)
    # The sampler that went on made many replies, which are no calls of a model.
    assert 1 == scene.history.spend.calls < len(scene.events(ModelCalled))


def resumed(place: Place, server: MessagesServer, **flags: Any) -> None:
    """What `nightlab resume` does, without an engine."""
    with Ledger.open(place.directory) as ledger:
        settings = ledger.history.in_force.with_overrides(**flags)
    place.program = type(place.program)(place.program.prose, settings, place.program.source)
    lab = place.open()
    with lab.ledger:
        begin_again(lab, place.program, "claude", (), {})
    work_with_claude(place.open(), place, server)


def test_a_night_goes_on_with_another_model_its_price_and_its_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"then": [], "price_usd_per_million": [1000.0, 1000.0]}
    scene = Scene(tmp_path, researcher=own, session={"attempts": 1})
    scene.play(scene.then())
    before = len(scene.events(ModelCalled))
    with MessagesServer(scene.then(), endless=True) as server:
        monkeypatch.setenv("ANTHROPIC_API_KEY", "not-a-real-key")
        monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url)
        resumed(
            scene.place,
            server,
            attempts=2,
            model="claude-opus-5-5",
            max_output_tokens=9000,
        )
    asked = [(r["model"], r["max_tokens"]) for r in server.requests]
    assert {("claude-opus-5-5", 9000)} == set(asked)
    calls = scene.events(ModelCalled)[before:]
    assert sum(call.cost_usd for call in calls) == pytest.approx(server.billed_usd)
    assert ["claude-sonnet-5-5", "claude-opus-5-5"] == [
        attempt.started.researcher for attempt in scene.history.completed
    ]
    told = dict(machine_state(scene.history, read_ledger(scene.place.directory)))["changed then"]
    assert 'model "claude-opus-5-5" in place of "claude-sonnet-5-5"' in told
    assert "max_output_tokens 9000 in place of 32000" in told
    assert "price_usd_per_million [] in place of [1000.0, 1000.0]" in told
    entries = read_ledger(scene.place.directory)
    assert [] == audit(scene.place.directory, entries)
    # The wall: without the resume's settings the same calls are no longer those of the night.
    place = next(i for i, e in enumerate(entries) if isinstance(e.event, SessionResumed))
    first = scene.events(SessionResumed)[0]
    kept = fold(entries[:place]).in_force
    entries[place] = entries[place].model_copy(
        update={"event": first.model_copy(update={"settings": kept})}
    )
    said = " ".join(one.what for one in audit(scene.place.directory, entries))
    assert "claude-opus-5-5 was asked, which the settings in force do not name" in said


def test_a_price_of_ones_own_goes_with_its_model() -> None:
    settings = Place(Path("/nowhere"), changes={}).program.settings
    other = settings.with_overrides(model="mine", price=(2.0, 8.0))
    assert (2.0, 8.0) == other.researcher.price_usd_per_million
    same = other.with_overrides(model="mine", max_output_tokens=2000)
    assert (2.0, 8.0) == same.researcher.price_usd_per_million
    assert () == other.with_overrides(model="another").researcher.price_usd_per_million
    for wrong in ({"max_output_tokens": 1}, {"price": (1.0,)}, {"price": (float("nan"), 1.0)}):
        flag = next(iter(wrong)).replace("_", "-")
        with pytest.raises(ProgramError, match=f"^--{flag}"):
            settings.with_overrides(**wrong)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "mine"], "add --researcher claude"),
        (["--price", "two"], "--price"),
        (["--max-output-tokens", "1"], "--max-output-tokens 1"),
    ],
)
def test_flags_of_a_resume_that_cannot_be_are_refused(
    words: list[str], said: str, tmp_path: Path
) -> None:
    place = Place(tmp_path, changes={"session": {"attempts": 9}})
    place.begin("tpe").ledger.close()
    before = (place.directory / "ledger.jsonl").read_bytes()
    done = CliRunner().invoke(app, ["resume", "night", "--runs", str(tmp_path), *words])
    assert 2 == done.exit_code
    assert said in done.output
    assert before == (place.directory / "ledger.jsonl").read_bytes()
