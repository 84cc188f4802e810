"""Commands about this machine: init, setup, check, box."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agent.candidate.knobs import described, find_knobs, given_elsewhere, left_out, literal
from agent.candidate.own_files import copy_workspace
from agent.candidate.workspace import Workspace
from agent.cli import flags
from agent.cli.shared import out, print_event, print_line, print_table, say
from agent.machine.look import begin_program, look_at
from agent.machine.rehearse import in_place_of_a_night, rehearse
from agent.machine.runtime import find_runtime
from agent.machine.setup import copy_template, image_recipe, own_workspace, set_up
from agent.program import load_program
from agent.settings import parse_size
from agent.text import one_line, visible
from sandbox.check.self_check import CheckResult, machine_notes, try_walls
from sandbox.contract.errors import UsageError
from sandbox.engine.own import stop_own_engine
from sandbox.engine.versions import installed
from sandbox.gpu.inventory import find_gpus
from sandbox.gpu.leases import GpuRow, gpu_rows
from sandbox.image.image import find_image
from sandbox.image.profiles import find_profile
from sandbox.machine import (
    engine_and_state,
    executor,
    gpu_leases,
    gpu_source,
    named_limits,
    run_box,
    state_directory,
)

NOTED = ("core_pattern", "osrelease", "modprobe")
"""Settings of this kernel by which a box could start programs of the host's."""


def init(
    directory: Annotated[Path, typer.Argument(help="where to put the files")] = Path(),
    profile: Annotated[
        str, typer.Option("--profile", help="the hardware it is for; see `nightlab image list`")
    ] = "cpu",
) -> None:
    """Look at a checkout and write its program, or copy a task.

    Nothing of a checkout is run. Each line of its program has its reason; what is missing is
    marked. Into an empty directory the shipped task is copied.
    """
    find_profile(profile, directory)
    if (begun := begin_program(directory, Path.home(), profile)) is not None:
        path, lines = begun
        table = Table("", "found", "why", box=None, pad_edge=False)
        for line in lines:
            style = "yellow" if line.is_missing else ""
            what = Text(one_line(line.setting.replace("\n", ", "), 70))
            table.add_row(line.table, what, Text(one_line(line.reason, 200)), style=style)
        print_table(out, table)
        missing = sum(line.is_missing for line in lines)
        marked = f"; {missing} lines marked MISSING are yours to look at" if missing else ""
        say(f"new: {path.name}{marked}. Next: nightlab setup, nightlab try, nightlab run")
        return
    copied = [] if look_at(directory, Path.home()) else copy_template(directory, profile)
    say(f"new: {', '.join(copied)}" if copied else "nothing new: all files were there")


def knobs(program: flags.Program = flags.PROGRAM) -> None:
    """List what the sampler would turn, and what not, with why."""
    settings = load_program(program).settings
    files = Workspace(own_workspace(settings, program.parent), settings.workspace.editable)
    table = Table("file", "knob", "value", "what is tried", box=None, pad_edge=False)
    others = Table("file", "left alone", "why", box=None, pad_edge=False)
    contents = files.editable_files()
    found = [knob for file, source in contents.items() for knob in find_knobs(file, source)]
    given = given_elsewhere(found, settings.workspace.command)
    for knob in found:
        tried = "nothing: the command gives it" if knob.key in given else described(knob.domain)
        row = knob.file, one_line(knob.name, 60), literal(knob.value), tried
        table.add_row(*map(Text, row))
    for file, source in contents.items():
        for name, why in left_out(file, source).items():
            others.add_row(*map(Text, (file, one_line(name, 60), why)))
    if table.row_count:
        print_table(out, table)
    else:
        say("nothing to turn: name files with numbers under editable in [workspace]")
    if others.row_count:
        out.print()
        print_table(out, others)


def try_(
    program: flags.Program = flags.PROGRAM,
    seconds: Annotated[
        float | None, typer.Option(help="what a training may take here; without it the night's")
    ] = None,
    base_image: flags.BaseImage = None,
) -> None:
    """Rehearse a program that reports its own score, in a box.

    It trains in the night's box, twice, and its log is shown live. Says what is missing and what to
    change in program.md; exit 1 if there is anything. Nothing is recorded.
    """
    settings = load_program(program).settings.with_overrides(base_image=base_image)
    if not settings.goal.is_reported:
        hint = "for a task that boxes score: nightlab run --attempts 1"
        raise UsageError('try is for [goal] source = "reported"', hint)
    source = own_workspace(settings, program.parent)
    runtime = find_runtime(settings, program.parent, os.environ, say)
    with in_place_of_a_night(settings, runtime, state_directory(os.environ), _show_log) as worker:
        place, own = worker.directory, settings.workspace
        left = copy_workspace(
            source,
            place / "copy",
            place,
            own.leave_out,
            max_files=own.max_files,
            max_bytes=own.max_bytes,
        )
        if left:
            say(f"not copied: {left}")
        files = Workspace(place / "copy", settings.workspace.editable, left_out=()).candidate()
        seen = list(rehearse(worker, source, files, seconds, seeds=(1, 2)))
    table = Table("", "what was seen", "what would change it", box=None, pad_edge=False)
    for one in seen:
        style = "yellow" if one.cure else ""
        table.add_row(*map(Text, (one.about, one_line(one.seen, 600), one.cure)), style=style)
    out.print(table)
    if any(one.cure for one in seen):
        raise typer.Exit(1)
    say("ready: nightlab run")


def _show_log(piece: bytes) -> None:
    out.print(visible(piece.decode("utf-8", "replace")), end="", markup=False, soft_wrap=True)


def setup(
    program: flags.Program = flags.PROGRAM,
    base_image: flags.BaseImage = None,
    torch_index: Annotated[
        str,
        typer.Option(
            envvar="NIGHTLAB_TORCH_INDEX", help="a wheel index that has the CPU build of torch"
        ),
    ] = "",
    stop_engine: Annotated[
        bool, typer.Option("--stop-engine", help="end the engine that nightlab started, only that")
    ] = False,
) -> None:
    """Make engine, image and data ready, as far as they are not."""
    if stop_engine:
        stopped = stop_own_engine(state_directory(os.environ))
        out.print("engine stopped" if stopped else "no engine of nightlab's own was running")
        return
    began = time.monotonic()
    set_up(
        load_program(program).settings.with_overrides(base_image=base_image),
        program.parent,
        os.environ,
        torch_index=torch_index,
        say=lambda line: say(f"{time.monotonic() - began:4.0f} s  {line}"),
    )
    out.print("ready")
    if base_image:
        setting = f'base_image = "{base_image}"'
        say(f"give it to the other commands too, or write {setting} in program.md")


def check(
    program: flags.Program = flags.PROGRAM,
    base_image: flags.BaseImage = None,
    as_json: flags.Json = False,
) -> None:
    """Try to break every wall here; exit 1 if one gave way."""
    settings = load_program(program).settings.with_overrides(base_image=base_image)
    engine, state_dir = engine_and_state(os.environ)
    recipe = image_recipe(settings, program.parent)
    image = find_image(engine, recipe, state_dir=state_dir)
    devices = recipe.profile.devices
    source = gpu_source(engine, state_dir, devices, settings.hardware.gpus, 1)
    began = time.monotonic()
    boxes, run_root = executor(engine, state_dir), state_dir / "run"
    found = CheckResult(
        walls=try_walls(boxes, image.image_id, run_root, os.environ, source),
        components=installed(engine, os.environ),
        notes=machine_notes(engine.cgroup_version, *(_kernel_setting(name) for name in NOTED)),
        gpus=gpu_rows(find_gpus(devices), gpu_leases(engine, state_dir).status()),
        seconds=time.monotonic() - began,
    )
    if as_json:
        print_event("check", **found.model_dump(mode="json"))
    else:
        show_check(out, found)
    if found.gave_way:
        raise typer.Exit(1)


def box(
    argv: Annotated[list[str], typer.Argument(help="what to run, after --")],
    program: flags.Program = flags.PROGRAM,
    base_image: flags.BaseImage = None,
    gpus: flags.Gpus = None,
    wall_seconds: Annotated[float | None, typer.Option(help="kill after so many seconds")] = None,
    memory: Annotated[str | None, typer.Option(help="such as 1g")] = None,
    cpus: Annotated[float | None, typer.Option(help="such as 1.5")] = None,
    pids: Annotated[int | None, typer.Option(help="processes and threads")] = None,
    output: Annotated[str | None, typer.Option(help="size of /out, such as 64m")] = None,
    mount_ro: Annotated[
        list[str] | None, typer.Option("--mount-ro", help="HOST:BOX, read-only; may be repeated")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="an empty directory that receives the files of /out")
    ] = None,
) -> None:
    """Run one command in a train box; print its RunResult as JSON.

    Limits that are not given come from the [limits] of program.md. With --gpus it gets all those.
    """
    settings = load_program(program).settings.with_overrides(base_image=base_image, gpus=gpus)
    given = {
        "wall_seconds": wall_seconds,
        "memory_bytes": _size("--memory", memory),
        "cpus": cpus,
        "pids": pids,
        "output_bytes": _size("--output", output),
    }
    changed = {name: value for name, value in given.items() if value is not None}
    result = run_box(
        argv,
        named_limits(settings.train_limits(), changed),
        mounts=dict(_mount(text) for text in mount_ro or []),
        output_dir=output_dir,
        recipe=(recipe := image_recipe(settings, program.parent)),
        gpus=settings.hardware.gpus,
        gpu_memory=settings.hardware.gpu_memory(recipe.profile.allocator_variable),
        environ=os.environ,
    )
    print_line(result.model_dump_json(indent=2))


def gpus(
    program: flags.Program = flags.PROGRAM,
    lift: Annotated[
        str | None, typer.Option("--lift", help="put this one back into use, by its id")
    ] = None,
    as_json: flags.Json = False,
) -> None:
    """Show the GPUs for runs, who has them, which are out of use."""
    if lift is not None:
        if not gpu_leases(*engine_and_state(os.environ)).lift(lift):
            raise UsageError(f"GPU {lift[:60]} is not out of use", "see `nightlab gpus`")
        say(f"{lift} is back in use")
        return
    devices = image_recipe(load_program(program).settings, program.parent).profile.devices
    leases = gpu_leases(*engine_and_state(os.environ))
    rows = gpu_rows(find_gpus(devices), leases.status())
    if as_json:
        print_event("gpus", gpus=[row.model_dump(mode="json") for row in rows])
        return
    if not rows:
        say("the profile's boxes have no GPUs" if devices == "none" else "there are no GPUs here")
    show_gpus(out, rows)


def show_gpus(console: Console, rows: Sequence[GpuRow]) -> None:
    """A table of GPUs, then how each that is out of use comes back."""
    if not rows:
        return
    table = Table("index", "id", "name", "memory", "", box=None, pad_edge=False)
    for row in rows:
        size = "" if row.memory_bytes is None else f"{row.memory_bytes / 2**30:.0f} GiB"
        style = "bold red" if row.status == "out of use" else ""
        status = Text(one_line(f"{row.status}: {row.words}" if row.words else row.status, 100))
        table.add_row(row.index, row.id, Text(one_line(row.name, 60)), size, status, style=style)
    print_table(console, table)
    for row in rows:
        if row.status == "out of use":
            # Never by itself: a GPU that failed once makes every later score doubtful.
            hint = f"once you know why: nightlab gpus --lift {row.id}"
            console.print(hint, markup=False, highlight=False)


def show_check(console: Console, found: CheckResult) -> None:
    """A table of what was tried and what held, then the versions a box rests on."""
    table = Table("wall", "what was tried", "", "what was seen", box=None, pad_edge=False)
    for wall in found.walls:
        style = "" if wall.status == "held" else "bold red"
        seen = Text(one_line(wall.seen, 60))
        table.add_row(wall.family, Text(wall.tried), wall.status, seen, style=style)
    print_table(console, table)
    console.print()
    show_gpus(console, found.gpus)
    table = Table("part", "version", "the distribution's own", box=None, pad_edge=False)
    for part in found.components:
        table.add_row(part.name, Text(one_line(part.version, 60)), Text(one_line(part.package, 60)))
    print_table(console, table)
    for note in found.notes:
        console.print(f"\nnote: {one_line(note, 300)}", markup=False, highlight=False)
    statuses = [wall.status for wall in found.walls]
    counts = [f"{statuses.count('held')} of {len(statuses)} attempts held"]
    counts += [f"{n} {s}" for s in ("gave way", "not tried") if (n := statuses.count(s))]
    console.print(f"\n{', '.join(counts)} in {found.seconds:.0f} s", highlight=False)


def _kernel_setting(name: str) -> str:
    """Return one of the kernel's settings; nothing where this kernel has it not."""
    try:
        return Path("/proc/sys/kernel", name).read_text("utf-8", errors="replace").strip()
    except OSError:
        return ""


def _size(flag: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        size = parse_size(text)
    except ValueError as error:
        raise UsageError(f"{flag} {text}: {error}", "write it like 512m or 8g") from None
    assert isinstance(size, int)
    return size


def _mount(text: str) -> tuple[Path, str]:
    source, separator, target = text.partition(":")
    if not separator or not Path(source).exists():
        message = f"--mount-ro {text}: not HOST:BOX with an existing host path"
        raise UsageError(message, "write it like data:/data")
    return Path(source), target
