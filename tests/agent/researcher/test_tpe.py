"""Claims about the researcher without a key."""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from agent.candidate.knobs import Choices, Domain, KnobValue, Span, find_knobs, replacement, turn
from agent.candidate.workspace import Workspace
from agent.night.toolbox import Toolbox
from agent.record.events import (
    AttemptFinished,
    AttemptInterrupted,
    AttemptStarted,
    EarlyStop,
    Method,
    StopReason,
    Verdict,
)
from agent.researcher.arguments import Run, parsed
from agent.researcher.base import Model, ModelError, Prompt, Reply
from agent.researcher.tpe import TpeModel, _study
from agent.settings import Direction
from tests.support.histories import Night, start
from tests.support.labs import lab_in_memory

TRAIN = b'''"""A file with knobs."""
DEPTH = 4  # blocks {1, 2, 3, 4, 6}
WIDTH = 128  # residual stream {64, 96, 128, 192, 256}
SEQUENCE = 64  # {32, 64, 128, 256}
BATCH = 16  # rows a step {8, 12, 16, 24, 32}
MATRIX_RATE = 0.02  # [0.005..0.08 log]
EMBEDDING_RATE = 0.3  # [0.05..2.0 log]
HEAD_RATE = 0.01  # [0.001..0.05 log]
MOMENTUM = 0.95  # [0.8..0.98]
WEIGHT_DECAY = 0.1  # [0.0..0.5]
WARMDOWN = 0.4  # [0.1..1.0]
TIED = False
print(DEPTH, WIDTH)
'''
NOISE = 0.006
REQUIRED_GAIN = 0.012
ATTEMPTS = 20

Values = dict[str, float]


def surface(values: Values) -> float | None:
    """Bits per byte of a make-believe training; none where it runs out of memory.

    Bowls around an optimum off the start, two of them coupled, as rates and sizes are.
    """
    if values["DEPTH"] * values["WIDTH"] * values["BATCH"] * values["SEQUENCE"] > 2**22:
        return None
    size = math.log2(values["DEPTH"] * values["WIDTH"] / 256)
    rows = math.log2(values["BATCH"] * values["SEQUENCE"] / 1536)
    rate = math.log2(values["MATRIX_RATE"] / 0.03) + 0.5 * size
    return (
        2.16
        + 0.06 * size**2
        + 0.04 * rows**2
        + 0.04 * rate**2
        + 0.024 * math.log2(values["EMBEDDING_RATE"] / 0.6) ** 2
        + 0.012 * math.log2(values["HEAD_RATE"] / 0.004) ** 2
        + 3.0 * (values["MOMENTUM"] - 0.9) ** 2
        + 0.2 * values["WEIGHT_DECAY"] ** 2
        + 0.16 * (values["WARMDOWN"] - 0.7) ** 2
        + (0.02 if values["TIED"] else 0.0)
    )


def values_of(source: bytes) -> Values:
    return {k.name: k.value for k in find_knobs("train.py", source) if not isinstance(k.value, str)}


@dataclass
class InMemory:
    """A workspace that holds the best of a study."""

    study: Study

    def editable_files(self) -> dict[str, bytes]:
        return {"train.py": self.study.best}


@dataclass
class Study:
    """A night in memory, in which the surface stands for training and judge."""

    seed: int
    source: bytes = TRAIN
    night: Night = field(default_factory=Night)
    best: bytes = b""
    best_value: float = math.inf
    scored: bool = True
    """Whether the baseline's value comes from the surface."""

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        start(self.night, seeds=(self.seed, 101, 102))
        if self.scored:
            self.try_out(self.source)
        else:
            self.best = self.source
            self.record(self.source, Verdict.KEPT, 2.3)

    def model(self) -> TpeModel:
        return self.sampler("tpe")

    def sampler(self, method: Method) -> TpeModel:
        workspace = cast(Workspace, InMemory(self))
        return TpeModel(lab_in_memory(self.night, workspace, direction="minimize"), method)

    def try_out(self, source: bytes) -> None:
        first = not self.night.history.attempts
        true = surface(values_of(source))
        if true is None:
            self.record(source, Verdict.FAILED, None)
            return
        value = true + self.chance.gauss(0, NOISE)
        kept = first or self.best_value - value > REQUIRED_GAIN
        if kept:
            self.best, self.best_value = source, value
        self.record(source, Verdict.KEPT if kept else Verdict.DISCARDED, value)

    def record(
        self,
        source: bytes,
        verdict: Verdict,
        value: float | None,
        *,
        researcher: str = "tpe",
        reason: str = "made_up",
        early_stop: EarlyStop | None = None,
    ) -> None:
        number = len(self.night.history.attempts)
        self.begin(number, source, researcher)
        self.night.add(
            AttemptFinished(
                attempt=number,
                verdict=verdict,
                reason=reason,
                explanation="",
                value=value,
                arithmetic=None,
                seconds=20.0,
                early_stop=early_stop,
            )
        )

    def begin(self, number: int, source: bytes, researcher: str = "tpe") -> None:
        self.night.add(
            AttemptStarted(
                attempt=number,
                kind="candidate" if number else "baseline",
                hypothesis="",
                researcher=researcher,
                files={"train.py": self.night.put_blob(source)},
                diff=None,
                parent=None,
                seeds=(0, 1, 2, 3),
            )
        )

    def truth(self) -> float:
        value = surface(values_of(self.best))
        assert value is not None
        return value


def edited(source: bytes, reply: Reply) -> bytes:
    """The file after a reply's edits, each of which must be possible exactly once."""
    text = source.decode()
    for call in reply.tool_calls[:-1]:
        assert call.name == "edit"
        assert text.count(call.input["old_string"]) == 1
        text = text.replace(call.input["old_string"], call.input["new_string"])
    assert reply.tool_calls[-1].name == "run"
    return text.encode()


def ask(model: Model) -> Reply:
    return model.reply(Prompt("", [], []), 60.0)


def searched(seed: int) -> Study:
    study = Study(seed)
    for _ in range(ATTEMPTS):
        study.try_out(edited(study.best, ask(study.model())))
    return study


def sampled_uniformly(seed: int) -> Study:
    study, chance = Study(seed), random.Random(seed)
    for _ in range(ATTEMPTS):
        source = study.source
        for name in values_of(source):
            knob = next(k for k in find_knobs("train.py", source) if k.name == name)
            source = turn(source, knob, uniform(knob.domain, chance))
        study.try_out(source)
    return study


def uniform(domain: Domain, chance: random.Random) -> KnobValue:
    if isinstance(domain, Choices):
        return chance.choice(domain.values)
    if domain.log:
        return math.exp(chance.uniform(math.log(domain.low), math.log(domain.high)))
    return chance.uniform(domain.low, domain.high)


def test_twenty_attempts_beat_the_start_clearly_and_uniform_sampling_too() -> None:
    start_value = Study(0).truth()
    found = [searched(seed).truth() for seed in range(6)]
    uniform_found = [sampled_uniformly(seed).truth() for seed in range(6)]

    assert fmean(found) < start_value - 5 * NOISE
    assert fmean(found) < fmean(uniform_found)


def test_the_same_ledger_gives_the_same_reply() -> None:
    study = Study(3)
    for _ in range(8):
        first, second = ask(study.model()), ask(study.model())
        assert first == second
        study.try_out(edited(study.best, first))


def test_another_seed_gives_another_reply() -> None:
    first, second = (Study(seed, scored=False).model() for seed in (1, 2))

    assert ask(first).content != ask(second).content


def test_a_reply_is_edits_then_one_run_that_says_what_changes() -> None:
    study = Study(0)
    reply = ask(study.model())
    names = [call.name for call in reply.tool_calls]

    assert [*["edit"] * (len(names) - 1), "run"] == names
    assert [f"tpe-1-{n}" for n in range(len(names))] == [call.id for call in reply.tool_calls]
    hypothesis = reply.tool_calls[-1].input["hypothesis"]
    before, after = values_of(study.best), values_of(edited(study.best, reply))
    for name in before:
        assert (before[name] != after[name]) == (f"{name} {before[name]!r} -> " in hypothesis)


def test_a_reply_costs_nothing_and_is_a_message_of_the_same_shape() -> None:
    reply = ask(Study(0).model())

    assert (0.0, "tool_use", "tpe") == (reply.cost_usd, reply.stop_reason, reply.model)
    assert [call.id for call in reply.tool_calls] == [
        block["id"] for block in reply.content if block["type"] == "tool_use"
    ]


def test_the_first_attempts_move_one_to_four_knobs() -> None:
    for seed in range(10):
        study = Study(seed)
        before, after = values_of(study.best), values_of(edited(study.best, ask(study.model())))
        assert 1 <= sum(before[name] != after[name] for name in before) <= 4


def test_no_candidate_is_proposed_twice_until_none_is_left() -> None:
    study = Study(0, source=b"DEPTH = 4\nA = 1  # {1, 2, 3}\nB = True\n", scored=False)
    seen = {study.source}
    while (candidate := next_candidate(study)) is not None:
        assert candidate not in seen
        seen.add(candidate)
        study.record(candidate, Verdict.DISCARDED, 2.5)

    assert len(seen) > 10


def next_candidate(study: Study) -> bytes | None:
    try:
        return edited(study.best, ask(study.model()))
    except ModelError as error:
        if error.reason is StopReason.EXHAUSTED:
            return None
        raise


def test_failures_count_as_worse_than_everything_measured() -> None:
    study = Study(0)
    study.record(TRAIN.replace(b"DEPTH = 4", b"DEPTH = 6"), Verdict.FAILED, None)
    study.record(TRAIN.replace(b"DEPTH = 4", b"DEPTH = 3"), Verdict.DISCARDED, 2.9)
    model = study.model()
    history = study.night.history
    files, knobs = {"train.py": TRAIN}, find_knobs("train.py", TRAIN)
    values = [trial.value for trial in model._observations(history, knobs, files)]

    assert 3 == len(values)
    assert max(values) == values[1] > 2.9


@pytest.mark.parametrize(("direction", "sign"), [("minimize", 1), ("maximize", -1)])
def test_a_stopped_attempt_is_a_pruned_trial_with_the_loss_that_it_had(
    direction: Direction, sign: int
) -> None:
    stop = EarlyStop(
        share=0.55,
        loss=4.1,
        expected=3.5,
        bound=3.7,
        noise=0.05,
        degrees_of_freedom=2,
        compared=3,
    )
    study = Study(0)
    stopped = TRAIN.replace(b"DEPTH = 4", b"DEPTH = 6")
    study.record(stopped, Verdict.DISCARDED, None, reason="stopped_early", early_stop=stop)
    knobs = find_knobs("train.py", TRAIN)

    trials = study.model()._observations(study.night.history, knobs, {"train.py": study.best})
    last = _study(knobs, trials, direction).trials[-1]

    assert (TrialState.PRUNED, {55: sign * 4.1}) == (last.state, last.intermediate_values)
    assert trials[-1].value > trials[0].value, "and never the promising one"


def test_files_without_knobs_end_the_search() -> None:
    study = Study(0, source=b"import math\nname = -3\n", scored=False)

    with pytest.raises(ModelError) as caught:
        ask(study.model())

    assert StopReason.EXHAUSTED is caught.value.reason
    assert study.model().propose() is None


def test_attempts_whose_knobs_are_gone_do_not_disturb() -> None:
    study = Study(0)
    for number in range(7):
        study.record(b"import math  # rewritten\nDEPTH = 'deep'\n", Verdict.DISCARDED, 2.3 + number)
    study.record(b"not python at all (", Verdict.FAILED, None)

    assert ask(study.model()).tool_calls[-1].name == "run"


def test_a_knob_out_of_its_own_range_is_searched_all_the_same() -> None:
    source = TRAIN.replace(b"MATRIX_RATE = 0.02", b"MATRIX_RATE = 0.0").replace(
        b"DEPTH = 4", b"DEPTH = 5"
    )
    study = Study(0, source=source, scored=False)
    for number in range(8):
        candidate = edited(study.best, ask(study.model()))
        study.record(candidate, Verdict.DISCARDED, 2.4 + 0.01 * number)


def test_interrupted_attempts_teach_nothing() -> None:
    study = Study(0)
    study.begin(1, TRAIN.replace(b"DEPTH = 4", b"DEPTH = 6"))
    study.night.add(AttemptInterrupted(is_box_lost=False, attempt=1, reason="killed"))

    assert ["tpe-2-0"] == [call.id for call in ask(study.model()).tool_calls][:1]
    files, knobs = {"train.py": TRAIN}, find_knobs("train.py", TRAIN)
    assert 1 == len(study.model()._observations(study.night.history, knobs, files))


def test_a_point_that_was_disturbed_was_never_judged_and_is_proposed_again() -> None:
    study = Study(0)
    candidate = edited(study.best, ask(study.model()))
    study.record(candidate, Verdict.DISCARDED, None, reason="disturbed")

    assert candidate == edited(study.best, ask(study.model()))
    study.record(candidate, Verdict.DISCARDED, 2.4)
    assert candidate != edited(study.best, ask(study.model()))


def test_three_refused_candidates_for_one_attempt_end_the_session() -> None:
    model, messages = Study(0).model(), list[dict[str, Any]]()
    ids: list[str] = []
    for _ in range(3):
        reply = model.reply(Prompt("", [], messages), 60.0)
        ids += [call.id for call in reply.tool_calls]
        messages.append({"role": "assistant", "content": reply.content})

    with pytest.raises(ModelError) as caught:
        model.reply(Prompt("", [], messages), 60.0)
    assert StopReason.AGENT_IDLE is caught.value.reason
    assert len(set(ids)) == len(ids)


def test_a_suggestion_is_the_next_point_with_its_reason() -> None:
    study = Study(0)
    suggestion = study.model().propose()
    assert suggestion is not None

    hypothesis = ask(study.model()).tool_calls[-1].input["hypothesis"]
    moves = ", ".join(f"{m.knob.name} {m.old} -> {m.new}" for m in suggestion.moves)
    assert f"tpe: {moves}" == hypothesis
    assert "step away from the best" in suggestion.reason


def knobs_of(text: str) -> dict[str, Domain]:
    return {knob.name: knob.domain for knob in find_knobs("train.py", text.encode())}


@pytest.mark.parametrize(
    ("line", "domain"),
    [
        ("A = 0.02", Span(0.002, 0.2, log=True, whole=False)),
        ("A = 0.5", Span(0.05, 1.0, log=True, whole=False)),
        ("A = 12", Span(3, 48, log=True, whole=True)),
        ("A = 16", Choices((4, 8, 16, 32, 64))),
        ("A = 1", Span(1, 4, log=True, whole=True)),
        ("A = True", Choices((False, True))),
        ("A: float = 1e-3  # [1e-4..1e-2 log]", Span(1e-4, 1e-2, log=True, whole=False)),
        ("A = 3  # blocks [1..8]", Span(1, 8, log=False, whole=True)),
        ("A = 32  # rows [8..128 log]", Choices((8, 16, 32, 64, 128))),
        ("A = 4  # {6, 2, 4}", Choices((2, 4, 6))),
        ("A = 'relu2'  # {'relu2', 'gelu'}", Choices(("relu2", "gelu"))),
        ("A = 5  # {6, 2, 4}", Choices((2, 4, 5, 6))),
        ("A = -0.5  # [-1.0..0.0]", Span(-1.0, 0.0, log=False, whole=False)),
        ("A = 3  # empty [2.5..2.7]", Span(1, 12, log=True, whole=True)),
        ("A = 0.1  # endless [1..1e999]", Span(0.01, 1.0, log=True, whole=False)),
        ("A = 0.1  # broken [5..1]", Span(0.01, 1.0, log=True, whole=False)),
    ],
)
def test_a_knob_says_what_to_try(line: str, domain: Domain) -> None:
    found = knobs_of(line + "\n")["A"]

    assert domain == found if isinstance(domain, Choices) else approximately(domain, found)


def approximately(expected: Span, actual: Domain) -> bool:
    assert isinstance(actual, Span)
    assert pytest.approx((expected.low, expected.high)) == (actual.low, actual.high)
    return (expected.log, expected.whole) == (actual.log, actual.whole)


@pytest.mark.parametrize(
    "text",
    [
        "A = 3  # fixed",
        "A = 3  # fixed: the scorer wants it",
        "A = 3  # width of a row (fixed)",
        "A = 'text'",
        "A = 0",
        "A = -2",
        "A = 0.0",
        "A = 2 ** 4",
        "A = None",
        "A = B = 3",
        "A += 3",
        "A = 3\nA = 4",
        "if True:\n    A = 3",
        "def f():\n    A = 3",
        "A = 1e400",
        "A = 3 (",
        "# coding: latin-1\nX = 'ä'; A = 3",
    ],
)
def test_what_is_no_knob_is_left_alone(text: str) -> None:
    assert {} == knobs_of(text + "\n")


@given(seed=st.integers(0, 10_000), ending=st.sampled_from(["\n", "\r\n"]))
@settings(max_examples=100, deadline=None)
def test_turning_a_knob_changes_its_literal_and_no_other_byte(seed: int, ending: str) -> None:
    source = (TRAIN.decode() + "Z_ß = 'é'\nÉ = 1  # é\n").replace("\n", ending).encode()
    chance = random.Random(seed)
    knob = chance.choice(find_knobs("train.py", source))
    value = uniform(knob.domain, chance)
    after = turn(source, knob, value)
    old, new = replacement(source, knob, value)

    before_lines, after_lines = source.splitlines(), after.splitlines()
    line, turned = before_lines[knob.line - 1], after_lines[knob.line - 1]
    assert line[: knob.start] == turned[: knob.start]
    assert line[knob.end :] == turned[len(turned) - len(line[knob.end :]) :]
    assert before_lines[: knob.line - 1] == after_lines[: knob.line - 1]
    assert before_lines[knob.line :] == after_lines[knob.line :]
    assert 1 == source.decode().count(old)
    assert after == source.decode().replace(old, new).encode()
    found = {k.key: k.value for k in find_knobs("train.py", after)}[knob.key]
    assert pytest.approx(value, rel=0.01) == found


def test_a_line_that_is_part_of_another_is_made_unique() -> None:
    source = b"RATE = 0.1\nHEAD_RATE = 0.1\n"
    knob = find_knobs("train.py", source)[0]

    old, new = replacement(source, knob, 0.2)

    assert 1 == source.decode().count(old)
    assert b"RATE = 0.2\nHEAD_RATE = 0.1\n" == source.decode().replace(old, new).encode()


@pytest.mark.parametrize("seed", range(5))
def test_the_tools_accept_every_call_on_the_shipped_workload(tmp_path: Path, seed: int) -> None:
    source = (Path(__file__).parents[3] / "workspace" / "train.py").read_bytes()
    (tmp_path / "train.py").write_bytes(source)
    study = Study(seed, source=source, scored=False)
    lab = lab_in_memory(study.night, Workspace(tmp_path, ("train.py",)))
    tools = Toolbox(lab, study.model())

    *edits, run = ask(study.model()).tool_calls

    assert not tools.call("suggest", {}, "tpe").is_error
    assert [] == [call for call in edits if tools.call(call.name, call.input, "tpe").is_error]
    assert isinstance(parsed(run.name, run.input), Run)
    assert source != (tmp_path / "train.py").read_bytes()


def test_the_shipped_workload_has_knobs() -> None:
    source = (Path(__file__).parents[3] / "workspace" / "train.py").read_bytes()

    assert len(find_knobs("train.py", source)) >= 8


ENDS: dict[str, tuple[str, str, str, Verdict, float | None, bool]] = {
    "the_samplers_own_failure": ("tpe", "", "failed", Verdict.FAILED, None, True),
    "knobs_that_a_model_turned": ("claude", "", "out_of_memory", Verdict.FAILED, None, True),
    "memory_of_rewritten_code": ("claude", "x", "out_of_memory", Verdict.FAILED, None, False),
    "time_of_rewritten_code": ("claude", "x", "timed_out", Verdict.FAILED, None, False),
    "bug_in_rewritten_code": ("claude", "x", "failed", Verdict.FAILED, None, False),
    "score_of_rewritten_code": ("claude", "x", "no_gain", Verdict.DISCARDED, 2.4, False),
    "score_of_turned_knobs": ("claude", "", "no_gain", Verdict.DISCARDED, 2.4, True),
    "disturbed_run": ("tpe", "", "disturbed", Verdict.DISCARDED, None, False),
}


@pytest.mark.parametrize(
    ("researcher", "rewritten", "reason", "verdict", "value", "teaches"), ENDS.values(), ids=ENDS
)
def test_knobs_are_blamed_only_where_the_code_around_them_is_the_same(
    researcher: str,
    rewritten: str,
    reason: str,
    verdict: Verdict,
    value: float | None,
    teaches: bool,
) -> None:
    study = Study(0)
    for _ in range(8):
        study.try_out(edited(study.best, ask(study.model())))
    before = ask(study.model()).content[0]["text"]
    worse = turn(study.best, find_knobs("train.py", study.best)[1], 256)
    worse += f"{rewritten} = [0.0] * 10**9\n".encode() if rewritten else b""
    study.record(worse, verdict, value, researcher=researcher, reason=reason)
    after = ask(study.model()).content[0]["text"]

    trials = [int(re.findall(r"after (\d+) trials", words)[0]) for words in (before, after)]
    assert int(teaches) == trials[1] - trials[0]


def test_random_draws_every_knob_from_its_whole_range() -> None:
    study = Study(4)
    model = study.sampler("random")
    drawn: dict[str, set[float]] = {}
    for _ in range(30):
        changed = edited(study.best, model.reply(Prompt("", [], []), 60.0))
        for name, value in values_of(changed).items():
            drawn.setdefault(name, set()).add(value)
        study.record(changed, Verdict.DISCARDED, 3.0)

    assert "random" == model.name
    assert all(len(values) >= 4 for name, values in drawn.items() if name != "TIED")
    assert min(drawn["MATRIX_RATE"]) < 0.01
    assert max(drawn["MATRIX_RATE"]) > 0.04
