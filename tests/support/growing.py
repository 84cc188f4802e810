"""A session that grows while somebody watches it."""

from __future__ import annotations

import itertools
from pathlib import Path

from agent.record.events import Event, RunStarted
from agent.record.ledger import Ledger
from agent.report.activity import SECONDS_BETWEEN_NOTES, RunNotes
from tests.support import histories


class Session:
    """A session at work: its ledger is open and grows by the events of a synthetic night."""

    def __init__(self, directory: Path, made: histories.Night) -> None:
        self.directory = directory
        self.ledger = Ledger.create(directory)
        for body in made.blobs.values():
            self.ledger.put_blob(body)
        self._events = [entry.event for entry in made.entries]

    def go_on(self, attempts: int) -> None:
        """Write until so many attempts have been judged or interrupted, and no further."""
        while self._events and self._judged() < attempts:
            self.ledger.append(self._events.pop(0))

    def begin_attempt(self) -> None:
        """Write until the next attempt has begun."""
        begun = len(self.ledger.history.attempts)
        while len(self.ledger.history.attempts) == begun:
            self.ledger.append(self._events.pop(0))

    def add(self, *events: Event) -> None:
        for event in events:
            self.ledger.append(event)

    def note(self, seed: int) -> None:
        """Leave the note of a training that has printed twenty lines."""
        notes = RunNotes(self.directory, itertools.count(0.0, SECONDS_BETWEEN_NOTES).__next__)
        notes.begin("train", seed)
        notes.log(histories.progress_log(1, 20).encode())

    def _judged(self) -> int:
        return sum(not attempt.open for attempt in self.ledger.history.attempts)


def begun_training(attempt: int, seed: int) -> RunStarted:
    result = histories.run_result("now", "train", log="")
    return histories.run_started(attempt, seed, result)
