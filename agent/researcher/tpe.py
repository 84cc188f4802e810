"""The researcher without a key: Optuna turns the knobs.

A study is rebuilt from the ledger at every reply, so there is nothing else to store, and the same
verdicts give the same reply: an attempt that was interrupted, or disturbed by others and so never
judged, is proposed again. Attempts of any researcher teach it whose files differ from those at hand
in nothing but knobs; those that failed count as a little worse than the worst that was measured,
and those that were stopped early as pruned trials, with the loss that they had when they were
stopped.

Twenty attempts are few for a dozen knobs, so the search stays near the best point that was
measured: the first attempts move one to four knobs a step away from it, and later ones take a few
knobs of the sampler's point and leave the others. That point may be better without proof: small
gains then add up until the judge can tell them from noise. This is our own choice; the tests hold
it against uniform sampling.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from agent.attempt.lab import Lab, hashes_of, sha_of
from agent.candidate.knob_places import WITH_KNOBS
from agent.candidate.knobs import (
    Choices,
    Domain,
    Knob,
    KnobValue,
    Span,
    current_literal,
    find_knobs,
    given_elsewhere,
    literal,
    replacement,
    turn,
    without_knobs,
)
from agent.candidate.workspace import may_be_written
from agent.record.attempts import Attempt
from agent.record.events import (
    AttemptFinished,
    EarlyStop,
    Method,
    Reserve,
    StopReason,
    Usage,
    Verdict,
)
from agent.record.history import History, settled
from agent.researcher.base import ModelError, Prompt, Reply, ToolCall
from agent.settings import Direction
from agent.text import one_line

Files = dict[str, bytes]
Parameter = float | int | bool | str
Point = dict[str, Parameter]
"""A parameter for each knob, by the knob's key; of ordered choices their index."""

STARTUP_ATTEMPTS = 6
MAX_STEP_KNOBS = 4
STEP = 0.2
"""Standard deviation of a step, as a share of the knob's range."""
MAX_DRAWS = 64
MAX_REPLIES_PER_ATTEMPT = 3
HYPOTHESIS_CHARACTERS = 400


@dataclass(frozen=True)
class Observation:
    """What one attempt teaches: where it was, and what came of it."""

    point: Point
    value: float
    early_stop: EarlyStop | None
    """Why it has no score; the value is then a stand-in that is worse than all."""


@dataclass(frozen=True)
class Move:
    """One knob's literal before and after, as they stand in the file."""

    knob: Knob
    value: KnobValue
    old: str
    new: str


@dataclass(frozen=True)
class Proposal:
    """The next point: what moves, in which files, and why."""

    sampler: str
    files: Files
    """Before anything moves."""
    moves: tuple[Move, ...]
    reason: str

    @property
    def hypothesis(self) -> str:
        """What changes, as the record and the person read it."""
        moves = ", ".join(f"{move.knob.name} {move.old} -> {move.new}" for move in self.moves)
        return one_line(f"{self.sampler}: {moves}", HYPOTHESIS_CHARACTERS)

    @property
    def candidate(self) -> Files:
        """The files at the point."""
        return self._after(len(self.moves))

    @property
    def edits(self) -> list[dict[str, Any]]:
        """Arguments of `edit` that make the candidate, each for what the one before left."""
        edits = []
        for number, move in enumerate(self.moves):
            path = move.knob.file
            old, new = replacement(self._after(number)[path], move.knob, move.value)
            edits.append({"file_path": path, "old_string": old, "new_string": new})
        return edits

    def _after(self, moves: int) -> Files:
        files = dict(self.files)
        for move in self.moves[:moves]:
            files[move.knob.file] = turn(files[move.knob.file], move.knob, move.value)
        return files


class TpeModel:
    """Proposes with a tree-structured Parzen estimator, through the same tools as a language model.

    Args:
        lab: of the session; its history, the files of the best, which lie in the workspace between
            attempts, and the seed of every random choice.
        method: `random` draws every knob evenly from its range and learns nothing: the floor.
    """

    def __init__(self, lab: Lab, method: Method = "tpe") -> None:
        self._lab = lab
        self._method: Method = method
        self._direction = lab.settings.goal.direction
        self._found: dict[tuple[str, str], list[Knob]] = {}
        self._code: dict[tuple[str, str], str] = {}

    @property
    def name(self) -> str:
        """Name for the record."""
        return self._method

    def worst_case(self, prompt: Prompt) -> Reserve:
        """What one more reply can cost at most: nothing."""
        del prompt
        return Reserve(calls=0, tokens=0, usd=0.0)

    def reply(self, prompt: Prompt, seconds_left: float) -> Reply:
        """Edits that make the next candidate, then its run.

        Raises:
            ModelError: no knob is left, or every point nearby was tried, or the tools refused.
        """
        del seconds_left
        attempt = len(self._lab.history.attempts)
        earlier = _calls_for(attempt, self.name, prompt.messages)
        replies = sum(1 for name in earlier if name == "run")
        if replies >= MAX_REPLIES_PER_ATTEMPT:
            message = f"the tools refused {replies} candidates in a row"
            hint = "read the last tool results with nightlab review"
            raise ModelError(StopReason.AGENT_IDLE, message, hint)
        proposal = self.propose(draw=replies)
        if proposal is None:
            message = "every knob that the files have was tried"
            hint = "give the knobs wider ranges, or go on with --researcher claude"
            raise ModelError(StopReason.EXHAUSTED, message, hint)
        return _as_reply(proposal, attempt, first=len(earlier))

    def propose(self, names: tuple[str, ...] = (), *, draw: int = 0) -> Proposal | None:
        """The next point; none when no knob is left, or every point nearby was tried.

        Args:
            names: of the knobs that may move; empty for all.
            draw: how many proposals for this attempt were refused.
        """
        history, files = self._lab.history, self._lab.workspace.editable_files()
        present = self._knobs_of(hashes_of(files), files)
        given = given_elsewhere(present, self._lab.settings.workspace.command)
        space = [k for k in self._search_space(history, present) if k.key not in given]
        knobs = [k for k in space if not names or k.name in names]
        here = _point(knobs, present)
        seen = self._observations(history, knobs, files)
        base = self._promising(seen, here)
        done = settled(history)
        tried = [{path: a.started.files.get(path) for path in files} for a in done]
        # The same record gives the same proposal: an attempt that a crash cut off comes again.
        chance = random.Random(f"{self._lab.seeds[0]} {len(done)} {draw}")
        study = _study(knobs, seen, self._direction)
        for _ in range(MAX_DRAWS if knobs else 0):
            if self._method == "random":
                study.sampler = RandomSampler(seed=chance.randrange(2**31))
                point, reason = _ask(knobs, study), "drawn evenly from the ranges"
            elif len(seen) <= STARTUP_ATTEMPTS:  # the first of them is where they began
                point, reason = _step(knobs, base, chance), "a step away from the best"
            else:
                # None of the startup draws of its own: the first attempts were those.
                study.sampler = TPESampler(seed=chance.randrange(2**31), n_startup_trials=0)
                point = _a_part(_ask(knobs, study), base, chance)
                reason = f"the sampler's choice after {len(seen)} trials, near the best"
            proposal = Proposal(self.name, files, _moves(knobs, here, point, files), reason)
            # A verdict that is known already costs no second training.
            if proposal.moves and hashes_of(proposal.candidate) not in tried:
                return proposal
        return None

    def _search_space(self, history: History, present: list[Knob]) -> list[Knob]:
        """The files' knobs; a range that no comment states stays where the baseline put it."""
        baseline = history.baseline
        first = (
            {} if baseline is None else {k.key: k for k in self._knobs_of(baseline.started.files)}
        )
        return [_anchored(knob, first.get(knob.key)) for knob in present]

    def _knobs_of(self, hashes: Mapping[str, str], contents: Files | None = None) -> list[Knob]:
        """The knobs of files, each parsed once; what is not given comes from the ledger."""
        knobs: list[Knob] = []
        for path, sha in sorted(hashes.items()):
            if path.endswith(WITH_KNOBS) and (path, sha) not in self._found:
                source = contents[path] if contents else self._lab.ledger.get_blob(sha)
                self._found[path, sha] = find_knobs(path, source)
            knobs += self._found.get((path, sha), [])
        return knobs

    def _code_of(self, hashes: Mapping[str, str], contents: Files | None = None) -> dict[str, str]:
        """Hashes of the editable files without their knobs' literals."""
        editable = self._lab.settings.workspace.editable
        code = {}
        for path, sha in hashes.items():
            if may_be_written(path.split("/"), editable):
                if (path, sha) not in self._code:
                    source = contents[path] if contents else self._lab.ledger.get_blob(sha)
                    self._code[path, sha] = sha_of(without_knobs(path, source))
                code[path] = self._code[path, sha]
        return code

    def _observations(self, history: History, knobs: list[Knob], files: Files) -> list[Observation]:
        """Every attempt that says something about these files' knobs, the oldest first.

        Where other code stood around the knobs, what came of it may be that code's doing.
        """
        code = self._code_of(hashes_of(files), files)
        judged = [
            (a, a.finished)
            for a in history.attempts
            if a.finished is not None
            and _teaches(a, a.finished)
            and self._code_of(a.started.files) == code
        ]
        measured = [end.value for _, end in judged if end.value is not None]
        if not measured:
            return []
        bad = _worse_than_all(measured, self._direction)
        return [
            Observation(
                point=_point(knobs, self._knobs_of(attempt.started.files)),
                value=bad if end.value is None else end.value,
                early_stop=end.early_stop,
            )
            for attempt, end in judged
        ]

    def _promising(self, seen: list[Observation], here: Point) -> Point:
        """The point with the best measured value, proven or not; the files' own without one."""
        if not seen:
            return here
        choose = min if self._direction == "minimize" else max
        return here | choose(seen, key=lambda observation: observation.value).point


def _teaches(attempt: Attempt, finished: AttemptFinished) -> bool:
    """Whether an attempt's value, or its lack of one, is its files' doing.

    A disturbed run is nobody's fault, and what was refused later has no value.
    """
    if attempt.dethroned is not None:
        return False
    is_valued = finished.value is not None or finished.early_stop is not None
    return is_valued or finished.verdict is not Verdict.DISCARDED


def _calls_for(attempt: int, name: str, messages: list[dict[str, Any]]) -> list[str]:
    """Names of the tools that this conversation already called for that attempt."""
    blocks = [
        block
        for message in messages
        if message["role"] == "assistant" and isinstance(message["content"], list)
        for block in message["content"]
    ]
    prefix = f"{name}-{attempt}-"
    return [b["name"] for b in blocks if str(b.get("id", "")).startswith(prefix)]


def _anchored(knob: Knob, first: Knob | None) -> Knob:
    """The knob with the domain it is searched in, which always holds where it stands."""
    domain = knob.domain
    if first is not None and not knob.from_comment and type(first.value) is type(knob.value):
        domain = first.domain
    return replace(knob, domain=_including(domain, knob.value))


def _including(domain: Domain, value: KnobValue) -> Domain:
    if isinstance(domain, Choices):
        if value in domain.values:
            return domain
        values = (*domain.values, value)
        return Choices(tuple(sorted(values)) if Choices(values).ordered else values)
    assert isinstance(value, int | float)
    low, high = min(domain.low, value), max(domain.high, value)
    return replace(domain, low=low, high=high, log=domain.log and low > 0)


def _point(knobs: list[Knob], present: list[Knob]) -> Point:
    """Where files lie in the space of `knobs`; a knob that they lack has no entry."""
    values = {knob.key: knob.value for knob in present}
    parameters = {k.key: _parameter(k.domain, values[k.key]) for k in knobs if k.key in values}
    return {key: found for key, found in parameters.items() if found is not None}


def _parameter(domain: Domain, value: KnobValue) -> Parameter | None:
    if isinstance(domain, Choices):
        if value not in domain.values:
            return None
        return domain.values.index(value) if domain.ordered else value
    if isinstance(value, bool | str):
        return None
    inside = min(max(value, domain.low), domain.high)
    return round(inside) if domain.whole else float(inside)


def _value(domain: Domain, parameter: Parameter) -> KnobValue:
    if isinstance(domain, Choices):
        return domain.values[int(parameter)] if domain.ordered else parameter
    if domain.whole:
        return int(parameter)
    written = float(literal(float(parameter)))
    return min(max(written, domain.low), domain.high)


def _distribution(domain: Domain) -> BaseDistribution:
    if isinstance(domain, Choices):
        if domain.ordered:
            return IntDistribution(0, len(domain.values) - 1)
        return CategoricalDistribution(domain.values)
    if domain.whole:
        return IntDistribution(math.ceil(domain.low), math.floor(domain.high), log=domain.log)
    return FloatDistribution(domain.low, domain.high, log=domain.log)


def _study(knobs: list[Knob], seen: list[Observation], direction: Direction) -> optuna.Study:
    """What the sampler learns from; made anew each time, so that the ledger is all there is."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction=direction)
    space = {knob.key: _distribution(knob.domain) for knob in knobs}
    for trial in seen:
        distributions = {key: space[key] for key in trial.point}
        study.add_trial(_as_optuna_s(trial, distributions, direction))
    return study


def _as_optuna_s(
    trial: Observation, distributions: dict[str, BaseDistribution], direction: Direction
) -> FrozenTrial:
    stop = trial.early_stop
    if stop is None:
        return create_trial(params=trial.point, distributions=distributions, value=trial.value)
    loss = stop.loss if direction == "minimize" else -stop.loss  # losses fall, whatever the metric
    return create_trial(
        state=TrialState.PRUNED,
        params=trial.point,
        distributions=distributions,
        intermediate_values={round(100 * stop.share): loss},
    )


def _ask(knobs: list[Knob], study: optuna.Study) -> Point:
    """The next point of the study's sampler."""
    space = {knob.key: _distribution(knob.domain) for knob in knobs}
    point = study.ask(space).params
    return {key: point[key] for key in space}


def _a_part(point: Point, base: Point, chance: random.Random) -> Point:
    """A few knobs of the sampler's point, the others as they are."""
    different = [key for key in point if point[key] != base[key]]
    size = min(len(different), chance.randint(1, MAX_STEP_KNOBS))
    taken = set(chance.sample(different, size))
    return {key: point[key] if key in taken else base[key] for key in base}


def _worse_than_all(measured: list[float], direction: Direction) -> float:
    spread = max(measured) - min(measured)
    margin = max(spread / 4, abs(measured[0]) / 100)
    return max(measured) + margin if direction == "minimize" else min(measured) - margin


def _step(knobs: list[Knob], here: Point, chance: random.Random) -> Point:
    """One to four knobs moved a step, the others as they are."""
    size = min(len(knobs), chance.randint(1, MAX_STEP_KNOBS))
    moved = {
        knob.key: _nearby(knob.domain, here[knob.key], chance)
        for knob in chance.sample(knobs, size)
    }
    return {**here, **moved}


def _nearby(domain: Domain, parameter: Parameter, chance: random.Random) -> Parameter:
    if isinstance(domain, Choices):
        if not domain.ordered:
            return chance.choice([v for v in domain.values if v != parameter])
        index, last = int(parameter), len(domain.values) - 1
        return chance.choice([i for i in (index - 1, index + 1) if 0 <= i <= last])
    return _nearby_number(domain, float(parameter), chance)


def _nearby_number(span: Span, number: float, chance: random.Random) -> Parameter:
    scale, back = (math.log, math.exp) if span.log else (float, float)
    step = chance.gauss(0, STEP) * (scale(span.high) - scale(span.low))
    inside = min(max(back(scale(number) + step), span.low), span.high)
    return round(inside) if span.whole else inside


def _moves(knobs: list[Knob], here: Point, point: Point, files: Files) -> tuple[Move, ...]:
    moves = []
    for knob in knobs:
        if point[knob.key] != here[knob.key]:
            value = _value(knob.domain, point[knob.key])
            if literal(value) != literal(knob.value):
                old = current_literal(files[knob.file], knob)
                moves.append(Move(knob, value, old, literal(value)))
    return tuple(moves)


def _as_reply(proposal: Proposal, attempt: int, first: int) -> Reply:
    """The calls that make and run a proposal; `first` is the number of the first of them."""
    hypothesis = proposal.hypothesis
    inputs = [*(("edit", edit) for edit in proposal.edits), ("run", {"hypothesis": hypothesis})]
    calls = [
        ToolCall(f"{proposal.sampler}-{attempt}-{number}", tool, arguments)
        for number, (tool, arguments) in enumerate(inputs, start=first)
    ]
    text = {"type": "text", "text": f"{hypothesis} ({proposal.reason})"}
    blocks = [
        {"type": "tool_use", "id": call.id, "name": call.name, "input": call.input}
        for call in calls
    ]
    return Reply(
        content=[text, *blocks],
        tool_calls=calls,
        stop_reason="tool_use",
        model=proposal.sampler,
        usage=Usage(input_tokens=0, output_tokens=0, cache_read_tokens=0, cache_write_tokens=0),
        cost_usd=0.0,
        request_id=None,
        seconds=0.0,
    )
