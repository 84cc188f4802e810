"""Spans of a session, collected without any exporter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import INVALID_SPAN_CONTEXT, NonRecordingSpan, Span, Tracer

from agent.night.assemble import assemble, open_models
from agent.night.loop import run_session
from agent.night.tracing import TracedExecutor
from tests.support.nights import Place


class KeptSpan(NonRecordingSpan):
    """A span that remembers its name, its parent and what was said of it."""

    def __init__(self, name: str, parent: Span, attributes: dict[str, Any]) -> None:
        super().__init__(INVALID_SPAN_CONTEXT)
        self.name, self.parent, self.attributes = name, parent, attributes

    def set_attribute(self, key: str, value: Any) -> None:
        self.attributes[key] = value


class Collector(Tracer):
    """Keeps the spans."""

    def __init__(self) -> None:
        self.spans: list[KeptSpan] = []

    def start_span(  # type: ignore[override]  # what it does not look at is left out
        self, name: str, context: Any = None, **options: Any
    ) -> Span:
        attributes = dict(options.get("attributes") or {})
        span = KeptSpan(name, trace.get_current_span(context), attributes)
        self.spans.append(span)
        return span

    @contextmanager
    def start_as_current_span(  # type: ignore[override]  # the base's is a decorator as well
        self, name: str, context: Any = None, **options: Any
    ) -> Iterator[Span]:
        span = self.start_span(name, context, **options)
        with trace.use_span(span):
            yield span

    def named(self, name: str) -> list[KeptSpan]:
        return [span for span in self.spans if span.name == name]


def test_session_attempt_call_tool_and_run_have_spans_that_hang_together(tmp_path: Path) -> None:
    place = Place(tmp_path, changes={"session": {"attempts": 2}})
    collector = Collector()
    lab = place.begin("tpe")
    executor = TracedExecutor(place.boxes, collector)
    lab = type(lab)(**{**vars(lab), "executor": executor})
    with lab.ledger, open_models(lab, "tpe", {}, lambda *_: None) as models:
        run_session(assemble(lab, place.program, models, tracer=collector), lambda: None)

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
