from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from itertools import count
from pathlib import Path
from statistics import median

import pytest
from rich.console import Console

from agent.attempt.disturbance import (
    Sample,
    Usual,
    disturbance,
    idle_cores,
    is_crowded,
    is_slow,
    reasons,
    speed,
    used_seconds,
    usual_of,
)
from agent.program import load_program
from agent.record.attempts import TrialKey
from agent.record.events import Disturbance
from agent.record.history import History
from agent.report.activity import RunNotes
from agent.report.console import NightConsole
from agent.settings import DisturbanceSettings
from sandbox.contract.run import Outcome
from tests.support.histories import STATE, night, run_finished, run_result

NO_TRIAL = TrialKey("", -1, 0)
NOTHING_USUAL = Usual(cores=0.0, speed=None)


def at(used: float, own_seconds: float, at: float, speed: float = 500.0) -> Sample:
    return Sample(used, own_seconds, at, speed, STATE)


def found(
    before: Sample,
    after: Sample,
    run_cpu_seconds: float,
    limit_cores: float,
    *,
    idle: float = 0.0,
    usual: Usual = NOTHING_USUAL,
) -> Disturbance:
    limits = DisturbanceSettings(max_other_cores=limit_cores)
    return disturbance(before, after, run_cpu_seconds, limits, idle=idle, usual=usual)


KERNEL_THREAD, PROGRAM = 0x00208040, 0x00400100
TICKS = os.sysconf("SC_CLK_TCK")


def machine(root: Path, *accounts: tuple[str, str], kernel_seconds: float = 0.0) -> Path:
    """A machine's files: what was stolen from it (7 s), its processes, and these accounts."""
    ticks = int(kernel_seconds * TICKS)
    rows = {9: ("ksoftirqd) 0 (x", KERNEL_THREAD, ticks), 10: ("python3", PROGRAM, 50 * TICKS)}
    files = {"proc/stat": f"cpu  100 20 30 5000 40 5 6 {7 * TICKS} 50 2\ncpu0 50 10\n"}
    for pid, (name, flags, time) in rows.items():
        files[f"proc/{pid}/stat"] = f"{pid} ({name}) S 2 0 0 0 -1 {flags} 0 0 0 0 {time} 0 0 0 20"
    for name, text in {**files, **dict(accounts)}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "sys/fs/cgroup/cpu,cpuacct/cpuacct.usage"


def test_what_the_kernels_own_threads_do_is_nobodys(tmp_path: Path) -> None:
    root = machine(tmp_path, (V1, "90500000000"), kernel_seconds=0.5)
    assert 7 + 90 == used_seconds(root)
    # A box that makes them work is charged nothing for it, and neither are others.
    machine(tmp_path, (V1, "93500000000"), kernel_seconds=3.5)
    assert 7 + 90 == used_seconds(root)


def test_the_second_version_of_cgroups_counts_all_but_its_root(tmp_path: Path) -> None:
    kept = "usage_usec {}\nuser_usec 1\n"
    slices = [("system.slice", 2_500_000), ("user.slice", 500_000)]
    files = [(f"sys/fs/cgroup/{name}/cpu.stat", kept.format(used)) for name, used in slices]
    inner = ("sys/fs/cgroup/system.slice/docker-1.scope/cpu.stat", kept.format(2_000_000))
    root = ("sys/fs/cgroup/cpu.stat", kept.format(9_000_000))
    assert 7 + 3 == used_seconds(machine(tmp_path, *files, inner, root, kernel_seconds=6.0))


def test_where_there_are_no_accounts_nobody_is_accused(tmp_path: Path) -> None:
    assert 0 == used_seconds(tmp_path)


def test_programs_of_this_machine_are_counted_also_those_that_are_over_at_once() -> None:
    before = used_seconds()
    spent = os.times()
    for _ in range(5):
        subprocess.run([sys.executable, "-c", "sum(range(10**6))"], check=True)
    now = os.times()
    children = now.children_user + now.children_system
    children -= spent.children_user + spent.children_system
    assert used_seconds() - before >= 0.9 * children > 0


def test_the_run_and_nightlab_itself_disturb_nobody() -> None:
    noise = found(at(10.0, 1.0, 0.0), at(31.0, 2.0, 10.0), 20.0, 0.1)

    assert (0.0, False) == (noise.other_cores, noise.disturbed)


def test_others_are_measured_in_cores() -> None:
    noise = found(at(0.0, 0.0, 0.0), at(25.0, 0.0, 10.0), 20.0, 0.25)

    assert (0.5, True) == (noise.other_cores, noise.disturbed)


@pytest.mark.parametrize(
    ("idle", "usual", "disturbed"),
    [(0.0, 0.0, True), (0.5, 0.0, False), (0.0, 0.5, False), (0.2, 0.2, True), (0.2, 0.3, False)],
)
def test_others_may_use_what_a_run_leaves_free_and_what_they_used_before(
    idle: float, usual: float, disturbed: bool
) -> None:
    before, after = at(0.0, 0.0, 0.0), at(25.0, 0.0, 10.0)
    noise = found(before, after, 20.0, 0.06, idle=idle, usual=Usual(usual, None))

    assert (0.5, disturbed) == (noise.other_cores, noise.disturbed)
    assert disturbed == is_crowded(noise) == bool(reasons(noise))


def test_a_run_leaves_the_cores_free_that_it_may_not_use() -> None:
    cores = os.cpu_count()
    assert cores is not None
    assert (cores - 0.5, 0.0) == (idle_cores(0.5), idle_cores(cores + 1.0))


def test_what_others_usually_use_is_what_they_used_beside_the_baseline() -> None:
    made = night(2)
    assert Usual(0.0, None) == usual_of(History(), NO_TRIAL)
    runs = [run for run in made.history.attempts[0].runs if run.disturbance]
    assert runs
    for run, cores in zip(runs, (0.1, 0.9, 0.2), strict=False):
        assert run.disturbance is not None
        told = run.disturbance.model_copy(update={"other_cores": cores})
        place = made.history.attempts[0].runs.index(run)
        made.history.attempts[0].runs[place] = run.model_copy(update={"disturbance": told})
    seen = sorted(r.disturbance.other_cores for r in made.history.attempts[0].runs if r.disturbance)
    assert median(seen) == usual_of(made.history, NO_TRIAL).cores


def test_a_clock_that_did_not_move_is_no_division_by_zero() -> None:
    assert found(at(0.0, 0.0, 5.0), at(0.0, 0.0, 5.0), 0.0, 0.25).disturbed is False


@pytest.mark.parametrize(
    ("before", "after", "usual", "slow"),
    [
        (500.0, 500.0, 500.0, False),
        (500.0, 350.0, 500.0, False),
        (380.0, 380.0, 500.0, True),
        (500.0, 250.0, 500.0, True),
        (100.0, 100.0, None, False),
    ],
)
def test_a_core_that_lost_a_fifth_of_its_usual_speed_disturbs_the_run(
    before: float, after: float, usual: float | None, slow: bool
) -> None:
    noise = found(
        at(0.0, 0.0, 0.0, before), at(20.0, 0.0, 10.0, after), 20.0, 0.25, usual=Usual(0.0, usual)
    )

    assert (slow, slow) == (noise.disturbed, is_slow(noise))


def test_speed_is_the_best_of_a_few_slices_of_equal_work() -> None:
    ticks = count()
    pauses = {5: 10.0, 6: 10.0}  # somebody else had the core meanwhile

    def clock() -> float:
        now = next(ticks)
        return now * 0.001 + sum(pause for at, pause in pauses.items() if now >= at)

    assert pytest.approx(speed(clock), rel=0.2) == 64 * 1024 / 1e6 / 0.001


def test_speed_is_measured_in_no_time() -> None:
    import time

    began = time.monotonic()
    assert speed() > 0
    assert time.monotonic() - began < 1


def test_a_person_reads_what_disturbed_a_run_and_where_the_limit_stands(tmp_path: Path) -> None:
    noise = Disturbance(
        other_cores=0.1,
        limit_cores=0.25,
        disturbed=True,
        idle_cores=0.0,
        usual_cores=0.0,
        before=STATE,
        after=STATE,
        speed=350.0,
        usual_speed=500.0,
        min_speed=0.8,
        held_back=("it was too hot",),
    )
    written = io.StringIO()
    settings = load_program(Path("program.md")).settings
    notes = RunNotes(tmp_path, lambda: 0.0)
    console = NightConsole(notes, Console(file=written, width=200), settings, History)
    failed = run_finished(0, 1, run_result("a0", "train", log="", outcome=Outcome.FAILED))
    console.run_finished(failed.model_copy(update={"disturbance": noise}))
    assert "" == written.getvalue()  # what others did explains no crash
    run = run_finished(0, 1, run_result("a0", "train", log=""))
    console.run_finished(run.model_copy(update={"disturbance": noise}))

    clock, _, said = written.getvalue().strip().partition(" ")
    assert re.fullmatch(r"\d\d:\d\d", clock)
    assert (
        "disturbed: a core had 70% of its usual speed; it was too hot; waiting for a quiet "
        "machine, then again; see [disturbance] in program.md" == said.strip()
    )
    others = noise.model_copy(update={"other_cores": 1.5, "speed": 500.0, "held_back": ()})
    assert ["others used 1.50 cores (limit 0.25)"] == reasons(others)
