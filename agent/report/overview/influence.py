"""Which knobs went together with the score, and how."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import stdev

from agent.candidate.knobs import KnobValue
from agent.report.charts import Scale
from agent.settings import Direction
from sandbox.contract.record import Record

LEAST_SCORES = 20
LEAST_TURNS = 5
"""Attempts at which a knob had another value than mostly."""
MOST_KNOBS = 8
_LEAST_SPREAD = 2.0
"""Of the scores, in units of the noise of one: less is luck, which no knob explains."""
_FEW_OF_THE_BEST = 0.25
_LOGARITHMIC = 30.0
WIDTH, HEIGHT = 200.0, 110.0


class Measured(Record):
    """A score with the knobs that it was measured at."""

    attempt: int
    mark: str
    score: float
    knobs: dict[str, KnobValue]


class SliceDot(Record):
    """One attempt on a knob's slice."""

    attempt: int
    mark: str
    x: float
    y: float


class Slice(Record):
    """One knob: its share of what knobs explain, and all scores over its values."""

    name: str
    importance: float
    dots: tuple[SliceDot, ...]
    low: str
    high: str


def influence(
    seen: Sequence[Measured], direction: Direction, noise: float | None
) -> tuple[Slice, ...]:
    """The knobs that matter most, by PED-ANOVA; none where there is too little to say.

    Watanabe et al. 2023, as Optuna has it: which knobs tell the best quarter from the rest.
    """
    scores = [one.score for one in seen]
    if len(scores) < LEAST_SCORES or stdev(scores) <= _LEAST_SPREAD * (noise or 0.0):
        return ()
    shared = [name for name in seen[0].knobs if all(name in one.knobs for one in seen)]
    turned = [name for name in shared if _turns([one.knobs[name] for one in seen]) >= LEAST_TURNS]
    if not turned:
        return ()
    shares = _importances({n: [one.knobs[n] for one in seen] for n in turned}, scores, direction)
    chosen = sorted(shares, key=lambda name: -shares[name])[:MOST_KNOBS]
    return tuple(_slice(name, shares[name], seen) for name in chosen)


def _turns(values: Sequence[KnobValue]) -> int:
    return len(values) - Counter(values).most_common(1)[0][1]


def _importances(
    knobs: Mapping[str, Sequence[KnobValue]], scores: Sequence[float], direction: Direction
) -> dict[str, float]:
    # Half a second to import, which a report without enough scores need not pay.
    import optuna
    from optuna.distributions import (
        BaseDistribution,
        CategoricalDistribution,
        FloatDistribution,
    )

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction=direction)
    space: dict[str, BaseDistribution] = {}
    columns: dict[str, list[float | str]] = {}
    for name, values in knobs.items():
        numbers = _numbers(values)
        columns[name] = list(numbers or map(str, values))
        space[name] = (
            FloatDistribution(min(numbers), max(numbers), log=_is_logarithmic(numbers))
            if numbers
            else CategoricalDistribution(sorted(set(map(str, values))))
        )
    for place, score in enumerate(scores):
        point = {name: column[place] for name, column in columns.items()}
        study.add_trial(optuna.create_trial(params=point, distributions=space, value=score))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=_FEW_OF_THE_BEST)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(share) for name, share in found.items() if math.isfinite(share)}


def _numbers(values: Sequence[KnobValue]) -> list[float]:
    """The values as numbers; empty where one is none."""
    plain = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    return plain if len(plain) == len(values) else []


def _is_logarithmic(numbers: Sequence[float]) -> bool:
    return min(numbers) > 0 and max(numbers) / min(numbers) >= _LOGARITHMIC


def _slice(name: str, importance: float, seen: Sequence[Measured]) -> Slice:
    values = [one.knobs[name] for one in seen]
    numbers = _numbers(values)
    kinds = sorted(set(map(str, values)))
    if numbers:
        places = list(map(math.log, numbers)) if _is_logarithmic(numbers) else numbers
        low, high = f"{min(numbers):g}", f"{max(numbers):g}"
    else:
        places, low, high = [float(kinds.index(str(v))) for v in values], kinds[0], kinds[-1]
    scores = [one.score for one in seen]
    x = Scale(min(places), max(places), 8, WIDTH - 8)
    y = Scale(min(scores), max(scores), HEIGHT - 8, 8)
    dots = [
        SliceDot(attempt=one.attempt, mark=one.mark, x=x(place), y=y(one.score))
        for one, place in zip(seen, places, strict=True)
    ]
    return Slice(name=name, importance=importance, dots=tuple(dots), low=low, high=high)
