"""Puts a session's parts together: model, tools, turns."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from agent.attempt.lab import Lab
from agent.night.budget import seconds_left
from agent.night.loop import Night
from agent.night.toolbox import Toolbox
from agent.night.turns import Turns
from agent.night.waiting import for_the_night
from agent.program import Program
from agent.record.events import SAMPLERS, Method, ModelCalled, Noticed
from agent.record.history import History
from agent.record.usage import Spend
from agent.researcher.base import Model, ModelError
from agent.researcher.providers import retirement
from agent.settings import ResearcherSettings, Settings
from agent.text import one_line
from sandbox.contract.errors import UsageError

if TYPE_CHECKING:
    from agent.researcher.claude import ClaudeModel
    from agent.researcher.tpe import TpeModel

MAX_FACT_CHARACTERS = 4000


def assemble(lab: Lab, program: Program, models: list[Model]) -> Night:
    """A session ready to run, whose researchers stand in for each other in that order."""
    lab = for_the_night(lab)
    toolbox = Toolbox(lab, _sampler(lab, "tpe"))
    return Night(lab, toolbox, Turns(lab, models, toolbox, program.prose))


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

    Raises:
        ModelError: the service has no such model, or no longer.
    """
    if researcher != "claude":
        yield [_sampler(lab, "random" if researcher == "random" else "tpe")]
        return
    with ExitStack() as stack:
        models: list[Model] = []
        for model in _claude_models(lab.settings, environ, clock):
            models.append(stack.enter_context(closing(model)))
            _note_facts(lab, model, on_warning)
        then = lab.settings.researcher.then
        known = {model.name: model for model in models}
        known |= {name: _sampler(lab, name) for name in SAMPLERS if name in then}
        yield [models[0], *(known[name] for name in then if name != models[0].name)]


def check_models(
    program: Program,
    environ: Mapping[str, str],
    paid: list[ModelCalled],
    spend: Spend,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Ask each model once, before a session begins or goes on with another researcher.

    Args:
        program: with the settings in force.
        environ: holds credentials and maybe the address of a compatible server.
        paid: takes what each call cost, also where a later one raises.
        spend: what the session has used of its limits before.
        sleep: waits between two tries.

    Raises:
        UsageError: a night with them could not work, better said before an hour of baselines.
    """
    # Its errors are the SDK's, which takes a second to import.
    from agent.night.first_call import first_call

    spent = History(spend=replace(spend))

    def pay(call: ModelCalled) -> None:
        paid.append(call)
        spent.spend.apply(call)

    try:
        for model in _claude_models(program.settings, environ, time.monotonic):
            with closing(model):
                model.facts(must_be_there=True)
                first_call(model, program.settings, program.prose, spent, pay, sleep)
    except ModelError as error:
        raise UsageError(error.message, error.hint) from error


def _claude_models(
    settings: Settings, environ: Mapping[str, str], clock: Callable[[], float]
) -> Iterator[ClaudeModel]:
    # The SDK takes a second to import, and a session of the sampler needs none of it.
    from agent.researcher.claude import ClaudeModel

    researcher = settings.researcher
    for name in model_names(researcher):
        yield ClaudeModel(name, researcher, environ, clock=clock)


def model_names(researcher: ResearcherSettings) -> list[str]:
    """The language models among who proposes, in their order."""
    names = (researcher.model, *researcher.then)
    return [name for name in dict.fromkeys(names) if name not in SAMPLERS]


def _sampler(lab: Lab, method: Method) -> TpeModel:
    # Optuna takes a second to import, and a command that only asks for help needs none of it.
    from agent.researcher.tpe import TpeModel

    return TpeModel(lab, method)


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
