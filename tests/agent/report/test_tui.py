"""The terminal shows what the report's first screen shows, within its size, as plain text."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import unicodedata
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from agent.record.chain import LEDGER_NAME, Follower
from agent.record.events import Verdict
from agent.record.ledger import Ledger
from agent.report.charts import best_steps
from agent.report.summary import summary
from agent.report.tui import screen, show, sparkline
from tests.support import histories
from tests.support.growing import Session, begun_training

NIGHT = histories.night(12)


def written(directory: Path, made: histories.Night) -> Path:
    made.write(directory)
    return directory


def shown(directory: Path, width: int = 80, height: int | None = 24, hours: float = 1) -> list[str]:
    console = Console(width=width, height=height or 25, no_color=True, highlight=False)
    now = histories.EVENING + timedelta(hours=hours)
    with console.capture() as capture:
        console.print(screen(directory, Follower(directory), now, width, height))
    return capture.get().splitlines()


def test_the_first_screens_numbers_are_there(tmp_path: Path) -> None:
    numbers = summary(NIGHT.entries)
    lines = "\n".join(shown(written(tmp_path / "night", NIGHT)))
    assert f"best     val_bpb {numbers.best:.4f} by attempt #{numbers.best_attempt}, " in lines
    assert f", better by {numbers.gain:.4f} (" in lines
    assert f"baseline val_bpb {numbers.baseline:.4f}, noise {numbers.noise:.4f}" in lines
    assert f"{numbers.kept} kept, {numbers.discarded} discarded, {numbers.failed} failed" in lines
    assert "12 of 100" in lines
    assert f"${numbers.spent_usd:.2f} of $20.00" in lines
    assert "Ended: 12 attempts done" in lines
    assert "! 1 score was refused as invalid. #7" in lines


@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 20), (200, 60)])
def test_everything_fits_the_terminal(
    tmp_path: Path, width: int, height: int, hostile: bool
) -> None:
    made = histories.night(60, hostile=hostile)
    lines = shown(written(tmp_path / "night", made), width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert "#60" in "\n".join(lines)


def test_hostile_text_is_text(tmp_path: Path) -> None:
    made = histories.night(16, hostile=True, ended=False)
    text = "\n".join(shown(written(tmp_path / "night", made), 160, 40))
    assert "⟨U+001B⟩[31mred" in text
    assert not {c for c in text if unicodedata.category(c) in ("Cc", "Cf")} - {"\n"}


def test_the_running_training_is_shown_against_its_budget(tmp_path: Path) -> None:
    session = Session(tmp_path / "night", NIGHT)
    with session.ledger:
        session.go_on(2)
        session.begin_attempt()
        session.add(begun_training(2, seed=7))
        session.note(seed=7)
        lines = "\n".join(shown(session.directory))
        # What is read has begun after the clock was looked at.
        assert "#2  0.0 s" in "\n".join(shown(session.directory, hours=-1))
    assert "Training attempt #2" in lines
    assert histories.IDEAS[2] in lines
    assert "of 300 s, seed 7" in lines
    assert re.search(r"loss  █[▁▂▃▄▅▆▇█]{19}  6\.\d+ to \d", lines)


def test_a_session_that_has_just_been_made_is_shown(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "night"):
        lines = "\n".join(shown(tmp_path / "night"))
    assert "The session has not begun to write its record yet." in lines


def test_a_damaged_record_is_said(tmp_path: Path) -> None:
    directory = written(tmp_path / "night", NIGHT)
    path = directory / LEDGER_NAME
    path.write_bytes(path.read_bytes().replace(b"Halve", b"Heave"))
    assert "The record cannot be read to its end" in "\n".join(shown(directory))


def test_without_a_terminal_the_state_is_printed_once(tmp_path: Path) -> None:
    console = Console(width=100, force_terminal=False, no_color=True)
    with console.capture() as capture:
        show(written(tmp_path / "night", NIGHT), console, lambda: histories.EVENING)
    assert 13 == len(re.findall(r"^#\d+ ", capture.get(), re.MULTILINE))
    assert "\x1b" not in capture.get()


def test_the_best_so_far_only_gets_better() -> None:
    steps = best_steps(NIGHT.history)
    assert 1 + NIGHT.history.count(Verdict.KEPT) == len(steps)
    assert sorted((value for _, value in steps), reverse=True) == [value for _, value in steps]


@given(st.lists(st.floats(-1e9, 1e9), max_size=400), st.integers(2, 80))
def test_a_sparkline_keeps_its_width_and_its_last_value(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) <= width
    assert bool(values) == bool(line)
    if len(values) == 2 and values[-1] < values[0]:
        assert "█▁" == line


def test_in_a_terminal_it_goes_on_until_ctrl_c_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    directory = written(tmp_path / "night", NIGHT)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-P", "-m", "agent.cli", "watch", "night", "--tui"]
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "TERM": "xterm"}
    watching = subprocess.Popen(
        [*command, "--runs", str(directory.parent)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environ,
    )
    os.close(theirs)
    seen = heard(ours, until=b"Ended: 12 attempts done")
    watching.send_signal(signal.SIGINT)
    seen += heard(ours, until=b"\x1b[?1049l")
    assert 0 == watching.wait(20)
    os.close(ours)
    assert b"\x1b[?1049h" in seen


def heard(terminal: int, until: bytes) -> bytes:
    """What the terminal was told, up to and with those bytes."""
    seen, give_up = b"", time.monotonic() + 30
    while until not in seen:
        assert time.monotonic() < give_up, seen
        if select.select([terminal], [], [], 0.5)[0]:
            seen += os.read(terminal, 65536)
    return seen
