"""Spans of a session, collected without any exporter."""

from __future__ import annotations

from pathlib import Path

from tests.support.labs import traced, work
from tests.support.nights import Place
from tests.support.spans import Collector


def test_session_attempt_call_tool_and_run_have_spans_that_hang_together(tmp_path: Path) -> None:
    place = Place(tmp_path, changes={"session": {"attempts": 2}})
    collector = Collector()
    lab = place.begin("tpe")
    work(traced(lab, collector), place.program)

    (session,) = collector.named("invoke_agent nightlab")
    attempts = collector.named("nightlab.attempt")
    assert "attempts" == session.attributes["nightlab.ended"]
    assert ["baseline", "candidate", "candidate"] == [
        span.attributes["nightlab.kind"] for span in attempts
    ]
    assert {session} == {span.parent for span in collector.named("chat tpe")}
    tools = collector.named("execute_tool run")
    assert tools == [span.parent for span in attempts[1:]]
    assert session is attempts[0].parent
    boxes = {s.attributes["nightlab.box"] for s in collector.spans if s.parent is attempts[1]}
    assert {"train", "model", "scorer"} == boxes
    outcomes = {span.attributes["nightlab.outcome"] for span in collector.named("nightlab.run")}
    assert outcomes <= {"ok", "out_of_memory"}
