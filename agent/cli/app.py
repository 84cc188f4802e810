"""The command line: every command, its errors, its exit codes."""

import errno
import functools
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from types import FrameType
from typing import Annotated, ParamSpec

import typer

from agent.cli import image
from agent.cli.calibrate import calibrate_
from agent.cli.machine import box, check, gpus, init, knobs, setup, try_
from agent.cli.morning import approve, audit, reject, replay, report, review
from agent.cli.night import continue_, pause, resume, run, stop
from agent.cli.shared import (
    INTERRUPTED,
    SERVICE_FAILED,
    WRONG_SETTINGS,
    err,
    print_event,
    print_line,
    warn,
)
from agent.cli.terminal import outlive_hang_up, outlive_readers
from agent.cli.watch import list_, show, watch
from agent.night.session import VERSION
from agent.record.chain import LedgerError
from agent.researcher.base import ModelError
from agent.text import one_line
from sandbox.contract.errors import (
    DISK_REFUSES,
    LOCAL_DISK,
    MAKE_ROOM,
    NO_LOCKS,
    NightlabError,
    SandboxError,
)

P = ParamSpec("P")

NIGHT_LONG = (run, resume, review)
"""Commands that go on when the terminal that they were started from hangs up."""

EXIT_CODES = (
    "Exit codes: 0 done, or a planned end; 1 the answer is no (check: a wall gave way; audit: "
    "something differs; run: the baseline failed); 2 a wrong request or wrong settings, nothing "
    "was begun; 3 the engine, a box, the disk, the ledger or the service failed; 130 interrupted."
)
"""docs/commands.md says the same."""

app = typer.Typer(
    name="nightlab",
    help="A safe, unattended night of experiments. Containers share the kernel and the GPU driver "
    "with the host: see SECURITY.md for what is not promised.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
    epilog=EXIT_CODES,
)


def _tell_version(is_asked: bool) -> None:
    if is_asked:
        print_line(f"nightlab {VERSION}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="print it and end", is_eager=True, callback=_tell_version),
    ] = False,
) -> None:
    """Options of no command: `--version` alone."""


def guarded(function: Callable[P, None]) -> Callable[P, None]:
    """The command, with errors that are one sentence, a hint and an exit code."""

    @functools.wraps(function)  # typer reads the flags from the function's own signature
    def guard(*args: P.args, **kwargs: P.kwargs) -> None:
        fail = functools.partial(_fail, bool(kwargs.get("as_json")))
        try:
            with outlive_hang_up() if function in NIGHT_LONG else nullcontext():
                function(*args, **kwargs)
        except (SandboxError, LedgerError, ModelError) as error:
            fail(error.message, error.hint, SERVICE_FAILED)
        except NightlabError as error:
            fail(error.message, error.hint, WRONG_SETTINGS)
        except OSError as error:
            # A read-only place is about that path, not about room: it is named below.
            if error.errno in DISK_REFUSES and error.errno != errno.EROFS:
                fail(f"the disk refused: {error.strerror}", MAKE_ROOM, SERVICE_FAILED)
            if error.errno in NO_LOCKS:
                words = f"a file system here cannot lock files: {error.strerror}"
                fail(words, LOCAL_DISK, SERVICE_FAILED)
            path = error.filename
            if not isinstance(path, str | bytes | os.PathLike):  # of no file: a fault of ours
                raise
            place = one_line(os.fsdecode(path), 200)
            hint = "look at that path and its permissions, then try again"
            fail(f"{place}: {error.strerror}", hint, SERVICE_FAILED)
        except KeyboardInterrupt:
            if kwargs.get("as_json"):
                print_event("interrupted", exit_code=INTERRUPTED)
            err.print("interrupted", style="yellow")
            raise typer.Exit(INTERRUPTED) from None

    return guard


for function in (
    *(init, knobs, setup, try_, check, gpus, box, calibrate_),
    *(run, resume, watch, list_, show, stop, pause, continue_),
    *(report, audit, review, replay, approve, reject),
):
    app.command(function.__name__.rstrip("_"))(guarded(function))

images = typer.Typer(no_args_is_help=True, help="Images of the boxes: list, show.")
images.command("list")(guarded(image.list_))
images.command("show")(guarded(image.show))
app.add_typer(images, name="image")


def main() -> None:
    """Run the command line."""
    # What a service manager or a closing window sends counts as Ctrl-C: the box is removed, the
    # report written, and the session can go on.
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
        signal.signal(signal.SIGHUP, _interrupt)
    outlive_readers()
    app()


def _fail(as_json: bool, message: str, hint: str, code: int) -> None:
    if as_json:
        print_event("error", message=message, hint=hint, exit_code=code)
    warn(f"error: {message}", "red")
    if hint:
        warn(hint, "")
    raise typer.Exit(code)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
