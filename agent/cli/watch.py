"""Commands that show sessions: list, show, watch."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from agent.candidate.diffs import unified_diff
from agent.cli import flags
from agent.cli.shared import out, print_event, print_table, say, session_directory
from agent.night.session import has_begun
from agent.record.attempts import Attempt
from agent.record.chain import LEDGER_NAME, LedgerError, read_blob, read_ledger, utc_now
from agent.record.events import Entry
from agent.record.history import History, fold
from agent.report.activity import is_at_work
from agent.report.attempt_page import Around, TextRoom, attempt_page, messages_of
from agent.report.charts import best_steps
from agent.report.console import attempt_line
from agent.report.live import LiveReport, WatchServer
from agent.report.summary import Summary, summary
from agent.report.tui import show as show_in_terminal
from agent.report.tui import sparkline
from agent.text import in_words, one_line, visible
from sandbox.contract.errors import UsageError

MAX_SHOWN_BYTES = 400_000
SPARK_WIDTH = 20


def list_(runs: flags.Runs = flags.RUNS, as_json: flags.Json = False) -> None:
    """List the sessions with state, best and gain, the latest last."""
    table = Table(*("session", "began (UTC)", "state", "attempts", "best", "gain", "best so far"))
    table.box, table.pad_edge = None, False
    for directory in sorted(path.parent for path in runs.glob(f"*/{LEDGER_NAME}")):
        if not has_begun(directory):
            continue
        try:
            history = fold(entries := read_ledger(directory))
        except LedgerError as error:
            if as_json:
                print_event("session", session=directory.name, problem=error.message)
            else:
                table.add_row(one_line(directory.name, 80), "", one_line(error.message, 80))
            continue
        numbers = summary(entries, history)
        state = _state(numbers, directory)
        if as_json:
            print_event("session", state=state, **numbers.model_dump(mode="json"))
            continue
        table.add_row(*_row(directory.name, numbers, state, history))
    if not as_json:
        print_table(out, table) if table.row_count else say(f"no session in {runs}: nightlab run")


def _state(numbers: Summary, directory: Path) -> str:
    if numbers.ended is not None:
        return f"ended: {in_words(numbers.ended)}"
    return "at work" if is_at_work(directory) else "cut off"


def _row(name: str, numbers: Summary, state: str, history: History) -> tuple[str, ...]:
    line = sparkline([value for _, value in best_steps(history)], SPARK_WIDTH)
    return (
        one_line(name, 80),
        numbers.started_at[:16].replace("T", " "),
        state,
        f"{numbers.attempts} ({numbers.kept} kept)",
        "" if numbers.best is None else f"{numbers.label} {numbers.best:.4f}",
        f"{numbers.gain:+.4f}" if numbers.gain is not None and numbers.kept else "",
        line,
    )


def show(
    session: flags.Session,
    attempt: Annotated[int, typer.Argument(help="its number; 0 is the baseline")],
    diff: Annotated[bool, typer.Option("--diff", help="only what it changed")] = False,
    log: Annotated[bool, typer.Option("--log", help="only what its runs printed")] = False,
    messages: Annotated[
        bool, typer.Option("--messages", help="only what the researcher said and did for it")
    ] = False,
    against: Annotated[
        int | None, typer.Option(min=0, help="only how its files differ from this attempt's")
    ] = None,
    runs: flags.Runs = flags.RUNS,
    as_json: flags.Json = False,
) -> None:
    """Show one attempt: numbers, change, log, what was said for it."""
    directory = session_directory(runs, session)
    entries = read_ledger(directory)
    history = fold(entries)
    found = _named(history, attempt, session)
    parts = _parts(found, entries, history, directory)
    if against is not None:
        old, new = (_files(a, directory) for a in (_named(history, against, session), found))
        parts["change"], diff = visible(unified_diff(old, new).decode()).splitlines(), True
    chosen = [
        n for n, is_asked in (("change", diff), ("log", log), ("words", messages)) if is_asked
    ]
    if as_json:
        print_event("attempt", attempt=attempt, standing=found.standing, **parts)
        return
    for name in chosen or parts:
        if not chosen:
            say(f"--- {name}")
        for line in parts[name] or ["(none)"]:
            say(line)


def _named(history: History, number: int, session: str) -> Attempt:
    for attempt in history.attempts:
        if attempt.number == number:
            return attempt
    hint = f"its attempts are 0 to {len(history.attempts) - 1}" if history.attempts else ""
    raise UsageError(f"there is no attempt {number} in {session}", hint)


def _files(attempt: Attempt, directory: Path) -> dict[str, bytes]:
    return {name: read_blob(directory, sha) for name, sha in attempt.started.files.items()}


def _parts(
    attempt: Attempt, entries: Sequence[Entry], history: History, directory: Path
) -> dict[str, Any]:
    """What there is to an attempt, each part as visible lines."""

    def get_blob(sha: str) -> bytes:
        return read_blob(directory, sha)

    said = messages_of(entries).get(attempt.number, ())
    page = attempt_page(attempt, get_blob, TextRoom(MAX_SHOWN_BYTES, MAX_SHOWN_BYTES), Around(said))
    return {
        "verdict": list(_verdict(attempt, history, page.arithmetic)),
        "change": page.diff,
        "log": [line for title, lines in page.logs for line in (f"[{title}]", *lines)],
        "words": [line for one in page.words for line in (f"[{one.who}]", *one.lines)],
    }


def _verdict(attempt: Attempt, history: History, arithmetic: str) -> Iterator[str]:
    yield attempt_line(attempt, history, history.in_force)
    yield one_line(attempt.started.hypothesis, 600)
    if attempt.finished is not None:
        yield one_line(f"{attempt.finished.explanation} ({in_words(attempt.finished.reason)})", 800)
    if attempt.cause is not None:
        yield attempt.cause.sentence
    if arithmetic:
        yield arithmetic
    for score in attempt.scores:
        value = f"{score.value:.5f}" if score.value is not None else in_words(str(score.reason))
        yield f"{score.split}, seed {score.seed}: {value}"


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
            show_in_terminal(directory, out, utc_now)
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
