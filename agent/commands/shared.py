"""What the commands share: flags, output, where a session lies."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from agent.console import JsonConsole, NightConsole
from agent.lab import Observer
from agent.ledger import Ledger
from agent.program import Program, Settings, load_program
from agent.session import SessionError, has_begun
from agent.setup import clean_up, state_directory, template
from sandbox.engine import find_engine

WRONG_SETTINGS, SERVICE_FAILED, INTERRUPTED = 2, 3, 130

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

ProgramOption = Annotated[Path, typer.Option("--program", help="the person's file")]
AttemptsOption = Annotated[int | None, typer.Option("--attempts", help="stop after so many")]
HoursOption = Annotated[float | None, typer.Option("--hours", help="stop after so many hours")]
UsdOption = Annotated[float | None, typer.Option("--usd", help="stop before spending more")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON lines for scripts")]
RunsOption = Annotated[Path, typer.Option("--runs", help="where sessions are kept")]


def print_line(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def load(program: Path) -> Program:
    return load_program(template(program.name, program.parent))


def sweep_now() -> tuple[str, ...]:
    state_dir = state_directory(os.environ)
    return clean_up(find_engine(state_dir, environ=os.environ), state_dir)


def session_directory(runs: Path, session: str) -> Path:
    directory = runs / session
    if not (directory / "ledger.jsonl").is_file():
        known = sorted(path.parent.name for path in runs.glob("*/ledger.jsonl"))
        raise SessionError(
            f"there is no session {session!r} in {runs}",
            f"known sessions: {', '.join(known[-10:])}" if known else "start one: nightlab run",
        )
    if not has_begun(directory):
        raise SessionError(
            f"session {session!r} holds nothing: its beginning was cut off",
            f"remove {directory} and start anew: nightlab run --session {session}",
        )
    return directory


@contextmanager
def open_observer(settings: Settings, ledger: Ledger, *, as_json: bool) -> Iterator[Observer]:
    """What shows the session while it runs; leaves the terminal as it was."""
    console = (
        JsonConsole(print_line) if as_json else NightConsole(out, settings, lambda: ledger.history)
    )
    try:
        yield console
    finally:
        console.close()
