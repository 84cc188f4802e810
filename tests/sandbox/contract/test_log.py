"""The operational log: silent in a library, structlog's own once it is configured."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog
from structlog.testing import capture_logs

from sandbox.contract.log import log


@pytest.fixture
def unconfigured() -> Iterator[None]:
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()


def test_a_library_that_nobody_configured_prints_nothing(
    unconfigured: None, capfd: pytest.CaptureFixture[str]
) -> None:
    log.warning("engine_call_slow", seconds=7.0)
    assert ("", "") == capfd.readouterr()


def test_an_application_that_configured_structlog_gets_the_events(unconfigured: None) -> None:
    with capture_logs() as events:
        log.info("engine_call_slow", seconds=7.0)
    assert [{"event": "engine_call_slow", "seconds": 7.0, "log_level": "info"}] == events
