from __future__ import annotations

from agent.disturbance import Sample, busy_core_seconds, disturbance

PROC_STAT = "cpu  100 20 30 5000 40 5 6 7 50 2\ncpu0 50 10 15 2500 20 3 3 4 25 1\n"


def test_busy_time_counts_stolen_time_and_neither_idle_nor_guests_twice() -> None:
    assert (100 + 20 + 30 + 5 + 6 + 7) / 100 == busy_core_seconds(PROC_STAT, 100)


def test_the_run_and_nightlab_itself_disturb_nobody() -> None:
    found = disturbance(Sample(10.0, 1.0, 0.0), Sample(31.0, 2.0, 10.0), 20.0, 0.1)

    assert (0.0, False) == (found.other_cores, found.disturbed)


def test_others_are_measured_in_cores() -> None:
    found = disturbance(Sample(0.0, 0.0, 0.0), Sample(25.0, 0.0, 10.0), 20.0, 0.25)

    assert (0.5, True) == (found.other_cores, found.disturbed)


def test_a_clock_that_did_not_move_is_no_division_by_zero() -> None:
    assert disturbance(Sample(0.0, 0.0, 5.0), Sample(0.0, 0.0, 5.0), 0.0, 0.25).disturbed is False
