"""What every attempt works with: files, settings, boxes."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from agent.attempt.disturbance import ReadLoad, sample
from agent.attempt.machine_state import ReadMachine, machine_state
from agent.candidate.workspace import Workspace
from agent.record.events import AttemptKind, Disturbance, DriftChecked, Event, Noticed, RunEvent
from agent.record.history import Attempt
from agent.record.ledger import Ledger
from agent.settings import Settings
from sandbox.contract.gpu import GpuMemory, GpuSource, NoGpus
from sandbox.contract.run import Box, Executor, RunResult, RunSpec


class Observer(Protocol):
    """Whoever wants to see an attempt while it happens."""

    def attempt_started(self, number: int, kind: AttemptKind, hypothesis: str) -> None: ...
    def run_started(self, box: Box, seed: int, budget_seconds: float) -> None: ...
    def log(self, piece: bytes) -> None: ...
    def run_finished(self, result: RunResult, disturbance: Disturbance | None) -> None: ...
    def attempt_finished(self, attempt: Attempt) -> None: ...
    def drift_checked(self, found: DriftChecked) -> None: ...
    def waiting(self, words: str) -> None: ...


@dataclass(frozen=True)
class Lab:
    """Everything an attempt works with; made once a session."""

    session: str
    directory: Path
    ledger: Ledger
    workspace: Workspace
    settings: Settings
    executor: Executor
    image_id: str
    device: str
    environment: dict[str, str]
    data_dir: Path | None
    """None for a program that reports its own score and was given no data."""
    fixed_dir: Path
    """Holds the session's own copy of evaluate.py."""
    observer: Observer
    gpus: GpuSource = field(default_factory=NoGpus)
    gpu_memory: GpuMemory | None = None
    """What each run may use of each of its GPUs; None for all."""
    sleep: Callable[[float], None] = time.sleep
    is_night: bool = False
    """Whether waits heed the session's limits and what the person asks of it; a review's do not."""
    read_machine: ReadMachine = machine_state
    read_load: ReadLoad = sample
    envelope: Callable[[RunEvent], Event] = lambda event: event
    """What a run's events are put into before they are recorded; a review has its own."""

    def with_gpus(self, spec: RunSpec, gpus: tuple[str, ...]) -> RunSpec:
        """The same run with these GPUs, held to what the settings say."""
        if not gpus:
            return spec
        given = {"devices": self.gpus.devices, "gpus": gpus, "gpu_memory": self.gpu_memory}
        return RunSpec.model_validate(spec.model_dump() | given)

    def record(self, event: RunEvent) -> None:
        """Put what happens in the boxes on record."""
        self.ledger.append(self.envelope(event))

    def tell_waiting(self, kind: str, words: str) -> None:
        """Show what is waited for, or that it came; in a night it is on record as well."""
        if self.is_night:
            self.ledger.append(Noticed(kind=kind, explanation=words))
        self.observer.waiting(words)

    @property
    def train_data(self) -> Path | None:
        """What a training sees: its split, or the person's folder as it is."""
        if self.data_dir is None or self.settings.goal.is_reported:
            return self.data_dir
        return self.split("train")

    def split(self, name: Literal["train", "val", "holdout"]) -> Path:
        """One split of prepared data."""
        assert self.data_dir is not None
        return self.data_dir / name

    @property
    def seeds(self) -> tuple[int, ...]:
        session = self.ledger.history.session
        assert session is not None
        return session.seeds


def hashes_of(files: dict[str, bytes]) -> dict[str, str]:
    """SHA-256 of each of a candidate's files, by name: what the ledger knows it by."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def stored_files(lab: Lab, attempt: Attempt) -> dict[str, bytes]:
    """The files of an attempt, from the ledger's blobs."""
    return {name: lab.ledger.get_blob(sha) for name, sha in attempt.started.files.items()}


def find_known(lab: Lab, files: dict[str, bytes]) -> Attempt | None:
    """The judged attempt whose files were byte for byte these, if there is one."""
    hashes = hashes_of(files)
    for attempt in lab.ledger.history.attempts:
        if attempt.is_judged and attempt.started.files == hashes:
            return attempt
    return None


@contextmanager
def snapshot(lab: Lab, number: int, files: dict[str, bytes]) -> Iterator[Path]:
    """A fresh directory that holds exactly `files`, for read-only mounting; gone afterwards."""
    root = fresh_directory(lab.directory / "boxes" / f"{number}-{len(lab.ledger.entries)}-files")
    try:
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        make_readable(root)
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def checkpoint_dir(lab: Lab, number: int, seed: int) -> Path:
    return lab.directory / "checkpoints" / f"{number}-{seed}"


def forget_checkpoints(lab: Lab, number: int) -> None:
    for path in (lab.directory / "checkpoints").glob(f"{number}-*"):
        shutil.rmtree(path, ignore_errors=True)


def fresh_directory(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def make_readable(root: Path) -> None:
    """Let the box's user, who is nobody on the host, read what is mounted into it."""
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
