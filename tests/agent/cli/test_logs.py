"""nightlab's own log: every kind of event arrives, in bounds, and no disk ends a night for it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog

from agent.cli import logs
from agent.cli.logs import LOG_NAME, operational_log
from agent.cli.night import _work
from agent.cli.shared import keep_head
from agent.morning.anchor import Anchor
from agent.report.report import Report
from agent.trackers.export import Export, Tracker
from sandbox.contract.log import log
from tests.support.messages_server import Entry, MessagesServer, Status, tinker
from tests.support.nights import Place


def events(directory: Path, name: str = LOG_NAME) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


def written(directory: Path, event: str, **facts: Any) -> list[dict[str, Any]]:
    """What the log holds once a command has logged that."""
    with operational_log(directory, "run", {}, is_verbose=False):
        log.info(event, **facts)
    return events(directory)


def test_an_event_is_a_line_of_json_with_time_and_level(tmp_path: Path) -> None:
    begun, event, ended = written(tmp_path, "engine_slow", seconds=3.5, call="start", cause=None)
    at = datetime.fromisoformat(event.pop("at"))
    assert timedelta(0) == at.utcoffset()
    told = {"event": "engine_slow", "level": "info", "seconds": 3.5, "call": "start"}
    assert told | {"cause": None} == event
    assert ("command_started", "command_ended") == (begun["event"], ended["event"])


def test_a_second_command_goes_on_with_the_file(tmp_path: Path) -> None:
    written(tmp_path, "first")
    assert 6 == len(written(tmp_path, "second"))


@pytest.mark.parametrize("verbose", [False, True])
def test_verbose_shows_events_on_stderr_and_more_of_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], *, verbose: bool
) -> None:
    with operational_log(tmp_path, "run", {}, is_verbose=verbose):
        log.warning("engine_slow", seconds=3.5)
        log.debug("engine_called", call="start")
    shown, kept = capfd.readouterr(), [event["event"] for event in events(tmp_path)]
    assert "" == shown.out
    assert verbose == ("engine_slow seconds=3.5\n" in shown.err)
    assert verbose == ("engine_called call=start\n" in shown.err) == ("engine_called" in kept)
    assert verbose or "" == shown.err


def test_nothing_is_printed_where_no_command_opened_a_log(
    capfd: pytest.CaptureFixture[str],
) -> None:
    log.warning("engine_slow", seconds=3.5)
    imports = "import agent.cli.app, agent.cli.logs; agent.cli.logs.log.info('nothing')"
    done = subprocess.run([sys.executable, "-P", "-c", imports], capture_output=True, check=True)
    assert ("", "") == capfd.readouterr()
    assert (b"", b"") == (done.stdout, done.stderr)
    assert not structlog.is_configured()


def test_hostile_facts_are_one_bounded_line_and_tell_no_secret(tmp_path: Path) -> None:
    environ = {"ANTHROPIC_API_KEY": "sk-very-secret"}
    with operational_log(tmp_path, "run", environ, is_verbose=False):
        log.info("odd", error="key sk-very-secret\n\x1b[31m" + "x" * 10_000, path=Path("/a"))
    _, event, _ = events(tmp_path)
    assert "sk-very" not in (tmp_path / LOG_NAME).read_text()
    assert "\x1b" not in event["error"]
    assert len(event["error"]) <= logs.MAX_FACT_CHARACTERS
    assert "/a" == event["path"]


def test_a_log_that_is_full_begins_anew_and_is_kept_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MAX_LOG_BYTES", 2000)
    with operational_log(tmp_path, "run", {}, is_verbose=False):
        for number in range(100):
            log.info("counted", number=number)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert {LOG_NAME, f"{LOG_NAME}.1"} == sizes.keys()
    assert max(sizes.values()) <= 2000
    numbers = [
        event["number"]
        for name in (f"{LOG_NAME}.1", LOG_NAME)
        for event in events(tmp_path, name)
        if event["event"] == "counted"
    ]
    assert list(range(numbers[0], 100)) == numbers


@pytest.mark.parametrize("there", ["full", "directory", "gone"])
def test_a_disk_that_refuses_costs_lines_and_no_night(tmp_path: Path, there: str) -> None:
    if there == "full":
        (tmp_path / LOG_NAME).symlink_to("/dev/full")
    if there == "directory":
        (tmp_path / LOG_NAME).mkdir()
    place = tmp_path / "gone" if there == "gone" else tmp_path
    with operational_log(place, "run", {}, is_verbose=False):
        log.info("engine_slow")


def test_a_command_that_fails_says_how(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        operational_log(tmp_path, "run", {}, is_verbose=False),
    ):
        raise KeyboardInterrupt
    assert ("command_failed", "KeyboardInterrupt") == (
        events(tmp_path)[-1]["event"],
        events(tmp_path)[-1]["error"],
    )
    assert not structlog.is_configured()


def test_what_fails_beside_a_night_is_in_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tracker, report and anchor fail; the model's service is waited for."""

    def fail(*_: Any) -> None:
        raise ValueError("no ink")

    monkeypatch.setattr(Report, "write", fail)
    (tmp_path / "files").write_text("in the way\n")
    place = Place(tmp_path, changes={"session": {"attempts": 1}})
    lab = place.begin("claude")
    export = Export(Tracker.TENSORBOARD, tmp_path / "files", {})
    answers: list[Entry] = [
        Status(529, message="no room", headers={"retry-after": "12"}),
        *[tinker] * 9,
    ]
    with (
        MessagesServer(answers, endless=True) as server,
        lab.ledger,
        operational_log(place.directory, "run", {}, is_verbose=False),
    ):
        monkeypatch.setenv("ANTHROPIC_API_KEY", "not-a-real-key")
        monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url)
        keep_head(lab.ledger, Anchor(Path("/dev/full"), "night"))
        _work(lab, place.program, "claude", export, as_json=True)
    found = {event["event"]: event for event in events(place.directory)}
    assert "No space left" in found["anchor_failed"]["error"]
    assert (12.0, "529 api_error: no room") == (
        found["model_retried"]["wait_seconds"],
        found["model_retried"]["error"],
    )
    assert "ValueError: no ink" == found["report_failed"]["error"]
    assert "FileExistsError" in found["tracker_failed"]["error"]


def test_the_page_names_every_event() -> None:
    root = Path(__file__).parents[3]
    sources = [path for room in ("agent", "sandbox") for path in (root / room).rglob("*.py")]
    call = re.compile(r"\blog\.(?:debug|info|warning)\(\s*\"(\w+)\"")
    logged = {name for path in sources for name in call.findall(path.read_text())}
    page = (root / "docs" / "log.md").read_text()
    rows = re.findall(r"^\| (`.+?`) \|", page, re.MULTILINE)
    assert logged == {name for row in rows for name in re.findall(r"`(\w+)`", row)}
