"""The commands, and the only place that picks concrete parts."""

from __future__ import annotations

import functools
import json
import os
import secrets
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version as distribution_version
from pathlib import Path
from types import FrameType
from typing import Annotated, ParamSpec

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agent.audit import audit as differences
from agent.console import JsonConsole, NightConsole, closing_lines
from agent.export import (
    PATCH_NAME,
    Git,
    approval,
    find_person,
    make_branch,
    original_files,
    patch,
    refuse_inside,
    rejection,
    result_diff,
    result_files,
    write_approved,
)
from agent.history import fold
from agent.lab import Lab, Observer
from agent.ledger import Ledger, LedgerError, read_blob, read_ledger
from agent.loop import run_session
from agent.model import ModelError, check_credentials, price_known
from agent.morning import notes, replay_lines, result_lines, worth_table
from agent.night import assemble, open_models
from agent.program import Program, ProgramError, Settings, load_program, parse_program, parse_size
from agent.records import PLANNED_STOPS
from agent.render import for_terminal, one_line
from agent.report import write_report
from agent.review import replay as run_again
from agent.review import review as check_by_daylight
from agent.session import SessionError, begin, bring_back, open_lab, settings_of
from agent.setup import (
    box_environment,
    clean_up,
    copy_template,
    executor,
    find_outfit,
    recorded_outfit,
    set_up,
    state_directory,
    template,
)
from agent.steering import ask_to_continue, ask_to_pause, ask_to_stop
from agent.summary import summary
from agent.worth import ReviewTable, reviews, worth
from sandbox.contract import Limits, Mount, RunSpec, SandboxError
from sandbox.engine import find_engine, stop_own_engine
from sandbox.escapes import installed, version_rows
from sandbox.hardware import find_profile
from sandbox.image import find_image
from sandbox.self_check import CheckResult, timed_check

MAX_DIFF_CHARACTERS = 12_000
WRONG_SETTINGS, SERVICE_FAILED, INTERRUPTED = 2, 3, 130

app = typer.Typer(
    name="nightlab",
    help="A safe, unattended night of experiments. Containers share the kernel and the GPU driver "
    "with the host: see SECURITY.md for what is not promised.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

P = ParamSpec("P")


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Register a command whose errors are one sentence, a hint and an exit code."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except (ProgramError, SessionError) as error:
            _fail(error.message, error.hint, WRONG_SETTINGS)
        except (SandboxError, LedgerError, ModelError) as error:
            _fail(error.message, error.hint, SERVICE_FAILED)
        except KeyboardInterrupt:
            err.print("interrupted", style="yellow")
            raise typer.Exit(INTERRUPTED) from None

    app.command(function.__name__.rstrip("_"))(guarded)
    return guarded


ProgramOption = Annotated[Path, typer.Option("--program", help="the person's file")]
AttemptsOption = Annotated[int | None, typer.Option("--attempts", help="stop after so many")]
HoursOption = Annotated[float | None, typer.Option("--hours", help="stop after so many hours")]
UsdOption = Annotated[float | None, typer.Option("--usd", help="stop before spending more")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON lines for scripts")]
ReasonOption = Annotated[str, typer.Option("--reason", help="why; it is recorded")]
RepoOption = Annotated[
    Path, typer.Option("--repo", help="your own directory with the workspace, in a repository")
]
RunsOption = Annotated[Path, typer.Option("--runs", help="where sessions are kept")]


@command
def init(
    directory: Annotated[Path, typer.Argument(help="where to put the files")] = Path(),
) -> None:
    """Copy program.md, Dockerfile.train and workspace/ here, as a place to start from."""
    copied = copy_template(directory)
    out.print(f"new: {', '.join(copied)}" if copied else "nothing new: all files were there")


@command
def setup(
    program: ProgramOption = Path("program.md"),
    base_image: Annotated[
        str | None, typer.Option("--base-image", help="build on this image instead")
    ] = None,
    torch_index: Annotated[
        str, typer.Option("--torch-index", help="a wheel index that has the CPU build of torch")
    ] = "",
    stop_engine: Annotated[
        bool, typer.Option("--stop-engine", help="end the engine that nightlab started, only that")
    ] = False,
) -> None:
    """Make engine, image and data ready; what is there already is not made again."""
    state_dir = state_directory(os.environ)
    if stop_engine:
        stopped = stop_own_engine(state_dir)
        out.print("engine stopped" if stopped else "no engine of nightlab's own was running")
        return
    content = _load(program)
    set_up(
        content.settings,
        program.parent,
        state_dir=state_dir,
        environ=os.environ,
        base_image=base_image,
        torch_index=torch_index or os.environ.get("NIGHTLAB_TORCH_INDEX", ""),
        say=lambda line: out.print(line, markup=False, soft_wrap=True),
    )
    out.print("ready")


@command
def check(
    program: ProgramOption = Path("program.md"),
    as_json: JsonOption = False,
) -> None:
    """Try to break every wall on this machine; exit 1 if one gave way."""
    settings = _load(program).settings
    state_dir = state_directory(os.environ)
    engine = find_engine(state_dir, environ=os.environ)
    image = find_image(engine, find_profile(settings.hardware.profile), state_dir=state_dir)
    components = installed(engine, os.environ)
    found = timed_check(
        executor(engine, state_dir),
        image.image_id,
        state_dir / "run",
        os.environ,
        components,
        version_rows(components),
    )
    if as_json:
        _print_line(found.model_dump_json())
    else:
        show_check(out, found)
    if found.gave_way:
        raise typer.Exit(1)


@command
def box(
    argv: Annotated[list[str], typer.Argument(help="what to run, after --")],
    program: ProgramOption = Path("program.md"),
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

    Limits that are not given come from the [limits] of program.md.
    """
    settings = _load(program).settings
    given = {
        "wall_seconds": wall_seconds,
        "memory_bytes": _size("--memory", memory),
        "cpus": cpus,
        "pids": pids,
        "output_bytes": _size("--output", output),
    }
    limits = settings.train_limits().model_dump() | {
        name: value for name, value in given.items() if value is not None
    }
    state_dir = state_directory(os.environ)
    engine = find_engine(state_dir, environ=os.environ)
    profile = find_profile(settings.hardware.profile)
    image = find_image(engine, profile, state_dir=state_dir)
    name = f"box-{uuid.uuid4().hex[:12]}"
    spec = RunSpec(
        run_id=name,
        session=name,
        box="train",
        image=image.image_id,
        argv=tuple(argv),
        working_directory="/",
        environment=box_environment(profile, limits["cpus"]),
        mounts=tuple(_mount(text) for text in mount_ro or []),
        gpus=(),
        limits=Limits.model_validate(limits),
    )
    if output_dir is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
    result = executor(engine, state_dir).run(spec, output_dir=output_dir)
    sys.stdout.write(result.model_dump_json(indent=2) + "\n")


@command
def run(
    program: ProgramOption = Path("program.md"),
    researcher: Annotated[
        str | None, typer.Option(help="auto (claude with a key, else tpe), claude, tpe or random")
    ] = None,
    attempts: AttemptsOption = None,
    hours: HoursOption = None,
    usd: UsdOption = None,
    budget_seconds: Annotated[float | None, typer.Option(help="seconds for each training")] = None,
    session: Annotated[str | None, typer.Option(help="name of the session")] = None,
    seed: Annotated[int | None, typer.Option(help="what all seeds are drawn from")] = None,
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Run a session: baseline, then attempt after attempt until a limit is reached."""
    content = _load(program)
    settings = content.settings.with_overrides(
        attempts=attempts,
        hours=hours,
        usd=usd,
        budget_seconds=budget_seconds,
        researcher=researcher,
    )
    name = _researcher(settings)
    outfit = find_outfit(
        settings, program.parent, state_dir=state_directory(os.environ), environ=os.environ
    )
    _clean_up()
    directory = runs / (session or datetime.now().astimezone().strftime("night-%Y%m%d-%H%M%S"))
    ledger = begin(
        directory.absolute(),
        content,
        settings,
        template("workspace", program.parent),
        outfit,
        researcher=name,
        version=distribution_version("nightlab"),
        seed=secrets.randbits(31) if seed is None else seed,
    )
    with ledger, _observer(settings, ledger, as_json=as_json) as observer:
        lab = open_lab(ledger, settings, outfit, observer)
        _work(lab, content, name, as_json=as_json)


@command
def resume(
    session: Annotated[str, typer.Argument(help="name of the session")],
    attempts: AttemptsOption = None,
    hours: HoursOption = None,
    usd: UsdOption = None,
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Go on with a session that was stopped, was killed, or may have more attempts now."""
    directory = _session_directory(runs, session)
    with Ledger.open(directory.absolute()) as ledger:
        settings = settings_of(ledger).with_overrides(attempts=attempts, hours=hours, usd=usd)
        content = parse_program((directory / "program.md").read_bytes(), "program.md")
        begun = ledger.history.session
        assert begun is not None
        name = begun.researcher
        _require_credentials(name, settings)
        outfit = recorded_outfit(
            begun, settings, directory, state_dir=state_directory(os.environ), environ=os.environ
        )
        removed = _clean_up()
        with _observer(settings, ledger, as_json=as_json) as observer:
            lab = open_lab(ledger, settings, outfit, observer)
            bring_back(lab, version=distribution_version("nightlab"), removed_containers=removed)
            _work(lab, content, name, as_json=as_json)


@command
def report(
    session: Annotated[str, typer.Argument(help="name of the session")],
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Write the report of a session anew and say where it lies."""
    directory = _session_directory(runs, session).absolute()
    entries = read_ledger(directory)
    paths = write_report(directory, entries, lambda sha: read_blob(directory, sha))
    if as_json:
        sys.stdout.write(summary(entries).model_dump_json() + "\n")
        return
    out.print(f"report: {paths.html}", soft_wrap=True)


@command
def audit(
    session: Annotated[str, typer.Argument(help="name of the session")],
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Verify the chain and every blob, and recompute every verdict and price from the record."""
    directory = _session_directory(runs, session).absolute()
    entries = read_ledger(directory)
    found = differences(directory, entries)
    for difference in found:
        text = f"seq {difference.seq}: {one_line(difference.what, 300)}"
        _print_line(difference.model_dump_json() if as_json else text)
    if found:
        raise typer.Exit(1)
    if not as_json:
        out.print(f"{len(entries)} events, nothing differs; head {entries[-1].hash}")


@command
def review(
    session: Annotated[str, typer.Argument(help="name of the session")],
    repeats: Annotated[
        int | None, typer.Option(min=1, help="fresh seeds; as many as the baseline had if left out")
    ] = None,
    no_runs: Annotated[
        bool, typer.Option("--no-runs", help="show the last review, run nothing")
    ] = False,
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Check the result with fresh seeds and holdout, and leave out each kept change in turn."""
    directory = _session_directory(runs, session).absolute()
    if no_runs:
        entries = read_ledger(directory)
        if not (found := reviews(entries)):
            raise SessionError("there is no review yet", f"nightlab review {session}")
        _tell_review(worth(found[-1], fold(entries)), directory, as_json=as_json)
        return
    try:
        with _recorded_lab(directory, as_json=as_json) as lab:
            version = distribution_version("nightlab")
            table = check_by_daylight(lab, repeats, version, _progress(as_json=as_json))
            write_report(directory, lab.ledger.entries, lab.ledger.get_blob)
    except KeyboardInterrupt:
        err.print(f"stopped; go on with: nightlab review {session}", style="yellow")
        raise
    _tell_review(table, directory, as_json=as_json)


@command
def replay(
    session: Annotated[str, typer.Argument(help="name of the session")],
    attempt: Annotated[int, typer.Argument(help="its number; 0 is the baseline")],
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Run one attempt again from the record alone and compare the scores."""
    directory = _session_directory(runs, session).absolute()
    with _recorded_lab(directory, as_json=as_json) as lab:
        replayed = run_again(lab, attempt, _progress(as_json=as_json))
    if as_json:
        _print_line(json.dumps({"event": replayed.type, **replayed.model_dump(mode="json")}))
        return
    for line in replay_lines(replayed):
        out.print(line, markup=False, soft_wrap=True)


@command
def approve(
    session: Annotated[str, typer.Argument(help="name of the session")],
    reason: ReasonOption,
    smaller: Annotated[
        bool, typer.Option("--smaller", help="take the review's smaller equal model")
    ] = False,
    branch: Annotated[str | None, typer.Option(help="make this branch in --repo")] = None,
    repo: RepoOption = Path(),
    runs: RunsOption = Path("runs"),
) -> None:
    """Take the result: files, a patch and, if asked, a branch; recorded with your git name."""
    directory = _session_directory(runs, session).absolute()
    refuse_inside(repo, runs)
    person = find_person(repo, os.environ)
    with Ledger.open(directory) as ledger:
        files, old = result_files(ledger, smaller=smaller), original_files(ledger)
        difference = patch(old, files)
        commit = None
        if branch is not None:
            git, message = Git(repo, os.environ), f"{session}: {reason}"
            commit = make_branch(git, branch, old, files, person, message)
        approved = write_approved(directory, files, difference)
        ledger.append(
            approval(
                ledger,
                person,
                reason,
                files,
                smaller=smaller,
                difference=difference,
                branch=branch,
                commit=commit,
            )
        )
        write_report(directory, ledger.entries, ledger.get_blob)
    out.print(f"approved by {person.name}: {approved}", markup=False, soft_wrap=True)
    out.print(f"apply it with: git apply {approved / PATCH_NAME}", markup=False, soft_wrap=True)
    if commit is not None:
        out.print(f"branch {branch} is {commit}", markup=False, soft_wrap=True)


@command
def reject(
    session: Annotated[str, typer.Argument(help="name of the session")],
    reason: ReasonOption,
    repo: RepoOption = Path(),
    runs: RunsOption = Path("runs"),
) -> None:
    """Turn the result down; recorded with your git name."""
    directory = _session_directory(runs, session).absolute()
    refuse_inside(repo, runs)
    person = find_person(repo, os.environ)
    with Ledger.open(directory) as ledger:
        ledger.append(rejection(ledger, person, reason))
        write_report(directory, ledger.entries, ledger.get_blob)
    out.print(f"rejected by {person.name}", markup=False, soft_wrap=True)


@command
def stop(
    session: Annotated[str, typer.Argument(help="name of the session")],
    runs: RunsOption = Path("runs"),
) -> None:
    """Let a session finish the attempt that it is at, then end with its report."""
    ask_to_stop(_running_session(runs, session))
    out.print(f"{session} ends after its present attempt")


@command
def pause(
    session: Annotated[str, typer.Argument(help="name of the session")],
    runs: RunsOption = Path("runs"),
) -> None:
    """Let a session wait after the attempt that it is at; the pause costs none of its hours."""
    ask_to_pause(_running_session(runs, session))
    out.print(f"{session} pauses after its present attempt; go on: nightlab continue {session}")


@command
def continue_(
    session: Annotated[str, typer.Argument(help="name of the session")],
    runs: RunsOption = Path("runs"),
) -> None:
    """Let a paused session go on."""
    if not ask_to_continue(_running_session(runs, session)):
        raise SessionError(f"{session} is not paused", "see nightlab pause --help")
    out.print(f"{session} goes on")


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, _interrupt)
    app()


# ---- a session at work ---------------------------------------------------------------------


def _work(lab: Lab, program: Program, researcher: str, *, as_json: bool) -> None:
    """Run the session in `lab` to its end, and tell how it ended."""
    ledger = lab.ledger

    def refresh() -> None:
        _refresh_report(lab)

    try:
        with open_models(lab, researcher, os.environ, _say_waiting) as models:
            ended = run_session(assemble(lab, program, models), refresh)
    except KeyboardInterrupt:
        refresh()
        err.print(f"stopped; go on with: nightlab resume {lab.session}", style="yellow")
        raise
    refresh()
    _tell(ledger, as_json=as_json)
    if ended.reason not in PLANNED_STOPS:
        raise typer.Exit(SERVICE_FAILED)


def _refresh_report(lab: Lab) -> None:
    """Write the report; one that cannot be drawn must not end a night that goes well."""
    try:
        write_report(lab.directory, lab.ledger.entries, lab.ledger.get_blob)
    except Exception as error:  # noqa: BLE001 - a drawing error is for the morning
        text = f"the report could not be written: {type(error).__name__}: {error}"
        err.print(one_line(text, 300), style="yellow", markup=False, soft_wrap=True)


def _say_waiting(error: str, wait_seconds: float) -> None:
    text = f"      waiting {wait_seconds:.0f} s for the service: {one_line(error, 160)}"
    err.print(text, style="yellow", markup=False, soft_wrap=True)


@contextmanager
def _observer(settings: Settings, ledger: Ledger, *, as_json: bool) -> Iterator[Observer]:
    """What shows the session while it runs; leaves the terminal as it was."""
    console = (
        JsonConsole(_print_line) if as_json else NightConsole(out, settings, lambda: ledger.history)
    )
    try:
        yield console
    finally:
        console.close()


def _tell(ledger: Ledger, *, as_json: bool) -> None:
    """The last lines: best, baseline, noise, what survived, where the report lies."""
    numbers = summary(ledger.entries)
    if as_json:
        _print_line(json.dumps({"event": "session_ended", **numbers.model_dump(mode="json")}))
        return
    for line in closing_lines(numbers, ledger.directory):
        out.print(line, markup=False, soft_wrap=True)


def _print_line(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


# ---- the morning after -----------------------------------------------------------------------


@contextmanager
def _recorded_lab(directory: Path, *, as_json: bool) -> Iterator[Lab]:
    """The lab of a session as it was recorded: its image, its data, its settings."""
    with Ledger.open(directory) as ledger:
        session, settings = ledger.history.session, settings_of(ledger)
        assert session is not None
        outfit = recorded_outfit(
            session,
            settings,
            directory,
            state_dir=state_directory(os.environ),
            environ=os.environ,
        )
        _clean_up()
        with _observer(settings, ledger, as_json=as_json) as observer:
            yield open_lab(ledger, settings, outfit, observer)


def _progress(*, as_json: bool) -> Callable[[str], None]:
    def say(line: str) -> None:
        if as_json:
            _print_line(json.dumps({"event": "progress", "text": line}))
        else:
            out.print(line, markup=False, soft_wrap=True)

    return say


def _tell_review(table: ReviewTable, directory: Path, *, as_json: bool) -> None:
    if as_json:
        _print_line(json.dumps({"event": "review", **table.model_dump(mode="json")}))
        return
    for line in result_lines(table):
        out.print(line, markup=False, soft_wrap=True)
    out.print(worth_table(table))
    for line in notes(table):
        out.print(line, markup=False, soft_wrap=True)
    difference = result_diff(directory, read_ledger(directory))
    out.print(for_terminal(difference, MAX_DIFF_CHARACTERS), markup=False, soft_wrap=True)


# ---- flags and errors ----------------------------------------------------------------------


def _researcher(settings: Settings) -> str:
    """Who proposes candidates; claude must have a key before anything runs."""
    name = settings.researcher.name
    if name == "auto":
        missing = check_credentials(os.environ, provider=settings.researcher.provider)
        name = "tpe" if missing else "claude"
    _require_credentials(name, settings)
    return name


def _require_credentials(name: str, settings: Settings) -> None:
    if name != "claude":
        return
    provider = settings.researcher.provider
    if missing := check_credentials(os.environ, provider=provider):
        raise SessionError(missing, "")
    models = (settings.researcher.model, settings.researcher.fallback_model)
    unpriced = [m for m in models if m is not None and not price_known(m, provider=provider)]
    if settings.session.usd is not None and unpriced:
        raise SessionError(
            f"the price of {unpriced[0]} is not known, so usd cannot be kept",
            "leave usd out of program.md and --usd, or choose a model with a known price",
        )


def _load(program: Path) -> Program:
    return load_program(template(program.name, program.parent))


def _clean_up() -> tuple[str, ...]:
    state_dir = state_directory(os.environ)
    return clean_up(find_engine(state_dir, environ=os.environ), state_dir)


def _session_directory(runs: Path, session: str) -> Path:
    directory = runs / session
    if not (directory / "ledger.jsonl").is_file():
        known = sorted(path.parent.name for path in runs.glob("*/ledger.jsonl"))
        raise SessionError(
            f"there is no session {session!r} in {runs}",
            f"known sessions: {', '.join(known[-10:])}" if known else "start one: nightlab run",
        )
    return directory


def _running_session(runs: Path, session: str) -> Path:
    directory = _session_directory(runs, session)
    ended = fold(read_ledger(directory)).ended
    if ended is not None:
        hint = f"go on with it: nightlab resume {session}"
        raise SessionError(f"{session} has ended already ({ended.reason.value})", hint)
    return directory


def _size(flag: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        size = parse_size(text)
    except ValueError as error:
        raise SessionError(f"{flag} {text}: {error}", "write it like 512m or 8g") from None
    assert isinstance(size, int)
    return size


def _mount(text: str) -> Mount:
    source, separator, target = text.partition(":")
    if not separator or not Path(source).exists():
        raise SessionError(f"--mount-ro {text}: not HOST:BOX with an existing host path", "")
    return Mount(source=Path(source).absolute(), target=target)


def _fail(message: str, hint: str, code: int) -> None:
    err.print(f"error: {message}", style="red", markup=False, soft_wrap=True)
    if hint:
        err.print(hint, markup=False, soft_wrap=True)
    raise typer.Exit(code)


def show_check(console: Console, found: CheckResult) -> None:
    """A table of what was tried and what held; warnings about versions below it."""
    table = Table("family", "tried", "", "what was seen", box=None, pad_edge=False)
    for finding in found.findings:
        style = "" if finding.standing == "held" else "bold red"
        seen = Text(one_line(finding.seen, 60))
        table.add_row(finding.family, Text(finding.tried), finding.standing, seen, style=style)
    console.print(table)
    for row in found.versions:
        if row.standing != "ok":
            console.print(
                f"{row.standing}: {row.component} {row.version}: {row.words}", markup=False
            )
    held = sum(finding.standing == "held" for finding in found.findings)
    parts = ", ".join(f"{part.name} {part.version}" for part in found.components)
    console.print(f"{held} of {len(found.findings)} held in {found.seconds:.0f} s; {parts}")


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
