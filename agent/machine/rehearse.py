"""Rehearses a training in the night's box, before the night."""

import ast
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from agent.attempt.boxes import box_spec, train_spec, with_gpus
from agent.attempt.disturbance import Usual
from agent.attempt.lab import Trial, Worker, evidence_of, fresh_directory
from agent.attempt.trial import files_of, leased
from agent.candidate import own_files
from agent.causes import LACKS, LOOKS, WRITES, cause_of_run
from agent.machine.look import LEAVINGS, modules_asked, nodes_of, sources_of
from agent.machine.readiness import try_a_box
from agent.night.session import Runtime
from agent.record.reported import (
    LINES_LOOKED_AT,
    likely_progress,
    lines_of,
    read_reported,
    reported_file,
)
from agent.settings import Settings
from agent.text import one_line
from sandbox.contract.errors import UsageError, host_faults
from sandbox.contract.run import Outcome, RunResult

IMPORT_SECONDS = 60
SCORE = "score"
NEAR = 0.8
"""Share of a limit from which it is worth a word."""
_ANSWER = "nightlab try: "
_ABSENT = (
    "import importlib.util, json, sys; "
    "absent = [m for m in json.loads(sys.argv[1]) if not importlib.util.find_spec(m)]; "
    f"print({_ANSWER!r} + json.dumps(absent))"
)
WRITERS = frozenset(
    ["makedirs", "mkdir", "save", "savefig", "savetxt", "savez", "to_csv", "to_json", "to_parquet"]
)
"""Calls whose first text is a place that is written to."""
PYTHON = re.compile(r"(.*/)?python[\d.]*$")
WRITABLE = re.compile(r"/tmp(/|$)|/out(/|$)|/dev/(shm/|null|std)|~")  # noqa: S108 - a box's own


@dataclass(frozen=True)
class Rehearsed:
    """One thing that a rehearsal showed, and what would change it."""

    about: str
    seen: str
    cure: str = ""
    """A line for program.md, or what to do; empty where all is well."""
    is_certain: bool = False
    """Whether no training can come to a good end before that is done."""


@contextmanager
def in_place_of_a_night(
    settings: Settings,
    runtime: Runtime,
    state_dir: Path,
    on_log: Callable[[bytes], None] = lambda _piece: None,
) -> Iterator[Worker]:
    """A worker as the night has one, with a folder that is gone afterwards."""
    with TemporaryDirectory(dir=state_dir, prefix="try-") as folder:
        yield Worker(
            session="try",
            directory=Path(folder),
            settings=settings,
            executor=runtime.executor,
            image_id=runtime.image_id,
            copies={},
            device=runtime.device,
            environment=runtime.environment,
            data_dir=None,
            fixed_dir=Path(folder),
            gpus=runtime.gpus,
            gpu_memory=runtime.gpu_memory,
            on_log=on_log,
        )


def before_training(worker: Worker, source: Path) -> Iterator[Rehearsed]:
    """What can be told of a program without a training, in a second or two.

    Args:
        worker: with the night's settings.
        source: the person's own files, as a session would copy them.

    Raises:
        SandboxError: nightlab or the engine failed.
    """
    settings = worker.settings
    names, command = own_files.files_of(source), settings.workspace.command
    sources = sources_of(source, names)
    asked = modules_asked(sources, names, command)
    if asked is None:
        yield Rehearsed("imports", "not looked at: the command names no .py of the workspace")
    else:
        yield _imports(worker, asked[1])
        code = {name: nodes_of(sources[name]) for name in asked[0]}
        for place in _written(code, is_copied=settings.goal.is_reported):
            yield Rehearsed("writes", WRITES[0].format(place), WRITES[1])
        for place in _absent(code, source, names, settings):
            yield Rehearsed("paths", LOOKS[0].format(place), LOOKS[1])
    if settings.folders:
        try:
            try_a_box(worker.executor, worker.image_id, settings, None)
        except UsageError as error:
            yield Rehearsed("data", error.message, error.hint, is_certain=True)
        else:
            shown = ", ".join(folder.at or "$NIGHTLAB_DATA" for folder in settings.folders)
            yield Rehearsed("data", f"can be read: {shown}")
    if settings.goal.is_reported:
        yield Rehearsed(SCORE, f"{settings.goal.metric} is read from {settings.goal.expected}")


def rehearse(
    worker: Worker,
    source: Path,
    files: dict[str, bytes],
    seconds: float | None,
    seeds: Sequence[int],
) -> Iterator[Rehearsed]:
    """Tell what can be told, train once, and once more with another seed.

    Args:
        worker: with the night's settings; its `on_log` shows the log.
        source: see `before_training`.
        files: of the workspace, as a session has them.
        seconds: that a training may take here; None for the night's own limit.
        seeds: two.

    Raises:
        SandboxError: nightlab or the engine failed.
    """
    settings = worker.settings
    for one in before_training(worker, source):
        yield one
        if one.is_certain or (one.cure and one.about == "imports"):
            return
    first, value = _trained(worker, files, seeds[0], seconds)
    yield from _ending(first)
    yield from _size(worker, first)
    if first.outcome is not Outcome.OK:
        return
    yield Rehearsed("output", f"{len(first.output)} files come back")
    progress = likely_progress(lines_of(first.log)[-LINES_LOOKED_AT:])
    if settings.progress.pattern is None and progress:
        line, pattern = progress
        text = f"`{line}` gives bars, curves and early stopping by [progress] pattern = '{pattern}'"
        yield Rehearsed("progress", text)
    if isinstance(value, Rehearsed):
        yield value
        return
    yield Rehearsed(settings.goal.label, f"{value:g}")
    second, other = _trained(worker, files, seeds[1], seconds)
    if second.outcome is not Outcome.OK:
        yield from _ending(second)
    elif isinstance(other, Rehearsed):
        yield other
    elif other != value:
        yield Rehearsed("seed", f"another one gives {other:g}: it reaches the score, or luck does")
    else:
        cure = "{seed} in command, or NIGHTLAB_SEED read by the code; else [noise] smallest_gain"
        yield Rehearsed("seed", "another one gives the same: it does not reach the score", cure)


def _written(code: Mapping[str, list[ast.AST]], *, is_copied: bool) -> Iterator[str]:
    """Places that code says it writes to and no box of a training can, as far as it names them."""
    for name, nodes in code.items():
        for node in nodes:
            if not isinstance(node, ast.Call) or not node.args:
                continue
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            mode = next((word.value for word in node.keywords if word.arg == "mode"), None)
            first, second = (*map(_text, node.args[:2]), _text(mode), "")[:2]
            is_open = called == "open" and re.fullmatch(r"[wax][bt+]*", second)
            path = first or second if called in WRITERS else first if is_open else ""
            is_there = is_copied and not path.startswith("/")
            if path and not is_there and not WRITABLE.match(path):
                yield f"{path} ({name}, line {node.lineno})"


def _text(node: ast.expr | None) -> str:
    """A text that stands in the code; empty for what only a run would tell."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _absent(
    code: Mapping[str, list[ast.AST]], source: Path, names: Sequence[str], settings: Settings
) -> Iterator[str]:
    """Paths that code names, that lie here, and that a box would not have."""
    there = {str(path) for name in names for path in (Path(name), *Path(name).parents)}
    shown = tuple(folder.at for folder in settings.folders if folder.at)
    told = set[str]()
    for name, nodes in code.items():
        for node in nodes:
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
                continue
            path = node.value.removeprefix("./").rstrip("/")
            if not re.fullmatch(r"\w[\w./ -]{0,199}", path) or path in there | told:
                continue
            if LEAVINGS.search(path) or path.startswith(shown) or not (source / path).exists():
                continue
            told.add(path)
            yield f"{path} ({name}, line {node.lineno})"


def _imports(worker: Worker, modules: Sequence[str]) -> Rehearsed:
    """What the image lacks of the modules that are imported, as a box of it says."""
    command = worker.settings.workspace.command
    last = max((n for n, word in enumerate(command) if PYTHON.match(word)), default=None)
    python = ("python3",) if last is None else command[: last + 1]
    limits = worker.settings.train_limits().model_copy(update={"wall_seconds": IMPORT_SECONDS})
    argv = (*python, "-c", _ABSENT, json.dumps(list(modules)))
    spec = box_spec(worker, "try-imports", "train", argv, worker.environment, {}, limits)
    spec = spec.model_copy(update={"working_directory": "/"})
    result = worker.run(spec)
    lines = (result.log.head + result.log.tail).splitlines()
    # An image may say more than it was asked: a warning, a greeting.
    answers = [line.removeprefix(_ANSWER) for line in lines if line.startswith(_ANSWER)]
    if result.outcome is not Outcome.OK or not answers:
        ended = f"{evidence_of(result)}: {one_line(lines[-1] if lines else '', 200)}"
        cause = cause_of_run(result)
        cure = cause.cure if cause else "Python must start in the image, within [limits]"
        return Rehearsed("imports", f"the box that looks for them did not answer: {ended}", cure)
    if absent := json.loads(answers[-1]):
        lacks, cure = LACKS
        what = lacks.format(", ".join(map(str, absent)))
        return Rehearsed("imports", what, cure, is_certain=True)
    return Rehearsed("imports", f"all there: {', '.join(modules) or 'the standard library alone'}")


def _trained(
    worker: Worker, files: dict[str, bytes], seed: int, seconds: float | None
) -> tuple[RunResult, float | Rehearsed]:
    """One training as the night has it, and its score or why there is none."""
    settings = worker.settings
    limits = settings.train_limits()
    if seconds is not None:
        limits = limits.model_copy(update={"wall_seconds": seconds})
    trial = Trial(
        id=f"try-{seed}",
        purpose="smoke-0",
        attempt=0,
        seed=seed,
        files=files,
        budget=settings.budget,
        limits=limits,
        splits=("val",),
        checks=0,
        free=None,
        left_seconds=0.0,
        usual=Usual(0.0, None),
        past=None,
        counts_when_disturbed=True,
        is_begun=False,
    )
    output = fresh_directory(worker.directory / "output")
    with host_faults(), leased(worker, 0) as gpus, files_of(worker, trial) as root:
        spec = with_gpus(worker, train_spec(worker, trial, trial.id, root), gpus)
        result = worker.run(spec, output_dir=output, on_log=worker.on_log)
    read = read_reported(result.log, settings.goal, reported_file(output, settings.goal))
    if read.value is None:
        return result, Rehearsed(settings.goal.label, read.explanation, "see pattern under [goal]")
    return result, read.value


def _ending(result: RunResult) -> Iterator[Rehearsed]:
    """How it ended, and what its log says of why."""
    text = f"{result.log.head}\n{result.log.tail}"
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    ended = evidence_of(result)
    is_good = result.outcome is Outcome.OK
    yield Rehearsed(
        "end",
        ended if is_good else f"{ended}: {one_line(last, 200)}",
        "" if is_good else "see its log",
    )
    if cause := cause_of_run(result):
        yield Rehearsed("cause", cause.words, cause.cure)


def _size(worker: Worker, result: RunResult) -> Iterator[Rehearsed]:
    """Time and memory against the settings."""
    budget, limits = worker.settings.budget, result.limits
    took, room = result.wall_seconds, math.ceil(1.5 * result.wall_seconds / 10) * 10
    fits = f"{took:.0f} s of {budget.seconds:g}"
    is_near = took > NEAR * budget.seconds and result.outcome is Outcome.OK
    yield Rehearsed("time", fits, f"[budget] seconds = {room}" if is_near else "")
    peak = result.peak_memory_bytes or 0
    is_near = peak > NEAR * limits.memory_bytes
    text = f"{peak / 2**20:,.0f} of {limits.memory_bytes / 2**20:,.0f} MiB"
    yield Rehearsed(
        "memory", text, f'[limits] memory = "{2 * peak // 2**30 + 1}g"' if is_near else ""
    )
