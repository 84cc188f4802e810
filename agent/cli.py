"""The command line: every command, its errors, its exit codes."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from contextlib import nullcontext
from types import FrameType
from typing import ParamSpec

import typer

from agent.commands import image
from agent.commands.machine import box, check, init, setup
from agent.commands.morning import approve, audit, reject, replay, report, review
from agent.commands.night import continue_, pause, resume, run, stop
from agent.commands.shared import INTERRUPTED, SERVICE_FAILED, WRONG_SETTINGS, err, warn
from agent.commands.watch import watch
from agent.ledger import LedgerError
from agent.listing import ListingError
from agent.model import ModelError
from agent.program import ProgramError
from agent.session import SessionError
from agent.terminal import outlive_hang_up, outlive_readers
from sandbox.contract import DISK_REFUSES, MAKE_ROOM, SandboxError

P = ParamSpec("P")

NIGHT_LONG = (run, resume, review)
"""Commands that go on when the terminal that they were started from hangs up."""

app = typer.Typer(
    name="nightlab",
    help="A safe, unattended night of experiments. Containers share the kernel and the GPU driver "
    "with the host: see SECURITY.md for what is not promised.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def guarded(function: Callable[P, None]) -> Callable[P, None]:
    """The command, with errors that are one sentence, a hint and an exit code."""

    @functools.wraps(function)
    def guard(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with outlive_hang_up() if function in NIGHT_LONG else nullcontext():
                function(*args, **kwargs)
        except (ListingError, ProgramError, SessionError) as error:
            _fail(error.message, error.hint, WRONG_SETTINGS)
        except (SandboxError, LedgerError, ModelError) as error:
            _fail(error.message, error.hint, SERVICE_FAILED)
        except OSError as error:
            if error.errno not in DISK_REFUSES:
                raise
            _fail(f"the disk refused: {error.strerror}", MAKE_ROOM, SERVICE_FAILED)
        except KeyboardInterrupt:
            err.print("interrupted", style="yellow")
            raise typer.Exit(INTERRUPTED) from None

    return guard


for function in (
    *(init, setup, check, box),
    *(run, resume, watch, stop, pause, continue_),
    *(report, audit, review, replay, approve, reject),
):
    app.command(function.__name__.rstrip("_"))(guarded(function))

images = typer.Typer(no_args_is_help=True, help="Images of the boxes: build, list, show, verify.")
images.command("build")(guarded(image.build))
images.command("list")(guarded(image.list_))
images.command("show")(guarded(image.show))
images.command("verify")(guarded(image.verify))
app.add_typer(images, name="image")


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
        signal.signal(signal.SIGHUP, _interrupt)
    outlive_readers()
    app()


def _fail(message: str, hint: str, code: int) -> None:
    warn(f"error: {message}", "red")
    if hint:
        warn(hint, "")
    raise typer.Exit(code)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
