"""Puts a session's parts together: model, tools, turns."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from opentelemetry.trace import Tracer

from agent.attempt.drift import check_for_drift
from agent.attempt.lab import Lab, hashes_of
from agent.candidate.diffs import unified_diff
from agent.night.budget import reason_to_stop, seconds_left
from agent.night.loop import Night
from agent.night.tracing import attempt_span, usual_tracer
from agent.night.turns import Turns
from agent.night.waiting import (
    for_the_night,
    is_asked_to_pause,
    is_asked_to_stop,
    run_with_retries,
    smoke_with_retries,
)
from agent.program import Program
from agent.record.attempts import Attempt
from agent.record.events import FileChanged, Method, Noticed
from agent.record.ledger import Ledger
from agent.researcher.base import Model
from agent.researcher.providers import retirement
from agent.researcher.tools import Toolbox
from agent.settings import Settings
from agent.text import one_line

if TYPE_CHECKING:
    from agent.researcher.claude import ClaudeModel
    from agent.researcher.tpe import TpeModel

MAX_FACT_CHARACTERS = 4000


def assemble(
    lab: Lab, program: Program, models: list[Model], *, tracer: Tracer | None = None
) -> Night:
    """A session ready to run, whose researchers stand in for each other in that order."""
    spans = tracer or usual_tracer()
    lab = for_the_night(replace(lab, worker=replace(lab.worker, tracer=spans)))
    ledger = lab.ledger
    sampler = make_sampler(lab, "tpe")

    def attempt(hypothesis: str, researcher: str) -> Attempt:
        check_for_drift(lab)
        with attempt_span(spans, "candidate"):
            return run_with_retries(lab, "candidate", hypothesis, researcher)

    toolbox = Toolbox(
        workspace=lab.workspace,
        history=lambda: ledger.history,
        get_blob=ledger.get_blob,
        run_attempt=lambda hypothesis: attempt(hypothesis, models[0].name),
        run_smoke=lambda files: smoke_with_retries(lab, files),
        max_smokes=lab.settings.economy.max_smokes,
        find_known=lambda files: lab.history.find_judged(hashes_of(files)),
        suggest=sampler.suggestion,
        sweep=Sweep(lab, sampler, lambda hypothesis: attempt(hypothesis, sampler.name)),
        goal=lab.settings.goal,
        on_change=lambda path, old, new: _note_change(ledger, path, old, new),
    )
    turns = Turns(lab, models, toolbox, program.prose)
    return Night(lab, toolbox, turns, spans)


@contextmanager
def open_models(
    lab: Lab,
    researcher: str,
    environ: Mapping[str, str],
    *,
    on_warning: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[list[Model]]:
    """The researcher, and who stands in for it; closed afterwards.

    Args:
        lab: of the session.
        researcher: `claude`, `tpe` or `random`.
        environ: holds credentials and maybe the address of a compatible server.
        on_warning: called with what to say of a model that is on its way out.
        clock: monotonic seconds, by which replies are timed.

    Raises:
        ModelError: the service has no such model, or no longer.
    """
    if researcher != "claude":
        yield [make_sampler(lab, "random" if researcher == "random" else "tpe")]
        return
    with ExitStack() as stack:
        models: list[Model] = []
        for model in _claude_models(lab.settings, environ, clock):
            models.append(stack.enter_context(closing(model)))
            _note_facts(lab, model, on_warning)
        yield [*models, make_sampler(lab, "tpe")]


def check_models(settings: Settings, environ: Mapping[str, str]) -> None:
    """Ask the service for the models of a session that has not begun.

    Raises:
        ModelError: it has no such model, or no longer, or does not know the key: better said
            before an hour of baselines. Or it is not there at all.
    """
    for model in _claude_models(settings, environ, time.monotonic):
        with closing(model):
            model.facts(must_be_there=True)


def _claude_models(
    settings: Settings, environ: Mapping[str, str], clock: Callable[[], float]
) -> Iterator[ClaudeModel]:
    # The SDK takes a second to import, and a session of the sampler needs none of it.
    from agent.researcher.claude import ClaudeModel

    researcher = settings.researcher
    for name in filter(None, (researcher.model, researcher.fallback_model)):
        yield ClaudeModel(name, researcher, environ, clock=clock)


def _note_change(ledger: Ledger, path: str, old: str | None, new: str) -> None:
    before = {} if old is None else {path: old.encode()}
    after = {path: new.encode()}
    ledger.append(
        FileChanged(
            path=path,
            before=None if old is None else ledger.put_blob(before[path]),
            after=ledger.put_blob(after[path]),
            diff=ledger.put_blob(unified_diff(before, after)),
        )
    )


@dataclass
class Sweep:
    """Hands a few attempts to the sampler; see the tool of that name."""

    lab: Lab
    sampler: TpeModel
    attempt: Callable[[str], Attempt]

    def __call__(self, knobs: tuple[str, ...], attempts: int) -> tuple[list[Attempt], str]:
        """The judged attempts, and why there are not more of them."""
        done: list[Attempt] = []
        while len(done) < attempts:
            if self._has_to_stop():
                return done, "the session has to stop"
            turned = self.sampler.turned(knobs)
            if turned is None:
                return done, "no point is left to try with these knobs"
            files, hypothesis = turned
            self.lab.workspace.restore(files)
            done.append(self.attempt(hypothesis))
        return done, "all done"

    def _has_to_stop(self) -> bool:
        directory = self.lab.worker.directory
        if is_asked_to_stop(directory) or is_asked_to_pause(directory):
            return True
        return reason_to_stop(self.lab.ledger.history, self.lab.settings.session) is not None


def make_sampler(lab: Lab, method: Method) -> TpeModel:
    """The sampler over the knobs of a session's files."""
    from agent.researcher.tpe import TpeModel

    ledger = lab.ledger
    session = ledger.history.session
    assert session is not None
    return TpeModel(
        history=lambda: ledger.history,
        get_blob=ledger.get_blob,
        best_files=lab.workspace.editable_files,
        seed=session.seeds[0],
        direction=lab.settings.goal.direction,
        method=method,
    )


def _note_facts(lab: Lab, model: ClaudeModel, on_warning: Callable[[str], None]) -> None:
    ledger, facts = lab.ledger, model.facts()
    if facts is None:
        return
    text = one_line(json.dumps(facts, ensure_ascii=False, sort_keys=True), MAX_FACT_CHARACTERS)
    ledger.append(Noticed(kind="model_facts", explanation=text))
    now = datetime.fromisoformat(ledger.history.time.last_at)
    end = now + timedelta(seconds=seconds_left(ledger.history, lab.settings.session))
    if warning := retirement(facts, end):
        ledger.append(Noticed(kind="model_retires", explanation=warning))
        on_warning(warning)
