"""Nights without boxes, on a clock of the test's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.attempt.lab import Lab
from agent.night.session import Runtime, begin, recover
from agent.program import Program, load_program
from agent.record.events import Entry, Event
from agent.record.files import FileHashes
from agent.record.ledger import Ledger
from tests.support.clock import Clock
from tests.support.executors import TRAINING_SECONDS, FakeExecutor
from tests.support.labs import quiet_lab

TOY = Path(__file__).parent / "toy"
IMAGE: dict[str, Any] = {
    "image_id": "sha256:0",
    "copies": {"model": "sha256:1", "check": "sha256:2"},
}


class Crash(BaseException):
    """Our process is gone: nothing that runs after this may touch the disk."""


class CrashingLedger(Ledger):
    """A ledger whose process dies before or after it writes the event of that number."""

    crash_at: int | None = None
    crash_after_writing = True
    witness: Callable[[Event], None] = staticmethod(lambda _: None)
    """Called before and after each event is written."""

    def append(self, event: Event) -> Entry:
        if self.crash_at is not None and self.crash_at < len(self.entries):
            raise Crash(event.type)  # it is dead already; nothing more reaches the disk
        if self.crash_at == len(self.entries) and not self.crash_after_writing:
            raise Crash(event.type)
        self.witness(event)
        entry = super().append(event)
        self.witness(event)
        if self.crash_at == entry.seq:
            raise Crash(event.type)
        return entry


@dataclass
class Place:
    """A session's directory, its clock and its boxes; reopened after each crash."""

    root: Path
    clock: Clock = field(default_factory=Clock)
    changes: Mapping[str, dict[str, Any] | None] = field(default_factory=dict)
    workspace: Path = TOY / "workspace"
    image: dict[str, Any] = field(default_factory=lambda: dict(IMAGE))
    sleep: Callable[[float], None] | None = None
    """What waiting does; the clock goes on when not given."""
    name: str = "night"

    def __post_init__(self) -> None:
        self.boxes = FakeExecutor(self.clock)
        program = load_program(TOY / "program.md")
        tables = program.settings.model_dump()
        tables["budget"]["seconds"] = TRAINING_SECONDS + 10
        for section, values in self.changes.items():
            tables[section] = None if values is None else (tables[section] or {}) | values
        settings = type(program.settings).model_validate(tables, strict=False)
        self.program = Program(program.prose, settings, program.source)

    @property
    def directory(self) -> Path:
        return self.root / self.name

    @property
    def runtime(self) -> Runtime:
        splits = [self.root / "data" / name for name in ("train", "val", "holdout")]
        for split in splits:
            split.mkdir(parents=True, exist_ok=True)
        return Runtime(
            executor=self.boxes,
            engine={},
            image=self.image,
            image_id=self.image["image_id"],
            device="cpu",
            environment={},
            data_dir=None if self.program.settings.data is None else self.root / "data",
            data={"files": {split.name: FileHashes().below(split) for split in splits}},
        )

    def begin(self, researcher: str) -> Lab:
        """A new session, ready to run."""
        begin(
            self.directory,
            self.program,
            self.program.settings,
            self.workspace,
            self.runtime,
            researcher=researcher,
            seed=7,
            now=self.clock.now,
        ).close()
        return self.open()

    def resume(self, crash_at: int | None = None) -> Lab:
        """The session as `nightlab resume` finds it; it may crash already while it is found."""
        lab = self.open(crash_at)
        try:
            recover(lab, removed_containers=(), engine={})
        except BaseException:
            lab.ledger.close()  # as a process's end does
            raise
        return lab

    def open(self, crash_at: int | None = None) -> Lab:
        """The session as the commands of the morning find it."""
        ledger = CrashingLedger.open(self.directory, self.clock.now)
        ledger.crash_at = crash_at
        return quiet_lab(ledger, self.program.settings, self.runtime, self.clock, self.sleep)
