"""The real service, for those who ask for it: `pytest --require api -m api`.

A session in pretended boxes with a real, cheap model: a few calls, a few cents, capped. What is
checked is run against the strict server too, so that the check itself is known to work.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from agent.record.chain import read_blob, read_ledger
from agent.record.events import PLANNED_STOPS, MessageAdded, ModelCalled, Noticed, ToolCalled
from agent.researcher.providers import cost_usd
from tests.support.facilities import missing
from tests.support.labs import work
from tests.support.messages_server import MessagesServer, Turn, say, text, thinking, tool
from tests.support.nights import Place

MODEL = "claude-haiku-5-5"
LIMIT_USD = 0.50
LIMIT_CALLS = 16
# Taken before the tests' own fixture hides it; the value goes nowhere but into the client.
ENVIRON = {
    name: os.environ[name]
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_BASE_URL")
    if os.environ.get(name)
}


def check_session(root: Path, environ: dict[str, str], model: str) -> None:
    """One attempt with a model: thinking, tools, the cache and the bill."""
    place = Place(
        root,
        changes={
            "session": {"attempts": 1, "hours": 1.0, "usd": LIMIT_USD, "calls": LIMIT_CALLS},
            "researcher": {"model": model, "max_output_tokens": 8192, "effort": "high"},
        },
    )
    lab, warnings = place.begin("claude"), list[str]()
    ended = work(lab, place.program, "claude", environ=environ, on_warning=warnings.append)
    entries = read_ledger(place.directory)

    def events(kind: type) -> list[Any]:
        return [entry.event for entry in entries if isinstance(entry.event, kind)]

    assert ended.reason in PLANNED_STOPS, ended
    assert "run" in {call.name for call in events(ToolCalled)}
    notices = {notice.kind: notice.explanation for notice in events(Noticed)}
    assert '"lifecycle"' in notices["model_facts"]
    assert not notices.keys() & {"history_rejected", "refusal"}, notices
    said = [json.loads(read_blob(place.directory, e.message)) for e in events(MessageAdded)]
    kinds = {b["type"] for m in said if m["role"] == "assistant" for b in m["content"]}
    assert {"thinking", "tool_use"} <= kinds
    check_bill(events(ModelCalled), model)


def check_bill(calls: list[ModelCalled], model: str) -> None:
    """Every call is counted and priced, and all but the first read what was cached before."""
    assert len(calls) > 1
    assert all(call.request_id for call in calls)
    assert all(call.usage.output_tokens > 0 for call in calls)
    assert calls[0].usage.cache_write_tokens + calls[0].usage.cache_read_tokens > 0
    assert all(call.usage.cache_read_tokens > 0 for call in calls[1:])
    for call in calls:
        assert call.cost_usd == cost_usd(model, call.usage)
    assert 0 < sum(call.cost_usd or 0.0 for call in calls) < LIMIT_USD


@pytest.mark.api
def test_a_real_model_works_through_an_attempt(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    if "ANTHROPIC_API_KEY" not in ENVIRON and "ANTHROPIC_AUTH_TOKEN" not in ENVIRON:
        missing(pytestconfig, "api", "neither ANTHROPIC_API_KEY nor ANTHROPIC_AUTH_TOKEN is set")
    check_session(tmp_path, ENVIRON, MODEL)


def test_the_check_of_the_real_model_holds_against_the_strict_server(tmp_path: Path) -> None:
    change = tool("edit", file_path="train.py", old_string="X = 1.0 ", new_string="X = 2.0 ")
    script: list[Turn] = [
        say(thinking("I look first."), tool("read", file_path="train.py")),
        say(thinking("Closer."), text("Trying."), change, tool("run", hypothesis="X is low")),
    ]
    with MessagesServer(script) as server:
        environ = {"ANTHROPIC_API_KEY": "not-a-real-key", "ANTHROPIC_BASE_URL": server.url}
        check_session(tmp_path, environ, "claude-sonnet-5-5")
