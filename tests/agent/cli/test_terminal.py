"""A night goes on when the terminal or pipe that it writes to goes away."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent.cli.shared import err, say, warn

ROOT = Path(__file__).parents[3]
STARTED = [sys.executable, "-P", "-c"]
TALKS = """
import sys
from agent.cli.terminal import outlive_readers
outlive_readers()
for number in range(20_000):
    print(number)
    print("noise", file=sys.stderr)
sys.stdout.flush()
sys.exit(7)
"""
WRITES = """
import os, subprocess, sys
from agent.cli.terminal import outlive_readers
outlive_readers()
kept = open(sys.argv[1], "w")
print("not for the file", flush=True)
print("nor this", file=sys.stderr)
subprocess.run(["echo", "nor what a child says"])
kept.write(f"{kept.fileno()}")
"""


def started(program: str, *arguments: str, **streams: Any) -> subprocess.Popen[bytes]:
    process: subprocess.Popen[bytes] = subprocess.Popen(
        [*STARTED, program, *arguments], cwd=ROOT, **streams
    )
    return process


def test_a_reader_that_has_read_enough_changes_no_exit_code() -> None:
    with started(TALKS, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as talking:
        assert talking.stdout is not None
        assert talking.stderr is not None
        assert b"0\n" == talking.stdout.readline()
        talking.stdout.close()
        talking.stderr.close()
        assert 7 == talking.wait(20)


def test_a_terminal_that_hangs_up_changes_no_exit_code() -> None:
    ours, theirs = pty.openpty()
    with started(TALKS, stdin=theirs, stdout=theirs, stderr=theirs) as talking:
        os.close(theirs)
        os.read(ours, 10)
        os.close(ours)
        assert 7 == talking.wait(20)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_file_never_takes_the_place_of_a_stream_that_was_closed(
    closed: str, tmp_path: Path
) -> None:
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", *STARTED, WRITES, str(tmp_path / "kept")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert int((tmp_path / "kept").read_text()) > 2
    words = closed.split()
    assert (">&-" not in words, "2>&-" not in words) == (
        b"not for" in done.stdout,
        b"nor this" in done.stderr,
    )


SIGNS = "\u00b7 \u00b1 \u2192 \u2026 \U0001f319 \udcff"
"""Of a report's words and a model's, and of a file name that is no text."""
SAY = "import agent.cli.shared as s; import agent.cli.terminal as t; t.outlive_readers()"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "koi8-r"])
def test_no_sign_that_a_terminal_cannot_show_ends_a_night(encoding: str) -> None:
    code = f"{SAY}; s.say({SIGNS!r}); s.warn({SIGNS!r}); s.print_line({SIGNS!r}); s.say('end')"
    environ = os.environ | {"PYTHONIOENCODING": f"{encoding}:strict", "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=ROOT, env=environ, capture_output=True, check=False
    )
    assert (0, b"") == (done.returncode, done.stderr.replace(done.stderr.strip(), b"").strip())
    assert done.stdout.decode(encoding).splitlines()[-1] == "end"
    assert b"Traceback" not in done.stderr


def test_without_that_it_would() -> None:
    code = f"import sys; sys.stdout.write({SIGNS!r})"
    environ = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, check=False
    )
    assert b"UnicodeEncodeError" in done.stderr


def test_what_looks_like_markup_or_a_picture_is_printed_as_it_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = "train.py:12: {'lr:fire:': 1} [bold]x[/bold] :smile:"
    say(line)
    warn(line)
    err.print("a hint with :warning: in it")
    printed = capsys.readouterr()
    assert f"{line}\n" == printed.out
    assert f"{line}\na hint with :warning: in it\n" == printed.err
