"""nightlab's own operational log, silent until an application configures it.

Machinery only: what was slow, waited for, asked again, taken away. What an attempt did is on the
ledger. One snake_case event a line, with its facts as fields; never prose, environment or secrets.
"""

from collections.abc import Callable

import structlog


class _QuietUntilConfigured:
    """A structlog logger once an application has called `structlog.configure`; silence before.

    structlog prints to stdout where nobody configured it, and there a caller's own answer stands.
    """

    def __getattr__(self, level: str) -> Callable[..., None]:
        """Return the method of a level: `debug`, `info`, `warning`."""
        logger = structlog.get_logger("nightlab.sandbox")
        return getattr(logger, level) if structlog.is_configured() else lambda *_, **__: None


log = _QuietUntilConfigured()
