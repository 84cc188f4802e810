"""Calibration: what is measured, what is proposed, and what hostile programs can say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agent.attempt.lab import Observer
from agent.machine.calibrate import SCORING_SECONDS, Bench, amount_of, calibrate, seconds_left
from agent.machine.calibration import AtBudget, Batches, BatchTried, findable, proposals
from agent.machine.rates import Rates, read_rates
from agent.machine.runtime import find_runtime
from agent.machine.setup import copy_template
from agent.night.session import begin
from agent.program import load_program
from agent.record.curves import mfu_of, peak_of
from agent.record.ledger import Ledger
from agent.settings import Settings
from sandbox.contract.run import Outcome, RunResult, RunSpec
from tests.support.executors import FakeExecutor
from tests.support.labs import Quiet
from tests.support.nights import Crash, Place

RATES = {
    "device": "AMD EPYC",
    "dtype": "bfloat16",
    "matmul_flops": 4.2e11,
    "memory_bytes_per_second": 2e10,
}


def at(seconds: float, values: list[float], start_seconds: float = 2.0) -> AtBudget:
    return AtBudget(
        budget_seconds=seconds,
        values=tuple(values),
        tokens_per_second=25_000,
        start_seconds=start_seconds,
        flops_per_token=1e6,
        disturbed=0,
    )


def tried(batch: int, rate: float | None, outcome: Outcome = Outcome.OK) -> BatchTried:
    return BatchTried(
        batch=batch, outcome=outcome, peak_memory_bytes=2**20 * batch, tokens_per_second=rate
    )


NO_BATCHES = Batches(present=None, tried=(), ended="train.py names no BATCH and no SEQUENCE")
QUIET, NOISY = [2.300, 2.301, 2.302], [2.30, 2.40, 2.50]


def proposed(*measured: AtBudget, batches: Batches = NO_BATCHES) -> dict[str, str]:
    return {p.setting: p.value for p in proposals(measured, batches, 0.05)}


def test_the_shortest_budget_that_starts_quickly_and_shows_one_percent_is_proposed() -> None:
    slow_start, good, longer = at(10, QUIET), at(40, QUIET), at(160, QUIET)
    assert "40" == proposed(slow_start, good, longer)["[budget] seconds"]


def test_without_a_budget_that_shows_enough_the_longest_is_proposed() -> None:
    assert "160" == proposed(at(40, NOISY), at(160, NOISY))["[budget] seconds"]


def test_noise_asks_for_more_seeds_but_never_for_more_than_five() -> None:
    assert "3" == proposed(at(40, QUIET))["[noise] baseline_repeats"]
    assert "5" == proposed(at(40, NOISY))["[noise] baseline_repeats"]


def test_a_findable_gain_follows_from_the_spread_of_two_runs() -> None:
    # Student's t for 95 % and 2 degrees of freedom is 2.9200; the deviation is 0.001.
    assert pytest.approx(2.9200 * 2**0.5 * 0.001, rel=1e-3) == findable(at(40, QUIET), 0.05)
    assert findable(at(40, [2.3]), 0.05) is None


def test_the_smallest_batch_that_is_nearly_as_fast_as_any_is_proposed() -> None:
    batches = Batches(
        present=16,
        tried=(tried(16, 20_000), tried(32, 27_500), tried(64, 30_000), tried(128, None, OOM)),
        ended="128 ends with out_of_memory",
    )
    found = {p.setting: p for p in proposals([], batches, 0.05)}
    assert 64 == batches.largest
    assert "32" == found["BATCH in train.py"].value
    assert "128 ends with out_of_memory" in found["BATCH in train.py"].reason


OOM = Outcome.OUT_OF_MEMORY


def test_nothing_measured_means_nothing_proposed() -> None:
    failed = at(5, []).model_copy(update={"problem": "over_budget"})
    assert {} == proposed(failed)


def test_rates_are_read_from_the_last_line() -> None:
    assert Rates.model_validate(RATES) == read_rates(f"warning\n{json.dumps(RATES)}\n")


@pytest.mark.parametrize(
    "said",
    [
        "",
        "not json",
        "[" * 100_000,
        json.dumps(RATES | {"matmul_flops": "1e400"}),
        json.dumps(RATES)[:-1] + ', "matmul_flops": NaN}',
        json.dumps(RATES | {"matmul_flops": -1}),
        json.dumps(RATES | {"matmul_flops": 1e30}),
        json.dumps(RATES | {"device": "x" * 201}),
        json.dumps(RATES | {"more": 1}),
        json.dumps(RATES | {"device": "x" * 5000}),
    ],
)
def test_what_is_no_rate_counts_as_none(said: str) -> None:
    assert read_rates(said) is None


CURVE = [
    {"seconds": 1.0, "loss": 5.0, "tokens_per_second": 9e9, "flops_per_token": 9e9},
    {"seconds": 9.0, "loss": 4.0, "tokens_per_second": 20_000.0, "flops_per_token": 5e6},
]


def on(*gpus: str, name: str = "NVIDIA L4") -> RunResult:
    use = [SimpleNamespace(name=name) for _ in gpus]
    return cast("RunResult", SimpleNamespace(gpus=gpus, gpu=use))


def test_the_share_of_the_peak_is_the_last_points_own_numbers_over_the_devices_peak() -> None:
    assert 0.25 == mfu_of({"AMD EPYC": 4e11}, "AMD EPYC", on(), CURVE)
    assert 0.5 == mfu_of({"NVIDIA L4": 2e11}, "AMD EPYC", on("GPU-1"), CURVE)


@pytest.mark.parametrize(
    ("peaks", "result", "curve"),
    [
        ({}, on(), CURVE),
        ({"AMD": 4e11}, on(), CURVE),
        ({"AMD EPYC": 4e11}, on("GPU-1"), CURVE),
        ({"NVIDIA L4": 2e11}, on("GPU-1", "GPU-2"), CURVE),
        ({"AMD EPYC": 4e11}, on(), [{"seconds": 1.0, "loss": 5.0}]),
        ({"AMD EPYC": 4e11}, on(), []),
        ({"AMD EPYC": 9e10}, on(), CURVE),
        ({"AMD EPYC": "much"}, on(), CURVE),
    ],
)
def test_no_share_is_told_where_a_part_of_it_is_not_known_or_not_possible(
    peaks: dict[str, Any], result: RunResult, curve: list[dict[str, float]]
) -> None:
    assert mfu_of(peaks, "AMD EPYC", result, curve) is None


def test_a_peak_must_be_a_number() -> None:
    assert peak_of({"x": float("nan")}, "x") is None
    assert peak_of({"x": "much"}, "x") is None


def bench(place: Place) -> Bench:
    def watched(_settings: Settings, _ledger: Ledger) -> nullcontext[Observer]:
        return nullcontext(Quiet())

    root = place.root / "calibration"
    root.mkdir(exist_ok=True)
    return Bench(
        root=root,
        program=place.program,
        settings=place.program.settings,
        source=place.workspace,
        runtime=place.runtime,
        watched=watched,
        say=lambda _line: None,
    )


def calibrated_place(root: Path) -> Place:
    """The toy's boxes, which also answer how fast they are."""
    root.mkdir(exist_ok=True)
    place = Place(root)
    place.boxes.prints = {"-rates": json.dumps(RATES) + "\n"}
    return place


def test_every_budget_is_measured_at_its_own_seeds_and_said_to_be_so(tmp_path: Path) -> None:
    place = calibrated_place(tmp_path)

    found = calibrate(bench(place), [300, 600], 3)

    assert [(300, 3), (600, 3)] == [(a.budget_seconds, len(a.values)) for a in found.at_budgets]
    assert Rates.model_validate(RATES) == found.rates
    assert found.batches == NO_BATCHES
    assert found.measured_at > datetime(2026, 1, 1, tzinfo=UTC)


def test_what_an_interruption_left_is_not_measured_again(tmp_path: Path) -> None:
    whole = calibrate(bench(calibrated_place(tmp_path / "whole")), [300], 3)
    place = calibrated_place(tmp_path / "cut")

    def dies_at_the_third_training(spec: RunSpec) -> Crash | None:
        return Crash() if spec.box == "train" and place.boxes.trainings == 2 else None

    place.boxes.fault = dies_at_the_third_training
    all_of_it = seconds_left(bench(place), [300], 3)

    with pytest.raises(Crash):
        calibrate(bench(place), [300], 3)
    assert all_of_it - 2 * (300 + SCORING_SECONDS) == seconds_left(bench(place), [300], 3)

    place.boxes = FakeExecutor(place.clock, prints=place.boxes.prints)
    found = calibrate(bench(place), [300], 3)

    assert 1 == place.boxes.trainings
    assert whole.at_budgets[0].values == found.at_budgets[0].values


def test_a_beginning_that_was_cut_off_is_begun_again(tmp_path: Path) -> None:
    place = calibrated_place(tmp_path)
    (tmp_path / "calibration" / "calibrate-300s").mkdir(parents=True)

    assert 2 == len(calibrate(bench(place), [300], 2).at_budgets[0].values)


@pytest.mark.parametrize("said", [-5.0, 0.0, -1e15])
def test_less_than_nothing_counts_as_nothing_said(said: float) -> None:
    point = {"seconds": 3.0, "loss": 1.0, "tokens_per_second": said, "tokens": said}
    assert amount_of(point, "tokens_per_second") is None
    assert amount_of({"tokens": 7.0}, "tokens") == 7.0
    assert amount_of({}, "tokens") is None


@pytest.mark.docker
def test_the_command_measures_this_machine_and_the_next_session_records_it(
    tmp_path: Path, image: Any
) -> None:
    assert image.image_id
    copy_template(tmp_path, "cpu")
    # A busy machine must not decide this test. So most of the budget is kept for saving, and a
    # training beside which others used the machine is not made again.
    changes = {
        "workspace/train.py": ("RESERVED_SECONDS = 1.0", "RESERVED_SECONDS = 10.0"),
        "program.md": ("max_repeats = 2 ", "max_repeats = 0 "),
    }
    for name, (old, new) in changes.items():
        text = (tmp_path / name).read_text()
        assert old in text
        (tmp_path / name).write_text(text.replace(old, new))
    command = [sys.executable, "-P", "-m", "agent.cli", "calibrate", "--json"]
    done = subprocess.run(
        [*command, "--budgets", "15", "--repeats", "2", "--program", str(tmp_path / "program.md")],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "calibration" == found["event"]
    assert found["rates"]["matmul_flops"] > 1e9
    (at_budget,) = found["at_budgets"]
    assert 2 == len(at_budget["values"])
    assert at_budget["tokens_per_second"] > 0
    assert found["batches"]["tried"][0]["batch"] == found["batches"]["present"] == 16
    assert found["proposals"]

    content = load_program(tmp_path / "program.md")
    runtime = find_runtime(content.settings, tmp_path, os.environ, print)
    night = begin(
        tmp_path / "runs" / "night",
        content,
        content.settings,
        tmp_path / "workspace",
        runtime,
        researcher="tpe",
        seed=1,
    )
    with night:
        assert night.history.session is not None
        line = {name: found.pop(name) for name in ("schema", "event", "at")}
        assert "calibration" == line["event"]
        assert found == night.history.session.calibration
