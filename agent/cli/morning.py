"""Commands of the morning: report, audit, review, replay, decide."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from agent.attempt.lab import Lab
from agent.candidate.git import Git
from agent.cli import flags
from agent.cli.logs import operational_log
from agent.cli.shared import (
    SERVICE_FAILED,
    anchor_of,
    err,
    keep_head,
    open_observer,
    out,
    print_event,
    print_line,
    print_table,
    progress,
    say,
    session_directory,
    sweep_now,
    warn,
)
from agent.machine.runtime import data_on_this_machine, recorded_runtime
from agent.morning import export
from agent.morning.ablation import ReviewTable, ablation, reviews
from agent.morning.anchor import anchor_path, compare_heads
from agent.morning.audit import Difference
from agent.morning.audit import audit as find_differences
from agent.morning.export import (
    APPROVED,
    PATCH_NAME,
    branch_notes,
    find_person,
    refuse_inside,
    result_diff,
)
from agent.morning.listing import asked_for, check_hash, sentence, table
from agent.morning.replay import replay as run_again
from agent.morning.review import review as check_by_daylight
from agent.night.session import open_lab
from agent.record.chain import read_blob, read_ledger
from agent.record.events import Entry, SessionResumed, SessionStarted
from agent.record.history import fold
from agent.record.ledger import Ledger
from agent.report.ablation_table import ablation_table, notes, replay_lines, result_lines
from agent.report.console import attempt_line, counts_in_words, next_lines
from agent.report.report import REPORT_NAME, report_differences, write_report
from agent.report.summary import result_in_words, summary
from agent.settings import Settings
from agent.text import for_terminal
from agent.trackers.export import exporter
from sandbox.contract.errors import UsageError

MAX_DIFF_CHARACTERS = 12_000


def _reason(text: str) -> str:
    if not text.strip():
        raise typer.BadParameter("say why; it is recorded")
    return text


ReasonOption = Annotated[
    str, typer.Option("--reason", callback=_reason, help="why; it is recorded")
]
RepoOption = Annotated[
    Path, typer.Option("--repo", help="your own directory with the workspace, in a repository")
]


def report(
    session: flags.Session,
    track: flags.Track = None,
    track_dir: flags.TrackDir = None,
    runs: flags.Runs = flags.RUNS,
    as_json: flags.Json = False,
) -> None:
    """Write the report of a session anew and say where it lies."""
    directory = session_directory(runs, session)
    tracking = exporter(track, track_dir, runs, os.environ)
    entries = read_ledger(directory)
    write_report(directory, entries, lambda sha: read_blob(directory, sha))
    if as_json:
        told = summary(entries).model_dump(mode="json")
        print_event("report", path=str(directory / REPORT_NAME), **told)
    else:
        numbers = summary(entries)
        for line in (*result_in_words(numbers), counts_in_words(numbers), *next_lines(numbers)):
            say(line)
        say(f"report: {directory / REPORT_NAME}")
    if tracking is not None and (problem := tracking(directory)):
        text = f"error: {tracking.tracker.value} was not brought up to date: {problem}"
        warn(text, "red")
        raise typer.Exit(SERVICE_FAILED)  # the report is written all the same


def audit(
    session: flags.Session,
    attempt: Annotated[
        int | None, typer.Option("--attempt", help="show the events of this attempt")
    ] = None,
    types: Annotated[
        str | None, typer.Option("--type", help="show events of these types, commas between")
    ] = None,
    since: Annotated[
        str | None, typer.Option("--since", help="show events from a time on, or of the last 1h30m")
    ] = None,
    head: Annotated[
        str | None, typer.Option("--head", help="a head that you noted: is it in the chain?")
    ] = None,
    anchor: Annotated[
        Path | None, typer.Option("--anchor", help="a file of heads, if not the one in program.md")
    ] = None,
    runs: flags.Runs = flags.RUNS,
    as_json: flags.Json = False,
) -> None:
    """Verify chain and blobs; recompute every verdict and price."""
    directory = session_directory(runs, session)
    entries = read_ledger(directory)
    # Not folded: a record that contradicts itself is what an audit looks for.
    events = (entry.event for entry in reversed(entries))
    begun = (event for event in events if isinstance(event, SessionStarted | SessionResumed))
    settings = next((event.settings for event in begun), None)
    chosen = asked_for(entries, attempt, types, since)
    check_hash(head)
    place = anchor or _anchor_on_record(directory, settings)
    heads = compare_heads(directory, entries, noted=head, anchor=place)
    first = entries[0].event if entries else None
    start = first if isinstance(first, SessionStarted) else None
    data = data_on_this_machine(start, directory, os.environ) if start else []
    found = find_differences(directory, entries, [*data, *heads.differences])
    if start and not found:  # what a record that contradicts itself comes to says nothing
        told = report_differences(directory, entries, lambda sha: read_blob(directory, sha))
        found = [Difference(seq=None, what=what) for what in told]
    _show_audit(chosen, found, as_json=as_json)
    last, notes = entries[-1].hash, heads.notes
    if as_json:
        print_event("audited", events=len(entries), differences=len(found), head=last, notes=notes)
    elif not found:
        print_line(f"{len(entries)} events, nothing differs; head {last}")
        if settings is not None and settings.goal.is_reported:
            print_line("the scores are self-reported: they are what the logs say, no more")
        for note in notes:
            print_line(note)
    if found:
        raise typer.Exit(1)


def review(
    session: flags.Session,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="fresh seeds; as many as the baseline had if left out")
    ] = None,
    no_runs: Annotated[
        bool, typer.Option("--no-runs", help="show the last review, run nothing")
    ] = False,
    runs: flags.Runs = flags.RUNS,
    as_json: flags.Json = False,
    verbose: flags.Verbose = False,
) -> None:
    """Check the result: fresh seeds, holdout, each change left out."""
    directory = session_directory(runs, session)
    if no_runs:
        entries = read_ledger(directory)
        if not (found := reviews(entries)):
            raise UsageError("there is no review yet", f"nightlab review {session}")
        _show_review(ablation(found[-1], fold(entries)), directory, as_json=as_json)
        return
    try:
        with _recorded_lab(directory, "review", as_json=as_json, is_verbose=verbose) as lab:
            table = check_by_daylight(lab, repeats, progress(as_json=as_json))
            keep_head(lab.ledger, anchor_of(lab.ledger))
            write_report(directory, lab.ledger.entries, lab.ledger.get_blob)
    except KeyboardInterrupt:
        err.print(f"stopped; go on with: nightlab review {session}", style="yellow")
        raise
    _show_review(table, directory, as_json=as_json)


def replay(
    session: flags.Session,
    attempt: Annotated[int, typer.Argument(help="its number; 0 is the baseline")],
    runs: flags.Runs = flags.RUNS,
    as_json: flags.Json = False,
    verbose: flags.Verbose = False,
) -> None:
    """Run one attempt again from the record alone, and compare.

    Exit code 0 once it has run, whatever comes of the comparison.
    """
    directory = session_directory(runs, session)
    with _recorded_lab(directory, "replay", as_json=as_json, is_verbose=verbose) as lab:
        replayed = run_again(lab, attempt, progress(as_json=as_json))
        keep_head(lab.ledger, anchor_of(lab.ledger))
    if as_json:
        print_event(replayed.type, **replayed.model_dump(mode="json"))
        return
    for line in replay_lines(replayed, is_self_reported=lab.settings.goal.is_reported):
        say(line)


def approve(
    session: flags.Session,
    reason: ReasonOption,
    smaller: Annotated[
        bool, typer.Option("--smaller", help="take the review's smaller equal model")
    ] = False,
    attempt: Annotated[
        int | None, typer.Option("--attempt", help="take this kept attempt, not the best")
    ] = None,
    branch: Annotated[str | None, typer.Option(help="make this branch in --repo")] = None,
    repo: RepoOption = Path(),
    runs: flags.Runs = flags.RUNS,
) -> None:
    """Take the result: files, a patch and, if asked, a branch.

    The decision is recorded with your git name.
    """
    directory, git = session_directory(runs, session), Git(repo, os.environ)
    refuse_inside(repo, runs)  # a session's own files are the agent's: git must not start in them
    person = find_person(git)
    with Ledger.open(directory) as ledger:
        decided = export.approve(
            ledger, person, reason, git, attempt=attempt, smaller=smaller, branch=branch
        )
        keep_head(ledger, anchor_of(ledger))
        write_report(directory, ledger.entries, ledger.get_blob)
        taken = ledger.history.attempt(decided.attempt)
        say(attempt_line(taken, ledger.history, ledger.history.in_force))
        if not any(one.is_finished for one in reviews(ledger.entries)):
            warn(f"it was not reviewed: nightlab review {session} measures it at fresh seeds")
    say(f"attempt {decided.attempt} approved by {person.name}: {directory / APPROVED}")
    say(f"apply it with: git apply {directory / APPROVED / PATCH_NAME}")
    if decided.commit is not None:
        say(f"branch {branch} is {decided.commit}")
        for line in branch_notes(ledger.history, decided):
            say(line)


def reject(
    session: flags.Session,
    reason: ReasonOption,
    repo: RepoOption = Path(),
    runs: flags.Runs = flags.RUNS,
) -> None:
    """Turn the result down; recorded with your git name."""
    directory = session_directory(runs, session)
    refuse_inside(repo, runs)
    person = find_person(Git(repo, os.environ))
    with Ledger.open(directory) as ledger:
        export.reject(ledger, person, reason)
        keep_head(ledger, anchor_of(ledger))
        write_report(directory, ledger.entries, ledger.get_blob)
    say(f"rejected by {person.name}")
    if (directory / APPROVED).exists():
        say(f"what was approved before stays where it is: {directory / APPROVED}")


def _show_audit(chosen: Sequence[Entry], found: Sequence[Difference], *, as_json: bool) -> None:
    """The events that were asked for, then what differs."""
    if as_json:
        for entry in chosen:
            print_event("entry", entry=entry.model_dump(mode="json"))
        for difference in found:
            print_event("difference", **difference.model_dump(mode="json"))
        return
    for row in table(chosen) if chosen else ():
        print_line(row)
    for difference in found:
        print_line(sentence(difference))


def _anchor_on_record(directory: Path, settings: Settings | None) -> Path | None:
    """The anchor that the settings name, if it is on this machine."""
    if settings is None:
        return None
    path = anchor_path(settings.record.anchor, directory)
    if path is None or path.is_file():
        return path
    warn(f"there is no {path} here, where heads were anchored", "")
    return None


@contextmanager
def _recorded_lab(
    directory: Path, command: str, *, as_json: bool, is_verbose: bool
) -> Iterator[Lab]:
    """The lab of a session as it was recorded: its image, its data, its settings."""
    with (
        Ledger.open(directory) as ledger,
        operational_log(directory, command, os.environ, is_verbose=is_verbose),
    ):
        settings = ledger.history.in_force
        runtime = recorded_runtime(ledger, settings, os.environ)
        sweep_now()  # what a dead session left may hold the GPU that this one needs
        with open_observer(settings, ledger, as_json=as_json) as observer:
            yield open_lab(ledger, settings, runtime, observer)


def _show_review(table: ReviewTable, directory: Path, *, as_json: bool) -> None:
    if as_json:
        print_event("review", **table.model_dump(mode="json"))
        return
    for line in result_lines(table):
        say(line)
    print_table(out, ablation_table(table))
    for line in notes(table):
        say(line)
    difference = result_diff(directory, read_ledger(directory))
    say(for_terminal(difference, MAX_DIFF_CHARACTERS))
