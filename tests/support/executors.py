"""An executor without an engine: the toy task, done by hand."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import random
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from sandbox.contract.errors import EngineUnavailable
from sandbox.contract.gpu import GpuReading, GpuUse
from sandbox.contract.run import Log, Outcome, OutputFile, RunResult, RunSpec
from tests.support.clock import Clock

TARGET = (3.0, 16.0)
TRAINING_SECONDS = 200.0
SCORING_SECONDS = 2.0
BASELINE_MEMORY = 50 * 2**20


@dataclass
class Outage:
    """An engine that goes away at a run, and comes back."""

    from_run: int
    seconds: float
    back_at: float | None = None
    """None before it has begun."""


@dataclass
class FakeExecutor:
    """The toy's train.py and evaluate.py, done by hand on the test's clock.

    A point too far out runs out of memory, so that some candidates fail. What else a test wants of
    its boxes it sets on the fields below; nothing needs a class of its own.
    """

    clock: Clock
    fault: Callable[[RunSpec], BaseException | None] = lambda _: None
    """What a run raises in place of a result."""
    outcome: Callable[[RunSpec, RunResult, Path | None], RunResult] = lambda _, result, __: result
    """What a run comes to; the path is where its output lies."""
    luck: Callable[[float], float] = lambda noise: noise
    """What a training's luck does to its point, where it is not the seed's alone."""
    shows_progress: bool = False
    """Whether a training says on its way how far its point will be."""
    log_line: Callable[[bytes], bytes] = lambda line: line
    """What a training makes of a line that it says on its way."""
    prints: Mapping[str, str] = field(default_factory=dict)
    """What programs other than the toy's print, by the end of their run's id."""
    outage: Outage | None = None
    runs: list[RunSpec] = field(default_factory=list)
    """What was run; neither what raised nor what only printed."""

    @property
    def trainings(self) -> int:
        """How many trainings were begun."""
        return sum(run.box == "train" for run in self.runs)

    def answers(self) -> bool:
        back_at = None if self.outage is None else self.outage.back_at
        return back_at is None or self.clock.seconds >= back_at

    def run(
        self,
        spec: RunSpec,
        *,
        output_dir: Path | None = None,
        channel: socket.socket | None = None,
        on_log: Callable[[bytes], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> RunResult:
        self._fail(spec)
        for name, text in self.prints.items():
            if spec.run_id.endswith(name):
                return self._printed(spec, text)
        self.runs.append(spec)
        started_at = self.clock.now()
        match spec.box:
            case "train":
                outcome, seconds = self._train(spec, output_dir), _training_seconds(spec)
                tells = self.shows_progress and outcome is Outcome.OK
                for line, at in _progress(spec) if tells else ():
                    if on_log is not None:
                        on_log(self.log_line(line))
                    if should_stop is not None and should_stop():
                        outcome, seconds = Outcome.STOPPED, at
                        break
            case "model":
                assert channel is not None
                channel.sendall((_mounted(spec, "/checkpoint") / "point.json").read_bytes() + b"\n")
                outcome, seconds = Outcome.OK, SCORING_SECONDS
            case "scorer":
                assert channel is not None
                assert output_dir is not None
                _score(channel, _mounted(spec, "/data").name, output_dir)
                outcome, seconds = Outcome.OK, SCORING_SECONDS
        if spec.box != "model":  # which runs beside the scorer
            self.clock.advance(seconds)
        if on_log is not None and not self.shows_progress:
            on_log(b'{"step": 1, "seconds": 0.1, "loss": 1.0}\n')
        result = _result(spec, outcome, seconds, output_dir, started_at, self.clock.now())
        return self.outcome(spec, result, output_dir)

    def _fail(self, spec: RunSpec) -> None:
        outage = self.outage
        if outage is not None and outage.back_at is None and len(self.runs) >= outage.from_run:
            outage.back_at = self.clock.seconds + outage.seconds
        if not self.answers():
            raise EngineUnavailable("the engine does not answer: connection refused")
        if (fault := self.fault(spec)) is not None:
            raise fault

    def _printed(self, spec: RunSpec, text: str) -> RunResult:
        now = self.clock.now()
        log = Log(head=text, tail="", omitted_bytes=0)
        return _result(spec, Outcome.OK, 1.0, None, now, now).model_copy(update={"log": log})

    def _train(self, spec: RunSpec, output_dir: Path | None) -> Outcome:
        values = _knobs((_mounted(spec, "/workspace") / "train.py").read_text())
        if values["X"] > 4.5:
            return Outcome.OUT_OF_MEMORY
        noise = random.Random(int(spec.environment["NIGHTLAB_SEED"])).gauss(0, 0.001)
        point = {"x": values["X"], "y": values["Y"], "noise": self.luck(noise)}
        assert output_dir is not None
        (output_dir / "point.json").write_text(json.dumps(point))
        return Outcome.OK


def _training_seconds(spec: RunSpec) -> float:
    """What a training takes: less in a smoke run, whose budget it keeps to."""
    return min(TRAINING_SECONDS, float(spec.environment["NIGHTLAB_BUDGET_SECONDS"]))


def _progress(spec: RunSpec) -> Iterator[tuple[bytes, float]]:
    """What a training says, and when: a loss that falls towards the distance of its point."""
    values = _knobs((_mounted(spec, "/workspace") / "train.py").read_text())
    luck = random.Random(int(spec.environment["NIGHTLAB_SEED"]))
    for step in range(1, 21):
        seconds = _training_seconds(spec) * step / 20
        loss = _distance(values["X"], values["Y"]) + 2 / step + luck.gauss(0, 0.01)
        line = json.dumps({"step": step, "seconds": seconds, "loss": loss})
        yield line.encode() + b"\n", seconds


def _mounted(spec: RunSpec, target: str) -> Path:
    return next(mount.source for mount in spec.mounts if mount.target == target)


def _knobs(source: str) -> dict[str, float]:
    return {
        statement.targets[0].id: ast.literal_eval(statement.value)
        for statement in ast.parse(source).body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }


def _distance(x: float, y: float) -> float:
    return math.dist((x, math.log2(y)), (TARGET[0], math.log2(TARGET[1])))


def _score(channel: socket.socket, split: str, output_dir: Path) -> None:
    point = json.loads(channel.makefile("rb").readline(10_000))
    value = _distance(point["x"], point["y"])
    value += point["noise"] + (0.05 if split == "holdout" else 0.0)
    sheet = {"metric": "distance", "value": value, "valid": True, "reason": None}
    (output_dir / "score.json").write_text(json.dumps(sheet | {"explanation": "", "details": {}}))


def _use(gpu: str) -> GpuUse:
    return GpuUse(
        uuid=gpu,
        name="a GPU",
        memory_bound="watchdog",
        peak_memory_bytes=2**30,
        utilisation=0.9,
        energy_joules=1000.0,
        throttled_share=0.05,
        throttled_by=("heat",),
        power_watts=GpuReading(mean=300.0, max=400.0),
        sm_clock_mhz=GpuReading(mean=1900.0, max=1980.0),
        memory_clock_mhz=None,
        temperature_celsius=GpuReading(mean=70.0, max=81.0),
        samples=800,
        events=(),
    )


def _result(
    spec: RunSpec,
    outcome: Outcome,
    seconds: float,
    output_dir: Path | None,
    started_at: datetime,
    finished_at: datetime,
) -> RunResult:
    killed = outcome in (Outcome.OUT_OF_MEMORY, Outcome.STOPPED)
    written = [] if output_dir is None else sorted(output_dir.iterdir())
    output = [(p.name, body, hashlib.sha256(body)) for p in written for body in (p.read_bytes(),)]
    return RunResult(
        run_id=spec.run_id,
        box=spec.box,
        outcome=outcome,
        exit_code=None if killed else 0,
        signal=9 if killed else None,
        wall_seconds=seconds,
        limits=spec.limits,
        peak_memory_bytes=BASELINE_MEMORY,
        cpu_seconds=seconds,
        oom_kills=int(outcome is Outcome.OUT_OF_MEMORY),
        gpus=spec.gpus,
        gpu=tuple(_use(gpu) for gpu in spec.gpus),
        log=Log(head="", tail="Killed\n" if killed else "done\n", omitted_bytes=0),
        output=tuple(OutputFile(name=n, bytes=len(b), sha256=s.hexdigest()) for n, b, s in output),
        image_digest=spec.image,
        started_at=started_at,
        finished_at=finished_at,
        evidence={},
    )
