"""The comparison of researchers: resumable, drawn, written where it belongs."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.bench.compare import (
    BEGIN,
    END,
    RESEARCHERS,
    Plan,
    Result,
    Step,
    as_json,
    compare,
    draw,
    next_step,
    table,
    write_between,
)
from tests.support.executors import TRAINING_SECONDS
from tests.support.labs import work
from tests.support.nights import TOY, Crash, CrashingLedger, Place

ATTEMPTS = 3


@dataclass
class Bench:
    """Sessions in pretended boxes, and what was asked for; `scripted` is played by random."""

    root: Path
    asked: list[tuple[str, int, Step]] = field(default_factory=list)
    crash: str = ""
    places: dict[str, Place] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)

    def plan(self, attempts: int = ATTEMPTS) -> Plan:
        return Plan(
            TOY / "program.md",
            self.root / "runs",
            self.root,
            (1, 2),
            attempts,
            TRAINING_SECONDS + 10,
        )

    def further(self, plan: Plan, name: str, seed: int, step: Step) -> None:
        self.asked.append((name, seed, step))
        directory = plan.directory(name, seed)
        if step == "run":
            place = Place(self.root / directory.name, changes={"session": {"attempts": ATTEMPTS}})
            place.image["image_id"] = self.images.get(directory.name, "sha256:1")
            self.places[directory.name] = place
            lab = place.begin("tpe" if name == "tpe" else "random")
        else:
            place = self.places[directory.name]
            lab = place.resume()
        if directory.name == self.crash and step == "run":
            assert isinstance(lab.ledger, CrashingLedger)
            lab.ledger.crash_at = 30
        with contextlib.suppress(Crash):
            work(lab, place.program, name)
        shutil.copytree(place.directory, directory, dirs_exist_ok=True)


def test_every_researcher_runs_once_at_every_seed_and_never_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    results = compare(bench.plan(), bench.further)

    pairs = [(name, seed) for seed in (1, 2) for name in RESEARCHERS]
    assert [(name, seed, "run") for name, seed in pairs] == bench.asked
    assert pairs == [(result.researcher, result.seed) for result in results]
    for result in results:
        assert ATTEMPTS + 1 == len(result.curve)
        assert sorted(result.curve, reverse=True) == list(result.curve)
        assert ATTEMPTS == result.kept + result.discarded + result.failed + result.invalid

    assert results == compare(bench.plan(), bench.further)
    assert 6 == len(bench.asked)


def test_a_comparison_that_was_cut_off_goes_on_in_the_session_it_was_at(tmp_path: Path) -> None:
    bench = Bench(tmp_path, crash="tpe-1")
    with pytest.raises(SystemExit, match="the same command goes on with it"):
        compare(bench.plan(), bench.further)
    assert "resume" == next_step(bench.plan().directory("tpe", 1))

    results = compare(bench.plan(), bench.further)

    assert ("tpe", 1, "resume") == bench.asked[2]
    assert 1 == bench.asked.count(("random", 1, "run"))
    assert 6 == len(results)


def test_sessions_with_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    compare(bench.plan(), bench.further)
    with pytest.raises(SystemExit, match=r"another \[session\]; remove it"):
        compare(bench.plan(attempts=9), bench.further)


def test_sessions_on_different_images_are_not_compared(tmp_path: Path) -> None:
    bench = Bench(tmp_path, images={"tpe-2": "sha256:2"})
    with pytest.raises(SystemExit, match=r"tpe-2 ran on another image than .*random-1; remove it"):
        compare(bench.plan(), bench.further)


def test_a_session_without_a_first_entry_begins_anew(tmp_path: Path) -> None:
    directory = tmp_path / "tpe-1"
    directory.mkdir()
    assert "run" == next_step(directory)
    (directory / "ledger.jsonl").touch()
    assert "run" == next_step(directory)
    assert not directory.exists()


def result(name: str, *curve: float) -> Result:
    return Result(
        researcher=name,
        seed=1,
        baseline=curve[0],
        best=curve[-1],
        curve=curve,
        holdout_gain=None,
        noise=0.002,
        kept=1,
        discarded=1,
        failed=0,
        invalid=0,
        ended="attempts",
        hours=0.1,
        machine="a CPU, 2 cores",
    )


RESULTS = [
    result("random", 2.5, 2.5, 2.4),
    result("tpe", 2.5, 2.3, 2.2),
    result("tpe", 2.5, 2.3, 2.1),
    result("tpe", 2.6, 2.6, 2.0),
    result("scripted", 2.5, 2.4, 2.4),
]


def test_the_table_tells_median_and_range(tmp_path: Path) -> None:
    text = table(RESULTS, "minimize", Bench(tmp_path).plan().settings)

    assert "| tpe | 2.1000 (2.0000 to 2.2000) | 0.4000 | 0.0000 | 3 | 0 | attempts |" in text
    assert "3 attempts of 210 s, 1 seed; distance, lower is better" in text
    assert json.loads(as_json(RESULTS))["sessions"][1]["curve"] == [2.5, 2.3, 2.2]


def test_the_same_results_give_the_same_picture(tmp_path: Path) -> None:
    settings = Bench(tmp_path).plan().settings
    draw(RESULTS, settings, tmp_path / "one.png")
    draw(RESULTS, settings, tmp_path / "two.png")

    picture = (tmp_path / "one.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert picture == (tmp_path / "two.png").read_bytes()


def test_the_table_is_written_between_its_marks_and_nowhere_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_between(page, "new\n")

    assert f"before\n{BEGIN}\nnew\n{END}\nafter\n" == page.read_text()
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="has no lines"):
        write_between(page, "new\n")


def test_the_benchmarks_page_has_the_place_for_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    assert 0 < page.index(BEGIN) < page.index(END)
