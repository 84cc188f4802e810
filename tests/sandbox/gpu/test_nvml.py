"""NVIDIA's driver, asked through the real nvidia-ml-py against a stand-in library in C."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.contract.errors import GpuFault
from sandbox.contract.run import RunSpec
from sandbox.gpu.nvml import Driver, DriverFault, DriverUnavailable, open_driver, xid_event
from sandbox.gpu.request import Gpu
from sandbox.gpu.run import attended
from sandbox.gpu.watch import LEFT_BYTES, GpuWatch
from tests.support.boxes import python_spec, wait_until
from tests.support.gpu_stand_ins import GIBIBYTE, GPU_0, GPU_1, GPU_2, MIG_0, MIG_1, Cards

LOST, UNKNOWN, NOT_LOADED, MISMATCH = 15, 999, 9, 18
"""NVML's own error numbers."""


@pytest.fixture
def driver(cards: Cards, tmp_path: Path) -> Iterator[Driver]:
    cards.add(0, GPU_0)
    cards.add(1, GPU_1)
    with open_driver(lay_out_driver_files(tmp_path / "proc"), tmp_path / "cgroups") as driver:
        yield driver


def lay_out_driver_files(root: Path) -> Path:
    """Lay out what the driver shows below /proc for two instances of GPU 1."""
    (root / "driver" / "nvidia").mkdir(parents=True)
    (root / "devices").write_text("Character devices:\n195 nvidia\n236 nvidia-caps\n\nBlock:\n")
    for gi, first in ((7, 66), (8, 75)):
        place = root / "driver" / "nvidia" / "capabilities" / "gpu1" / "mig" / f"gi{gi}"
        (place / "ci0").mkdir(parents=True)
        (place / "access").write_text(f"DeviceFileMinor: {first}\nDeviceFileMode: 292\n")
        (place / "ci0" / "access").write_text(f"DeviceFileMinor: {first + 1}\n")
    return root / "driver" / "nvidia"


def gpu(driver: Driver, uuid: str) -> Gpu:
    return next(gpu for gpu in driver.gpus() if gpu.id == uuid)


# --- which there are ---


def test_gpus_are_found_with_their_nodes_and_memory(driver: Driver) -> None:
    first, second = driver.gpus()
    assert (GPU_0, "0", None) == (first.id, first.index, first.parent)
    assert 80 * GIBIBYTE == first.memory_bytes
    assert [("nvidia1", 195, 1)] == [(n.path, n.major, n.minor) for n in second.nodes]


def test_a_gpu_in_mig_mode_offers_its_instances_and_not_itself(
    cards: Cards, driver: Driver
) -> None:
    cards.add_instance(1, 0, MIG_0)
    cards.add_instance(1, 1, MIG_1)
    assert [GPU_0, MIG_0, MIG_1] == [gpu.id for gpu in driver.gpus()]
    part = gpu(driver, MIG_1)
    assert ("1:1", GPU_1, 10 * GIBIBYTE) == (part.index, part.parent, part.memory_bytes)
    paths = ["nvidia1", "nvidia-caps/nvidia-cap75", "nvidia-caps/nvidia-cap76"]
    assert paths == [node.path for node in part.nodes]


def test_a_gpu_in_mig_mode_without_instances_offers_nothing(cards: Cards, driver: Driver) -> None:
    (cards.root / "1" / "mig").mkdir()
    assert [GPU_0] == [gpu.id for gpu in driver.gpus()]


@pytest.mark.parametrize("field", ["uuid", "minor", "memory_total"])
def test_a_gpu_that_cannot_be_described_hides_no_other(
    cards: Cards, driver: Driver, field: str
) -> None:
    cards.fail(f"0/{field}", UNKNOWN)
    assert [GPU_1] == [gpu.id for gpu in driver.gpus()]


def test_a_gpu_that_is_lost_hides_no_other(cards: Cards, driver: Driver) -> None:
    cards.add(2, GPU_2)
    cards.fail("1/handle", LOST)
    assert [GPU_0, GPU_2] == [gpu.id for gpu in driver.gpus()]


def test_without_a_driver_the_refusal_says_so(cards: Cards) -> None:
    cards.fail("init", NOT_LOADED)
    with pytest.raises(DriverUnavailable, match="does not answer"), open_driver():
        pass


def test_after_an_update_of_the_driver_the_refusal_says_so(cards: Cards) -> None:
    cards.fail("init", MISMATCH)
    with pytest.raises(DriverUnavailable) as refusal, open_driver():
        pass
    assert "nvidia-smi" in refusal.value.hint


# --- what one does ---


def test_a_sample_has_everything_in_the_units_of_its_name(cards: Cards, driver: Driver) -> None:
    for field, value in {"utilisation": 87, "throttle": 0x48, "ecc": 2, "temperature": 83}.items():
        cards.set(f"0/{field}", value)
    sample = driver.sample(gpu(driver, GPU_0))
    assert (0.87, 70.0, 1000.0) == (sample.utilisation, sample.power_watts, sample.energy_joules)
    assert (1980, 2619, 83) == (
        sample.sm_clock_mhz,
        sample.memory_clock_mhz,
        sample.temperature_celsius,
    )
    assert ("hardware_slowdown", "heat_hardware") == sample.throttled_by
    assert (GIBIBYTE // 2, 80 * GIBIBYTE, 2) == (
        sample.memory_used_bytes,
        sample.memory_total_bytes,
        sample.ecc_errors,
    )


def test_what_a_card_does_not_offer_is_none_and_no_fault(cards: Cards, driver: Driver) -> None:
    for field in ("energy_mj", "ecc", "power_mw", "throttle", "utilisation", "temperature"):
        cards.forget(f"0/{field}")
    sample = driver.sample(gpu(driver, GPU_0))
    assert (None, None, None) == (sample.energy_joules, sample.ecc_errors, sample.utilisation)
    assert () == sample.throttled_by


def test_an_idle_or_power_capped_gpu_is_not_throttled(cards: Cards, driver: Driver) -> None:
    cards.set("0/throttle", 0x1 | 0x2 | 0x4)
    assert () == driver.sample(gpu(driver, GPU_0)).throttled_by


def test_an_instance_has_no_power_or_use_of_its_own(cards: Cards, driver: Driver) -> None:
    cards.add_instance(1, 0, MIG_0, utilisation=50, power_mw=1, energy_mj=1)
    sample = driver.sample(gpu(driver, MIG_0))
    assert (None, None, None) == (sample.utilisation, sample.power_watts, sample.energy_joules)
    assert 10 * GIBIBYTE == sample.memory_total_bytes


@pytest.mark.parametrize(("error", "kind"), [(LOST, "lost"), (16, "lost"), (UNKNOWN, "unreadable")])
def test_a_gpu_that_does_not_answer_is_a_fault(
    cards: Cards, driver: Driver, error: int, kind: str
) -> None:
    first = gpu(driver, GPU_0)
    cards.fail("0/memory_used", error)
    with pytest.raises(DriverFault) as fault:
        driver.sample(first)
    assert (kind, True) == (fault.value.event.kind, fault.value.event.is_fault)


def test_processes_are_told_with_their_memory(cards: Cards, driver: Driver) -> None:
    first = gpu(driver, GPU_0)
    assert {} == driver.processes(first)
    cards.set("0/processes", f"41 1000\n42 {2**64 - 1}")
    assert {41: 1000, 42: None} == driver.processes(first)
    cards.set("0/drawing", "41 1000\n43 7")
    assert {41: 1000, 42: None, 43: 7} == driver.processes(first)


def test_each_error_report_comes_once_and_only_for_gpus_listened_to(
    cards: Cards, driver: Driver
) -> None:
    watch = driver.xids([gpu(driver, GPU_0)])
    cards.report(1, 79)
    cards.report(0, 79)
    cards.report(0, 13)
    assert [(GPU_0, 79), (GPU_0, 13)] == [(g, event.xid) for g, event in watch.reports()]
    assert [] == watch.reports()
    watch.close()


@pytest.mark.parametrize("xid", [13, 31, 43, 45])
def test_an_error_that_a_program_can_bring_about_is_not_blamed_on_the_gpu(xid: int) -> None:
    assert not xid_event(xid).is_fault


@pytest.mark.parametrize("xid", [48, 62, 63, 64, 74, 79, 92, 94, 95, 119, 120, 143])
def test_every_other_error_is_blamed_on_the_gpu(xid: int) -> None:
    assert xid_event(xid).is_fault


def test_a_gpu_that_cannot_be_listened_to_is_named_and_no_event_set_stays_open(
    cards: Cards, driver: Driver
) -> None:
    both = driver.gpus()
    driver.xids(both).close()
    open_sets = (cards.root / "event_sets").read_text()
    cards.fail("1/register", UNKNOWN)
    with pytest.raises(DriverFault) as fault:
        GpuWatch(driver, both)
    assert GPU_1 == fault.value.gpu
    assert open_sets == (cards.root / "event_sets").read_text()


@pytest.mark.parametrize(("broken", "out_of_use"), [("0/power_mw", GPU_0), ("1/register", GPU_1)])
def test_the_gpu_that_does_not_answer_before_a_run_is_the_one_that_goes_out_of_use(
    cards: Cards, driver: Driver, broken: str, out_of_use: str
) -> None:
    quarantined = list[str]()
    cards.fail(broken, UNKNOWN)
    with pytest.raises(GpuFault, match=out_of_use):
        attend(quarantined)
    assert [out_of_use] == quarantined


def test_a_driver_that_fails_for_no_gpu_in_particular_takes_none_out_of_use(
    cards: Cards, driver: Driver
) -> None:
    quarantined = list[str]()
    cards.fail("event_set", UNKNOWN)
    with pytest.raises(DriverUnavailable, match="cannot be listened to"):
        attend(quarantined)
    assert [] == quarantined


def attend(quarantined: list[str]) -> None:
    """Attend to a run on both GPUs that is over at once, and note which go out of use."""
    plain = python_spec("", image="sha256:0").model_dump()
    spec = RunSpec.model_validate(plain | {"devices": "nvidia", "gpus": (GPU_0, GPU_1)})
    with attended(spec, dict, lambda gpu, *_: quarantined.append(gpu)):
        pass


def test_what_the_driver_asks_to_be_done_is_told(cards: Cards, driver: Driver) -> None:
    first = gpu(driver, GPU_0)
    assert driver.recovery(first) is None
    cards.set("0/recovery", 1)
    event = driver.recovery(first)
    assert event is not None
    assert "reset the GPU" in event.words
    cards.forget("0/recovery")
    assert driver.recovery(first) is None


# --- what bounds one ---


def test_a_bound_of_the_kernel_s_counts_only_once_the_driver_tells_it_back(
    cards: Cards, driver: Driver, tmp_path: Path
) -> None:
    first = gpu(driver, GPU_0)
    assert not driver.bound_by_kernel([first], "/docker/box", GIBIBYTE)
    cards.set("0/kernel_limits", "yes")
    assert driver.bound_by_kernel([first], "/docker/box", GIBIBYTE)
    told = (cards.root / "0" / "limit").read_text().split()
    assert [f"{tmp_path}/cgroups/docker/box", str(GIBIBYTE), str(GIBIBYTE)] == told


def test_without_the_unified_hierarchy_or_for_an_instance_there_is_no_such_bound(
    cards: Cards, driver: Driver
) -> None:
    cards.set("0/kernel_limits", "yes")
    cards.set("1/kernel_limits", "yes")
    cards.add_instance(1, 0, MIG_0)
    assert not driver.bound_by_kernel([gpu(driver, GPU_0)], "", GIBIBYTE)
    assert not driver.bound_by_kernel([gpu(driver, MIG_0)], "/docker/box", GIBIBYTE)


# --- the watch ---


class Ended:
    """Notes why a watch ended a run."""

    def __init__(self) -> None:
        self.why: list[str] = []

    def __call__(self, why: str) -> None:
        self.why.append(why)


def started(
    driver: Driver, limit: int | None = None, *, only: bool = False, left_seconds: float = 5.0
) -> tuple[GpuWatch, Ended]:
    """Return a quick watch over GPU 0 for a box that is this very process."""
    first, ended = gpu(driver, GPU_0), Ended()
    watch = GpuWatch(driver, [first], period_seconds=0.01, left_seconds=left_seconds)
    watch.begin(os.getpid(), ended, limit, is_only_bound=only)
    return watch, ended


def test_a_run_s_numbers_are_peak_mean_and_growth(cards: Cards, driver: Driver) -> None:
    cards.set("0/utilisation", 50)
    watch, ended = started(driver)
    account = watch.accounts[0]
    assert wait_until(lambda: account.samples >= 2)
    cards.set("0/memory_used", 8 * GIBIBYTE)
    cards.set("0/energy_mj", 1_005_000)
    assert wait_until(lambda: (account.last.energy_joules or 0) > 1000.0)
    cards.set("0/memory_used", GIBIBYTE)
    watch.close()
    use = account.use("none")
    assert (8 * GIBIBYTE - GIBIBYTE // 2, 0.5, 5.0) == (
        use.peak_memory_bytes,
        use.utilisation,
        use.energy_joules,
    )
    assert ([], (), 0.0) == (ended.why, use.events, use.throttled_share)


def test_a_run_s_readings_are_kept_as_mean_and_most(cards: Cards, driver: Driver) -> None:
    cards.forget("0/memory_clock")
    watch, _ = started(driver)
    account = watch.accounts[0]
    assert wait_until(lambda: account.samples >= 2)
    for field, value in {"power_mw": 350_000, "temperature": 80, "sm_clock": 1000}.items():
        cards.set(f"0/{field}", value)
    cards.set("0/throttle", 0x20)
    assert wait_until(lambda: account.throttled != {})
    watch.close()
    use = account.use("none")
    assert (350.0, 80.0, 1980.0, None, ("heat",)) == (
        use.power_watts and use.power_watts.max,
        use.temperature_celsius and use.temperature_celsius.max,
        use.sm_clock_mhz and use.sm_clock_mhz.max,
        use.memory_clock_mhz,
        use.throttled_by,
    )
    assert use.power_watts is not None
    assert 70.0 < use.power_watts.mean < 350.0
    assert use.sm_clock_mhz is not None
    assert 1000.0 < use.sm_clock_mhz.mean < 1980.0


def test_memory_of_the_box_s_own_processes_is_counted_and_no_other(
    cards: Cards, driver: Driver, tmp_path: Path
) -> None:
    for pid, group in ((41, "0::/docker/box\n"), (42, "0::/docker/box\n"), (43, "0::/user\n")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cgroup").write_text(group)
    cards.set("0/processes", f"42 {3 * GIBIBYTE}\n43 {50 * GIBIBYTE}")
    watch = GpuWatch(driver, [gpu(driver, GPU_0)], period_seconds=0.01, proc=tmp_path)
    watch.begin(41, Ended(), None, is_only_bound=False)
    assert wait_until(lambda: watch.accounts[0].samples >= 2)
    watch.close()
    assert 3 * GIBIBYTE == watch.accounts[0].peak_bytes


def test_a_run_over_its_limit_is_ended_with_the_numbers(cards: Cards, driver: Driver) -> None:
    watch, ended = started(driver, 4 * GIBIBYTE)
    cards.set("0/memory_used", 4 * GIBIBYTE)
    time.sleep(0.1)
    assert [] == ended.why
    cards.set("0/memory_used", 6 * GIBIBYTE)
    assert wait_until(lambda: ended.why == ["gpu_memory"])
    watch.close()
    taken = 6 * GIBIBYTE - GIBIBYTE // 2
    assert f"{taken} of {4 * GIBIBYTE} bytes on {GPU_0}" == watch.exceeded


def test_a_lost_gpu_ends_the_run_at_once(cards: Cards, driver: Driver) -> None:
    watch, ended = started(driver)
    cards.fail("0/memory_used", LOST)
    assert wait_until(lambda: "gpu_fault" in ended.why)
    watch.close()
    assert ["lost"] == [event.kind for event in watch.accounts[0].events]


def test_a_hardware_error_report_ends_the_run_and_a_program_s_own_does_not(
    cards: Cards, driver: Driver
) -> None:
    watch, ended = started(driver)
    cards.report(0, 31)
    assert wait_until(lambda: len(watch.accounts[0].events) == 1)
    assert [] == ended.why
    cards.report(0, 79)
    assert wait_until(lambda: "gpu_fault" in ended.why)
    watch.close()
    assert [31, 79] == [event.xid for event in watch.accounts[0].events]


def test_a_driver_that_stalls_once_is_forgiven_and_one_that_stays_silent_is_a_fault(
    cards: Cards, driver: Driver
) -> None:
    watch, ended = started(driver)
    account = watch.accounts[0]
    cards.fail("0/memory_used", UNKNOWN)
    assert wait_until(lambda: any(e.kind == "unreadable" for e in account.events))
    time.sleep(0.05)
    watch.close()
    assert [] == ended.why  # the program may be well; its GPU is looked at afterwards
    assert 1 == len(account.events)


def test_a_driver_that_stays_silent_ends_a_run_whose_limit_only_the_watch_holds(
    cards: Cards, driver: Driver
) -> None:
    watch, ended = started(driver, GIBIBYTE, only=True)
    cards.fail("0/memory_used", UNKNOWN)
    assert wait_until(lambda: "gpu_fault" in ended.why)
    watch.close()


def test_new_memory_errors_are_a_fault_and_old_ones_are_not(cards: Cards, driver: Driver) -> None:
    cards.set("0/ecc", 3)
    watch, ended = started(driver)
    assert wait_until(lambda: watch.accounts[0].samples >= 2)
    assert [] == watch.accounts[0].events
    cards.set("0/ecc", 5)
    assert wait_until(lambda: "gpu_fault" in ended.why)
    watch.close()
    assert ["2 memory errors that could not be corrected"] == [
        event.words for event in watch.accounts[0].events
    ]


def test_throttling_is_told_with_its_share_and_ends_nothing(cards: Cards, driver: Driver) -> None:
    cards.set("0/throttle", 0x20)
    watch, ended = started(driver)
    assert wait_until(lambda: watch.accounts[0].samples >= 3)
    watch.close()
    use = watch.accounts[0].use("none")
    assert (1.0, [("throttled", False)]) == (
        use.throttled_share,
        [(event.kind, event.is_fault) for event in use.events],
    )
    assert [] == ended.why


def test_memory_that_stays_taken_after_a_run_is_a_fault(cards: Cards, driver: Driver) -> None:
    watch, _ = started(driver, left_seconds=0.5)
    cards.set("0/memory_used", GIBIBYTE // 2 + LEFT_BYTES + 2**20)
    watch.stop()
    watch.look_back()
    watch.close()
    assert ["memory_left"] == [event.kind for event in watch.accounts[0].events]


def test_memory_that_the_driver_gives_back_late_is_none(cards: Cards, driver: Driver) -> None:
    watch, _ = started(driver)
    cards.set("0/memory_used", 8 * GIBIBYTE)
    watch.stop()
    given_back = threading.Timer(0.3, lambda: cards.set("0/memory_used", GIBIBYTE // 2))
    given_back.start()
    watch.look_back()
    given_back.join()
    watch.close()
    assert [] == watch.accounts[0].events


def of_the_box(proc: Path, group: str, *pids: int) -> None:
    """Let these processes be in a control group, as /proc shows it."""
    for pid in pids:
        (proc / str(pid)).mkdir()
        (proc / str(pid) / "cgroup").write_text(group)


def side_by_side(driver: Driver, proc: Path, limit: int) -> tuple[list[GpuWatch], Ended]:
    """Return the watches of two boxes, with PID 1 as 41 and 51."""
    of_the_box(proc, "0::/docker/one\n", 41, 42)
    of_the_box(proc, "0::/docker/other\n", 51, 52)
    first = gpu(driver, GPU_0)
    watches = [GpuWatch(driver, [first], 0.01, proc, left_seconds=0.5) for _ in range(2)]
    ended = Ended()
    for watch, pid in zip(watches, (41, 51), strict=True):
        watch.begin(pid, ended, limit, is_only_bound=True)
    return watches, ended


def test_a_box_over_its_limit_is_ended_for_its_own_memory_alone(
    cards: Cards, driver: Driver, tmp_path: Path
) -> None:
    (one, other), ended = side_by_side(driver, tmp_path, GIBIBYTE)
    cards.set("0/processes", f"42 {GIBIBYTE // 2}\n52 {2 * GIBIBYTE}")
    assert wait_until(lambda: ended.why == ["gpu_memory"])
    for watch in (one, other):
        watch.close()
    assert ("", True) == (one.exceeded, f"{2 * GIBIBYTE} of" in other.exceeded)


@pytest.mark.parametrize("field", ["processes", "drawing"])
def test_other_work_that_comes_to_a_gpu_during_a_run_is_not_left_by_it(
    cards: Cards, driver: Driver, tmp_path: Path, field: str
) -> None:
    of_the_box(tmp_path, "0::/docker/box\n", 41)
    of_the_box(tmp_path, "0::/user\n", 43)
    watch, ended = GpuWatch(driver, [gpu(driver, GPU_0)], 0.01, tmp_path), Ended()
    watch.begin(41, ended, GIBIBYTE, is_only_bound=True)
    cards.set(f"0/{field}", f"43 {5 * GIBIBYTE}")
    cards.set("0/memory_used", GIBIBYTE // 2 + 5 * GIBIBYTE)
    seen = watch.accounts[0].samples
    assert wait_until(lambda: watch.accounts[0].samples > seen + 1)
    watch.stop()
    watch.look_back()
    watch.close()
    assert ([], []) == (ended.why, watch.accounts[0].events)


def test_a_process_whose_memory_is_not_told_leaves_a_doubt_and_no_fault(
    cards: Cards, driver: Driver
) -> None:
    watch, _ = started(driver)
    cards.set("0/processes", f"43 {2**64 - 1}")
    cards.set("0/memory_used", 5 * GIBIBYTE)
    watch.stop()
    watch.look_back()
    watch.close()
    assert [] == watch.accounts[0].events


def test_a_question_that_hangs_in_the_driver_does_not_hold_up_the_end_of_a_run(
    cards: Cards, driver: Driver
) -> None:
    watch = GpuWatch(driver, [gpu(driver, GPU_0)], period_seconds=0.01, stop_seconds=0.2)
    watch.begin(os.getpid(), Ended(), None, is_only_bound=False)
    assert wait_until(lambda: watch.accounts[0].samples >= 1)
    cards.set("0/memory_used", "~2")
    time.sleep(0.1)
    began = time.monotonic()
    watch.stop()
    watch.look_back()
    watch.close()
    assert time.monotonic() - began < 1.9  # the driver answers after 2 s
    assert [("unreadable", True)] == [(e.kind, e.is_fault) for e in watch.accounts[0].events]
    time.sleep(2)  # the next test must not find this one's thread in the library


def test_a_watch_that_breaks_ends_the_run_and_blames_no_gpu(
    cards: Cards, driver: Driver, tmp_path: Path
) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "cgroup").write_bytes(b"\xff\n")  # no text
    (tmp_path / "8").mkdir()
    (tmp_path / "8" / "cgroup").write_text("0::/docker/box\n")
    cards.set("0/processes", "7 1000")
    watch, ended = GpuWatch(driver, [gpu(driver, GPU_0)], 0.01, tmp_path), Ended()
    watch.begin(8, ended, None, is_only_bound=False)
    assert wait_until(lambda: ended.why == ["gpu_fault"])
    watch.close()
    assert [("unreadable", False)] == [(e.kind, e.is_fault) for e in watch.accounts[0].events]


def test_a_gpu_that_wants_a_reset_after_a_run_is_at_fault(cards: Cards, driver: Driver) -> None:
    watch, _ = started(driver)
    watch.stop()
    cards.set("0/recovery", 1)
    watch.look_back()
    watch.close()
    assert ["recovery"] == [event.kind for event in watch.accounts[0].events]
