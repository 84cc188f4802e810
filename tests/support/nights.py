"""Nights without boxes, on a clock of the test's."""

from __future__ import annotations

import ast
import json
import math
import random
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from agent.attempt.lab import Lab
from agent.night.session import Outfit, begin, bring_back, open_lab
from agent.program import Program, load_program
from agent.record.events import Entry, Event
from agent.record.ledger import Ledger
from sandbox.contract.gpu import GpuUse, Spread
from sandbox.contract.run import Log, Outcome, OutputFile, RunResult, RunSpec

TOY = Path(__file__).parent / "toy"
EVENING = datetime(2026, 3, 7, 21, 0, tzinfo=UTC)
TARGET = (3.0, 16.0)
TRAINING_SECONDS = 200.0
SCORING_SECONDS = 2.0
BASELINE_MEMORY = 50 * 2**20


class Crash(BaseException):
    """Our process is gone: nothing that runs after this may touch the disk."""


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

    async def wait(self, seconds: float) -> None:
        self.advance(seconds)


@dataclass
class PretendedBoxes:
    """An executor without an engine: the toy's train.py and evaluate.py, done by hand.

    A point too far out runs out of memory, so that some candidates fail.
    """

    clock: Clock
    runs: list[RunSpec] = field(default_factory=list)
    tells: bool = False
    """Whether a training says on its way how far its point will be."""

    def run(
        self,
        spec: RunSpec,
        *,
        output_dir: Path | None = None,
        channel: socket.socket | None = None,
        on_log: Callable[[bytes], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> RunResult:
        self.runs.append(spec)
        started_at = self.clock.now()
        match spec.box:
            case "train":
                outcome, seconds = self._train(spec, output_dir), _training_seconds(spec)
                for line, at in _progress(spec) if self.tells and outcome is Outcome.OK else ():
                    if on_log is not None:
                        on_log(line)
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
        if on_log is not None and not self.tells:
            on_log(b'{"step": 1, "seconds": 0.1, "loss": 1.0}\n')
        return _result(spec, outcome, seconds, output_dir, started_at, self.clock.now())

    def answers(self) -> bool:
        return True

    def _train(self, spec: RunSpec, output_dir: Path | None) -> Outcome:
        values = _knobs((_mounted(spec, "/workspace") / "train.py").read_text())
        if values["X"] > 4.5:
            return Outcome.OUT_OF_MEMORY
        noise = random.Random(int(spec.environment["NIGHTLAB_SEED"])).gauss(0, 0.001)
        point = {"x": values["X"], "y": values["Y"], "noise": noise}
        assert output_dir is not None
        (output_dir / "point.json").write_text(json.dumps(point))
        return Outcome.OK


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


class Quiet:
    """An observer that shows nothing."""

    def attempt_started(self, *_: Any) -> None: ...
    def run_started(self, *_: Any) -> None: ...
    def log(self, *_: Any) -> None: ...
    def run_finished(self, *_: Any) -> None: ...
    def attempt_finished(self, *_: Any) -> None: ...
    def drift_checked(self, *_: Any) -> None: ...
    def waiting(self, *_: Any) -> None: ...


@dataclass
class Place:
    """A session's directory, its clock and its boxes; reopened after each crash."""

    root: Path
    clock: Clock = field(default_factory=Clock)
    changes: Mapping[str, dict[str, Any] | None] = field(default_factory=dict)
    workspace: Path = TOY / "workspace"
    boxes_type: type[PretendedBoxes] = PretendedBoxes
    image: dict[str, Any] = field(default_factory=dict)
    sleep: Callable[[float], None] | None = None
    """What waiting does; the clock goes on when not given."""
    name: str = "night"

    def __post_init__(self) -> None:
        self.boxes = self.boxes_type(self.clock)
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
    def outfit(self) -> Outfit:
        for split in ("train", "val", "holdout"):
            (self.root / "data" / split).mkdir(parents=True, exist_ok=True)
        return Outfit(
            executor=self.boxes,
            engine={},
            image=self.image,
            image_id="sha256:0",
            device="cpu",
            environment={},
            data_dir=None if self.program.settings.data is None else self.root / "data",
            data={},
        )

    def begin(self, researcher: str) -> Lab:
        """A new session, ready to run."""
        begin(
            self.directory,
            self.program,
            self.program.settings,
            self.workspace,
            self.outfit,
            researcher=researcher,
            version="test",
            seed=7,
            now=self.clock.now,
        ).close()
        return self.open()

    def resume(self, crash_at: int | None = None) -> Lab:
        """The session as `nightlab resume` finds it; it may crash already while it is found."""
        lab = self.open(crash_at)
        try:
            bring_back(lab, version="test", removed_containers=())
        except BaseException:
            lab.ledger.close()  # as a process's end does
            raise
        return lab

    def open(self, crash_at: int | None = None) -> Lab:
        """The session as the commands of the morning find it."""
        ledger = CrashingLedger.open(self.directory, self.clock.now)
        ledger.crash_at = crash_at
        return open_lab(
            ledger,
            self.program.settings,
            self.outfit,
            Quiet(),
            sleep=self.sleep or self.clock.advance,
        )


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
        power_watts=Spread(mean=300.0, max=400.0),
        sm_clock_mhz=Spread(mean=1900.0, max=1980.0),
        memory_clock_mhz=None,
        temperature_celsius=Spread(mean=70.0, max=81.0),
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
    names = [] if output_dir is None else sorted(path.name for path in output_dir.iterdir())
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
        output=tuple(OutputFile(name=name, bytes=1, sha256="0" * 64) for name in names),
        image_digest="sha256:0",
        started_at=started_at,
        finished_at=finished_at,
        evidence={},
    )
