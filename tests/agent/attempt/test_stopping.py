"""Runs that can no longer win are stopped, and nothing that a run says gets it kept."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.attempt.experiment import run_attempt
from agent.attempt.lab import Lab
from agent.attempt.stopping import (
    WINDOW,
    Past,
    Progress,
    Rule,
    Watch,
    by_median,
    noise_of_loss,
    past,
    share,
    smoothed,
)
from agent.morning.replay import replay
from agent.morning.review import review
from agent.record.chain import read_ledger
from agent.record.curves import Curve, curve_of, packed, unpacked
from agent.record.events import AttemptFinished, DriftChecked, RunFinished, Verdict
from agent.record.history import find_settled
from agent.report.ablation_table import replay_lines
from agent.report.summary import summary
from agent.settings import Budget
from sandbox.contract.run import Outcome
from tests.support.executors import TRAINING_SECONDS
from tests.support.labs import work
from tests.support.nights import Place
from tests.support.sessions import Lines, forge, found, only

WALL = Budget(kind="wall", seconds=100, grace_seconds=10)
TOKENS = Budget(kind="tokens", seconds=100, tokens=1000, grace_seconds=10)


def run(level: float, *, seed: int = 0, until: float = 1.0, noise: float = 0.01) -> Progress:
    """What a run says that ends near `level`."""
    luck = random.Random(seed)
    steps = [n / 20 for n in range(1, 21) if n / 20 <= until]
    return tuple((at, level + 1 - at + luck.gauss(0, noise)) for at in steps)


def kept(*levels: float) -> Past:
    return tuple(tuple(run(level, seed=seed) for seed in range(3)) for level in levels)


# --- the rules ---


def test_a_loss_is_a_mean_over_a_window_of_the_budget_that_ends_where_it_is_looked_at() -> None:
    said = ((0.2, 9.0), (0.4, 2.0), (0.5, 4.0), (0.6, 7.0))
    assert 3.0 == smoothed(said, 0.5)
    assert None is smoothed(said, 0.1)
    assert WINDOW < 0.3


def test_a_share_is_of_seconds_or_of_tokens_whatever_the_budget_counts() -> None:
    point = {"seconds": 50.0, "loss": 1.0, "tokens": 100.0}
    assert (0.5, 0.1) == (share(point, WALL), share(point, TOKENS))
    assert None is share({"seconds": 50.0, "loss": 1.0}, TOKENS)


def test_what_is_behind_the_best_beyond_noise_is_stopped_and_the_numbers_say_why() -> None:
    past = kept(3.0, 2.0, 1.0)
    stop = by_median(run(1.5, until=0.5), past)
    assert stop is not None
    assert stop.loss > stop.bound > stop.expected
    assert (0.5, 3, 6) == (stop.share, stop.compared, stop.degrees_of_freedom)
    assert pytest.approx(1.0 + 0.6, abs=0.05) == stop.expected
    assert pytest.approx(stop.noise) == stop.bound - stop.expected


@pytest.mark.parametrize("level", [0.5, 0.99])
def test_what_is_not_behind_the_best_goes_on(level: float) -> None:
    assert None is by_median(run(level, until=0.5, seed=9), kept(3.0, 2.0, 1.0))


@given(seed=st.integers(0, 10_000))
def test_what_is_better_by_what_a_verdict_needs_is_hardly_ever_stopped(seed: int) -> None:
    """Six standard errors of the mean of five losses that a window holds, at every look."""
    assert not is_stopped(2.0 - 6 * 0.01 / 5**0.5, seed)


def is_stopped(level: float, seed: int) -> bool:
    """Whether a run that ends there is stopped at any look, beside a best that ends at 2."""
    own = run(level, seed=seed + 1000)
    looks = range(len(own) // 2, len(own) + 1)
    return any(by_median(own[:look], kept(2.0)) is not None for look in looks)


def test_what_is_better_by_little_is_stopped_now_and_then_and_by_more_hardly_ever() -> None:
    """Shares of runs that are stopped, by how many standard errors they are better."""
    seeds = range(300)
    equal, two, three = (
        sum(is_stopped(2.0 - better * 0.01 / 5**0.5, seed) for seed in seeds) / len(seeds)
        for better in (0, 2, 3)
    )
    assert equal > 0.7  # which is where the time is saved
    assert 0.02 < two < 0.2
    assert three < 0.03


def test_without_a_repeat_nothing_is_known_of_noise_and_nothing_is_stopped() -> None:
    once = ((run(1.0),),)
    assert None is noise_of_loss(once, 0.6)
    assert None is by_median(run(9.0, until=0.6), once)


def test_before_anything_was_kept_nothing_is_stopped() -> None:
    assert None is by_median(run(9.0, until=0.6), ())


def test_noise_is_that_of_equal_files_and_not_the_distance_between_attempts() -> None:
    noise = noise_of_loss(kept(3.0, 1.0), 0.5)
    assert noise is not None
    assert noise.sigma < 0.05
    assert 4 == noise.degrees_of_freedom


# --- looking while it runs ---


class Told:
    """A curve that grows."""

    def __init__(self) -> None:
        self.curve: Curve = []

    def say(self, seconds: float, loss: float) -> None:
        self.curve = [*self.curve, {"seconds": seconds, "loss": loss}]


def rule(kind: str = "median", stop_after: float = 0.5) -> Rule:
    tables = Place(Path("unused")).program.settings.model_dump()
    tables["budget"] = WALL.model_dump()
    tables["economy"] |= {"early_stopping": kind, "stop_after": stop_after}
    settings = type(Place(Path("unused")).program.settings).model_validate(tables, strict=False)
    return Rule(settings, kept(2.0))


def test_nothing_is_stopped_before_the_share_that_a_person_set() -> None:
    told = Told()
    watch = Watch(lambda: told.curve, rule(stop_after=0.5), WALL)
    for seconds in range(1, 50):
        told.say(seconds, 99.0)
        assert not watch()
    told.say(50, 99.0)
    assert watch()


def test_what_is_said_after_the_decision_changes_nothing() -> None:
    told = Told()
    watch = Watch(lambda: told.curve, rule(), WALL)
    told.say(55, 99.0)
    assert watch()
    stop = watch.found
    told.say(60, 0.0)
    assert watch()
    assert (stop, [{"seconds": 55, "loss": 99.0}]) == (watch.found, watch.seen)


def test_a_flood_of_lines_is_looked_at_a_few_times_only() -> None:
    told, looks = Told(), [0]
    decide = rule("off")

    def counted(curve: Curve) -> None:
        looks[0] += 1
        assert decide(curve) is None

    watch = Watch(lambda: told.curve, counted, WALL)  # type: ignore[arg-type]
    for n in range(5000):
        told.say(n / 50, 2.0)
        watch()
    assert looks[0] <= 100


@given(st.lists(st.tuples(st.floats(0, 1e9), st.floats(-1e9, 1e9)), min_size=1, max_size=30))
def test_a_stored_curve_is_the_one_that_was_decided_from(points: list[tuple[float, float]]) -> None:
    lines = [json.dumps({"seconds": seconds, "loss": loss}) for seconds, loss in points]
    curve = curve_of("\n".join(lines))
    assert curve == unpacked(packed(curve))


# --- whole nights ---


def a_night(
    root: Path, kind: str, *, attempts: int = 12, log_line: Callable[[bytes], bytes] | None = None
) -> Place:
    place = Place(
        root,
        changes={
            "session": {"attempts": attempts},
            "economy": {"early_stopping": kind},
            "noise": {"baseline_repeats": 3},
        },
    )
    place.boxes.shows_progress = True
    if log_line is not None:
        place.boxes.log_line = log_line
    work(place.begin("tpe"), place.program)
    return place


def ends(place: Place) -> Iterator[AttemptFinished]:
    for entry in read_ledger(place.directory):
        if isinstance(entry.event, AttemptFinished):
            yield entry.event


def stopped_runs(place: Place) -> list[RunFinished]:
    events = [entry.event for entry in read_ledger(place.directory)]
    runs = [event for event in events if isinstance(event, RunFinished)]
    return [run for run in runs if run.result.outcome is Outcome.STOPPED]


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Place]:
    root = tmp_path_factory.mktemp("nights")
    return {kind: a_night(root / kind, kind) for kind in ("off", "median")}


def test_a_stopped_attempt_is_discarded_with_its_arithmetic_and_never_kept(
    nights: dict[str, Place],
) -> None:
    stopped = [end for end in ends(nights["median"]) if end.early_stop is not None]
    assert stopped
    assert {(Verdict.DISCARDED, "stopped_early", None)} == {
        (end.verdict, end.reason, end.value) for end in stopped
    }
    assert len(stopped) == len(stopped_runs(nights["median"]))
    assert all("% of the budget" in end.explanation for end in stopped)
    assert [] == found(nights["median"].directory)


def test_curves_from_before_the_machine_changed_stop_nothing(
    nights: dict[str, Place], tmp_path: Path
) -> None:
    copied(nights["median"], tmp_path)
    lab = dataclasses.replace(nights["median"], root=tmp_path).open()
    with lab.ledger:
        history, budget = lab.ledger.history, lab.settings.budget
        best, last = history.best, history.attempts[-1].number
        before = past(history, last, lab.ledger.get_blob, budget)
        assert before is not None
        assert best is not None
        assert before[-1]
        ((seed, score),) = list(best.values().items())[:1]
        lab.ledger.append(
            DriftChecked(
                problem="",
                check=1,
                attempt=best.number,
                seed=seed,
                recorded=score,
                today=(score + 1, score + 1),
                tolerance=0.1,
                changed=True,
                explanation="the machine changed",
            )
        )
        after = past(lab.ledger.history, last, lab.ledger.get_blob, budget)
    assert after is not None
    assert () == after[-1]
    assert None is by_median(run(99.0), after)


def test_the_saving_is_what_stopped_runs_did_not_use(nights: dict[str, Place]) -> None:
    numbers = summary(read_ledger(nights["median"].directory))
    runs = stopped_runs(nights["median"])
    due = sum(TRAINING_SECONDS - run.result.wall_seconds for run in runs)
    assert (len(runs), due) == (numbers.stopped_early, numbers.saved_seconds)
    assert due > 0


def test_a_night_without_early_stopping_stops_nothing(nights: dict[str, Place]) -> None:
    assert [] == stopped_runs(nights["off"])
    numbers = summary(read_ledger(nights["off"].directory))
    assert (0, 0.0) == (numbers.stopped_early, numbers.saved_seconds)


def moved(lab: Lab, x: float) -> None:
    text = lab.workspace.read_text("train.py")
    lab.workspace.write("train.py", re.sub(r"X = \S+", f"X = {x}", text, count=1).encode())


@pytest.fixture
def lab_of_night(nights: dict[str, Place], tmp_path: Path) -> Iterator[Lab]:
    """The lab of a night with a kept best, with room for more attempts."""
    copied(nights["median"], tmp_path)
    changes = {**nights["median"].changes, "session": {"attempts": 99}}
    place = dataclasses.replace(nights["median"], root=tmp_path, changes=changes)
    place.boxes.shows_progress = True
    with (lab := place.resume()).ledger:
        yield lab


def further_away(lab: Lab, text: str = "") -> AttemptFinished:
    """What becomes of a candidate that is far behind the best, with a line more in its file."""
    lab.workspace.write("train.py", (lab.workspace.read_text("train.py") + text).encode())
    moved(lab, 0.25)
    run_attempt(lab, "candidate", "further away", "tpe")
    return last(lab)


def test_files_that_were_stopped_run_whole_when_they_come_again(lab_of_night: Lab) -> None:
    assert "stopped_early" == further_away(lab_of_night).reason
    stopped = lab_of_night.history.attempts[-1]
    assert find_settled(lab_of_night.history, stopped.started.files) is None
    assert "not_better" == further_away(lab_of_night).reason
    settled = find_settled(lab_of_night.history, stopped.started.files)
    assert settled is lab_of_night.history.attempts[-1]
    assert [] == found(lab_of_night.ledger.directory)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("# as before", "stopped_early"),
        ("LOSS_SCALE = 10", "not_better"),
        ("print('more')", "not_better"),
    ],
)
def test_what_computes_or_prints_its_loss_otherwise_is_held_against_nobody(
    lab_of_night: Lab, line: str, reason: str
) -> None:
    assert reason == further_away(lab_of_night, line + "\n").reason
    assert [] == found(lab_of_night.ledger.directory)


def past_of_last(lab: Lab) -> Past | None:
    """What the last attempt's run may be held against, as the record is now."""
    last = lab.history.attempts[-1].number
    return past(lab.history, last, lab.ledger.get_blob, lab.settings.budget)


def test_losses_that_a_score_gave_the_lie_stop_nothing_any_more(lab_of_night: Lab) -> None:
    history = lab_of_night.history
    assert past_of_last(lab_of_night) is not None
    assert history.baseline is not None
    assert history.best is not history.baseline
    # By its loss the baseline is far behind; had it scored better, its word would be worth nothing.
    scores = history.baseline.scores
    scores[0] = scores[0].model_copy(update={"value": 0.0})
    assert past_of_last(lab_of_night) is None


def test_until_a_few_others_were_scored_nothing_is_stopped(lab_of_night: Lab) -> None:
    history = lab_of_night.history
    others = [a for a in history.attempts if a is not history.best and a.values()]
    witnesses = 0
    for other in reversed(others):
        other.curves_from, kept_from = len(other.runs), other.curves_from
        witnesses += len(other.values()) if kept_from == 0 else 0
    assert witnesses >= 3
    assert past_of_last(lab_of_night) is None


def test_baseline_and_reviews_run_to_their_end(tmp_path: Path) -> None:
    """What measures noise must not be chosen by its luck, so it is never stopped."""
    changes = {"early_stopping": "median", "stop_after": 0.1}
    place = Place(tmp_path, changes={"economy": changes})
    place.boxes.shows_progress = True
    lab = place.begin("tpe")
    with lab.ledger:
        run_attempt(lab, "baseline", "as it is", "nightlab")
        moved(lab, 1.4)
        assert run_attempt(lab, "candidate", "closer", "tpe").kept
        moved(lab, 0.5)
        run_attempt(lab, "candidate", "further away", "tpe")
        assert "stopped_early" == last(lab).reason
        review(lab, 2, lambda _: None)
    assert 1 == len(stopped_runs(place))
    assert [] == found(place.directory)


def test_a_replay_of_what_was_stopped_early_says_that_it_cannot_be_compared(
    nights: dict[str, Place], tmp_path: Path
) -> None:
    copied(nights["median"], tmp_path)
    place = dataclasses.replace(nights["median"], root=tmp_path)
    stopped = next(end for end in ends(place) if end.early_stop is not None)
    with (lab := place.open()).ledger:
        replayed = replay(lab, stopped.attempt, lambda _: None)
    assert (False, False) == (replayed.agrees, replayed.is_comparable)
    assert ("stopped_early", "measured") == (replayed.recorded_outcome, replayed.outcome)
    said = replay_lines(replayed, is_self_reported=False)[-1]
    assert f"attempt {stopped.attempt} cannot be compared" in said
    assert "a replay trains to the end" in said
    assert [] == found(place.directory)


def last(lab: Lab) -> AttemptFinished:
    finished = lab.ledger.history.attempts[-1].finished
    assert finished is not None
    return finished


@pytest.mark.parametrize(
    ("forgery", "said"),
    [
        ({"verdict": "kept", "value": 0.1}, "its verdict is not what the record comes to: kept"),
        ({"reason": "disturbed"}, "disturbed, not stopped_early"),
        ({"early_stop": None}, "its early_stop is not what the record comes to: None, not share"),
    ],
    ids=["kept", "another reason", "no arithmetic"],
)
def test_the_audit_sees_a_verdict_that_a_stopped_run_cannot_have(
    nights: dict[str, Place], tmp_path: Path, forgery: dict[str, Any], said: str
) -> None:
    directory = copied(nights["median"], tmp_path)

    def change(lines: Lines) -> None:
        only(lines, "attempt_finished", reason="stopped_early").update(forgery)

    forge(directory, change)
    assert any(said in what for what in found(directory)), found(directory)


@pytest.mark.parametrize("name", ["share", "loss", "expected", "bound", "noise", "compared"])
def test_the_audit_computes_every_stop_again_from_the_curves(
    nights: dict[str, Place], tmp_path: Path, name: str
) -> None:
    directory = copied(nights["median"], tmp_path)

    def change(lines: Lines) -> None:
        stop = only(lines, "attempt_finished", reason="stopped_early")["early_stop"]
        stop[name] = stop[name] + 1

    forge(directory, change)
    (what,) = found(directory)
    assert what.startswith(f"its early_stop is not what the record comes to: {name} ")


def test_the_audit_sees_a_whole_run_that_is_sold_as_a_stopped_one(
    nights: dict[str, Place], tmp_path: Path
) -> None:
    directory = copied(nights["median"], tmp_path)

    def change(lines: Lines) -> None:
        attempt = only(lines, "attempt_finished", reason="stopped_early")["attempt"]
        run = only(lines, "run_finished", attempt=attempt)
        assert "stopped" == run["result"]["outcome"]
        run["result"]["outcome"] = "ok"

    forge(directory, change)
    assert any("was still to be measured at seed" in what for what in found(directory))


def copied(place: Place, root: Path) -> Path:
    return Path(shutil.copytree(place.directory, root / "night"))


def test_a_candidate_that_lies_about_its_loss_is_scored_like_any_other(tmp_path: Path) -> None:
    """Praise keeps it from being stopped, and nothing else: its score decides."""

    def praise(line: bytes) -> bytes:
        return re.sub(rb'"loss": [^}]*', b'"loss": 0', line)

    place = a_night(tmp_path, "median", attempts=6, log_line=praise)
    assert [] == stopped_runs(place)
    verdicts = [end for end in ends(place) if end.reason != "baseline"]
    assert all(end.arithmetic is not None for end in verdicts if end.verdict is Verdict.KEPT)
    assert [] == found(place.directory)
