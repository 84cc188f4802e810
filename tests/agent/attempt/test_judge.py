from __future__ import annotations

import math
import random
from statistics import fmean

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from agent.attempt.judge import Judgement, Ruling, confidence_of_a_look, judge, student_t_quantile
from agent.record.repeats import Noise, pooled_noise

BEST = [2.49, 2.5, 2.51]
SCORES = st.lists(st.floats(0.5, 10), min_size=1, max_size=5)


def ruling(
    candidate: list[float], best: list[float], sigma: float, *, max_repeats: int = 3
) -> Judgement:
    return judge(
        candidate,
        best,
        Noise(sigma, 4),
        direction="minimize",
        confidence=0.95,
        max_repeats=max_repeats,
    )


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    [
        # Printed tables of Student's distribution.
        (0.95, 1, 6.314),
        (0.95, 2, 2.920),
        (0.95, 4, 2.132),
        (0.95, 10, 1.812),
        (0.975, 5, 2.571),
        (0.99, 3, 4.541),
        (0.95, 120, 1.658),
        (0.5, 7, 0.0),
    ],
)
def test_quantiles_are_those_of_the_tables(
    probability: float, degrees: int, expected: float
) -> None:
    assert round(student_t_quantile(probability, degrees), 3) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("probability", "degrees"), [(0.4, 3), (1.0, 3), (0.95, 0)])
def test_quantiles_outside_their_range_are_refused(probability: float, degrees: int) -> None:
    with pytest.raises(ValueError, match="needs"):
        student_t_quantile(probability, degrees)


def test_noise_pools_each_group_about_its_own_mean() -> None:
    noise = pooled_noise([[1.0, 3.0], [11.0, 13.0], [5.0]])

    assert Noise(math.sqrt(2.0), 2) == noise


def test_noise_without_a_repeat_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one repeated measurement"):
        pooled_noise([[1.0], [2.0]])


def test_a_gain_beyond_noise_is_kept() -> None:
    assert Ruling.KEEP is ruling([2.0], BEST, 0.01).ruling


def test_a_gain_that_repeats_could_prove_asks_for_repeats() -> None:
    judgement = ruling([2.475], BEST, 0.01)

    assert (Ruling.REPEAT, "close_call") == (judgement.ruling, judgement.reason)


def test_a_close_call_is_settled_when_the_repeats_are_used_up() -> None:
    judgement = ruling([2.4889, 2.489, 2.4891], BEST, 0.01)

    assert (Ruling.DISCARD, "unproven") == (judgement.ruling, judgement.reason)


def test_equal_scores_are_one_score_however_often_they_were_measured() -> None:
    once = ruling([2.475], BEST, 0.01)
    pinned = ruling([2.475, 2.475], BEST, 0.01)

    assert once.arithmetic.required_gain == pinned.arithmetic.required_gain
    assert (Ruling.DISCARD, "unproven") == (pinned.ruling, pinned.reason)


def test_a_gain_that_no_repeat_could_prove_is_discarded_at_once() -> None:
    assert Ruling.DISCARD is ruling([2.499], BEST, 0.01).ruling


@given(candidate=SCORES, best=SCORES, sigma=st.floats(0, 1))
def test_nothing_worse_than_the_best_is_ever_kept(
    candidate: list[float], best: list[float], sigma: float
) -> None:
    assume(fmean(candidate) >= fmean(best))

    assert Ruling.KEEP is not ruling(candidate, best, sigma).ruling


@given(candidate=SCORES, best=SCORES, sigma=st.floats(0, 1))
def test_every_keep_names_a_gain_beyond_the_required_one(
    candidate: list[float], best: list[float], sigma: float
) -> None:
    judgement = ruling(candidate, best, sigma)

    assert (judgement.ruling is Ruling.KEEP) == (
        judgement.arithmetic.gain > judgement.arithmetic.required_gain
    )


@given(candidate=SCORES, best=SCORES, sigma=st.floats(0, 1))
def test_maximising_is_minimising_of_the_negated_metric(
    candidate: list[float], best: list[float], sigma: float
) -> None:
    mirrored = judge(
        [-c for c in candidate],
        [-b for b in best],
        Noise(sigma, 4),
        direction="maximize",
        confidence=0.95,
        max_repeats=3,
    )

    assert ruling(candidate, best, sigma).ruling is mirrored.ruling


@given(candidate=SCORES, best=SCORES, low=st.floats(0, 1), more=st.floats(0, 1))
def test_more_noise_never_turns_a_discard_into_a_keep(
    candidate: list[float], best: list[float], low: float, more: float
) -> None:
    noisier = ruling(candidate, best, low + more).ruling

    assert noisier is not Ruling.KEEP or ruling(candidate, best, low).ruling is Ruling.KEEP


@given(candidate=SCORES, best=SCORES, sigma=st.floats(0, 1))
def test_the_last_repeat_always_settles_it(
    candidate: list[float], best: list[float], sigma: float
) -> None:
    judgement = ruling(candidate, best, sigma, max_repeats=len(candidate))

    assert judgement.ruling is not Ruling.REPEAT


# --- how often luck is kept ---


def is_kept(
    chance: random.Random, *, looks: int, known: int, effect: float = 0.0, host_seeds: bool = True
) -> bool:
    """One comparison as a night makes it: three scores of the best, repeats for a close call.

    Args:
        chance: where the luck comes from.
        looks: scores that a candidate may get.
        known: degrees of freedom of the noise from elsewhere in the session.
        effect: how much better the candidate is, in noise.
        host_seeds: whether the candidate heeds them; else every repeat gives its one lucky score.
    """
    best = [chance.gauss(0, 1) for _ in range(3)]
    elsewhere = [[chance.gauss(0, 1) for _ in range(known + 1)]] if known else []
    candidate: list[float] = []
    while True:
        score = chance.gauss(-effect, 1)
        candidate.append(score if host_seeds or not candidate else candidate[0])
        while len(best) < len(candidate):
            best.append(chance.gauss(0, 1))
        judgement = judge(
            candidate,
            best,
            pooled_noise([best, *elsewhere]),
            direction="minimize",
            confidence=0.95,
            max_repeats=looks,
        )
        if judgement.ruling is not Ruling.REPEAT:
            return judgement.ruling is Ruling.KEEP


@pytest.mark.parametrize("known", [0, 15])
@pytest.mark.parametrize("looks", [1, 3, 10])
def test_equal_files_are_kept_no_more_often_than_configured_however_often_one_looks(
    looks: int, known: int
) -> None:
    chance = random.Random(f"{looks} {known}")
    kept = sum(is_kept(chance, looks=looks, known=known) for _ in range(2000))
    # 100 are due; beyond 130 lies one chance in a thousand. Without an allowance for looks, 140.
    assert kept <= 130


def test_a_single_look_is_as_sure_as_the_whole_and_more_looks_must_be_surer() -> None:
    levels = [confidence_of_a_look(0.95, looks) for looks in (1, 2, 3, 10)]
    assert 0.95 == levels[0]
    assert levels == sorted(set(levels))
    assert 1 - 0.05 / 10 > levels[-1], "looks at growing data are alike: less than a share each"


@pytest.mark.parametrize("known", [2, 15])
def test_a_file_that_brings_its_own_lucky_seed_gains_nothing(known: int) -> None:
    """It has one score whatever seed the host gives: no noise of its own, but the session's counts.

    Such a file is the result of a hunt: here the best of one draw, as every attempt is one.
    """
    chance = random.Random(known)
    kept = sum(is_kept(chance, looks=3, known=known, host_seeds=False) for _ in range(2000))
    assert kept <= 130


def test_a_change_of_four_times_the_noise_is_mostly_kept() -> None:
    chance = random.Random(4)
    kept = sum(is_kept(chance, looks=3, known=15, effect=4.0) for _ in range(300))
    assert kept >= 270
