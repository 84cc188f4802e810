"""Stop, pause and continue: files that a person's commands leave."""

from __future__ import annotations

from pathlib import Path

STOP, PAUSE = "stop", "pause"


def ask_to_stop(session: Path) -> None:
    """Let the session end after the attempt that it is at."""
    (session / STOP).touch()


def ask_to_pause(session: Path) -> None:
    """Let the session wait after the attempt that it is at."""
    (session / PAUSE).touch()


def ask_to_continue(session: Path) -> bool:
    """Take back what `ask_to_pause` asked for; whether there was anything to take back."""
    was_paused = is_asked_to_pause(session)
    (session / PAUSE).unlink(missing_ok=True)
    return was_paused


def is_asked_to_stop(session: Path) -> bool:
    return (session / STOP).exists()


def is_asked_to_pause(session: Path) -> bool:
    return (session / PAUSE).exists()


def forget(session: Path) -> None:
    """Begin without the wishes of an earlier evening: who resumes a session wants it to run."""
    for name in (STOP, PAUSE):
        (session / name).unlink(missing_ok=True)
