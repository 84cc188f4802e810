"""The one place where tests make a lab, change one, and let a session work in it."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from opentelemetry.trace import Tracer

from agent.attempt.boxes import with_own_copies
from agent.attempt.disturbance import ReadMachine, Sample
from agent.attempt.lab import Lab, Observer, Worker
from agent.attempt.scoring import Measurement, RunBox, ScoringBoxes
from agent.candidate.workspace import Workspace
from agent.night.assemble import assemble, open_models
from agent.night.loop import run_session
from agent.night.session import Runtime, open_lab
from agent.program import Program
from agent.record.events import SessionEnded
from agent.record.ledger import Ledger
from agent.settings import Settings
from sandbox.contract.run import Executor, Outcome, RunSpec
from tests.support.clock import Clock
from tests.support.histories import IN_FORCE, Night

SPEED = 1000.0
"""Of a core, see `agent.attempt.disturbance.speed`; to measure it takes 40 ms each time."""


class Quiet:
    """An observer that shows nothing."""

    def attempt_started(self, *_: Any) -> None: ...
    def run_started(self, *_: Any) -> None: ...
    def log(self, *_: Any) -> None: ...
    def run_finished(self, *_: Any) -> None: ...
    def attempt_finished(self, *_: Any) -> None: ...
    def drift_checked(self, *_: Any) -> None: ...
    def dethroned(self, *_: Any) -> None: ...
    def waiting(self, *_: Any) -> None: ...


def quiet_lab(
    ledger: Ledger,
    settings: Settings,
    runtime: Runtime,
    clock: Clock,
    sleep: Callable[[float], None] | None = None,
) -> Lab:
    """The lab of a session that nobody watches, on a machine that is as fast as ever and idle."""

    def read_load(read_machine: ReadMachine) -> Sample:
        return Sample(0.0, 0.0, at=clock.seconds, speed=SPEED, state=read_machine())

    lab = open_lab(ledger, settings, runtime, Quiet(), sleep=sleep or clock.advance)

    def draw_seeds(count: int, _used: Collection[int]) -> tuple[int, ...]:
        # By the attempts before, so that a night in a test is the same however often it is killed.
        chance = random.Random(len(ledger.history.completed))
        return tuple(chance.sample(range(1, 2**31), count))

    worker = replace(lab.worker, read_load=read_load, draw_seeds=draw_seeds)
    return replace(lab, worker=worker)


def scoring_lab(directory: Path, settings: Settings, executor: Executor, **given: Any) -> Lab:
    """A lab that scores and records nothing: it has neither ledger nor workspace."""
    worker = Worker(
        directory=directory,
        settings=settings,
        executor=executor,
        device="cpu",
        fixed_dir=directory / "fixed",
        **given,
    )
    return Lab(worker, cast(Ledger, None), cast(Workspace, None), Quiet())


def score_in_boxes(
    run: RunBox,
    models: Sequence[RunSpec],
    scorer: RunSpec,
    output_dir: Path,
    *,
    brings_boxes: bool = True,
) -> Measurement:
    """One score, as a trial takes it."""
    with ScoringBoxes(run, scorer, output_dir, brings_boxes=brings_boxes) as scoring:
        for spec in models:
            if not scoring.wants_more():
                break
            with with_own_copies(spec, output_dir.parent / f"{spec.run_id}-sees") as own:
                if scoring.ask(own).outcome is not Outcome.OK:
                    break
        return scoring.measurement()


def lab_in_memory(night: Night, workspace: Workspace, **goal: Any) -> Lab:
    """A lab over a night in memory, in which nothing can be run."""
    settings = IN_FORCE.model_copy(update={"goal": IN_FORCE.goal.model_copy(update=goal)})
    if goal:
        night.history.settings = settings
    places: dict[str, Any] = {
        "session": "night",
        "image_id": "",
        "copies": {},
        "environment": {},
        "data_dir": None,
    }
    lab = scoring_lab(Path(), settings, cast(Executor, None), **places)
    return replace(lab, ledger=cast(Ledger, night), workspace=workspace)


def with_executor(lab: Lab, executor: Executor) -> Lab:
    """The same lab with other boxes."""
    return replace(lab, worker=replace(lab.worker, executor=executor))


def with_settings(lab: Lab, settings: Settings) -> Lab:
    """The same lab with other settings in force."""
    return replace(lab, worker=replace(lab.worker, settings=settings))


def with_sleep(lab: Lab, sleep: Callable[[float], None]) -> Lab:
    """The same lab with another way to wait."""
    return replace(lab, worker=replace(lab.worker, sleep=sleep))


def with_observer(lab: Lab, observer: Observer) -> Lab:
    """The same lab, watched by somebody else."""
    return replace(lab, observer=observer)


def with_machine(lab: Lab, read_machine: ReadMachine) -> Lab:
    """The same lab on a machine whose state is what the function says."""
    return replace(lab, worker=replace(lab.worker, read_machine=read_machine))


def in_directory(lab: Lab, directory: Path) -> Lab:
    """The same lab with its boxes' files elsewhere."""
    return replace(lab, worker=replace(lab.worker, directory=directory))


def traced(lab: Lab, tracer: Tracer) -> Lab:
    """The same lab, whose spans go to `tracer`."""
    return replace(lab, worker=replace(lab.worker, tracer=tracer))


def play(
    lab: Lab,
    program: Program,
    researcher: str = "tpe",
    environ: Mapping[str, str] | None = None,
    *,
    refresh: Callable[[], None] = lambda: None,
    **model: Any,
) -> SessionEnded:
    """Work on a session until it ends, and leave its ledger open."""
    with open_models(lab, researcher, environ or {}, **model) as models:
        return run_session(assemble(lab, program, models), refresh)


def work(lab: Lab, program: Program, researcher: str = "tpe", **options: Any) -> SessionEnded:
    """One life of our process: see `play`."""
    with lab.ledger:
        return play(lab, program, researcher, **options)
