"""OpenTelemetry spans; without an exporter they cost nothing.

Names and attributes stand here alone: the conventions for agents are still in development.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from opentelemetry.context import Context
from opentelemetry.trace import Span, Tracer, get_tracer, set_span_in_context

from sandbox.contract.run import Executor, RunResult, RunSpec

SESSION, ATTEMPT, CALL = "invoke_agent nightlab", "nightlab.attempt", "chat"


def usual_tracer() -> Tracer:
    """The tracer of whatever provider the process was given; none means that nothing is kept."""
    return get_tracer("nightlab")


def tool_span(name: str) -> str:
    """The name of a tool call's span."""
    return f"execute_tool {name}"


@contextmanager
def attempt_span(tracer: Tracer, executor: Executor, kind: str) -> Iterator[None]:
    """A span around an attempt, which the spans of its runs hang from."""
    attributes = {"nightlab.kind": kind}
    with tracer.start_as_current_span(ATTEMPT, attributes=attributes) as span:
        if not isinstance(executor, TracedExecutor):
            yield
            return
        executor.parent = span
        try:
            yield
        finally:
            executor.parent = None


class TracedExecutor:
    """An executor with a span around each run.

    Runs also come from threads of the scorer's, which know no surrounding span: `parent` is set
    to the attempt's while one goes on.
    """

    def __init__(self, executor: Executor, tracer: Tracer) -> None:
        self._executor = executor
        self._tracer = tracer
        self.parent: Span | None = None

    def run(
        self,
        spec: RunSpec,
        *,
        output_dir: Path | None = None,
        channel: socket.socket | None = None,
        on_log: Callable[[bytes], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> RunResult:
        """See `sandbox.contract.Executor`."""
        attributes = {"nightlab.run_id": spec.run_id, "nightlab.box": spec.box}
        with self._tracer.start_as_current_span(
            "nightlab.run", context=self._context(), attributes=attributes
        ) as span:
            result = self._executor.run(
                spec,
                output_dir=output_dir,
                channel=channel,
                on_log=on_log,
                should_stop=should_stop,
            )
            span.set_attribute("nightlab.outcome", result.outcome.value)
            span.set_attribute("nightlab.wall_seconds", result.wall_seconds)
            return result

    def answers(self) -> bool:
        """See `sandbox.contract.Executor`."""
        return self._executor.answers()

    def _context(self) -> Context | None:
        return None if self.parent is None else set_span_in_context(self.parent)
