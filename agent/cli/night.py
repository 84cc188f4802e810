"""Commands of the night: run, resume, stop, pause, continue."""

import os
import secrets
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from agent.attempt.lab import Lab
from agent.candidate.git import Git
from agent.cli import flags
from agent.cli.logs import operational_log
from agent.cli.shared import (
    BASELINE_FAILED,
    SERVICE_FAILED,
    anchor_of,
    err,
    keep_head,
    open_observer,
    out,
    print_event,
    progress,
    say,
    session_directory,
    sweep_now,
    warn,
)
from agent.machine.rehearse import SCORE, before_training, in_place_of_a_night
from agent.machine.runtime import find_runtime, recorded_runtime
from agent.machine.setup import own_workspace
from agent.morning.anchor import anchor_path
from agent.night.assemble import assemble, check_models, model_names, open_models
from agent.night.budget import work_is_done
from agent.night.loop import run_session
from agent.night.session import Runtime, begin, check_name, open_lab, recover
from agent.night.waiting import ask_to_continue, ask_to_pause, ask_to_stop
from agent.program import Program, load_program, parse_program
from agent.record.chain import read_ledger
from agent.record.events import PLANNED_STOPS, Event, ModelAsked, ModelCalled, Noticed, StopReason
from agent.record.history import History, fold
from agent.record.ledger import Ledger, is_locked
from agent.record.usage import Spend
from agent.report.activity import is_at_work
from agent.report.console import MORE, closing_lines
from agent.report.plan import plan
from agent.report.report import Report
from agent.report.summary import failed_baseline, summary, way_on
from agent.researcher.providers import (
    WITHOUT_A_KEY,
    check_credentials,
    price_known,
    unusable_credentials,
)
from agent.settings import Settings
from agent.text import one_line
from agent.trackers.export import Export, exporter
from sandbox.contract.errors import UsageError
from sandbox.contract.log import log
from sandbox.machine import state_directory


def run(
    program: flags.Program = flags.PROGRAM,
    researcher: Annotated[
        str | None, typer.Option(help="auto (claude with a key, else tpe), claude, tpe or random")
    ] = None,
    attempts: flags.Attempts = None,
    hours: flags.Hours = None,
    usd: flags.Usd = None,
    budget_seconds: Annotated[float | None, typer.Option(help="seconds for each training")] = None,
    base_image: flags.BaseImage = None,
    gpus: flags.Gpus = None,
    session: Annotated[str | None, typer.Option(help="name of the session")] = None,
    seed: Annotated[
        int | None, typer.Option(help="what the session's seeds are drawn from")
    ] = None,
    track: flags.Track = None,
    track_dir: flags.TrackDir = None,
    runs: flags.Runs = flags.RUNS,
    as_json: flags.Json = False,
    verbose: flags.Verbose = False,
) -> None:
    """Run a session: baseline, then attempt after attempt."""
    content = load_program(program)
    settings = content.settings.with_overrides(
        attempts=attempts,
        hours=hours,
        usd=usd,
        budget_seconds=budget_seconds,
        researcher=researcher,
        base_image=base_image,
        gpus=gpus,
    )
    session = check_name(session or datetime.now().astimezone().strftime("night-%Y%m%d-%H%M%S"))
    export = exporter(track, track_dir, runs, os.environ)  # refused before any build, as the name
    name, paid = _researcher(settings.researcher.name, settings), list[ModelCalled]()
    _ask_first(name, content, settings, paid)
    source = own_workspace(settings, program.parent)
    runtime = find_runtime(settings, program.parent, os.environ, progress(as_json=as_json))
    sweep_now()  # what a dead session left may hold the GPU that this one needs
    anchor_path(settings.record.anchor, directory := runs / session)  # may refuse it
    _look_first(settings, source, runtime, as_json=as_json)
    ledger = begin(
        directory.absolute(),
        content,
        settings,
        source,
        runtime,
        researcher=name,
        seed=secrets.randbits(31) if seed is None else seed,
        git=Git(source, os.environ),
        say=progress(as_json=as_json),
    )
    with (
        ledger,
        operational_log(ledger.directory, "run", os.environ, is_verbose=verbose),
        open_observer(settings, ledger, as_json=as_json) as observer,
    ):
        for call in paid:
            ledger.append(call)
        _work(open_lab(ledger, settings, runtime, observer), content, name, export, as_json=as_json)


def resume(
    session: flags.Session,
    researcher: Annotated[
        str | None, typer.Option(help="who goes on: claude, tpe or random; as before if left out")
    ] = None,
    attempts: flags.Attempts = None,
    hours: flags.Hours = None,
    usd: flags.Usd = None,
    model: flags.Model = None,
    price: flags.Price = None,
    max_output_tokens: flags.MostOutput = None,
    max_conversation_tokens: flags.MostConversation = None,
    track: flags.Track = None,
    track_dir: flags.TrackDir = None,
    runs: flags.Runs = flags.RUNS,
    as_json: flags.Json = False,
    verbose: flags.Verbose = False,
) -> None:
    """Go on with a session that was stopped, killed or may do more."""
    directory = session_directory(runs, session)
    export = exporter(track, track_dir, runs, os.environ)
    with Ledger.open(directory) as ledger:
        if failed_baseline(ledger.history) is not None:
            message = f"the baseline of {session} failed, and its copy of the files is as it was"
            hint = f"see nightlab report {session}; {way_on(summary(ledger.entries))}"
            raise UsageError(message, hint)
        settings = ledger.history.in_force.with_overrides(
            attempts=attempts,
            hours=hours,
            usd=usd,
            researcher=researcher,
            model=model,
            price=price,
            max_output_tokens=max_output_tokens,
            max_conversation_tokens=max_conversation_tokens,
        )
        assert ledger.history.session is not None
        if words := _nothing_to_do(ledger.history, settings):
            if as_json:
                print_event("nothing_to_do", why=words)
            else:
                say(f"nothing to do: {words}")
            return
        # Not the file beside the ledger: who edits that would steer a night without a trace.
        content = parse_program(ledger.get_blob(ledger.history.session.program), "program.md")
        wanted = ledger.history.researcher if researcher is None else settings.researcher.name
        name = _researcher(wanted, settings)
        is_chosen = bool(researcher) or settings.researcher != ledger.history.in_force.researcher
        if model is not None and name != "claude":
            raise UsageError(f"--model is claude's, and {name} goes on", "add --researcher claude")
        with (
            operational_log(directory, "resume", os.environ, is_verbose=verbose),
            open_observer(settings, ledger, as_json=as_json) as observer,
        ):
            # Swept before anything else runs: a box of the dead session may still be training.
            runtime, removed = recorded_runtime(ledger, settings, os.environ), sweep_now()
            lab = open_lab(ledger, settings, runtime, observer)
            begin_again(lab, content, name if is_chosen else None, removed, runtime.engine)
            _work(lab, content, name, export, as_json=as_json)


def stop(session: flags.Session, runs: flags.Runs = flags.RUNS) -> None:
    """Let a session finish its present attempt, then end."""
    ask_to_stop(_running_session(runs, session))
    out.print(f"{session} ends after its present attempt")


def pause(session: flags.Session, runs: flags.Runs = flags.RUNS) -> None:
    """Let a session wait after its present attempt; costs no hours."""
    ask_to_pause(_running_session(runs, session))
    out.print(f"{session} pauses after its present attempt; go on: nightlab continue {session}")


def continue_(session: flags.Session, runs: flags.Runs = flags.RUNS) -> None:
    """Let a paused session go on."""
    if not ask_to_continue(_running_session(runs, session)):
        raise UsageError(f"{session} is not paused", "see nightlab pause --help")
    out.print(f"{session} goes on")


def begin_again(
    lab: Lab, program: Program, chosen: str | None, removed: tuple[str, ...], engine: dict[str, Any]
) -> None:
    """Ask the researcher that the person chose, if any, and bring the session back.

    A call that was paid for is on record also where a later one comes to nothing.
    """
    paid, ledger, is_chosen = list[ModelCalled](), lab.ledger, False
    try:
        _ask_first(chosen, program, lab.settings, paid, ledger.history.spend)
        is_chosen = True
    finally:
        if is_chosen or paid:
            now = chosen if is_chosen else None
            recover(lab, removed_containers=removed, researcher=now, engine=engine)
            for call in paid:
                ledger.append(call)


def _look_first(settings: Settings, source: Path, runtime: Runtime, *, as_json: bool) -> None:
    """Say in a second or two what would fail, with the words of `nightlab try`.

    Raises:
        UsageError: no training can come to a good end.
    """
    with in_place_of_a_night(settings, runtime, state_directory(os.environ)) as worker:
        for one in before_training(worker, source):
            if one.is_certain:
                raise UsageError(one_line(f"{one.about}: {one.seen}", 600), one.cure)
            if one.cure:
                warn(one_line(f"{one.about}: {one.seen}; what helps: {one.cure}", 800))
            elif one.about == SCORE and not as_json:
                say(one.seen)


def _ask_first(
    name: str | None,
    program: Program,
    settings: Settings,
    paid: list[ModelCalled],
    spend: Spend | None = None,
) -> None:
    """Ask claude before anything runs; who else proposes needs no service."""
    if name == "claude":
        check_models(replace(program, settings=settings), os.environ, paid, spend or Spend())


def _work(
    lab: Lab, program: Program, researcher: str, export: Export | None, *, as_json: bool
) -> None:
    """Run the session in `lab` to its end, and tell how it ended."""
    ledger = lab.ledger
    report, anchor = Report(ledger.get_blob), anchor_of(ledger)

    def refresh() -> None:
        keep_head(ledger, anchor)
        _refresh_report(lab, report)
        if export is not None:
            _track(lab, export)

    if as_json:  # the name, which nightlab may have chosen, before anything takes its time
        print_event("session_begun", session=lab.session, researcher=researcher)
    else:
        who = _who(lab.settings, researcher)
        say(f"{lab.session} with {who}; in a second terminal: nightlab watch {lab.session}")
        for line in plan(ledger.history, datetime.now().astimezone()):
            say(line)
    try:
        keep_head(ledger, anchor)  # a tail can be cut off before the first attempt, too
        with open_models(lab, researcher, os.environ, on_warning=warn) as models:
            ended = run_session(assemble(lab, program, models), refresh)
    except KeyboardInterrupt:
        _refresh_report(lab, report)  # no tracker: whoever stops a night wants it to stop
        err.print(f"stopped; go on with: nightlab resume {lab.session}", style="yellow")
        raise
    refresh()
    numbers = summary(ledger.entries)
    if as_json:
        print_event("session_ended", **numbers.model_dump(mode="json"))
    else:
        for line in closing_lines(numbers, ledger.directory):
            say(line)
    if never_replied([entry.event for entry in ledger.entries]):
        warn(f"the model's service never gave one reply: see nightlab audit {lab.session}")
        raise typer.Exit(SERVICE_FAILED)
    if code := exit_code(ended.reason):
        raise typer.Exit(code)


def _nothing_to_do(history: History, settings: Settings) -> str:
    """Why a resume would end at once; it then writes nothing, and the head stays as it is."""
    done = work_is_done(history, settings.session) if history.ended else None
    ends = [one for one in (history.baseline, history.best) if one is not None]
    is_scored = settings.goal.is_reported or all(one.values("holdout") for one in ends)
    if done is None or not (is_scored or history.best is history.baseline):
        return ""
    limit = MORE.get(done[0])
    return f"{done[1]}" + (f"; {limit} allows more, those before included" if limit else "")


def never_replied(events: list[Event]) -> bool:
    """Whether a service was asked and gave no reply; a sampler's conversations are others."""
    asked = {event.conversation for event in events if isinstance(event, ModelAsked)}
    replies = (event for event in events if isinstance(event, ModelCalled) and event.reply)
    return bool(asked) and asked.isdisjoint(reply.conversation for reply in replies)


def exit_code(reason: StopReason) -> int:
    """What a session's command ends with: a baseline is the person's, the rest is of our side."""
    if reason in PLANNED_STOPS:
        return 0
    return BASELINE_FAILED if reason is StopReason.BASELINE_FAILED else SERVICE_FAILED


def _who(settings: Settings, researcher: str) -> str:
    """Who proposes, and who goes on where that one cannot."""
    if researcher == "claude":
        then = settings.researcher.then or ("nobody",)
        return f"{settings.researcher.model} (then {', '.join(then)})"
    is_without_key = settings.researcher.name == "auto" and settings.session.usd is not None
    return f"{researcher} (no key is set: usd bounds nothing)" if is_without_key else researcher


def _refresh_report(lab: Lab, report: Report) -> None:
    """Write the report; one that cannot be drawn must not end a night that goes well."""
    try:
        report.write(lab.worker.directory, lab.ledger.history, lab.ledger.entries)
    except Exception as error:  # noqa: BLE001 - a drawing error is for the morning
        problem = f"{type(error).__name__}: {error}"
        log.warning("report_failed", error=problem)
        warn(one_line(f"the report could not be written: {problem}", 300))


def _track(lab: Lab, export: Export) -> None:
    """Bring the tracker up to date; it warns once of a failure, and tries again each time."""
    before, problem, tracker = export.problem, export(lab.worker.directory), export.tracker.value
    if problem:
        log.warning("tracker_failed", tracker=tracker, error=problem)
    if not problem or problem == before:
        return
    later = f"nightlab report {lab.session} --track {tracker}"
    text = f"{tracker} was not brought up to date: {problem}; try it later: {later}"
    warn(text)
    if lab.ledger.history.ended is None:
        lab.ledger.append(Noticed(kind="not_tracked", explanation=text))


def _researcher(name: str, settings: Settings) -> str:
    """Who proposes candidates; refused where it lacks what it needs."""
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
        raise UsageError(missing, WITHOUT_A_KEY)
    if unusable := unusable_credentials(os.environ, provider=provider):
        raise UsageError(unusable, WITHOUT_A_KEY)
    own = settings.researcher.price_usd_per_million
    models = model_names(settings.researcher)
    unpriced = [m for m in models if not price_known(m, provider=provider, own=own)]
    if settings.session.usd is not None and unpriced:
        raise UsageError(
            f"the price of {unpriced[0]} is not known, so usd cannot be kept",
            "set price_usd_per_million in program.md (at a resume: --price), or leave usd out",
        )


def _running_session(runs: Path, session: str) -> Path:
    directory = session_directory(runs, session)
    ended = fold(read_ledger(directory)).ended
    hint = f"go on with it: nightlab resume {session}"
    if ended is not None:
        raise UsageError(f"{session} has ended already ({ended.reason.value})", hint)
    if not (is_at_work(directory) or is_locked(directory)):
        raise UsageError(f"nobody is at work on {session}: it was cut off", hint)
    return directory
