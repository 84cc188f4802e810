"""What the studies share: real trainings and scores, each done once and remembered."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agent.attempt.decide import Failure, outcome_of
from agent.attempt.lab import Lab
from agent.attempt.trial import run_trial
from agent.machine.runtime import find_runtime
from agent.night.session import begin, open_lab
from agent.program import Program, load_program
from agent.record.events import ATTEMPT, AttemptStarted, RunFinished, Split
from agent.record.ledger import Ledger
from agent.settings import Settings
from tests.support.labs import Quiet

ROOT = Path(__file__).parents[2]
Files = dict[str, bytes]
Row = dict[str, Any]


class Memory:
    """Rows in a file of JSON lines: a study that was cut off goes on where it was."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.rows: list[Row] = [json.loads(line) for line in lines]

    def add(self, row: Row) -> None:
        """Remember one row, also in the file."""
        with self._lock:
            self.rows.append(row)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")


class Bench:
    """Trains and scores files in real boxes, outside any night.

    Args:
        directory: for the session in whose ledger all of it is recorded; made anew.
        changes: of the shipped program's settings, by section.
        workspace: what is trained and scored; None for the shipped one.
    """

    def __init__(
        self,
        directory: Path,
        changes: dict[str, dict[str, Any]],
        workspace: Path | None = None,
    ) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        shipped = load_program(ROOT / "program.md")
        settings = changed(shipped.settings, changes)
        program = Program(shipped.prose, settings, shipped.source)
        runtime = find_runtime(settings, ROOT, os.environ, print)
        begin(
            directory, program, settings, workspace or ROOT / "workspace", runtime,
            researcher="study", seed=0,
        ).close()  # fmt: skip
        self.lab: Lab = open_lab(Ledger.open(directory), settings, runtime, Quiet())

    @property
    def files(self) -> Files:
        """The shipped workspace's files."""
        return self.lab.workspace.candidate()

    def train(self, files: Files, seed: int, *, scored: bool = False) -> RunFinished:
        """What became of training files at a seed; their score, if wanted, is in `score`.

        Raises:
            RuntimeError: it failed.
        """
        ledger, put = self.lab.ledger, self.lab.ledger.put_blob
        number = len(ledger.history.attempts)
        ledger.append(
            AttemptStarted(
                attempt=number,
                kind="baseline",
                hypothesis="study",
                researcher="study",
                files={name: put(content) for name, content in files.items()},
                diff=None,
                parent=None,
                seeds=(),
            )
        )
        splits: tuple[Split, ...] = ("val",) if scored else ()
        trial = self.lab.trial(ATTEMPT, number, seed, files, splits=splits)
        self.lab.record(run_trial(self.lab.worker, trial))
        outcome = outcome_of(self.lab.history, trial.key, ledger.get_blob)
        if isinstance(outcome, Failure):
            raise RuntimeError(f"{outcome.reason}: {outcome.explanation}")
        runs = reversed(ledger.history.attempt(number).runs)
        shutil.rmtree(self.lab.worker.directory / "checkpoints", ignore_errors=True)
        return next(run for run in runs if run.result.box == "train")

    def score(self, seed: int) -> float:
        """The score of what was trained last, at that seed."""
        return self.lab.ledger.history.attempts[-1].values()[seed]


def changed(settings: Settings, changes: dict[str, dict[str, Any]]) -> Settings:
    """Settings with other values, by section."""
    tables = settings.model_dump()
    for section, values in changes.items():
        tables[section] |= values
    return Settings.model_validate(tables, strict=False)


def turned(files: Files, knobs: dict[str, Any]) -> Files:
    """The files with other values of train.py's knobs.

    Raises:
        SystemExit: there is no such knob.
    """
    lines = files["train.py"].decode().splitlines(keepends=True)
    for name, value in knobs.items():
        found = [n for n, line in enumerate(lines) if line.startswith(f"{name} = ")]
        if len(found) != 1:
            sys.exit(f"train.py has no knob {name}")
        comment = lines[found[0]].partition("#")[2]
        lines[found[0]] = f"{name} = {value!r}  #{comment}"
    return {**files, "train.py": "".join(lines).encode()}


class Clock:
    """Says when a chunk of a study is over."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def is_over(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end


def spread(
    jobs: Iterable[Row], workers: Sequence[Callable[[Row], Row]], memory: Memory, clock: Clock
) -> bool:
    """Do jobs side by side, one by each worker; whether all are done.

    A worker turns a job into a row to remember; a job is done when a row has all of its entries.
    """
    todo = [job for job in jobs if not any(job.items() <= row.items() for row in memory.rows)]
    lock, total = threading.Lock(), len(todo)

    def work(worker: Callable[[Row], Row]) -> None:
        while not clock.is_over():
            with lock:
                if not todo:
                    return
                job = todo.pop(0)
                tell(f"{total - len(todo)}/{total}  {json.dumps(job)}")
            memory.add(worker(job))

    with ThreadPoolExecutor(len(workers)) as pool:
        for done in [pool.submit(work, worker) for worker in workers]:
            done.result()
    return not todo


def tell(line: str) -> None:
    """Say how far it is, on our error output."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def write_between(name: str, text: str) -> None:
    """Put a study's table between its markers in docs/benchmarks.md.

    Raises:
        SystemExit: the page has no such place.
    """
    path = ROOT / "docs" / "benchmarks.md"
    begin_mark, end_mark = (
        f"<!-- {name}: written by `python -m tests.bench.{name}` -->",
        f"<!-- /{name} -->",
    )
    before, begin_found, rest = path.read_text(encoding="utf-8").partition(begin_mark)
    _, end_found, after = rest.partition(end_mark)
    if not (begin_found and end_found):
        sys.exit(f"{path} has no lines {begin_mark} and {end_mark}")
    path.write_text(f"{before}{begin_mark}\n{text}{end_mark}{after}", encoding="utf-8")


@contextmanager
def interruptible() -> Any:
    """Say what Ctrl-C means for a study."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where it was")


def parser(about: str) -> argparse.ArgumentParser:
    """The flags that every study has."""
    made = argparse.ArgumentParser(description=about)
    made.add_argument("--runs", type=Path, default=Path("runs/studies"), help="where results stay")
    made.add_argument("--minutes", type=float, help="stop after so long; the same command goes on")
    made.add_argument("--docs", action="store_true", help="write the table into docs/benchmarks.md")
    return made


def clock_of(options: argparse.Namespace) -> Clock:
    """The clock that the flags ask for."""
    return Clock(None if options.minutes is None else options.minutes * 60)
