"""What the commands share: flags, output, where a session lies."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from agent.attempt.lab import Observer
from agent.morning.anchor import Anchor, anchor_path, name_on_record
from agent.night.session import has_begun
from agent.record.chain import LEDGER_NAME, LedgerError
from agent.record.events import Noticed
from agent.record.ledger import Ledger
from agent.report.activity import RunNotes
from agent.report.console import JsonConsole, NightConsole, json_line
from agent.settings import Settings
from agent.text import one_line
from sandbox.contract.errors import UsageError
from sandbox.contract.log import log
from sandbox.machine import clean_up, engine_and_state

BASELINE_FAILED, WRONG_SETTINGS, SERVICE_FAILED, INTERRUPTED = 1, 2, 3, 130

WIDEST_TABLE = 1000

out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)


def print_line(line: str) -> None:
    """Print a line as it is, at once: for scripts."""
    # Not by the console, which wraps lines at the width of a terminal and reads mark-up in them.
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def print_event(event: str, **facts: Any) -> None:
    """Print a JSON object, at once: for scripts."""
    print_line(json_line(event, **facts))


def progress(*, as_json: bool) -> Callable[[str], None]:
    """What takes the lines of a long work, for a person or a script."""
    return (lambda line: print_event("progress", text=line)) if as_json else say


def say(line: str) -> None:
    """Print a line for a person; what looks like markup is text, and long lines stay whole."""
    out.print(line, markup=False, soft_wrap=True)


def print_table(console: Console, table: Table) -> None:
    """Print a table whole: what is wider than the terminal goes on in the next line."""
    is_terminal = console.is_terminal
    wide = Console(file=console.file, width=WIDEST_TABLE, force_terminal=is_terminal, emoji=False)
    wide.print(table, highlight=False, soft_wrap=True)


def warn(line: str, style: str = "yellow") -> None:
    """The same, for what a person should notice, beside the output."""
    err.print(line, style=style, markup=False, soft_wrap=True)


def sweep_now() -> tuple[str, ...]:
    return clean_up(*engine_and_state(os.environ))


def session_directory(runs: Path, session: str) -> Path:
    """Where a session lies.

    Raises:
        UsageError: there is none of that name, or its beginning was cut off.
    """
    if Path(session).name != session:
        raise UsageError(
            f"{session} is a path, not the name of a session",
            f"name it {Path(session).name or 'as'} and, unless it lies in {runs}, its directory "
            "with --runs",
        )
    directory = runs / session
    if not (directory / LEDGER_NAME).is_file():
        known = sorted(path.parent.name for path in runs.glob(f"*/{LEDGER_NAME}"))
        raise UsageError(
            f"there is no session {session!r} in {runs}",
            f"known sessions: {', '.join(known[-10:])}" if known else "start one: nightlab run",
        )
    if not has_begun(directory):
        raise UsageError(
            f"session {session!r} holds nothing: its beginning was cut off",
            f"remove {directory} and start anew: nightlab run --session {session}",
        )
    return directory.absolute()  # an engine takes no relative path for a mount


def anchor_of(ledger: Ledger) -> Anchor | None:
    """Where the settings want the ledger's head written a second time; none for nowhere."""
    path = anchor_path(ledger.history.in_force.record.anchor, ledger.directory)
    return None if path is None else Anchor(path, name_on_record(ledger.directory, ledger.entries))


def keep_head(ledger: Ledger, anchor: Anchor | None) -> None:
    """Anchor the head; a second place that fails is noticed once in a row and ends no night."""
    if anchor is None:
        return
    try:
        anchor.add(ledger.entries)
    except LedgerError as error:
        if not anchor.has_failed:
            ledger.append(Noticed(kind="anchor_failed", explanation=error.message))
            warn(one_line(error.message, 300))
        log.warning("anchor_failed", error=error.message)
        anchor.has_failed = True


@contextmanager
def open_observer(settings: Settings, ledger: Ledger, *, as_json: bool) -> Iterator[Observer]:
    """What shows the session while it runs; leaves the terminal as it was."""
    notes = RunNotes(ledger.directory, time.monotonic)
    # Beside both consoles the notes say what a night is at, for `watch` in another process.
    console: JsonConsole | NightConsole = JsonConsole(notes, print_line)
    if not as_json:
        console = NightConsole(notes, out, settings, lambda: ledger.history)
    try:
        yield console
    finally:
        console.close()
