from __future__ import annotations

import math
import random
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from agent.attempt.judge import (
    MIN_SCORES,
    Demands,
    Judgement,
    Ruling,
    at_the_door,
    doubt_of_a_test,
    holds_beside,
    independent,
    judge,
    student_t,
)
from agent.record.repeats import Noise, Spread, pooled_credible, pooled_noise
from tests.bench.study_judge import World, play, shipped

BEST = [2.49, 2.5, 2.51, 2.5]
SCORES = st.lists(st.floats(0.5, 10), min_size=1, max_size=5)
TERMS = Demands("minimize", rate=0.05, doubt=0.005, max_repeats=6)


def ruling(
    candidate: list[float], best: list[float], sigma: float, *, max_repeats: int = 6
) -> Judgement:
    return judge(candidate, best, Noise(sigma, 9), replace(TERMS, max_repeats=max_repeats))


@pytest.mark.parametrize(
    ("doubt", "degrees", "expected"),
    [
        # Printed tables of Student's distribution.
        (0.05, 1, 6.314),
        (0.05, 2, 2.920),
        (0.05, 4, 2.132),
        (0.05, 10, 1.812),
        (0.025, 5, 2.571),
        (0.01, 3, 4.541),
        (0.05, 120, 1.658),
        (0.5, 7, 0.0),
    ],
)
def test_quantiles_are_those_of_the_tables(doubt: float, degrees: int, expected: float) -> None:
    assert round(student_t(doubt, degrees), 3) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("doubt", "degrees"), [(0.6, 3), (0.0, 3), (0.05, 0)])
def test_quantiles_outside_their_range_are_refused(doubt: float, degrees: int) -> None:
    with pytest.raises(ValueError, match="needs"):
        student_t(doubt, degrees)


def test_noise_pools_each_group_about_its_own_mean() -> None:
    noise = pooled_noise([[1.0, 3.0], [11.0, 13.0], [5.0]])

    assert Noise(math.sqrt(2.0), 2) == noise


def test_noise_without_a_repeat_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one repeated measurement"):
        pooled_noise([[1.0], [2.0]])


# --- the door ---


@pytest.mark.parametrize(
    ("first", "expected"),
    [(2.45, Ruling.REPEAT), (2.48, Ruling.REPEAT), (2.495, Ruling.DISCARD), (2.6, Ruling.DISCARD)],
)
def test_a_first_run_only_opens_the_door(first: float, expected: Ruling) -> None:
    assert expected is at_the_door(first, BEST, Noise(0.01, 9), TERMS).ruling


@given(first=st.floats(0.5, 10), sigma=st.floats(0, 1))
def test_nothing_is_kept_for_its_first_run(first: float, sigma: float) -> None:
    assert Ruling.KEEP is not at_the_door(first, BEST, Noise(sigma, 9), TERMS).ruling


def test_a_gain_far_below_the_smallest_that_counts_is_not_tested() -> None:
    assert Ruling.DISCARD is at_the_door(2.45, BEST, Noise(0.01, 9), demanding(0.2)).ruling


def demanding(smallest_gain: float) -> Demands:
    return replace(TERMS, smallest_gain=smallest_gain)


# --- the test ---


def test_a_gain_beyond_noise_is_kept() -> None:
    assert Ruling.KEEP is ruling([2.0, 2.01, 2.02], BEST, 0.01).ruling


@pytest.mark.parametrize("scores", [[2.0], [2.0, 2.01]])
def test_no_gain_is_kept_on_fewer_scores_than_say_something_of_its_spread(
    scores: list[float],
) -> None:
    judgement = ruling(scores, BEST, 0.01)

    assert (Ruling.REPEAT, "close_call") == (judgement.ruling, judgement.reason)


def test_a_gain_that_repeats_could_prove_asks_for_repeats() -> None:
    judgement = ruling([2.48, 2.485, 2.49], BEST, 0.01)

    assert (Ruling.REPEAT, "close_call") == (judgement.ruling, judgement.reason)


def test_a_close_call_is_settled_when_the_repeats_are_used_up() -> None:
    judgement = ruling([2.48, 2.485, 2.49], BEST, 0.01, max_repeats=3)

    assert (Ruling.DISCARD, "unproven") == (judgement.ruling, judgement.reason)


def test_a_candidate_that_is_noisier_than_the_session_must_gain_more() -> None:
    """The larger of two tests counts: by the session's noise, and by its own spread."""
    calm, wild = ruling([2.4, 2.41, 2.42], BEST, 0.01), ruling([2.31, 2.41, 2.51], BEST, 0.01)

    assert calm.arithmetic.candidate_mean == pytest.approx(wild.arithmetic.candidate_mean)
    assert (Ruling.KEEP, Ruling.REPEAT) == (calm.ruling, wild.ruling)
    assert wild.arithmetic.required_gain > 5 * calm.arithmetic.required_gain
    assert wild.arithmetic.own_noise == pytest.approx(0.1)


def test_a_candidate_that_is_calmer_than_the_session_is_held_to_its_noise() -> None:
    close, closer = ruling([2.4, 2.41, 2.42], BEST, 0.01), ruling([2.4, 2.4049, 2.41], BEST, 0.01)

    assert close.arithmetic.required_gain >= closer.arithmetic.required_gain
    assert closer.arithmetic.required_gain >= 0.01


def test_a_gain_must_be_as_large_as_the_person_says_however_sure_it_is() -> None:
    scores = [2.0, 2.01, 2.02]

    assert Ruling.KEEP is judge(scores, BEST, Noise(0.01, 9), demanding(0.4)).ruling
    assert Ruling.KEEP is not judge(scores, BEST, Noise(0.01, 9), demanding(0.6)).ruling


def test_a_gain_that_no_repeat_could_prove_is_discarded_at_once() -> None:
    assert Ruling.DISCARD is ruling([2.499, 2.5, 2.501], BEST, 0.01).ruling


@given(candidate=SCORES, best=SCORES, sigma=st.floats(0, 1))
def test_nothing_worse_than_the_best_is_ever_kept(
    candidate: list[float], best: list[float], sigma: float
) -> None:
    assume(fmean(candidate) >= fmean(best))

    assert Ruling.KEEP is not ruling(candidate, best, sigma).ruling


@given(candidate=SCORES, best=SCORES, sigma=st.floats(0, 1))
def test_every_keep_names_a_gain_beyond_the_required_one_and_scores_enough(
    candidate: list[float], best: list[float], sigma: float
) -> None:
    judgement = ruling(candidate, best, sigma)

    assert (judgement.ruling is Ruling.KEEP) == (
        judgement.arithmetic.gain > judgement.arithmetic.required_gain
        and len(candidate) >= MIN_SCORES
    )


@given(candidate=SCORES, best=SCORES, sigma=st.floats(0, 1))
def test_maximising_is_minimising_of_the_negated_metric(
    candidate: list[float], best: list[float], sigma: float
) -> None:
    negated = [-c for c in candidate], [-b for b in best]
    mirrored = judge(*negated, Noise(sigma, 9), replace(TERMS, direction="maximize"))

    assert ruling(candidate, best, sigma).ruling is mirrored.ruling


@given(candidate=SCORES, best=SCORES, sigma=st.floats(0, 1))
def test_the_last_repeat_always_settles_it(
    candidate: list[float], best: list[float], sigma: float
) -> None:
    judgement = ruling(candidate, best, sigma, max_repeats=len(candidate))

    assert judgement.ruling is not Ruling.REPEAT


@settings(deadline=None)  # scipy is loaded on the way
@given(
    candidate=SCORES,
    best=SCORES,
    sigma=st.floats(0, 10) | st.floats(0, 1e-300),
    degrees=st.integers(1, 500),
    doubt=st.floats(1e-9, 0.5),
)
def test_no_history_brings_the_judge_down(
    candidate: list[float], best: list[float], sigma: float, degrees: int, doubt: float
) -> None:
    terms = replace(TERMS, doubt=doubt)
    noise = Noise(sigma, degrees)
    for judgement in (
        judge(candidate, best, noise, terms, candidate[:1]),
        at_the_door(candidate[0], best, noise, terms),
    ):
        assert math.isfinite(judgement.arithmetic.required_gain)
    holds_beside(candidate, best, noise, "minimize")


# --- pinned seeds ---


def test_equal_scores_are_one_score_however_often_they_were_measured() -> None:
    assert 1 == independent([2.4, 2.4, 2.4], Noise(0.01, 9))
    assert 1 == independent([2.4, 2.4001, 2.4002], Noise(0.01, 9)), (
        "the clock's noise is not seeds'"
    )
    assert 3 == independent([2.4, 2.41, 2.42], Noise(0.01, 9))


def test_the_luck_of_a_pinned_seed_must_be_as_rare_as_the_door_and_the_test_together() -> None:
    """It opened the door already: nothing is learned from seeing it again."""
    pinned = judge([2.46, 2.4601, 2.4602], BEST, Noise(0.01, 9), TERMS, [2.4599])
    honest = judge([2.45, 2.46, 2.47], BEST, Noise(0.01, 9), TERMS, [2.455])

    assert pinned.arithmetic.required_gain > 1.5 * honest.arithmetic.required_gain
    assert (Ruling.KEEP, Ruling.REPEAT) == (honest.ruling, pinned.ruling)


def test_repeats_that_lie_too_close_together_do_not_make_a_night_look_calm() -> None:
    baseline = Spread.of([2.49, 2.5, 2.51, 2.5, 2.48])
    honest, pinned = Spread.of([2.42, 2.4, 2.41]), Spread.of([2.4, 2.4001, 2.4002])

    assert pooled_credible([baseline], [honest, pinned]) == pooled_credible([baseline], [honest])
    assert pooled_credible([baseline], [honest, honest]) != pooled_credible([baseline], [honest])


# --- a whole night ---


def test_all_tests_of_a_night_spend_less_than_its_rate_however_many_there_are() -> None:
    spent = [doubt_of_a_test(0.05, before) for before in range(10_000)]

    assert spent == sorted(spent, reverse=True)
    assert 0.049 < math.fsum(spent) <= 0.05 + 1e-4


def test_a_gain_must_hold_against_what_the_best_scores_in_the_same_hour() -> None:
    """The machine became faster by 0.1: so did the best."""
    scores, noise = [2.4, 2.41, 2.42], Noise(0.01, 9)

    assert Ruling.KEEP is judge(scores, BEST, noise, TERMS).ruling
    assert not holds_beside(scores, [2.4, 2.41], noise, "minimize")
    assert holds_beside(scores, [2.5, 2.51], noise, "minimize")


@pytest.mark.parametrize(
    "world",
    [{}, {"noise": 2.0}, {"noise": 5.0}, {"noise": 3.0, "worse": 1.0}, {"pins": True}],
    ids=str,
)
def test_luck_is_kept_in_no_more_nights_than_configured(world: dict[str, Any]) -> None:
    """Five in a hundred are due at most; beyond eleven lies one chance in a hundred."""
    nights = [play(World(random.Random(n), **world), shipped, attempts=40) for n in range(100)]

    assert sum(night.false_keeps > 0 for night in nights) <= 11


def test_a_test_that_forgets_the_candidates_own_spread_keeps_what_is_noisy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agent.attempt.judge._by_own_spread", lambda *_: 0.0)
    nights = [play(World(random.Random(n), noise=5.0), shipped, attempts=40) for n in range(40)]

    assert sum(night.false_keeps > 0 for night in nights) > 5, "more than one in eight"


def test_a_change_of_four_times_the_noise_is_mostly_kept() -> None:
    nights = [play(World(random.Random(n), gain=4.0), shipped, attempts=40) for n in range(30)]

    assert sum(n.true_keeps for n in nights) > 0.8 * sum(n.gains for n in nights)
