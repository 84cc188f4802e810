"""The time of one pretended night."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

EVENING = datetime(2026, 3, 7, 21, 0, tzinfo=UTC)


@dataclass
class Clock:
    """Time of one night; whoever works or waits moves it."""

    seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def now(self) -> datetime:
        return EVENING + timedelta(seconds=self.seconds)

    def monotonic(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        with self.lock:
            self.seconds += seconds
