"""Keeps the spans of a session, without any exporter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import INVALID_SPAN_CONTEXT, NonRecordingSpan, Span, Tracer


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
