"""OpenTelemetry spans; without an exporter they cost nothing.

Names and attributes stand here alone, those of a box aside (`attempt/lab.py`): the conventions for
agents are still in development.
"""

from contextlib import AbstractContextManager

from opentelemetry.trace import Span, Tracer, get_tracer

SESSION, ATTEMPT, CALL = "invoke_agent nightlab", "nightlab.attempt", "chat"


def usual_tracer() -> Tracer:
    """The tracer of whatever provider the process was given; none means that nothing is kept."""
    return get_tracer("nightlab")


def tool_span(name: str) -> str:
    """The name of a tool call's span."""
    return f"execute_tool {name}"


def attempt_span(tracer: Tracer, kind: str) -> AbstractContextManager[Span]:
    """A span around an attempt, which the spans of its runs hang from."""
    return tracer.start_as_current_span(ATTEMPT, attributes={"nightlab.kind": kind})
