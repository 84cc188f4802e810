"""What each box of a trial is asked for.

Who sees what stands here: candidate, data, checkpoint and scorer meet in no box that could use
them against the score. See docs/decisions/0015 for the number of model boxes.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agent.attempt.lab import (
    CHECKPOINT,
    DATA,
    EVALUATE,
    Trial,
    Worker,
    box_label,
    budget_of,
    fresh_directory,
)
from agent.record.events import SMOKE, Purpose, SessionStarted, Split
from agent.record.reported import TIME_IS_OVER
from agent.settings import Budget, Settings
from sandbox.contract.gpu import Devices, GpuMemory
from sandbox.contract.run import Box, Limits, Mount, RunSpec

WORKSPACE, OUTPUT, HOME, COPY = "/workspace", "/out", "/tmp", "/tmp/workspace"  # noqa: S108
CHECK_RUN = re.compile(r"-check-[0-9]+$")
"""How the name of a model box ends whose answers are compared and not scored."""
MODEL_RUN = re.compile(r"(.*)-(?:model|check-[0-9]+)")
"""The name of a model box, and of the score that it belongs to."""
IN_A_COPY = """
import contextlib, json, os, shutil, signal, subprocess, sys
from pathlib import Path
snapshot, copy, output, keep, links, report, *cut = json.loads(sys.argv[1])
shutil.copytree(snapshot, copy, symlinks=True)
for path in Path(copy).rglob("*"):
    if path.is_file() and path.open("rb").read(2) == b"#!":
        path.chmod(0o755)
def show(there, here):
    if not os.path.lexists(here):
        os.makedirs(os.path.dirname(here), exist_ok=True)
        os.symlink(there, here)
    elif os.path.isdir(there):
        for name in os.listdir(there):
            show(os.path.join(there, name), os.path.join(here, name))
for there, here in links:
    show(there, here)
if report and os.path.isfile(os.path.join(copy, report)):
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(copy, report))
shown = [os.path.realpath(there) for there, here in links]
try:
    program = subprocess.Popen(sys.argv[2:], cwd=copy, start_new_session=True)
    code = program.wait(*cut[:1])
except OSError as error:
    sys.exit(f"{sys.argv[2]} cannot be started: {error.strerror}; is it in the image?")
except subprocess.TimeoutExpired:
    code = 0
    print("\\nTIME_IS_OVER; what was said until now counts", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        os.killpg(program.pid, signal.SIGINT)
        program.wait(cut[1])
    with contextlib.suppress(OSError):
        os.killpg(program.pid, signal.SIGKILL)
        program.wait()
if code < 0:
    os.kill(os.getpid(), -code)
for pattern in keep:
    for path in Path(copy).glob(pattern):
        place = Path(output, path.relative_to(copy))
        is_shown = any(path.resolve().is_relative_to(there) for there in shown)
        if path.is_file() and not is_shown and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
sys.exit(code)
""".replace("TIME_IS_OVER", TIME_IS_OVER)
"""Runs a program that reports its own score where it may write: in a copy of the snapshot, bounded
by the box's /tmp and gone with it. A cut ends it as a person would, by an interrupt: some programs
then take their last measure. Data lies where the program looks, what is kept goes out. A file
with a metric that came with the files or data is none that the training wrote: it goes first."""


@dataclass(frozen=True)
class Terms:
    """What settings and session demand of a box: a session's record is checked against them."""

    image: str
    limits: Limits
    argv: tuple[str, ...] | None
    """None where the command is nightlab's own and names paths in the box."""
    seed: int | None
    """What the program is told of it; None for boxes that are told nothing."""
    gpus: int
    gpu_memory: GpuMemory | None


def image_of(box: Box, run_id: str, image_id: str, copies: Mapping[str, str]) -> str:
    """The image of a box: no page in memory of one that sees rows is any other's.

    Args:
        run_id: says whether the box answers for the score or is asked to check it.
        image_id: of the session.
        copies: of that image, by what they are for; see `sandbox.image.copies`.
    """
    if box != "model":
        return image_id
    return copies["check" if CHECK_RUN.search(run_id) else "model"]


def terms_of(
    box: Box, run_id: str, purpose: Purpose, seed: int, settings: Settings, session: SessionStarted
) -> Terms:
    """What a box of a session must have been asked for, whatever it is for."""
    devices: Devices = session.image.get("devices") or "none"
    has_gpus = devices != "none" and box != "scorer"  # it only adds up losses
    is_train, is_smoke = box == "train", purpose.startswith(SMOKE)
    limits = settings.train_limits(is_smoke=is_smoke) if is_train else settings.scoring_limits()
    if box == "scorer":
        limits = settings.scorer_limits()
    return Terms(
        image=image_of(
            box,
            run_id,
            str(session.image.get("image_id")),
            session.image.get("copies") or dict.fromkeys(("model", "check"), "none"),
        ),
        limits=limits,
        argv=training_command(settings, seed, budget_of(settings, purpose)) if is_train else None,
        seed=seed if is_train else None,
        gpus=settings.hardware.gpus_per_run if has_gpus else 0,
        gpu_memory=settings.hardware.gpu_memory("") if has_gpus else None,
    )


def training_command(settings: Settings, seed: int, budget: Budget) -> tuple[str, ...]:
    """What a train box runs: the person's command, in a copy where the program reports itself."""
    given = {
        "{seed}": str(seed),
        "{budget}": f"{budget.seconds:g}",
        "{output}": OUTPUT,
        "{data}": places_of(settings)[0] if places_of(settings) else DATA,
    }
    # By name and not by a format: a command may hold brackets of its own.
    words = (
        re.sub("|".join(map(re.escape, given)), lambda found: given[found[0]], word)
        for word in settings.workspace.command
    )
    if not settings.goal.is_reported:
        return tuple(words)
    keep = [*settings.workspace.keep, *([settings.goal.file] if settings.goal.file else [])]
    links = [
        (place, f"{HOME}/{folder.at[2:]}" if folder.at.startswith("~/") else f"{COPY}/{folder.at}")
        for folder, place in zip(settings.folders, places_of(settings), strict=True)
        if folder.at and place != folder.at
    ]
    # Half of the grace for an interrupted program, the rest for what is kept.
    cut = [budget.seconds, settings.budget.grace_seconds / 2] if budget.kind == "cut" else []
    asked = json.dumps([WORKSPACE, COPY, OUTPUT, keep, links, settings.goal.file, *cut])
    return ("python3", "-I", "-S", "-c", IN_A_COPY, asked, *words)


def places_of(settings: Settings) -> list[str]:
    """Where a train box has the person's folders mounted, in their order."""
    return [
        folder.at if folder.at.startswith("/") else f"{DATA}/{number}"
        for number, folder in enumerate(settings.folders)
    ]


def train_spec(worker: Worker, trial: Trial, run_id: str, files: Path) -> RunSpec:
    """A train box for files, with what it is told of its seed and its budget."""
    environment = worker.environment | {
        "NIGHTLAB_SEED": str(trial.seed),
        "NIGHTLAB_BUDGET_SECONDS": f"{trial.budget.seconds:g}",
        "NIGHTLAB_OUTPUT": OUTPUT,
    }
    mounts, places = {files: WORKSPACE}, places_of(worker.settings)
    if worker.data_dir is not None:
        places = [DATA]
        mounts[worker.split("train")] = DATA
    mounts |= {folder.path: p for folder, p in zip(worker.settings.folders, places, strict=False)}
    if places:
        environment["NIGHTLAB_DATA"] = places[0]
    if trial.budget.tokens is not None:
        environment["NIGHTLAB_BUDGET_TOKENS"] = str(trial.budget.tokens)
    command = training_command(worker.settings, trial.seed, trial.budget)
    return box_spec(worker, run_id, "train", command, environment, mounts, trial.limits)


def model_names(run_id: str, checks: int) -> list[str]:
    """The names of a score's model boxes: the one whose answers are the score comes first."""
    return [f"{run_id}-model", *(f"{run_id}-check-{number + 1}" for number in range(checks))]


def model_spec(worker: Worker, run_id: str, files: Path, checkpoint: Path) -> RunSpec:
    """A model box for files and the checkpoint that they left: no data, no loss."""
    argv = ("python3", f"{EVALUATE}/evaluate.py", "model", "--workspace", WORKSPACE)
    return box_spec(
        worker,
        run_id,
        "model",
        (*argv, "--checkpoint", CHECKPOINT, "--device", worker.device),
        worker.environment,
        {files: WORKSPACE, checkpoint: CHECKPOINT, worker.fixed_dir: EVALUATE},
        worker.settings.scoring_limits(),
    )


@contextmanager
def with_own_copies(spec: RunSpec, folder: Path) -> Iterator[RunSpec]:
    """The same run on copies of what it sees, in `folder`, which is gone afterwards.

    Boxes that see one file meet in it: in its locks, and in what of it lies in the page cache.
    """
    fresh_directory(folder)
    try:
        copies = []
        for number, mount in enumerate(spec.mounts):
            source = folder / str(number)
            _copy(mount.source, source)
            copies.append(Mount(source=source.absolute(), target=mount.target))
        yield spec.model_copy(update={"mounts": tuple(copies)})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """Copy a directory; not by `shutil.copytree`, whose error does not tell a full disk."""
    target.mkdir()
    for path in source.iterdir():
        (_copy if path.is_dir() else _clone)(path, target / path.name)
    shutil.copymode(source, target)


def _clone(source: Path, target: Path) -> None:
    """Copy a file as the kernel does best: blocks of the disk are shared where it can."""
    try:
        with source.open("rb") as old, target.open("wb") as new:
            while os.copy_file_range(old.fileno(), new.fileno(), 2**30):
                pass
    except OSError:  # between some file systems it cannot
        shutil.copyfile(source, target)
    shutil.copymode(source, target)


def scorer_spec(worker: Worker, run_id: str, *, seed: int, split: Split, checks: int) -> RunSpec:
    """The scorer box: tokens and loss, and nothing that the candidate wrote."""
    argv = ["python3", f"{EVALUATE}/evaluate.py", "score", "--data", DATA, "--output", OUTPUT]
    # A scorer that speaks to one model box knows nothing of checks.
    argv += ["--checks", str(checks)] if worker.settings.model_boxes > 1 else []
    return box_spec(
        worker,
        run_id,
        "scorer",
        (*argv, "--seed", str(seed)),
        worker.environment | {"NIGHTLAB_DEVICE": "cpu"},  # it only adds up losses
        {worker.fixed_dir: EVALUATE, worker.split(split): DATA},
        worker.settings.scorer_limits(),
    )


def box_spec(
    worker: Worker,
    run_id: str,
    box: Box,
    argv: tuple[str, ...],
    environment: dict[str, str],
    mounts: dict[Path, str],
    limits: Limits,
) -> RunSpec:
    """What a box of this session is asked."""
    return RunSpec(
        run_id=run_id,
        session=box_label(worker.session),
        box=box,
        image=image_of(box, run_id, worker.image_id, worker.copies),
        argv=argv,
        working_directory=WORKSPACE if box != "scorer" else EVALUATE,
        environment=environment,
        mounts=tuple(Mount(source=s.absolute(), target=t) for s, t in mounts.items()),
        gpus=(),
        limits=limits,
    )


def with_gpus(worker: Worker, spec: RunSpec, gpus: tuple[str, ...]) -> RunSpec:
    """The same run with these GPUs, held to what the settings say."""
    if not gpus:
        return spec
    given = {"devices": worker.gpus.devices, "gpus": gpus, "gpu_memory": worker.gpu_memory}
    return RunSpec.model_validate(spec.model_dump() | given)
