"""Begins a session, and brings a broken one back."""

import os
import platform
import random
import re
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import Any

from agent.attempt.disturbance import machine_state
from agent.attempt.experiment import advance, dethrone
from agent.attempt.lab import Lab, Observer, Worker
from agent.candidate.git import Git, repository_of
from agent.candidate.held_out import index_of
from agent.candidate.own_files import copy_workspace, is_in_repository
from agent.candidate.workspace import Workspace, WorkspaceError
from agent.night.waiting import forget_wishes
from agent.program import Program
from agent.record.chain import LEDGER_NAME, Clock
from agent.record.events import (
    SAMPLERS,
    AttemptFinished,
    AttemptInterrupted,
    AttemptStarted,
    ModelCalled,
    Noticed,
    SessionResumed,
    SessionStarted,
    ToolCalled,
    Usage,
)
from agent.record.ledger import Ledger
from agent.researcher.conversation import Conversation
from agent.settings import FIXED_FILES, Settings
from agent.text import one_line
from sandbox.contract.errors import UsageError, host_faults
from sandbox.contract.gpu import GpuMemory, GpuSource, NoGpus
from sandbox.contract.reading import MAX_SCRIPT_BYTES, read_named
from sandbox.contract.run import Executor

SCORERS = ("evaluate.py",)
"""The person's files that score a run; a program that reports its own score needs none."""
RECORDED_PACKAGES = ("anthropic", "genai-prices", "optuna", "pydantic")
"""What a night's calls, prices, points and records come from."""
VERSION = distribution_version("nightlab")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


@dataclass(frozen=True)
class Runtime:
    """What this machine offers a session: engine, image, data."""

    executor: Executor
    engine: dict[str, Any]
    image: dict[str, Any]
    image_id: str
    device: str
    environment: dict[str, str]
    data_dir: Path | None
    data: dict[str, Any]
    calibration: dict[str, Any] | None = None
    gpus: GpuSource = field(default_factory=NoGpus)
    gpu_memory: GpuMemory | None = None
    forget_pages: Callable[[str], None] = lambda _image: None
    """See `Worker`."""


def begin(
    directory: Path,
    program: Program,
    settings: Settings,
    source: Path,
    runtime: Runtime,
    *,
    researcher: str,
    seed: int,
    git: Git | None = None,
    now: Clock | None = None,
    say: Callable[[str], None] = lambda _line: None,
) -> Ledger:
    """Make the session's directory, with its own copy of the workspace, and open its ledger.

    Args:
        directory: of the session; must not exist.
        settings: the program's settings with the flags' overrides.
        source: the person's workspace.
        seed: what the seeds of all runs are drawn from.
        git: started in the person's workspace; None where nobody asks what is committed there.
        say: told what is not copied.

    Raises:
        UsageError: the session exists, or the workspace lacks a file or holds too much.
    """
    if directory.exists():
        hint = f"go on with `nightlab resume {directory.name}` or choose another --session"
        if not has_begun(directory):
            hint = f"its beginning was cut off: remove {directory}, or choose another --session"
        raise UsageError(f"there is a session {directory.name} already", hint)
    for name in _scorers(settings):
        if not (source / name).is_file():
            raise UsageError(
                f"{source / name} is missing",
                "it decides the score; put it there. For a program that prints its own score: "
                '[goal] source = "reported"',
            )
    with ExitStack() as undone, host_faults():
        is_new = not directory.parent.exists()
        directory.mkdir(parents=True)  # another process may have begun it since we looked
        # What cannot be filled goes again, so that its name stays free.
        undone.callback(shutil.rmtree, directory, ignore_errors=True)
        ignored = directory.parent / ".gitignore"
        if is_new and is_in_repository(source):
            undone.callback(ignored.unlink, missing_ok=True)
            ignored.write_text("*\n", encoding="utf-8")  # sessions are nothing to commit
        ledger = undone.enter_context(Ledger.create(directory, now))
        left = _lay_out(directory, program, source, settings)
        _start(ledger, program, settings, source, runtime, researcher, seed, git)
        if left:
            say(f"not copied: {left}")
            ledger.append(Noticed(kind="not_copied", explanation=f"not copied: {left}"))
        undone.pop_all()
    return ledger


def check_name(session: str) -> str:
    """A name; refuses what cannot be the name of a new session.

    Raises:
        UsageError: it could lead out of the directory of sessions, or hide there.
    """
    if not NAME.fullmatch(session):
        raise UsageError(
            f"a session cannot be called {one_line(session, 80)!r}",
            "letters, digits, dots, dashes and underscores, a letter or digit first, 80 at most",
        )
    return session


def _start(
    ledger: Ledger,
    program: Program,
    settings: Settings,
    source: Path,
    runtime: Runtime,
    researcher: str,
    seed: int,
    git: Git | None,
) -> None:
    directory, scorers = ledger.directory, _scorers(settings)
    candidate = _first_candidate(workspace_of(directory, settings))
    fixed = {name: read_named(source / name, MAX_SCRIPT_BYTES) for name in scorers}
    index = None if runtime.data_dir is None else index_of(runtime.data_dir)
    ledger.append(
        SessionStarted(
            session=directory.name,
            nightlab_version=VERSION,
            program=ledger.put_blob(program.source),
            settings=settings,
            researcher=researcher,
            image=runtime.image,
            engine=runtime.engine,
            data=runtime.data,
            machine=machine(),
            files={name: ledger.put_blob(content) for name, content in candidate.items()},
            fixed_files={name: ledger.put_blob(content) for name, content in fixed.items()},
            repository=None if git is None else repository_of(git, candidate | fixed),
            held_out_index=ledger.put_blob(index) if index else None,
            seeds=tuple(
                random.Random(seed).sample(range(1, 2**31), settings.noise.baseline_repeats)
            ),
            calibration=runtime.calibration,
        )
    )


def has_begun(directory: Path) -> bool:
    """Whether a session's first event is on record; a crash may come before it."""
    try:
        with (directory / LEDGER_NAME).open("rb") as ledger:
            return ledger.readline().endswith(b"\n")
    except FileNotFoundError:
        return False


def open_lab(
    ledger: Ledger,
    settings: Settings,
    runtime: Runtime,
    observer: Observer,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> Lab:
    """The lab of a session whose ledger is open."""
    directory, session = ledger.directory, ledger.history.session
    assert session is not None
    worker = Worker(
        session=directory.name,
        directory=directory,
        settings=settings,
        executor=runtime.executor,
        image_id=runtime.image_id,
        copies=session.image.get("copies") or {},
        device=runtime.device,
        environment=runtime.environment,
        data_dir=runtime.data_dir,
        fixed_dir=directory / "fixed",
        peaks=session.image.get("peak_flops") or {},
        cpu=session.machine.get("cpu"),
        gpus=runtime.gpus,
        gpu_memory=runtime.gpu_memory,
        forget_pages=runtime.forget_pages,
        sleep=sleep,
        on_log=observer.log,
    )
    return Lab(worker, ledger, workspace_of(directory, settings), observer)


def recover(
    lab: Lab,
    *,
    removed_containers: tuple[str, ...],
    researcher: str | None = None,
    engine: dict[str, Any],
) -> None:
    """Put a session that ended or broke into the state its ledger tells, and record that.

    Every attempt that was open is closed as interrupted; half-made files go; the workspace keeps a
    language model's edits that were not tried yet and loses all others.
    """
    history = lab.ledger.history
    forget_wishes(lab.worker.directory)
    cut_off = tuple(attempt.number for attempt in history.open)
    # First of all: what is written before it counts the time until now as hours of the session.
    lab.ledger.append(
        SessionResumed(
            nightlab_version=VERSION,
            settings=lab.settings,
            interrupted_attempts=cut_off,
            removed_containers=removed_containers,
            engine=engine,
            machine=machine(),
            researcher=researcher,
        )
    )
    _charge_unanswered(lab.ledger)
    # A kill may have come between a refused score and what follows from it.
    is_dethroned = dethrone(lab)
    for number in cut_off:
        reason = "nightlab stopped during it"
        lab.ledger.append(AttemptInterrupted(attempt=number, is_box_lost=False, reason=reason))
        lab.observer.attempt_finished(lab.history.attempt(number))
    _remove_half_made_files(lab.worker.directory)
    advance(lab)
    if history.best is not None and (is_dethroned or not _holds_untried_edits(lab.ledger)):
        lab.workspace.restore(lab.stored_files(history.best))


def machine() -> dict[str, Any]:
    """What the runs happen on, and in which state, as far as the host can read it."""
    return {
        "platform": platform.platform(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: distribution_version(name) for name in RECORDED_PACKAGES},
        "cpu": _first_value("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load": list(os.getloadavg()),
        "state": machine_state().model_dump(mode="json"),
    }


def _charge_unanswered(ledger: Ledger) -> None:
    """Put the call that a crash cut off on the bill, at its worst: nobody knows what it cost."""
    asked = ledger.history.spend.unanswered
    if asked is None:
        return
    usage = asked.reserve.usage or Usage(
        input_tokens=asked.reserve.tokens,
        output_tokens=0,
        cache_read_tokens=0,
        cache_write_tokens=0,
    )
    lost = ModelCalled.lost(asked.conversation, asked.model, usage, asked.reserve.usd)
    ledger.append(lost)


def _scorers(settings: Settings) -> tuple[str, ...]:
    return () if settings.goal.is_reported else SCORERS


def workspace_of(directory: Path, settings: Settings) -> Workspace:
    """The session's files; a program that reports its own score has them all in its box."""
    left_out = () if settings.goal.is_reported else FIXED_FILES
    return Workspace(directory / "workspace", settings.workspace.editable, left_out=left_out)


def _first_candidate(workspace: Workspace) -> dict[str, bytes]:
    """The files as they are, which must be usable before anything runs.

    Raises:
        UsageError: there are too many, or none that may be edited.
    """
    try:
        candidate = workspace.candidate()
    except WorkspaceError as error:
        hint = error.hint or "name what a run does not need under leave_out in [workspace]"
        raise UsageError(f"the workspace cannot be used: {error.message}", hint) from error
    if not any(map(workspace.is_editable, candidate)):
        hint = "see `path` and `editable` under [workspace] in program.md"
        raise UsageError("the workspace holds no file that may be edited", hint)
    return candidate


def _lay_out(directory: Path, program: Program, source: Path, settings: Settings) -> str:
    """Fill the session's directory; what of the person's files is not copied, in words."""
    (directory / "program.md").write_bytes(program.source)
    (directory / "guidance.md").touch()
    own = settings.workspace
    left = copy_workspace(
        source,
        directory / "workspace",
        directory.parent.resolve(),
        own.leave_out,
        max_files=own.max_files,
        max_bytes=own.max_bytes,
    )
    fixed = directory / "fixed"
    fixed.mkdir(mode=0o755)
    for name in _scorers(settings):
        shutil.copyfile(source / name, fixed / name)
        (fixed / name).chmod(0o644)
    fixed.chmod(0o755)
    return left


def _remove_half_made_files(directory: Path) -> None:
    shutil.rmtree(directory / "boxes", ignore_errors=True)
    for half_made in ("blobs/*/.*.tmp", f"workspace/**/.{'[0-9a-f]' * 16}.tmp", ".*.tmp"):
        for path in directory.glob(half_made):
            path.unlink(missing_ok=True)


def _holds_untried_edits(ledger: Ledger) -> bool:
    """Whether a language model began to change files after the last attempt was closed.

    Until then the best's files are put in place, and a crash may come in the middle of that. What
    a sampler changed means nothing without the rest of its point, which it proposes again.
    """
    conversation = Conversation.last_opening(ledger)
    if conversation is None or conversation.researcher in SAMPLERS:
        return False
    for entry in reversed(ledger.entries):
        match entry.event:
            case AttemptStarted() | AttemptFinished() | AttemptInterrupted():
                return False
            case ToolCalled(name="edit" | "write" | "delete" | "rename"):
                return True
    return False


def _first_value(path: str, key: str) -> str | None:
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)
