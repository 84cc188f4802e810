"""A night on GPUs: who gets one, what is on record, and what the audit says of it."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from agent.cli.machine import show_check, show_gpus
from agent.record.chain import read_ledger
from agent.record.events import AttemptFinished, Noticed, RunFinished, RunStarted
from agent.record.history import fold
from agent.report.tables import machine_state
from agent.settings import ProgramError
from sandbox.check.self_check import CheckResult
from sandbox.contract.gpu import GpuEvent
from sandbox.contract.run import RunResult, RunSpec
from sandbox.gpu.leases import GpuRow
from tests.support import histories
from tests.support.gpu_nights import GpuPlace
from tests.support.gpu_stand_ins import GIBIBYTE, GPU_0, GPU_1
from tests.support.labs import work
from tests.support.sessions import Lines, forge, found

ASKED = {"bytes": 20 * GIBIBYTE, "at_least": "watchdog", "allocator_variable": ""}


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> GpuPlace:
    changes: dict[str, dict[str, Any] | None] = {
        "session": {"attempts": 1},
        "hardware": {"gpu_memory_bytes": 20 * GIBIBYTE},
    }
    place = GpuPlace(tmp_path_factory.mktemp("gpus"), changes=changes)
    work(place.begin("tpe"), place.program)
    return place


@pytest.fixture
def copy(tmp_path: Path, night: GpuPlace) -> Path:
    return Path(shutil.copytree(night.directory, tmp_path / night.directory.name))


def events(night: GpuPlace, kind: type) -> list[Any]:
    entries = read_ledger(night.directory)
    return [entry.event for entry in entries if isinstance(entry.event, kind)]


def test_training_and_model_get_the_gpu_and_the_scorer_gets_none(night: GpuPlace) -> None:
    specs = [event.spec for event in events(night, RunStarted)]
    for spec in specs:
        has = spec.box != "scorer"
        assert ((GPU_0,) if has else ()) == spec.gpus
        assert ("nvidia" if has else "none") == spec.devices
        assert (ASKED if has else None) == (spec.gpu_memory and spec.gpu_memory.model_dump())
    assert {"train", "model", "scorer"} == {spec.box for spec in specs}


def test_each_gpu_that_came_back_is_on_record_with_what_bounded_it(night: GpuPlace) -> None:
    trained = [e.result for e in events(night, RunFinished) if e.result.box == "train"]
    assert trained
    for result in trained:
        assert (GPU_0,) == result.gpus
        assert [(GPU_0, "watchdog", 2**30)] == [
            (use.uuid, use.memory_bound, use.peak_memory_bytes) for use in result.gpu
        ]


def test_a_wait_for_a_gpu_is_on_record_and_others_are_told_who_has_it(night: GpuPlace) -> None:
    (noticed,) = [e for e in events(night, Noticed) if e.kind == "gpu_awaited"]
    assert "before it: somebody" in noticed.explanation
    assert "session night, attempt 0" == night.source.purposes[0]


def test_the_report_s_table_of_the_machine_tells_of_gpus(night: GpuPlace) -> None:
    rows = dict(machine_state(fold(read_ledger(night.directory))))
    assert ("a GPU", "1.00 GiB", "watchdog", "nothing") == (
        rows["GPUs"],
        rows["largest peak GPU memory"],
        rows["GPU memory held by"],
        rows["what GPUs reported"],
    )
    assert ("90% on average", "300 W on average, 400 W at most", "heat") == (
        rows["use of the GPUs"],
        rows["power of the GPUs"],
        rows["lower clocks of the GPUs by"],
    )
    assert ("1900 MHz on average, 1980 MHz at most", "unknown", "81 \u00b0C") == (
        rows["clock of the GPUs"],
        rows["clock of their memory"],
        rows["hottest GPU"],
    )
    assert "GPUs" not in dict(machine_state(histories.night(1).history))


def test_an_honest_night_on_gpus_has_no_differences(night: GpuPlace) -> None:
    assert [] == found(night.directory)


def last(lines: Lines, box: str) -> dict[str, Any]:
    runs = [line["event"] for line in lines if line["event"]["type"] == "run_finished"]
    return [run for run in runs if run["result"]["box"] == box][-1]["result"]  # type: ignore[no-any-return]


def asked(lines: Lines, box: str) -> dict[str, Any]:
    """The spec of the last run in such a box."""
    events = [line["event"] for line in lines if line["event"]["type"] == "run_started"]
    return [e["spec"] for e in events if e["spec"]["box"] == box][-1]  # type: ignore[no-any-return]


PLANTS: dict[str, tuple[Callable[[Lines], object], str]] = {
    "another GPU than was asked for": (
        lambda ls: last(ls, "train").update(gpus=[GPU_1]),
        "its GPUs are not those that were asked for",
    ),
    "a GPU that nobody watched": (
        lambda ls: last(ls, "model").update(gpu=[]),
        "not each of its GPUs was watched",
    ),
    "a bound weaker than was asked for": (
        lambda ls: last(ls, "train")["gpu"][0].update(memory_bound="none"),
        "its GPU memory was bounded by less than was asked for",
    ),
    "a run that asks for a second GPU": (
        lambda ls: asked(ls, "train").update(gpus=[GPU_0, GPU_1]),
        "it asks for 2 GPUs, profile and settings say 1",
    ),
    "a scorer with a GPU": (
        lambda ls: asked(ls, "scorer").update(gpus=[GPU_0], devices="nvidia"),
        "it asks for 1 GPUs, profile and settings say 0",
    ),
    "a run without its bound": (
        lambda ls: asked(ls, "train").update(gpu_memory=None),
        "its bound on GPU memory is not the one in the settings",
    ),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_what_was_planted_is_named(plant: str, copy: Path) -> None:
    change, words = PLANTS[plant]
    forge(copy, change)
    assert any(words in difference for difference in found(copy))


@pytest.mark.parametrize(("hot_runs", "is_judged"), [(1, True), (9, False)])
def test_a_training_on_a_throttled_gpu_is_repeated_and_never_judged(
    tmp_path: Path, hot_runs: int, is_judged: bool
) -> None:
    quiet = {"max_repeats": 2, "max_other_cores": 1000.0}
    changes: dict[str, dict[str, Any] | None] = {
        "session": {"attempts": 1},
        "disturbance": quiet,
        "economy": {"smoke": "off"},
    }
    place = GpuPlace(tmp_path, changes=changes)
    hot_left = hot_runs

    def hot(spec: RunSpec, result: RunResult, _: Path | None) -> RunResult:
        """Throttled during the first trainings of a candidate."""
        nonlocal hot_left
        if spec.box != "train" or "-1-" not in spec.run_id or hot_left == 0:
            return result
        hot_left -= 1
        event = GpuEvent(kind="throttled", words="lower clocks: heat", is_fault=False)
        used = tuple(use.model_copy(update={"events": (event,)}) for use in result.gpu)
        return result.model_copy(update={"gpu": used})

    place.boxes.outcome = hot
    work(place.begin("tpe"), place.program)
    finished = [e for e in events(place, AttemptFinished) if e.attempt == 1]
    assert [is_judged] == [e.reason != "disturbed" for e in finished]
    assert ("throttled" in finished[0].explanation) is not is_judged
    assert [] == found(place.directory)


# --- settings and words ---


def test_the_flag_names_gpus_by_index_or_id() -> None:
    settings = histories.IN_FORCE.with_overrides(gpus=f"0,{GPU_1}")
    assert ("0", GPU_1) == settings.hardware.gpus
    with pytest.raises(ProgramError, match="--gpus"):
        histories.IN_FORCE.with_overrides(gpus="0, 2")


ROWS = (
    GpuRow(index="0", id=GPU_0, name="A", memory_bytes=2**30, status="in use", words="night-7"),
    GpuRow(index="1", id=GPU_1, name="B", memory_bytes=None, status="out of use", words="Xid 79"),
)


def shown(show: Callable[[Console], None]) -> str:
    text = io.StringIO()
    show(Console(width=200, file=text))
    return text.getvalue()


def test_a_person_sees_who_has_a_gpu_and_how_one_comes_back_into_use() -> None:
    words = shown(lambda console: show_gpus(console, ROWS))
    assert "in use: night-7" in words
    assert "out of use: Xid 79" in words
    assert f"nightlab gpus --lift {GPU_1}" in words
    assert f"nightlab gpus --lift {GPU_0}" not in words


def test_the_check_shows_the_gpus_as_well() -> None:
    found = CheckResult(walls=(), components=(), notes=(), gpus=ROWS, seconds=1.0)
    assert "out of use: Xid 79" in shown(lambda console: show_check(console, found))
