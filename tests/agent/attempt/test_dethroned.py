"""A best whose later score is refused is the best no more, whoever refuses it, and is not taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.attempt import experiment
from agent.attempt.decide import PARENT_DETHRONED
from agent.attempt.experiment import CHECKPOINTS_KEPT, score_on_holdout
from agent.attempt.lab import Lab
from agent.candidate.git import Git
from agent.morning.audit import audit
from agent.morning.export import Person, approve
from agent.morning.review import review
from agent.record.chain import read_ledger
from agent.record.events import (
    ATTEMPT,
    DRIFT,
    Dethroned,
    Entry,
    RunStarted,
    Scored,
    StopReason,
    ToolReturned,
)
from agent.record.history import History, fold
from agent.report.console import closing_lines
from agent.report.report import results_tsv
from agent.report.summary import summary
from agent.trackers.attempts import tracked_runs
from sandbox.contract.errors import UsageError
from sandbox.contract.run import RunResult, RunSpec
from tests.support import sessions
from tests.support.labs import work
from tests.support.nights import Crash, Place
from tests.support.reports import render_html, render_markdown

SOMEBODY = Person("Somebody", "somebody@example.org")
REFUSED: dict[str, object] = {
    "metric": "distance",
    "value": None,
    "valid": False,
    "reason": "looks_ahead",
    "explanation": "row 3 knew its suffix",
    "details": {},
}
Meant = Callable[[History, RunStarted, str], bool]


def on_holdout(history: History, run: RunStarted, split: str) -> bool:
    """Any attempt but the baseline, until one was refused."""
    is_first = not any(a.dethroned for a in history.attempts)
    return is_first and split == "holdout" and run.purpose == ATTEMPT and run.attempt > 0


def always_on_holdout(history: History, run: RunStarted, split: str) -> bool:
    return split == "holdout" and run.attempt > 0


def in_a_check(history: History, run: RunStarted, split: str) -> bool:
    """A check of the machine that measures a best other than the baseline, the first time."""
    is_first = not any(a.dethroned for a in history.attempts)
    return is_first and run.purpose.startswith(DRIFT) and run.attempt > 0


def in_a_close_call(history: History, run: RunStarted, split: str) -> bool:
    """The best, measured again while a candidate waits."""
    is_first = not any(a.dethroned for a in history.attempts)
    last = history.attempts[-1]
    is_other = last.open and run.attempt != last.number and run.attempt > 0
    return is_first and run.purpose == ATTEMPT and is_other


def refuse(place: Place, lab: Lab, is_meant: Meant) -> None:
    """Let the scorer refuse what is meant, as it refuses a model that looks ahead."""

    def outcome(spec: RunSpec, result: RunResult, output: Path | None) -> RunResult:
        runs = (entry.event for entry in reversed(lab.ledger.entries))
        run = next(r for r in runs if isinstance(r, RunStarted) and r.run_id == spec.run_id)
        split = next((m.source.name for m in spec.mounts if m.target == "/data"), "")
        if spec.box == "scorer" and is_meant(lab.history, run, split):
            assert output is not None
            (output / "score.json").write_text(json.dumps(REFUSED))
        return result

    place.boxes.outcome = outcome


def night(root: Path, is_meant: Meant, attempts: int = 8, every: int = 0) -> Place:
    changes = {"session": {"attempts": attempts}, "noise": {"check_best_every": every}}
    place = Place(root, changes=changes)
    lab = place.begin("tpe")
    refuse(place, lab, is_meant)
    work(lab, place.program)
    return place


def entries_of(place: Place) -> list[Entry]:
    return read_ledger(place.directory)


def found(place: Place) -> list[Dethroned]:
    return [e.event for e in entries_of(place) if isinstance(e.event, Dethroned)]


def files_in(place: Place, history: History) -> bool:
    """Whether the workspace holds the best's files."""
    assert history.best is not None
    with place.open().ledger as ledger:
        return all(
            (place.directory / "workspace" / name).read_bytes() == ledger.get_blob(sha)
            for name, sha in history.best.started.files.items()
        )


@pytest.fixture(scope="module")
def holdout(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return night(tmp_path_factory.mktemp("holdout"), on_holdout)


# --- who dethrones, and who is the best then --------------------------------------------------


def test_a_best_that_is_refused_on_holdout_falls_to_the_one_before_which_is_scored(
    holdout: Place,
) -> None:
    (event,), history = found(holdout), fold(entries_of(holdout))
    assert ("holdout", "looks_ahead") == (event.split, event.reason)
    assert history.best is not None
    assert history.best.number == event.best != event.attempt
    assert history.attempt(event.attempt).was_kept
    assert not history.attempt(event.attempt).kept
    assert history.best.values("holdout")
    assert history.ended is not None
    assert StopReason.ATTEMPTS is history.ended.reason
    assert files_in(holdout, history)
    assert [] == audit(holdout.directory, entries_of(holdout))


def test_where_all_are_refused_the_baseline_is_the_best(tmp_path: Path) -> None:
    place = night(tmp_path, always_on_holdout)
    history = fold(entries_of(place))
    assert history.best is history.baseline
    assert len(found(place)) > 1
    assert 0 == summary(entries_of(place)).kept
    assert files_in(place, history)
    assert [] == audit(place.directory, entries_of(place))
    with place.open().ledger as ledger, pytest.raises(UsageError, match="nothing to approve"):
        approve(ledger, SOMEBODY, "good", Git(tmp_path, {}))


def test_a_look_at_the_machine_dethrones_and_the_night_goes_on_from_the_one_before(
    tmp_path: Path,
) -> None:
    place = night(tmp_path, in_a_check, every=2)
    (event,), entries = found(place), entries_of(place)
    assert event.purpose.startswith(DRIFT)
    history = fold(entries)
    later = [
        a for a in history.attempts if a.number > event.attempt and a.started.parent == event.best
    ]
    assert later
    assert 8 == len(history.completed)
    with place.open().ledger as ledger:
        answers = [
            e.event for e in entries if isinstance(e.event, ToolReturned) and e.event.is_error
        ]
        assert any(b"best_dethroned" in ledger.get_blob(a.output) for a in answers)
    assert [] == audit(place.directory, entries)


def test_a_close_call_dethrones_and_what_builds_on_the_best_is_not_kept(tmp_path: Path) -> None:
    noise = {"baseline_repeats": 4, "max_repeats": 4}
    place = Place(tmp_path, changes={"session": {"attempts": 8}, "noise": noise})
    lab = place.begin("tpe")
    refuse(place, lab, in_a_close_call)
    refused = place.boxes.outcome

    def outcome(spec: RunSpec, result: RunResult, output: Path | None) -> RunResult:
        """Whatever is compared with a best that is not the baseline is a close call."""
        history, noise = lab.history, lab.history.repeats.noise()
        best = history.best
        if spec.box == "scorer" and best and best.number and noise and history.attempts[-1].open:
            assert output is not None
            value = next(iter(best.values().values())) - 3 * noise.sigma
            sheet = REFUSED | {"value": value, "valid": True, "reason": None, "explanation": ""}
            (output / "score.json").write_text(json.dumps(sheet))
        return refused(spec, result, output)

    place.boxes.outcome = outcome
    work(lab, place.program)
    (event,), history = found(place), fold(entries_of(place))
    assert event.purpose == ATTEMPT
    waiting = next(
        a for a in history.attempts if a.finished and a.finished.reason == PARENT_DETHRONED
    )
    assert event.attempt == waiting.started.parent
    assert not waiting.kept
    assert files_in(place, history)
    assert [] == audit(place.directory, entries_of(place))


def test_a_refused_baseline_ends_the_night_for_good(tmp_path: Path) -> None:
    def of_the_baseline(history: History, run: RunStarted, split: str) -> bool:
        return run.purpose.startswith(DRIFT)

    changes = {"noise": {"check_best_every": 1}, "session": {"attempts": 8}}
    place = Place(tmp_path, changes=changes)
    place.boxes.luck = lambda noise: 1000 * noise  # nothing is kept before the first look
    lab = place.begin("tpe")
    refuse(place, lab, of_the_baseline)
    assert StopReason.BASELINE_FAILED is work(lab, place.program).reason
    (event,), history = found(place), fold(entries_of(place))
    assert (0, None) == (event.attempt, event.best)
    assert history.best is None
    assert history.baseline is not None
    assert "Nothing is left that stands" in render_markdown(entries_of(place), lab.ledger.get_blob)
    again = place.resume()
    assert StopReason.BASELINE_FAILED is work(again, place.program).reason
    assert [] == audit(place.directory, entries_of(place))


def test_a_review_dethrones_too(tmp_path: Path) -> None:
    place = night(tmp_path, lambda *_: False)
    lab = place.open()
    refuse(place, lab, lambda _, run, __: run.purpose == "review-1 best")
    with lab.ledger:
        before = lab.history.best
        review(lab, 1, lambda _: None)
        assert before is not None
        assert lab.history.best is not before
    assert ["review-1 best"] == [event.purpose for event in found(place)]
    assert [] == audit(place.directory, entries_of(place))


def test_a_variant_without_a_change_says_nothing_of_the_best(tmp_path: Path) -> None:
    place = night(tmp_path, lambda *_: False)
    lab = place.open()
    refuse(place, lab, lambda _, run, __: " without-" in run.purpose)
    with lab.ledger:
        review(lab, 1, lambda _: None)
    assert [] == found(place)
    assert [] == audit(place.directory, entries_of(place))


@pytest.mark.parametrize("is_written", [False, True])
@pytest.mark.parametrize(("is_meant", "every"), [(on_holdout, 0), (in_a_check, 2)])
def test_a_kill_beside_the_refusal_changes_nothing(
    tmp_path: Path, is_meant: Meant, every: int, is_written: bool
) -> None:
    whole = night(tmp_path / "whole", is_meant, every=every)
    scored = next(
        e.seq for e in entries_of(whole) if isinstance(e.event, Scored) and e.event.value is None
    )
    place = Place(tmp_path / "cut", changes=whole.changes)
    place.begin("tpe").ledger.close()
    lab = place.open(crash_at=scored + is_written)
    refuse(place, lab, is_meant)
    with pytest.raises(Crash):
        work(lab, place.program)
    lab = place.resume()
    refuse(place, lab, lambda *_: False)  # the same check, made anew, would pass
    work(lab, place.program)
    assert [e.attempt for e in found(whole)] == [e.attempt for e in found(place)]
    assert [] == audit(place.directory, entries_of(place))


# --- what is kept for the one that comes back -------------------------------------------------


def test_the_checkpoints_of_the_last_kept_attempts_stay_and_no_more(tmp_path: Path) -> None:
    place = night(tmp_path, lambda *_: False, attempts=12)
    history = fold(entries_of(place))
    kept = [a.number for a in history.attempts if a.kept]
    there = {int(path.name.split("-")[0]) for path in (place.directory / "checkpoints").iterdir()}
    assert len(kept) > 2
    assert {kept[0], *kept[-CHECKPOINTS_KEPT:]} == there


def test_without_a_checkpoint_the_best_is_trained_again_for_holdout(tmp_path: Path) -> None:
    place = night(tmp_path, lambda *_: False)
    lab = place.resume()
    refuse(place, lab, lambda *_: False)
    with lab.ledger:
        kept = next(a for a in lab.history.candidates if a.kept and not a.values("holdout"))
        shutil.rmtree(place.directory / "checkpoints")
        trainings, values = place.boxes.trainings, kept.values()
        score_on_holdout(lab, kept)
        assert 1 == len(kept.values("holdout"))
        assert trainings + 1 == place.boxes.trainings
        assert values == kept.values()


# --- who says so, and what is not taken -------------------------------------------------------


def test_every_screen_says_so(holdout: Place) -> None:
    (event,), entries = found(holdout), entries_of(holdout)
    with holdout.open().ledger as ledger:
        pages = [render_html(entries, ledger.get_blob), render_markdown(entries, ledger.get_blob)]
    numbers = summary(entries)
    assert "dethroned" == numbers.attention[0].kind
    assert event.best == numbers.best_attempt
    told = "\n".join(closing_lines(numbers, holdout.directory))
    assert f"refused  Attempt {event.attempt} was the best until it was refused on holdout" in told
    assert f"the best is {event.best} again" in told
    assert all("was the best until it was refused on holdout" in page for page in pages)
    row = results_tsv(fold(entries)).splitlines()[1 + event.attempt].split("\t")
    assert ("nan", "crash") == (row[1], row[3])
    assert "[dethroned: looks_ahead]" in row[4]
    run = next(run for run in tracked_runs(entries) if run.attempt == event.attempt)
    assert ("dethroned", False) == (run.verdict, run.has_score)


def test_a_refused_attempt_is_not_taken_and_the_one_that_stands_is_named(
    tmp_path: Path, holdout: Place
) -> None:
    shutil.copytree(holdout.directory, tmp_path / "night")
    place = Place(tmp_path, changes=holdout.changes)
    (event,) = found(place)
    with place.open().ledger as ledger:
        with pytest.raises(UsageError) as refused:
            approve(ledger, SOMEBODY, "good", Git(tmp_path, {}), attempt=event.attempt)
        assert f"attempt {event.attempt} was refused" in refused.value.message
        assert "looks_ahead" in refused.value.message
        assert f"take attempt {event.best}" in refused.value.hint
        assert event.best == approve(ledger, SOMEBODY, "good", Git(tmp_path, {})).attempt
    assert [] == audit(place.directory, entries_of(place))


def test_an_attempt_that_was_discarded_is_not_taken(tmp_path: Path, holdout: Place) -> None:
    discarded = next(a for a in fold(entries_of(holdout)).candidates if not a.was_kept)
    with holdout.open().ledger as ledger, pytest.raises(UsageError, match="was not kept"):
        approve(ledger, SOMEBODY, "good", Git(tmp_path, {}), attempt=discarded.number)


# --- without the wall, and against the record -------------------------------------------------


def test_without_the_event_the_refused_stays_the_best_and_audit_and_approve_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "dethroned", lambda _: None)
    place = night(tmp_path, on_holdout)
    history = fold(entries_of(place))
    assert [] == found(place)
    assert history.best is not None
    said = [difference.what for difference in audit(place.directory, entries_of(place))]
    assert [
        f"attempt {history.best.number} is the best, and was refused (looks_ahead) before"
    ] == said
    with place.open().ledger as ledger, pytest.raises(UsageError, match="was refused"):
        approve(ledger, SOMEBODY, "good", Git(tmp_path, {}))


def test_the_audit_decides_it_again(tmp_path: Path, holdout: Place) -> None:
    (event,) = found(holdout)
    forgeries: dict[str, dict[str, object]] = {
        "its best is not what the record comes to": {"best": 0},
        "its reason is not what the record comes to": {"reason": "too_slow"},
        "its sheet is not what the record comes to": {"sheet": None},
    }
    for number, (words, change) in enumerate(forgeries.items()):
        copy = tmp_path / str(number)
        shutil.copytree(holdout.directory, copy)
        sessions.forge(copy, lambda ls, c=change: sessions.only(ls, "dethroned").update(c))  # type: ignore[misc]
        assert [what for what in sessions.found(copy) if words in what], words
    copy = tmp_path / "honest"
    shutil.copytree(holdout.directory, copy)

    def pass_it(lines: sessions.Lines) -> None:
        for line in lines:
            score = line["event"]
            if score["type"] == "scored" and score["attempt"] == event.attempt and score["reason"]:
                score.update(value=0.1, reason=None, explanation="")

    sessions.forge(copy, pass_it)
    assert [what for what in sessions.found(copy) if "while it was the best" in what]
