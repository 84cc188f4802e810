"""Leases: in line, never shared, none left by a crash."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.contract.errors import SandboxError
from sandbox.gpu.leases import FROZEN_SECONDS, Leases, Ticket, allot, gpu_rows, overlap
from tests.support.boxes import wait_until
from tests.support.gpu_stand_ins import BOTH, GPU_0, GPU_1, MIG_0, MIG_1, gpu

PARENTS = {GPU_0: None, GPU_1: None, MIG_0: GPU_1, MIG_1: GPU_1}


def ticket(*pool: str, count: int = 1) -> Ticket:
    return Ticket(pool=pool, count=count, granted=(), owner="", purpose="")


# --- who gets what ---


def test_the_first_in_line_chooses_first_and_the_rest_waits() -> None:
    line = [(n, ticket(GPU_0, GPU_1)) for n in (3, 5, 8)]
    assert {3: (GPU_0,), 5: (GPU_1,)} == allot(line, [], PARENTS)
    assert {3: (GPU_1,)} == allot(line, [GPU_0], PARENTS)
    assert {} == allot(line, [GPU_0, GPU_1], PARENTS)


def test_who_wants_more_is_not_kept_waiting_by_those_behind_who_want_less() -> None:
    line = [(1, ticket(GPU_0, GPU_1, count=2)), (2, ticket(GPU_0)), (3, ticket(GPU_1))]
    assert {} == allot(line, [GPU_0], PARENTS)
    assert {1: (GPU_0, GPU_1)} == allot(line, [], PARENTS)


def test_who_wants_something_else_need_not_wait_for_those_ahead() -> None:
    line = [(1, ticket(GPU_0)), (2, ticket(GPU_1))]
    assert {2: (GPU_1,)} == allot(line, [GPU_0], PARENTS)


def test_a_gpu_and_its_instance_are_never_out_at_once() -> None:
    assert {} == allot([(1, ticket(MIG_0))], [GPU_1], PARENTS)
    assert {} == allot([(1, ticket(GPU_1))], [MIG_0], PARENTS)
    line = [(1, ticket(MIG_0)), (2, ticket(GPU_1)), (3, ticket(MIG_1))]
    assert {1: (MIG_0,), 3: (MIG_1,)} == allot(line, [], PARENTS)


IDS = st.sampled_from(sorted(PARENTS))
WISHES = st.builds(
    lambda pool, count: ticket(*pool, count=count),
    st.lists(IDS, min_size=1, unique=True),
    st.integers(1, 3),
)


@given(st.lists(WISHES, max_size=6), st.sets(IDS))
def test_no_device_is_ever_given_twice_or_beside_a_part_of_it(
    wishes: list[Ticket], taken: set[str]
) -> None:
    grants = allot(list(enumerate(wishes)), taken, PARENTS)
    given_out = [one for granted in grants.values() for one in granted]
    held = [*given_out, *taken]
    for place, one in enumerate(given_out):
        assert not any(overlap(one, other, PARENTS) for n, other in enumerate(held) if n != place)
    for number, granted in grants.items():
        assert len(granted) == wishes[number].count
        assert set(granted) <= set(wishes[number].pool)


@given(st.lists(WISHES, min_size=1, max_size=6), st.sets(IDS))
def test_nobody_gets_less_because_somebody_stands_behind(
    wishes: list[Ticket], taken: set[str]
) -> None:
    line = list(enumerate(wishes))
    everyone = allot(line, taken, PARENTS)
    ahead = allot(line[:-1], taken, PARENTS)
    assert ahead == {number: granted for number, granted in everyone.items() if number in ahead}


# --- processes ---


def leases(place: Path, living: list[str] | None = None) -> Leases:
    return Leases(place, lambda: living or [], f"process {os.getpid()}")


def test_a_lease_is_over_with_its_block_also_when_it_breaks(tmp_path: Path) -> None:
    with leases(tmp_path).lease(BOTH, 2, "a run") as granted:
        assert (GPU_0, GPU_1) == granted
        assert {GPU_0: "a run", GPU_1: "a run"} == leases(tmp_path).status().held
    with pytest.raises(ZeroDivisionError), leases(tmp_path).lease(BOTH, 1, "a run"):
        raise ZeroDivisionError
    assert {} == leases(tmp_path).status().held


def test_a_ticket_that_the_disk_refused_does_not_stay_in_the_line(tmp_path: Path) -> None:
    line, (soft, hard) = leases(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError, match="too large"), line.lease(BOTH, 1, "a run"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with line.lease(BOTH, 2, "the next run"):
        assert {"the next run"} == set(leases(tmp_path).status().held.values())


def test_what_living_containers_have_is_taken_whoever_started_them(tmp_path: Path) -> None:
    with leases(tmp_path, [GPU_0]).lease(BOTH, 1, "a run") as granted:
        assert (GPU_1,) == granted


def test_waiting_ends_when_the_container_does_and_is_told_once(tmp_path: Path) -> None:
    living, told = [GPU_0, GPU_1], list[str]()

    def sleep(_: float) -> None:
        living.clear() if len(told) == 1 and living == [GPU_1] else living.pop(0)

    line = Leases(tmp_path, lambda: living, "me", sleep=sleep)
    with line.lease([gpu(GPU_1)], 1, "a run", told.append) as granted:
        assert (GPU_1,) == granted
    assert ["waiting for a GPU; before it: a container"] == told


HOLDER = """
    import sys, time
    from pathlib import Path
    from sandbox.gpu.leases import Leases
    from tests.support.gpu_stand_ins import BOTH
    place, count, name = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    line = Leases(place, lambda: [], name, sleep=lambda _: time.sleep(0.02))
    with line.lease(BOTH, count, name) as granted:
        print(*granted, flush=True)
        sys.stdin.read()
"""


@contextlib.contextmanager
def process(place: Path, count: int, name: str) -> Iterator[subprocess.Popen[str]]:
    """Start a process that leases, says what it got, and keeps it until its input ends."""
    words = [sys.executable, "-c", textwrap.dedent(HOLDER), str(place), str(count), name]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def said(running: subprocess.Popen[str]) -> str:
    assert running.stdout is not None
    return running.stdout.readline().strip()


def test_a_killed_holder_leaves_nothing_and_a_killed_waiter_holds_nobody_up(
    tmp_path: Path,
) -> None:
    with process(tmp_path, 2, "holder") as holder:
        assert f"{GPU_0} {GPU_1}" == said(holder)
        with process(tmp_path, 2, "waiter") as waiter:
            assert wait_until(lambda: leases(tmp_path).status().waiting == ("waiter",))
            with process(tmp_path, 1, "last") as last:
                waits = ("waiter", "last")
                assert wait_until(lambda: leases(tmp_path).status().waiting == waits)
                waiter.kill()
                waiter.wait()
                assert wait_until(lambda: leases(tmp_path).status().waiting == ("last",))
                holder.kill()
                holder.wait()
                assert GPU_0 == said(last)
                assert {GPU_0: "last"} == leases(tmp_path).status().held


def test_a_waiter_that_is_frozen_is_passed_over_until_it_looks_again(tmp_path: Path) -> None:
    with process(tmp_path, 2, "holder") as holder:
        assert said(holder)
        with process(tmp_path, 1, "frozen") as frozen:
            assert wait_until(lambda: leases(tmp_path).status().waiting == ("frozen",))
            with leases(tmp_path)._locked():  # one that freezes while it looks stops all others
                os.kill(frozen.pid, signal.SIGSTOP)
                stat = Path(f"/proc/{frozen.pid}/stat")
                assert wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
            later = Leases(tmp_path, list, "later", now=long_after)
            holder.kill()
            holder.wait()
            with later.lease(BOTH, 2, "later") as granted:
                assert (GPU_0, GPU_1) == granted
                os.kill(frozen.pid, signal.SIGCONT)
            assert GPU_0 == said(frozen)


def long_after() -> float:
    return time.time() + FROZEN_SECONDS + 1


def test_threads_of_one_process_are_kept_apart_as_well(tmp_path: Path) -> None:
    together, most = [0], [0]
    guard = threading.Lock()

    def run() -> None:
        line = Leases(tmp_path, list, "me", sleep=lambda _: None)
        with line.lease([gpu(GPU_0)], 1, "a run"):
            with guard:
                together[0] += 1
                most[0] = max(most[0], together[0])
            with guard:
                together[0] -= 1

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 == most[0]


# --- out of use ---


def test_a_gpu_out_of_use_is_leased_to_nobody_until_a_person_lifts_that(tmp_path: Path) -> None:
    leases(tmp_path).quarantine(GPU_0, "Xid 79", "run-1")
    with leases(tmp_path).lease(BOTH, 1, "a run") as granted:
        assert (GPU_1,) == granted
    assert [(GPU_0, "Xid 79", "run-1")] == [
        (entry.gpu, entry.why, entry.run_id) for entry in leases(tmp_path).quarantined()
    ]
    assert leases(tmp_path).lift(GPU_0)
    assert not leases(tmp_path).lift(GPU_0)
    with leases(tmp_path).lease(BOTH, 2, "a run") as granted:
        assert (GPU_0, GPU_1) == granted


def test_a_wish_that_can_never_come_true_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with (
        pytest.raises(SandboxError, match="3 of 2 GPUs will never be free") as refusal,
        leases(tmp_path).lease(BOTH, 3, "a run"),
    ):
        pass
    assert "--gpus" in refusal.value.hint
    leases(tmp_path).quarantine(GPU_1, "lost", "run-1")
    with (
        pytest.raises(SandboxError, match=f"out of use: {GPU_1}") as refusal,
        leases(tmp_path).lease(BOTH, 2, "a run"),
    ):
        pass
    assert "--lift" in refusal.value.hint
    assert () == leases(tmp_path).status().waiting


def test_an_instance_of_a_gpu_out_of_use_is_out_of_use(tmp_path: Path) -> None:
    leases(tmp_path).quarantine(GPU_1, "lost", "run-1")
    with (
        pytest.raises(SandboxError, match="will never be free"),
        leases(tmp_path).lease([gpu(MIG_0, GPU_1)], 1, "a run"),
    ):
        pass


def test_who_gives_up_waiting_gives_its_place_up(tmp_path: Path) -> None:
    def give_up() -> None:
        raise TimeoutError

    line = leases(tmp_path, [GPU_1])
    with pytest.raises(TimeoutError):
        line.lease([gpu(GPU_1)], 1, "a run", while_waiting=give_up).__enter__()
    assert () == line.status().waiting
    assert [] == list((tmp_path / "queue").iterdir())


def test_a_person_is_told_who_has_which_gpu_and_which_are_gone(tmp_path: Path) -> None:
    line = leases(tmp_path)
    line.quarantine(MIG_0, "memory left", "run-7")
    with line.lease([gpu(GPU_0)], 1, "session a, attempt 3"):
        rows = gpu_rows(BOTH, line.status())
    assert [("in use", "session a, attempt 3"), ("free", "")] == [
        (row.status, row.words) for row in rows[:2]
    ]
    assert ("out of use", MIG_0) == (rows[2].status, rows[2].id)
    assert "memory left (run-7" in rows[2].words
