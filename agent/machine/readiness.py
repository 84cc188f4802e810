"""Tries, before anything trains, what this machine gives a box."""

from contextlib import closing
from pathlib import Path

from agent.attempt.boxes import places_of
from agent.settings import Settings
from sandbox.contract.errors import SandboxError, UsageError
from sandbox.contract.run import Executor, Mount, Outcome, RunSpec
from sandbox.engine.find import Engine, connect, must_answer

FIRST_BOX_SECONDS = 60
MOST_FILES = 20_000
"""Of a folder, at most so many are tried; those that cannot be read are seldom the last ones."""
READS = f"""
import itertools, os, sys
def unreadable():
    tried = 0
    for place in sys.argv[1:]:
        for folder, folders, files in itertools.chain([("", [place], [])], os.walk(place)):
            for path in [os.path.join(folder, name) for name in folders + files]:
                if os.path.islink(path) and not os.path.exists(path):
                    continue
                needs = os.R_OK | os.X_OK if os.path.isdir(path) else os.R_OK
                if not os.access(path, needs):
                    yield path
                tried += 1
                if tried == {MOST_FILES}:
                    return
print(*list(unreadable())[:3], sep="\\n", end="")
"""


def require_capacity(engine: Engine, settings: Settings) -> None:
    """Check that the engine's machine has the processors and the memory that are asked for.

    Raises:
        UsageError: naming the setting that asks for more.
    """
    with must_answer("the engine does not answer"), closing(connect(engine)) as client:
        about = client.info()
    processors, memory = int(about["NCPU"]), int(about["MemTotal"])
    if settings.limits.cpus > processors:
        raise UsageError(
            f"cpus under [limits] is {settings.limits.cpus:g}, and the engine has {processors}",
            "lower it; an engine that is held to fewer than the machine has counts those",
        )
    asked = {"limits": settings.limits.memory_bytes}
    asked |= {"scoring": settings.scoring.memory_bytes} if settings.scoring else {}
    for section, size in asked.items():
        if size > memory:
            raise UsageError(
                f"memory under [{section}] is {size / 2**30:.1f} GiB, and this machine has "
                f"{memory / 2**30:.1f}",
                "lower it, by what the machine itself needs as well",
            )


def try_a_box(executor: Executor, image_id: str, settings: Settings, data_dir: Path | None) -> None:
    """Run one box with the limits of trainings and see whether it can read the data.

    Raises:
        SandboxError: the engine cannot build it; with what it said.
        UsageError: the box came up and could not do what every training does.
    """
    limits = settings.train_limits().model_copy(update={"wall_seconds": FIRST_BOX_SECONDS})
    shown = dict(zip(places_of(settings), (one.path for one in settings.folders), strict=True))
    shown |= {} if data_dir is None else {"/data": data_dir}
    mounts = tuple(Mount(source=source, target=place) for place, source in shown.items())
    argv = ("python3", "-I", "-S", "-c", READS, *(mount.target for mount in mounts))
    spec = RunSpec(
        run_id="setup",
        session="setup",
        box="train",
        image=image_id,
        argv=argv,
        working_directory="/",
        environment={},
        mounts=mounts,
        gpus=(),
        limits=limits,
    )
    try:
        result = executor.run(spec)
    except SandboxError as error:
        problem = f"a first box with the [limits] of program.md did not run: {error.message}"
        raise type(error)(problem, error.hint) from error
    if result.outcome != Outcome.OK:
        raise UsageError(
            f"a first box with the [limits] of program.md ended {result.outcome}",
            f"it only started Python; raise the limit that this names. {result.log.head[-500:]}",
        )
    if result.log.head:
        seen = result.log.head.replace("\n", ", ")[:500]
        for place, source in reversed(shown.items()):
            seen = seen.replace(place, str(source))
        raise UsageError(
            f"boxes cannot read {seen}",
            "a box has a user of its own: let everybody read it (`chmod -R a+rX`); on a network "
            "file system or under SELinux also the engine must be let in",
        )
