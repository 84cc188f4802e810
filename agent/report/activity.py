"""What a session is at right now: attempt, box, curve.

The ledger says which run has begun. Its progress so far is in a note beside the ledger, which the
night writes every few seconds: a hint for whoever watches, never a result.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Literal

from agent.attempt.disturbance import was_disturbed
from agent.night.waiting import is_asked_to_pause
from agent.record.attempts import Attempt
from agent.record.curves import CurveCollector, packed, unpacked
from agent.record.events import DRIFT, AttemptStarted, Entry, RunFinished, RunStarted
from agent.record.files import replace_file
from agent.record.history import History
from agent.record.ledger import LOCK_NAME
from agent.report.plan import name_of, run_in_words
from agent.text import one_line
from sandbox.contract.record import Record
from sandbox.contract.run import Box

NOTE_NAME = "running.json"
SECONDS_BETWEEN_NOTES = 2.0

_MAX_NOTE_BYTES = 200_000
DOING: dict[Box, str] = {"train": "Training", "model": "Scoring", "scorer": "Scoring"}

State = Literal["waiting", "working", "paused", "cut_off", "ended"]


class Activity(Record):
    """What a session is at, as far as anybody outside can tell."""

    state: State
    text: str
    attempt: int | None = None
    hypothesis: str = ""
    attempt_since: datetime | None = None
    seed: int | None = None
    run_since: datetime | None = None
    budget_seconds: float | None = None
    """What a training may take; none for other runs."""
    curve: tuple[dict[str, float], ...] = ()
    """What the training reported of itself so far."""


def activity(directory: Path, history: History, entries: Sequence[Entry]) -> Activity:
    """What the session in `directory` is at."""
    name = one_line(directory.name, 64)
    if history.session is None:
        return Activity(state="waiting", text="The session has not begun to write its record yet.")
    if history.ended is not None:
        return Activity(state="ended", text=f"Ended: {one_line(history.ended.explanation, 300)}")
    if not is_at_work(directory):
        text = f"Nobody is at work on it: it was cut off. Go on with: nightlab resume {name}"
        return Activity(state="cut_off", text=text)
    if history.time.is_paused:
        return Activity(state="paused", text=f"Paused. Go on with: nightlab continue {name}")
    if history.time.waits_for:
        text = one_line(history.time.waits_for, 300)
        return Activity(state="working", text=text[:1].upper() + text[1:])
    last = history.attempts[-1] if history.attempts else None
    if last is not None and last.open:
        return _at_work(directory, history, last, entries)
    if getattr(entries[-1].event, "purpose", "").startswith(DRIFT):
        text = "Measuring the best again, to see whether the machine changed."
        return Activity(state="working", text=text)
    if is_asked_to_pause(directory):
        return Activity(state="paused", text=f"Paused. Go on with: nightlab continue {name}")
    return Activity(state="working", text="Between two attempts: the researcher is at work.")


class RunNotes:
    """Notes every few seconds how far the present run is; one that is over leaves no note."""

    def __init__(self, directory: Path, clock: Callable[[], float]) -> None:
        self._directory = directory
        self._clock = clock
        self._box: Box = "train"
        self._seed = 0
        self._progress = CurveCollector(lambda _piece: None)
        self._noted_at = 0.0

    @property
    def seconds(self) -> float | None:
        """How far the run says it is."""
        curve = self._progress.curve()
        return curve[-1]["seconds"] if curve else None

    def begin(self, box: Box, seed: int) -> None:
        self._box, self._seed = box, seed
        self._progress = CurveCollector(lambda _piece: None)
        self._write()

    def log(self, piece: bytes) -> None:
        """Take in what the run printed."""
        self._progress(piece)
        if self._clock() - self._noted_at >= SECONDS_BETWEEN_NOTES:
            self._write()

    def end(self) -> None:
        with suppress(OSError):
            (self._directory / NOTE_NAME).unlink(missing_ok=True)

    def _write(self) -> None:
        curve = json.loads(packed(self._progress.curve()))
        note = {"box": self._box, "seed": self._seed, "curve": curve}
        with suppress(OSError):  # a disk that refuses costs the note, not the night
            replace_file(self._directory / NOTE_NAME, json.dumps(note).encode())
        self._noted_at = self._clock()


def _at_work(
    directory: Path, history: History, attempt: Attempt, entries: Sequence[Entry]
) -> Activity:
    run, since = _running(entries) or (None, None)
    name, is_training = name_of(attempt), run is not None and run.box == "train"
    text = f"{DOING[run.box]} {name}" if run else f"At work on {name}"
    if run and (place := run_in_words(history, attempt.number, run.seed)):
        text += f", {place}"
    last = entries[-1].event
    if isinstance(last, RunFinished) and was_disturbed(last):
        text = f"Waiting for a quiet machine, at {name}: others were at work beside the last run"
    return Activity(
        state="working",
        text=text,
        attempt=attempt.number,
        hypothesis=one_line(attempt.started.hypothesis, 300),
        attempt_since=datetime.fromisoformat(attempt.started_at),
        seed=run.seed if run else None,
        run_since=datetime.fromisoformat(since) if since else None,
        budget_seconds=history.in_force.budget.seconds if is_training else None,
        curve=_noted_curve(directory, run) if run is not None and is_training else (),
    )


def _running(entries: Sequence[Entry]) -> tuple[RunStarted, str] | None:
    """The latest run that was begun and is not over, and when it began."""
    over = set()
    for entry in reversed(entries):
        event = entry.event
        if isinstance(event, AttemptStarted):
            return None  # nothing of an attempt before this one can still run
        if isinstance(event, RunFinished):
            over.add(event.result.run_id)
        elif isinstance(event, RunStarted) and event.run_id not in over:
            return event, entry.at
    return None


def _noted_curve(directory: Path, run: RunStarted) -> tuple[dict[str, float], ...]:
    """The curve in the note, if it is about that run."""
    try:
        with (directory / NOTE_NAME).open("rb") as file:
            note = json.loads(file.read(_MAX_NOTE_BYTES))
        if (note["box"], note["seed"]) != (run.box, run.seed):
            return ()
        return tuple(unpacked(json.dumps(note["curve"]).encode()))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ()


def is_at_work(directory: Path) -> bool:
    """Whether some process holds the session, as the kernel tells it; yes where it does not tell.

    To try the lock would tell too, but could stand in the way of a session that is just beginning.
    """
    try:
        inode = (directory / LOCK_NAME).stat().st_ino
        locks = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return True
    held = [line.split() for line in locks if " -> " not in line]
    return any(f[1] == "FLOCK" and f[5].endswith(f":{inode}") for f in held)
