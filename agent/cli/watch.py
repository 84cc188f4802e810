"""The command that shows a session while it runs: watch."""

from pathlib import Path
from typing import Annotated

import typer

from agent.cli import flags
from agent.cli.shared import out, print_event, say, session_directory
from agent.record.chain import utc_now
from agent.report.live import LiveReport, WatchServer
from agent.report.tui import show
from sandbox.contract.errors import UsageError


def watch(
    session: flags.Session,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="on 127.0.0.1; 0 takes a free one")
    ] = 0,
    tui: Annotated[bool, typer.Option("--tui", help="show it in this terminal instead")] = False,
    runs: flags.Runs = flags.RUNS,
    as_json: flags.Json = False,
) -> None:
    """Show a session while it runs, as a page on this machine only.

    It changes nothing and may be started and ended at any time: Ctrl-C ends it, exit code 0.
    Whoever has the address with its token can read the report: other users of this machine, if
    you show it to them.
    """
    if tui and as_json:
        raise UsageError("--tui and --json exclude each other", "leave one of them out")
    directory = session_directory(runs, session)
    try:
        if tui:
            show(directory, out, utc_now)
        else:
            _serve(directory, port, as_json=as_json)
    except KeyboardInterrupt:
        return


def _serve(directory: Path, port: int, *, as_json: bool) -> None:
    try:
        server = WatchServer(LiveReport(directory, utc_now), port=port)
    except OSError as error:
        hint = "choose another --port, or leave it out for a free one"
        raise UsageError(f"port {port} cannot be opened: {error.strerror}", hint) from error
    with server:
        if as_json:
            print_event("watching", address=server.address)
        else:
            tunnel = f"ssh -L {server.server_port}:127.0.0.1:{server.server_port} THIS-MACHINE"
            say(server.address)
            out.print(f"from elsewhere: {tunnel}, then the same address", markup=False)
            out.print("Ctrl-C ends the watching, not the session")
        server.serve_forever()
