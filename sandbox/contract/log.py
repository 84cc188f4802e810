"""nightlab's own operational log, silent until an application configures it.

Machinery only: what was slow, waited for, asked again, taken away. What an attempt did is on the
ledger. One snake_case event a line, with its facts as fields; never prose, environment or secrets.
"""

from __future__ import annotations

from typing import Any

import structlog


class _QuietUntilConfigured:
    """Passes events to structlog once an application has called `structlog.configure`.

    structlog prints to stdout where nobody configured it, and there a caller's own answer stands.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def debug(self, event: str, **facts: object) -> None:
        """Log what only somebody who hunts a fault wants to know."""
        self._pass_on("debug", event, facts)

    def info(self, event: str, **facts: object) -> None:
        """Log what a person greps for when something was odd."""
        self._pass_on("info", event, facts)

    def warning(self, event: str, **facts: object) -> None:
        """Log what should not happen on a healthy machine."""
        self._pass_on("warning", event, facts)

    def _pass_on(self, level: str, event: str, facts: dict[str, Any]) -> None:
        if structlog.is_configured():
            getattr(structlog.get_logger(self._name), level)(event, **facts)


log = _QuietUntilConfigured("nightlab.sandbox")
