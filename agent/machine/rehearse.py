"""Rehearses a training in the night's box, before the night."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agent.attempt.boxes import box_spec, train_spec, with_gpus
from agent.attempt.disturbance import Usual
from agent.attempt.lab import Trial, Worker, evidence_of, fresh_directory
from agent.attempt.trial import files_of, leased
from agent.machine.look import modules_asked
from agent.record.reported import read_reported, reported_file
from agent.text import one_line
from sandbox.contract.errors import host_faults
from sandbox.contract.run import Outcome, RunResult

IMPORT_SECONDS = 60
NEAR = 0.8
"""Share of a limit from which it is worth a word."""
_ANSWER = "nightlab try: "
_ABSENT = (
    "import importlib.util, json, sys; "
    "absent = [m for m in json.loads(sys.argv[1]) if not importlib.util.find_spec(m)]; "
    f"print({_ANSWER!r} + json.dumps(absent))"
)
ADDED = 'in a file named under [hardware]: requirements = "requirements.txt"; then nightlab setup'
CAUSES = {
    r"Read-only file system: '([^']*)'": (
        "it writes where nothing can be written: {0}",
        "write into its own directory, ~ or $NIGHTLAB_OUTPUT; what shall come back: keep",
    ),
    r"(name resolution|Network is unreachable|URLError|Max retries exceeded|Couldn't connect)": (
        "it asked the network, and a box has none",
        "download once here, then show the folder: [[data]] with from and at",
    ),
    r"No module named '([\w.]+)'": (
        "the image has no {0}",
        f"its package's name {ADDED}",
    ),
    r"No such file or directory: '([^']*)'": (
        "it looks for {0}, which is not there",
        "if git ignores it: [[data]] with from and at",
    ),
    r"(No space left on device)": ("a place was full", "raise tmp, shm or output under [limits]"),
}


@dataclass(frozen=True)
class Rehearsed:
    """One thing that a rehearsal showed, and what would change it."""

    about: str
    seen: str
    cure: str = ""
    """A line for program.md, or what to do; empty where all is well."""


def rehearse(
    worker: Worker, files: dict[str, bytes], seconds: float | None, seeds: Sequence[int]
) -> Iterator[Rehearsed]:
    """Ask the image for what is imported, train once, and once more with another seed.

    Args:
        worker: with the night's settings; its `on_log` shows the log.
        files: of the workspace.
        seconds: that a training may take here; None for the night's own limit.
        seeds: two.

    Raises:
        SandboxError: nightlab or the engine failed.
    """
    settings = worker.settings
    imports = _imports(worker, modules_asked(files, settings.workspace.command))
    yield imports
    if imports.cure:
        return
    first, value = _trained(worker, files, seeds[0], seconds)
    yield from _ending(first)
    yield from _size(worker, first)
    if first.outcome is not Outcome.OK:
        return
    yield Rehearsed("output", f"{len(first.output)} files come back")
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


def _imports(worker: Worker, modules: Sequence[str] | None) -> Rehearsed:
    """What the image lacks of the modules that are imported, as a box of it says."""
    if modules is None:
        return Rehearsed("imports", "not looked at: the command names no .py of the workspace")
    limits = worker.settings.train_limits().model_copy(update={"wall_seconds": IMPORT_SECONDS})
    argv = ("python3", "-c", _ABSENT, json.dumps(list(modules)))
    spec = box_spec(worker, "try-imports", "train", argv, worker.environment, {}, limits)
    spec = spec.model_copy(update={"working_directory": "/"})
    result = worker.run(spec)
    lines = (result.log.head + result.log.tail).splitlines()
    # An image may say more than it was asked: a warning, a greeting.
    answers = [line.removeprefix(_ANSWER) for line in lines if line.startswith(_ANSWER)]
    if result.outcome is not Outcome.OK or not answers:
        ended = f"{evidence_of(result)}: {one_line(lines[-1] if lines else '', 200)}"
        cure = "python3 must start in the image: base_image under [hardware], or more [limits]"
        return Rehearsed("imports", f"the box that looks for them did not answer: {ended}", cure)
    if absent := json.loads(answers[-1]):
        cure = f"their packages' names {ADDED}"
        return Rehearsed("imports", f"the image lacks {', '.join(map(str, absent))}", cure)
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
        "" if is_good else "see below",
    )
    for pattern, (seen, cure) in CAUSES.items():
        if not is_good and (found := list(re.finditer(pattern, text[-65536:]))):
            yield Rehearsed("cause", seen.format(one_line(found[-1][1], 100)), cure)


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
