"""Where trials run, and what a session puts around that.

A worker is a place that runs one trial at a time: it has an engine, GPUs and data, and knows no
ledger and no workspace. A lab is a worker with the session's record and files.
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from opentelemetry.trace import Tracer, get_tracer

from agent.attempt.disturbance import ReadLoad, ReadMachine, Usual, machine_state, sample, usual_of
from agent.attempt.sheet import Pace, free_pace_of, left_seconds_of
from agent.attempt.stopping import Past, past
from agent.candidate.workspace import Workspace
from agent.record.attempts import Attempt, TrialKey
from agent.record.events import (
    ATTEMPT,
    SMOKE,
    AttemptKind,
    Dethroned,
    DriftChecked,
    Noticed,
    Purpose,
    RunFinished,
    RunStarted,
    Scored,
    Split,
    StopReason,
)
from agent.record.files import FileHashes
from agent.record.history import History
from agent.record.ledger import Ledger
from agent.settings import Budget, Settings
from sandbox.contract.errors import BoxLost, NightlabError, SandboxError
from sandbox.contract.gpu import GpuMemory, GpuSource, NoGpus
from sandbox.contract.run import Executor, Limits, Outcome, RunResult, RunSpec

DATA, CHECKPOINT, EVALUATE = "/data", "/checkpoint", "/evaluate"
"""Where boxes see what is on record by its hash."""


class SessionOver(NightlabError):
    """What was waited for did not come before the session had to end."""

    usual_hint = "Go on with `nightlab resume`."

    def __init__(self, reason: StopReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Observer(Protocol):
    """Whoever wants to see an attempt while it happens."""

    def attempt_started(self, number: int, kind: AttemptKind, hypothesis: str) -> None: ...
    def run_started(self, event: RunStarted, budget_seconds: float) -> None: ...
    def log(self, piece: bytes) -> None: ...
    def run_finished(self, event: RunFinished) -> None: ...
    def attempt_finished(self, attempt: Attempt) -> None: ...
    def drift_checked(self, found: DriftChecked) -> None: ...
    def dethroned(self, event: Dethroned) -> None: ...
    def waiting(self, words: str) -> None: ...


def fresh_seeds(count: int, used: Collection[int]) -> tuple[int, ...]:
    """Seeds from the system's randomness, so that nothing on record foretells them."""
    fresh: list[int] = []
    while len(fresh) < count:
        seed = secrets.randbelow(2**31 - 1) + 1
        if seed not in used and seed not in fresh:
            fresh.append(seed)
    return tuple(fresh)


@dataclass(frozen=True)
class Worker:
    """A place that runs one trial at a time."""

    session: str
    directory: Path
    """For the boxes' files and for checkpoints; a trial reads nothing else in it."""
    settings: Settings
    executor: Executor
    image_id: str
    copies: Mapping[str, str]
    """Images for boxes that see rows, by what they are for; see `sandbox.image.copies`."""
    device: str
    environment: dict[str, str]
    data_dir: Path | None
    """None for a program that reports its own score: it sees the folders in its settings."""
    fixed_dir: Path
    """Holds the session's own copy of evaluate.py."""
    peaks: Mapping[str, Any] = field(default_factory=dict)
    """Operations per second that the profile knows of devices, by name."""
    cpu: str | None = None
    gpus: GpuSource = field(default_factory=NoGpus)
    gpu_memory: GpuMemory | None = None
    """What each run may use of each of its GPUs; None for all."""
    draw_seeds: Callable[[int, Collection[int]], tuple[int, ...]] = fresh_seeds
    """So many that are not among the others, see `fresh_seeds`."""
    sleep: Callable[[float], None] = time.sleep
    forget_pages: Callable[[str], None] = lambda _image: None
    """Makes what is in memory of an image's files the same, whatever boxes did before."""
    read_machine: ReadMachine = machine_state
    read_load: ReadLoad = sample
    on_log: Callable[[bytes], None] = lambda _piece: None
    stand_by: Callable[[], None] = lambda: None
    """Called in the middle of a wait; raises SessionOver once it makes no sense any more."""
    on_wait: Callable[[str, str], None] = lambda _kind, _text: None
    """Told the kind of a wait, and what is waited for."""
    tracer: Tracer = field(default_factory=lambda: get_tracer("nightlab"))

    def split(self, name: Literal["train", "val", "holdout"]) -> Path:
        """One split of prepared data."""
        assert self.data_dir is not None
        return self.data_dir / name

    def run(self, spec: RunSpec, **how: Any) -> RunResult:
        """Run a box, see `Executor.run`, with a span around it."""
        attributes = {"nightlab.run_id": spec.run_id, "nightlab.box": spec.box}
        with self.tracer.start_as_current_span("nightlab.run", attributes=attributes) as span:
            result = self.executor.run(spec, **how)
            span.set_attribute("nightlab.outcome", result.outcome.value)
            span.set_attribute("nightlab.wall_seconds", result.wall_seconds)
        return result


@dataclass(frozen=True)
class Trial:
    """One training with its scoring, at one seed: everything that a worker must be told.

    See docs/decisions/0018.
    """

    id: str
    """How the ids of its runs begin."""
    purpose: Purpose
    attempt: int
    seed: int
    files: dict[str, bytes]
    budget: Budget
    limits: Limits
    """Of the training."""
    splits: tuple[Split, ...]
    """Scored one after another, as long as there is a score."""
    checks: int
    """How many check boxes a score has beside the one whose answers it is; see decision 0015."""
    free: Pace | None
    """What a model box may take for nothing; None for the baseline."""
    left_seconds: float
    """What its training left of the budget, where that was recorded before."""
    usual: Usual
    past: Past | None
    """The runs that a training is stopped early against; None where it is never stopped."""
    counts_when_disturbed: bool
    """Only the baseline is measured on a machine that is never quiet: its noise then shows it."""
    is_begun: bool
    """Whether an attempt goes on that has a run: such a one is brought to its end."""

    @property
    def key(self) -> TrialKey:
        return TrialKey(self.purpose, self.attempt, self.seed)


class Step(NamedTuple):
    """What a trial yields: an event, and the blobs that it names."""

    event: RunStarted | RunFinished | Scored
    blobs: tuple[bytes, ...] = ()


Steps = Generator[Step, None, None]


@dataclass(frozen=True)
class Lab:
    """A session's worker, record and files; made once a session."""

    worker: Worker
    ledger: Ledger
    workspace: Workspace
    observer: Observer
    hashes: FileHashes = field(default_factory=FileHashes)

    @property
    def session(self) -> str:
        return self.worker.session

    @property
    def settings(self) -> Settings:
        return self.worker.settings

    @property
    def history(self) -> History:
        return self.ledger.history

    @property
    def seeds(self) -> tuple[int, ...]:
        assert self.history.session is not None
        return self.history.session.seeds

    def trial(
        self,
        purpose: Purpose,
        attempt: int,
        seed: int,
        files: dict[str, bytes],
        *,
        splits: tuple[Split, ...] = ("val",),
        checks: int = 1,
        may_stop: bool = False,
    ) -> Trial:
        """What a worker is told of one trial.

        A training that can no longer win is ended early if it may be and the settings say so. A
        program that reports its own score speaks of val alone, whatever the splits.
        """
        history, settings = self.history, self.settings
        own = next((a for a in history.attempts if a.number == attempt), None)
        asker = history.asker(attempt, seed)
        key = TrialKey(purpose, attempt, seed)
        stops = may_stop and settings.economy.early_stopping != "off"
        return Trial(
            id=f"{box_label(self.session)}-{attempt}-{len(self.ledger.entries)}",
            purpose=purpose,
            attempt=attempt,
            seed=seed,
            files=files,
            budget=budget_of(settings, purpose),
            limits=settings.train_limits(is_smoke=purpose.startswith(SMOKE)),
            splits=splits,
            # A scorer of a person's own may speak to one model box only, and checks nothing.
            checks=checks if settings.model_boxes > 1 else 0,
            free=free_pace_of(history),
            left_seconds=left_seconds_of(history.trial(key).training, settings.budget),
            usual=usual_of(history, key),
            past=past(history, attempt, self.ledger.get_blob, settings.budget) if stops else None,
            counts_when_disturbed=own is not None and _may_be_disturbed(own),
            is_begun=asker is not None and bool(asker.runs),
        )

    def record(self, steps: Steps) -> None:
        """Let a trial run, and put what it yields on record step by step.

        Raises:
            BoxLost: somebody else ended a box.
            SandboxError: nightlab or the engine failed, or a box would see other files than those
                on record.
        """
        with closing(steps):
            for event, blobs in steps:
                if isinstance(event, RunStarted):
                    self._refuse_changed(event)
                for blob in blobs:
                    self.ledger.put_blob(blob)
                self.ledger.append(event)
                self._show(event)

    def _refuse_changed(self, event: RunStarted) -> None:
        """Compare what a box is about to see with the record: scorer, data, checkpoint.

        The candidate's files were written for it a moment ago, from the record's own blobs.
        """
        session = self.history.session
        assert session is not None
        training = self.history.trial(TrialKey(event.purpose, event.attempt, event.seed)).training
        left = () if training is None else training.result.output
        data: dict[str, dict[str, str]] = session.data.get("files") or {}
        for mount in event.spec.mounts:
            due = {
                EVALUATE: session.fixed_files,
                CHECKPOINT: {file.name: file.sha256 for file in left},
                DATA: data.get(mount.source.name),
            }.get(mount.target)
            if due and (found := "; ".join(self.hashes.differences(mount.source, due))):
                message = (
                    f"a {event.box} box was to see {mount.target} as it is not on record: {found}"
                )
                raise SandboxError(
                    message, "see who changes the session's files, and nightlab audit"
                )

    def kept_checkpoint(self, attempt: int, seed: int) -> Path | None:
        """An attempt's checkpoint as its training left it; None where it is gone or another one."""
        path = self.checkpoint(attempt, seed)
        training = self.history.trial(TrialKey(ATTEMPT, attempt, seed)).training
        if not path.is_dir() or training is None:
            return None
        due = {file.name: file.sha256 for file in training.result.output}
        if not (found := "; ".join(self.hashes.differences(path, due))):
            return path
        text = f"the checkpoint of attempt {attempt} at seed {seed} is not what it left: {found}"
        self.ledger.append(Noticed(kind="checkpoint_changed", explanation=text))
        return None

    def _show(self, event: RunStarted | RunFinished | Scored) -> None:
        if isinstance(event, RunFinished):
            self.observer.run_finished(event)
        elif isinstance(event, RunStarted):
            if event.box == "train":
                seconds = budget_of(self.settings, event.purpose).seconds
            else:
                seconds = event.spec.limits.wall_seconds
            # Beside a scorer the model boxes are no news.
            if event.box != "model" or event.purpose.startswith(SMOKE):
                self.observer.run_started(event, seconds)

    def stored_files(self, attempt: Attempt) -> dict[str, bytes]:
        """The files of an attempt, from the ledger's blobs."""
        return {name: self.ledger.get_blob(sha) for name, sha in attempt.started.files.items()}

    def checkpoint(self, attempt: int, seed: int) -> Path:
        """Where an attempt's checkpoint lies as long as it is kept."""
        return self._checkpoints / f"{attempt}-{seed}"

    @property
    def _checkpoints(self) -> Path:
        return self.worker.directory / "checkpoints"

    def forget_checkpoints(self, attempt: int) -> None:
        for path in self._checkpoints.glob(f"{attempt}-*"):
            shutil.rmtree(path, ignore_errors=True)

    def forget_checkpoints_but(self, kept: Collection[int]) -> None:
        """Forget those of all other attempts, and what else lies there."""
        for path in self._checkpoints.glob("*"):
            if path.name.partition("-")[0] not in map(str, kept):
                shutil.rmtree(path, ignore_errors=True)


NO_SOCKETS = os.strerror(errno.EAFNOSUPPORT)
"""What a program says to which a box without loopback gives no network socket."""


def budget_of(settings: Settings, purpose: Purpose) -> Budget:
    """What a training may use, by what it is for."""
    return settings.smoke_budget() if purpose.startswith(SMOKE) else settings.budget


def _may_be_disturbed(attempt: Attempt) -> bool:
    """Whether its runs count as they are: only the baseline's, and only until it is measured."""
    return attempt.started.kind == "baseline" and attempt.open


def refuse_interruption(result: RunResult) -> None:
    """Take no run for the program's that somebody else ended.

    Raises:
        BoxLost: it was.
    """
    if result.was_ended_by_somebody_else:
        hint = "see who stopped the container, then resume the session"
        if result.oom_kills:
            hint = "this machine ran out of memory: give boxes less, or end what else needs it"
        raise BoxLost(
            f"run {result.run_id} was ended by somebody else: {evidence_of(result)}", hint
        )


def evidence_of(result: RunResult) -> str:
    """One sentence about how a run ended, from the host's evidence."""
    is_killed = result.signal is not None
    how = f"ended by signal {result.signal}" if is_killed else f"exit code {result.exit_code}"
    is_told = NO_SOCKETS in (result.log.tail or result.log.head)
    if is_told and result.outcome is not Outcome.OK and not result.limits.loopback:
        how += "; torchrun and gloo need network sockets: loopback = true under [limits] gives them"
    return f"{result.outcome.value} after {result.wall_seconds:.1f} s, {how}"


def box_label(session: str) -> str:
    """The session's name as a box can carry it; a copied directory may be called anything."""
    return re.sub(r"[^a-z0-9]+", "-", session.lower()).strip("-")[:30] or "session"


def hashes_of(files: dict[str, bytes]) -> dict[str, str]:
    """SHA-256 of each of a candidate's files, by name: what the ledger knows it by."""
    return {name: sha_of(content) for name, content in files.items()}


def sha_of(content: bytes) -> str:
    """SHA-256 in hexadecimal digits: the name of a blob."""
    return hashlib.sha256(content).hexdigest()


@contextmanager
def snapshot(root: Path, files: dict[str, bytes]) -> Iterator[Path]:
    """A fresh directory that holds exactly `files`, for read-only mounting; gone afterwards."""
    fresh_directory(root)
    try:
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        make_readable(root)
        for name, content in files.items():
            if content.startswith(b"#!"):  # what names its interpreter can be started: ./run.sh
                (root / name).chmod(0o755)
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def fresh_directory(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def make_readable(root: Path) -> None:
    """Let the box's user, who is nobody on the host, read what is mounted into it."""
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
