"""Begins a session, and brings a broken one back."""

from __future__ import annotations

import os
import platform
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import Any

from agent.experiment import drop
from agent.lab import Lab, Observer, hashes_of
from agent.ledger import Clock, Ledger, utc_now
from agent.program import Program, Settings
from agent.records import (
    AttemptInterrupted,
    Entry,
    ModelCalled,
    SessionResumed,
    SessionStarted,
    Usage,
)
from agent.steering import forget
from agent.tracing import TracedExecutor, usual_tracer
from agent.workspace import Workspace
from sandbox.contract import Executor

FIXED_FILES = ("evaluate.py",)
RECORDED_PACKAGES = ("anthropic", "genai-prices", "optuna", "pydantic")
"""What a night's calls, prices, points and records come from."""
NEVER_COPIED = shutil.ignore_patterns("__pycache__", ".*", "*.pyc")


class SessionError(Exception):
    """A session cannot begin or go on as asked.

    Args:
        message: what is wrong.
        hint: what the user can do next.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True)
class Outfit:
    """What this machine offers a session: engine, image, data."""

    executor: Executor
    engine: dict[str, Any]
    image: dict[str, Any]
    image_id: str
    device: str
    environment: dict[str, str]
    data_dir: Path
    data: dict[str, Any]


def begin(
    directory: Path,
    program: Program,
    settings: Settings,
    source: Path,
    outfit: Outfit,
    *,
    researcher: str,
    version: str,
    seed: int,
    now: Clock = utc_now,
) -> Ledger:
    """Make the session's directory, with its own copy of the workspace, and open its ledger.

    Args:
        directory: of the session; must not exist.
        program: what the person wrote.
        settings: the program's settings with the flags' overrides.
        source: the person's workspace.
        outfit: see `Outfit`.
        researcher: who proposes candidates.
        version: of nightlab.
        seed: what the seeds of all runs are drawn from.
        now: the ledger's clock.

    Raises:
        SessionError: the session exists, or the workspace lacks a file.
    """
    if directory.exists():
        raise SessionError(
            f"there is a session {directory.name} already",
            f"go on with `nightlab resume {directory.name}` or choose another --session",
        )
    for name in FIXED_FILES:
        if not (source / name).is_file():
            raise SessionError(f"{source / name} is missing", "it decides the score; put it there")
    ledger = Ledger.create(directory, now)
    _lay_out(directory, program, source)
    workspace = Workspace(directory / "workspace", settings.workspace.editable)
    candidate = workspace.candidate()
    count = max(settings.noise.baseline_repeats, settings.noise.max_repeats)
    ledger.append(
        SessionStarted(
            session=directory.name,
            nightlab_version=version,
            program=ledger.put_blob(program.source),
            settings=settings.model_dump(mode="json", by_alias=False),
            researcher=researcher,
            image=outfit.image,
            engine=outfit.engine,
            data=outfit.data,
            machine=machine(),
            files={name: ledger.put_blob(content) for name, content in candidate.items()},
            fixed_files={
                name: ledger.put_blob((source / name).read_bytes()) for name in FIXED_FILES
            },
            seeds=tuple(random.Random(seed).sample(range(1, 2**31), count)),
        )
    )
    return ledger


def open_lab(
    ledger: Ledger,
    settings: Settings,
    outfit: Outfit,
    observer: Observer,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> Lab:
    """The lab of a session whose ledger is open."""
    directory = ledger.directory
    return Lab(
        session=directory.name,
        directory=directory,
        ledger=ledger,
        workspace=Workspace(directory / "workspace", settings.workspace.editable),
        settings=settings,
        executor=TracedExecutor(outfit.executor, usual_tracer()),
        image_id=outfit.image_id,
        device=outfit.device,
        environment=outfit.environment,
        data_dir=outfit.data_dir,
        fixed_dir=directory / "fixed",
        observer=observer,
        sleep=sleep,
    )


def bring_back(
    lab: Lab,
    *,
    version: str,
    removed_containers: tuple[str, ...],
    engine: dict[str, Any] | None = None,
) -> None:
    """Put a session that ended or broke into the state its ledger tells, and record that.

    The attempt that was open is closed as interrupted; half-made files go; the workspace keeps
    edits that were not tried yet and loses those that already have a verdict.
    """
    history = lab.ledger.history
    _charge_unanswered(lab.ledger)
    forget(lab.directory)
    open_attempt = next((a for a in history.attempts if a.open), None)
    if open_attempt is not None:
        lab.ledger.append(
            AttemptInterrupted(attempt=open_attempt.number, reason="nightlab stopped during it")
        )
    lab.ledger.append(
        SessionResumed(
            nightlab_version=version,
            settings=lab.settings.model_dump(mode="json", by_alias=False),
            interrupted_attempt=None if open_attempt is None else open_attempt.number,
            removed_containers=removed_containers,
            engine=engine,
            machine=machine(),
        )
    )
    shutil.rmtree(lab.directory / "boxes", ignore_errors=True)
    last = history.attempts[-1] if history.attempts else None
    if last is not None and not last.kept and _is_in_workspace(lab, last.started.files):
        drop(lab, last.number)


def settings_of(ledger: Ledger) -> Settings:
    """The settings in force: those of the last resume, else those of the start."""
    return settings_in(ledger.entries)


def settings_in(entries: Sequence[Entry]) -> Settings:
    """The settings in force at the end of these entries.

    Raises:
        SessionError: there are none.
    """
    for entry in reversed(entries):
        if isinstance(entry.event, SessionResumed | SessionStarted):
            return Settings.model_validate(entry.event.settings, strict=False)
    raise SessionError("the ledger names no settings", "it is empty; start a new session")


def machine() -> dict[str, Any]:
    """What the runs happen on, as far as the host can read it."""
    return {
        "platform": platform.platform(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: distribution_version(name) for name in RECORDED_PACKAGES},
        "cpu": _first_value("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load": list(os.getloadavg()),
    }


def _charge_unanswered(ledger: Ledger) -> None:
    """Put the call that a crash cut off on the bill, at its worst: nobody knows what it cost."""
    asked = ledger.history.unanswered
    if asked is None:
        return
    usage = Usage(
        input_tokens=asked.reserve.tokens,
        output_tokens=0,
        cache_read_tokens=0,
        cache_write_tokens=0,
    )
    ledger.append(
        ModelCalled(
            conversation=asked.conversation,
            model=asked.model,
            request_id=None,
            stop_reason="lost",
            usage=usage,
            cost_usd=asked.reserve.usd,
            seconds=0.0,
        )
    )


def _lay_out(directory: Path, program: Program, source: Path) -> None:
    (directory / "program.md").write_bytes(program.source)
    (directory / "guidance.md").touch()
    shutil.copytree(source, directory / "workspace", ignore=NEVER_COPIED)
    fixed = directory / "fixed"
    fixed.mkdir(mode=0o755)
    for name in FIXED_FILES:
        shutil.copyfile(source / name, fixed / name)
        (fixed / name).chmod(0o644)
    fixed.chmod(0o755)


def _is_in_workspace(lab: Lab, files: dict[str, str]) -> bool:
    return files == hashes_of(lab.workspace.candidate())


def _first_value(path: str, key: str) -> str | None:
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)
