"""One command in one box, from limits alone.

Finds engine and image as `nightlab setup` left them. Limits are named by the caller: a set from
`limits.toml`, or `Limits` of his own, with single ones replaced by keyword.
"""

import os
import tomllib
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from importlib import resources
from pathlib import Path

from pydantic import ValidationError

from sandbox.box.executor import DockerExecutor
from sandbox.box.reaper import living_gpus, process_owner, sweep, sweep_run_directories
from sandbox.contract.errors import SandboxError, UsageError, first_problem
from sandbox.contract.gpu import Devices, GpuMemory, GpuSource, NoGpus
from sandbox.contract.run import Limits, Mount, RunResult, RunSpec
from sandbox.engine.find import Engine, connect, find_engine
from sandbox.gpu.inventory import named_gpus
from sandbox.gpu.leases import Leases, Pool
from sandbox.image.image import Recipe, find_image
from sandbox.image.profiles import find_profile

BASE_ENVIRONMENT = {
    "HOME": "/tmp",  # noqa: S108 - the box's own bounded tmpfs
    "USER": "nightlab",
    "LOGNAME": "nightlab",
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",  # or the last words of a killed program are lost
    # In the box's own /tmp, anew for each run: docs/decisions/0011.
    "TORCHINDUCTOR_CACHE_DIR": "/tmp/inductor",  # noqa: S108
    "TRITON_CACHE_DIR": "/tmp/triton",  # noqa: S108
}


def run_box(
    argv: Sequence[str],
    limits: Limits | str,
    *,
    mounts: Mapping[Path | str, str] | None = None,
    output_dir: Path | str | None = None,
    on_log: Callable[[bytes], None] | None = None,
    recipe: Recipe | None = None,
    gpus: Sequence[str] = (),
    gpu_memory: GpuMemory | None = None,
    environ: Mapping[str, str] | None = None,
    **changed_limits: float,
) -> RunResult:
    """Run one command in a train box and return what became of it.

    Args:
        argv: the command and its arguments; no shell reads it.
        limits: every limit, or the name of a set in `limits.toml`.
        mounts: host paths seen read-only, each with its place in the box.
        output_dir: receives the files that the command leaves in /out; made where missing.
        on_log: called with pieces of the log while the command runs.
        recipe: what the image was made from; None for the shipped profile `cpu`.
        gpus: those that the box gets, by index or id; where the profile has GPUs and none is
            named, it gets the first that is free.
        gpu_memory: how much of each it may use; None for all.
        environ: names engine and state directory; the process's own if left out. No box sees it.
        changed_limits: single limits of the set, by their names in `Limits`.

    Raises:
        SandboxError: nightlab or the engine failed. A command that fails is a result.
        UsageError: the arguments are not of this form.
    """
    command, seen = _command(argv), _mounts(mounts or {})
    environ = os.environ if environ is None else environ
    bounds = named_limits(limits, changed_limits)
    engine, state_dir = engine_and_state(environ)
    recipe = recipe or shipped_recipe()
    # What a dead session left may have the very GPU that this one waits for.
    clean_up(engine, state_dir)
    name = f"box-{uuid.uuid4().hex[:12]}"
    devices = recipe.profile.devices
    source = gpu_source(engine, state_dir, devices, tuple(gpus), max(1, len(gpus)))
    with source.lease(name) as granted:
        spec = RunSpec(
            run_id=name,
            session=name,
            box="train",
            image=find_image(engine, recipe, state_dir=state_dir).image_id,
            argv=command,
            working_directory="/",
            environment=box_environment(recipe.profile.variables, bounds.cpus),
            mounts=seen,
            devices=devices,
            gpus=granted,
            gpu_memory=gpu_memory if granted else None,
            limits=bounds,
        )
        if output_dir is not None:
            (output_dir := Path(output_dir)).mkdir(parents=True, exist_ok=True)
        return executor(engine, state_dir).run(spec, output_dir=output_dir, on_log=on_log)


def _command(argv: Sequence[str]) -> tuple[str, ...]:
    if isinstance(argv, str | bytes):  # it would be taken letter by letter
        hint = """write ["python3", "-c", "print('hi')"], or ["sh", "-c", "echo hi"] for a shell"""
        raise UsageError("argv is a text, not a command and its arguments", hint)
    return tuple(argv)


def _mounts(mounts: Mapping[Path | str, str]) -> tuple[Mount, ...]:
    try:
        return tuple(Mount(source=Path(h).absolute(), target=b) for h, b in mounts.items())
    except (AttributeError, TypeError, ValidationError) as error:
        said = first_problem(error) if isinstance(error, ValidationError) else "no mapping of paths"
        hint = 'write mounts={"data": "/data"}: a path here, and its place in the box'
        raise UsageError(f"these mounts cannot be: {said}", hint) from error


def named_limits(limits: Limits | str, changed: Mapping[str, float]) -> Limits:
    """Return a set of limits with single ones replaced.

    Raises:
        SandboxError: there is no such set or limit, or a limit cannot have this value.
    """
    if not isinstance(limits, str | Limits):
        raise SandboxError("limits are neither a set's name nor Limits", "such as `small`")
    chosen = _limit_set(limits) if isinstance(limits, str) else limits.model_dump()
    try:
        return Limits.model_validate({**chosen, **changed})
    except ValidationError as error:
        wrong = "; ".join(f"{e['loc'][0]}: {e['msg']}" for e in error.errors())
        hint = f"limits are {', '.join(Limits.model_fields)}"
        raise SandboxError(f"these limits cannot be: {wrong}"[:1000], hint) from error


def _limit_set(name: str) -> dict[str, float]:
    text = resources.files("sandbox").joinpath("limits.toml").read_text(encoding="utf-8")
    sets: dict[str, dict[str, float]] = tomllib.loads(text)
    if name not in sets:
        hint = f"known sets: {', '.join(sets)}; or give `Limits` of your own"
        raise SandboxError(f"there is no set of limits {name[:60]!r}", hint)
    return sets[name]


def state_directory(environ: Mapping[str, str]) -> Path:
    """Where nightlab keeps engine, wheels, images and data."""
    if named := environ.get("NIGHTLAB_HOME"):
        return Path(named).absolute()
    if state := environ.get("XDG_STATE_HOME"):
        return Path(state).absolute() / "nightlab"
    try:
        return Path.home() / ".local" / "state" / "nightlab"
    except RuntimeError as error:
        problem = "this user has no home directory to keep engine, images and data in"
        raise UsageError(problem, "set NIGHTLAB_HOME to a directory for them") from error


def engine_and_state(environ: Mapping[str, str]) -> tuple[Engine, Path]:
    """The engine to use and the directory where nightlab keeps things; see `find_engine`."""
    state_dir = state_directory(environ)
    return find_engine(state_dir, environ=environ), state_dir


def executor(engine: Engine, state_dir: Path) -> DockerExecutor:
    """The executor for an engine."""
    run_root = state_dir / "run"
    run_root.mkdir(parents=True, exist_ok=True)
    return DockerExecutor(
        engine.base_url,
        engine.api_version,
        run_root,
        quarantine=gpu_leases(engine, state_dir).quarantine,
    )


def gpu_leases(engine: Engine, state_dir: Path) -> Leases:
    """Who has which GPU, on this engine and under this state directory."""

    def living() -> list[str]:
        with closing(connect(engine)) as client:
            return living_gpus(client.api)

    return Leases(state_dir / "gpus", living, process_owner())


def gpu_source(
    engine: Engine, state_dir: Path, devices: Devices, words: tuple[str, ...], count: int
) -> GpuSource:
    """Where runs get their GPUs from.

    Args:
        engine: runs them.
        state_dir: holds the line of those who wait.
        devices: the kind of GPUs; `none` for runs without.
        words: those that will do, by index or id; none for all of the kind.
        count: how many each run gets.

    Raises:
        SandboxError: GPUs are named, and there are none of the kind or not these.
    """
    named_gpus(devices, words)
    if devices == "none":
        return NoGpus()
    return Pool(gpu_leases(engine, state_dir), devices, words, count)


def shipped_recipe() -> Recipe:
    """What the image is made from where nobody says otherwise."""
    dockerfile = resources.files("sandbox").joinpath("Dockerfile.train").read_text(encoding="utf-8")
    return Recipe(profile=find_profile("cpu"), dockerfile=dockerfile, base_image="")


def box_environment(named: Mapping[str, str], cpus: float) -> dict[str, str]:
    """The variables that a box's program sees, those that its profile names among them."""
    # torch counts the machine's cores, not the box's, and would start a thread for each.
    threads = str(max(1, int(cpus)))
    return BASE_ENVIRONMENT | dict(named) | {"OMP_NUM_THREADS": threads}


def clean_up(engine: Engine, state_dir: Path) -> tuple[str, ...]:
    """Remove what dead sessions left on the engine and in the run directory."""
    with closing(connect(engine)) as client:
        removed = sweep(client.api)
    sweep_run_directories(state_dir / "run")
    return tuple(removed)
