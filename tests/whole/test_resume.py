"""A session goes on elsewhere, after an upgrade, and once a full disk has room again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agent.attempt.lab import Lab
from agent.candidate.workspace import Workspace
from agent.cli.app import app
from agent.morning.audit import audit
from agent.record.chain import (
    FIRST_PREVIOUS,
    LEDGER_NAME,
    LedgerError,
    canonical,
    entry_hash,
    read_ledger,
)
from agent.record.events import AttemptFinished, AttemptInterrupted, Event, SessionEnded, StopReason
from agent.record.history import fold
from agent.record.ledger import Ledger
from agent.report.report import write_report
from sandbox import DockerExecutor, SandboxError
from sandbox.contract.errors import MAKE_ROOM, UsageError
from tests.support.boxes import python_spec
from tests.support.clock import Clock
from tests.support.command_line import CommandLine, wait_for
from tests.support.labs import work
from tests.support.nights import Crash, CrashingLedger, Place
from tests.support.sessions import verdicts_of

SMALL_DISK_BYTES = 3 * 2**20


# ---- another machine ---------------------------------------------------------------------------


def test_a_session_goes_on_from_a_copy_under_another_name_and_path(tmp_path: Path) -> None:
    here = _short_place(tmp_path / "here")
    lab = here.begin("tpe")
    assert isinstance(lab.ledger, CrashingLedger)
    lab.ledger.crash_at = 30
    with pytest.raises(Crash):
        _work(lab, here)
    there = _short_place(tmp_path / "another" / "there")
    there.name = "The Night (copy)"
    there.clock.seconds = here.clock.seconds
    shutil.copytree(here.directory, there.directory)
    shutil.rmtree(here.root)

    ended = _work(there.resume(), there)

    assert StopReason.ATTEMPTS is ended.reason
    entries = read_ledger(there.directory)
    assert [] == audit(there.directory, entries)
    assert verdicts_of(entries) == verdicts_of(_unbroken(tmp_path / "twin"))


@pytest.mark.docker
def test_a_machine_that_lacks_the_image_or_the_data_says_what_to_do(
    place: CommandLine,
    tmp_path: Path,
) -> None:
    assert 0 == place.nightlab("run", "--researcher", "tpe", "--session", "x").returncode
    there = CommandLine(tmp_path / "there", place.engine)
    shutil.copytree(place.session("x"), there.session("y"))
    shutil.rmtree(place.root)
    there.environ |= {
        "NIGHTLAB_HOME": f"{tmp_path / 'home'}",
        "DOCKER_HOST": place.engine.base_url,
    }

    no_data = there.nightlab("resume", "y", "--attempts", "5")
    assert 2 == no_data.returncode
    assert "nightlab setup --program runs/y/program.md" in no_data.stderr.replace(
        f"{there.root}/", ""
    )
    _rewrite_ledger(
        there.session("y"), lambda text: text.replace(_image_of(text), "sha256:" + "0" * 64)
    )
    no_image = there.nightlab("resume", "y", "--attempts", "5")
    assert 3 == no_image.returncode
    assert "docker load" in no_image.stderr


def _image_of(ledger: str) -> str:
    image: str = json.loads(ledger.splitlines()[0])["event"]["image"]["image_id"]
    return image


# ---- an upgrade --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": 3}, "its schema_version is 3; this nightlab reads 2"),
        ({"type": "dreamt"}, "no event of type 'dreamt'"),
        ({"mood": "good"}, "cannot read its session_started: event.session_started.mood"),
    ],
)
def test_a_newer_ledger_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    place = _broken_session(tmp_path)

    def newer(line: dict[str, Any]) -> dict[str, Any]:
        return line | {"event": line["event"] | change} if line["seq"] == 0 else line

    _rewrite_lines(place.directory, newer)
    before = (place.directory / LEDGER_NAME).read_bytes()
    done = CliRunner().invoke(app, ["resume", "night", "--runs", str(tmp_path)])
    assert 3 == done.exit_code
    assert said in done.stderr
    assert "newer" in done.stderr
    assert before == (place.directory / LEDGER_NAME).read_bytes()


def test_settings_that_only_a_newer_nightlab_knows_are_refused_by_name(tmp_path: Path) -> None:
    place = _broken_session(tmp_path)

    def newer(line: dict[str, Any]) -> dict[str, Any]:
        if "settings" in line["event"]:
            line["event"]["settings"]["session"]["naps"] = 3
        return line

    _rewrite_lines(place.directory, newer)
    with pytest.raises(LedgerError) as refused:
        Ledger.open(place.directory)
    assert "session_started.settings.session.naps" in refused.value.message
    assert "Another version of nightlab wrote it" in refused.value.hint


def _broken_session(root: Path) -> Place:
    """A session that nightlab was killed in."""
    place = _short_place(root)
    lab = place.begin("tpe")
    assert isinstance(lab.ledger, CrashingLedger)
    lab.ledger.crash_at = 30
    with pytest.raises(Crash):
        _work(lab, place)
    return place


def _rewrite_lines(directory: Path, change: Any) -> None:
    """Change every line and chain the ledger anew."""
    path, previous, lines = directory / LEDGER_NAME, FIRST_PREVIOUS, []
    for text in path.read_text(encoding="utf-8").splitlines():
        line = change(json.loads(text)) | {"previous": previous}
        line["hash"] = previous = entry_hash(line)
        lines.append(canonical(line) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def _rewrite_ledger(directory: Path, change: Any) -> None:
    path = directory / LEDGER_NAME
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    _rewrite_lines(directory, lambda line: line)


# ---- two processes, and beginnings -------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ["resume", "night"],
        ["review", "night"],
        ["replay", "night", "1"],
        ["approve", "night", "--reason", "good"],
        ["reject", "night", "--reason", "bad"],
    ],
    ids=lambda words: words[0],
)
def test_whoever_writes_to_a_session_shuts_all_others_out(
    tmp_path: Path, command: list[str]
) -> None:
    place = _short_place(tmp_path)
    _work(place.begin("tpe"), place)
    git = tmp_path / "gitconfig"
    git.write_text("[user]\nname = Somebody\nemail = somebody@example.org\n")
    before = (place.directory / LEDGER_NAME).read_bytes()
    with Ledger.open(place.directory):
        done = CliRunner().invoke(
            app,
            [*command, "--runs", str(tmp_path)],
            env={"GIT_CONFIG_GLOBAL": str(git), "NIGHTLAB_HOME": str(tmp_path / "home")},
        )
    assert 3 == done.exit_code
    assert f"another process (pid {os.getpid()})" in done.stderr
    assert before == (place.directory / LEDGER_NAME).read_bytes()
    assert not (place.directory / "approved").exists()


@pytest.mark.parametrize("command", ["report", "audit"])
def test_whoever_only_reads_is_never_shut_out(tmp_path: Path, command: str) -> None:
    place = _short_place(tmp_path)
    _work(place.begin("tpe"), place)
    with Ledger.open(place.directory):
        done = CliRunner().invoke(app, [command, "night", "--runs", str(tmp_path)])
    assert 0 == done.exit_code, done.output


def test_a_session_that_another_process_has_just_begun_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = _short_place(tmp_path)
    place.begin("tpe").ledger.close()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda *_, **__: False)  # as it was when somebody looked
        with pytest.raises(FileExistsError):
            place.begin("tpe")
    assert 1 == len(read_ledger(place.directory))


@pytest.mark.parametrize("left", [b"", b'{"at":"2026'])
def test_a_session_whose_beginning_was_cut_off_says_how_to_start_anew(
    tmp_path: Path, left: bytes
) -> None:
    place = _short_place(tmp_path)
    place.directory.mkdir(parents=True)
    (place.directory / LEDGER_NAME).write_bytes(left)
    done = CliRunner().invoke(app, ["resume", "night", "--runs", str(tmp_path)])
    assert 2 == done.exit_code
    assert f"remove {place.directory}" in done.stderr.replace("\n", "")
    with pytest.raises(UsageError, match="already") as refused:
        place.begin("tpe")
    assert f"remove {place.directory}" in refused.value.hint


# ---- a full disk -------------------------------------------------------------------------------


class SmallDisk:
    """A file system of a few MB that can be filled to its last byte."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._filler = root / "filler"

    def fill(self, *, but_bytes: int = 0) -> None:
        with self._filler.open("ab", buffering=0) as file:
            for piece in (2**20, 2**14, 1):
                try:
                    while file.write(b"x" * piece) == piece:
                        pass
                except OSError:
                    continue
            if but_bytes:
                file.truncate(max(0, file.tell() - but_bytes))

    def make_room(self) -> None:
        self._filler.unlink(missing_ok=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    root = tmp_path / "disk"
    root.mkdir()
    options = f"size={SMALL_DISK_BYTES},nr_inodes=4000,mode=755"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(root)],
        check=False,
        capture_output=True,
    )
    if mounted.returncode != 0:
        pytest.skip(f"this system lets nobody mount: {mounted.stderr.decode().strip()}")
    try:
        yield SmallDisk(root)
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_at_any_event_stops_the_night_and_loses_nothing(
    small_disk: SmallDisk, tmp_path: Path
) -> None:
    twin = verdicts_of(_unbroken(tmp_path / "twin"))
    chance = random.Random(11)
    stopped_by: set[str] = set()
    for number in range(24):
        place = _short_place(small_disk.root / str(number))
        lab = place.begin("tpe")
        stopped_by.add(_work_until_the_disk_is_full(place, lab, small_disk, chance))
        small_disk.make_room()
        _work(place.resume(), place)
        entries = read_ledger(place.directory)
        assert [] == audit(place.directory, entries)
        assert twin == verdicts_of(entries)
        assert not _candidates_blamed(place)
        shutil.rmtree(place.root)
    assert {"ledger", "sandbox_fault"} <= stopped_by <= {"ledger", "sandbox_fault", "attempts"}


def test_a_disk_that_is_full_at_the_beginning_leaves_the_name_free(small_disk: SmallDisk) -> None:
    place = _short_place(small_disk.root / "place")
    place.runtime  # noqa: B018 - makes the data directories
    small_disk.fill()
    with pytest.raises((LedgerError, SandboxError)):
        place.begin("tpe")
    assert not place.directory.exists()
    small_disk.make_room()
    assert StopReason.ATTEMPTS is _work(place.begin("tpe"), place).reason


def test_a_workspace_on_a_full_disk_is_not_the_researchers_business(small_disk: SmallDisk) -> None:
    (small_disk.root / "train.py").write_text("X = 1\n")
    workspace = Workspace(small_disk.root, ("train.py",))
    small_disk.fill()
    with pytest.raises(SandboxError) as refused:
        workspace.write("train.py", b"X = 2\n" * 10_000)
    assert MAKE_ROOM == refused.value.hint
    assert "X = 1\n" == workspace.read_text("train.py")


def _work_until_the_disk_is_full(
    place: Place, lab: Lab, disk: SmallDisk, chance: random.Random
) -> str:
    """What stopped the night: its ledger could not be written, or its boxes' directories.

    With a little room left it may get to its end as well.
    """
    at, room = chance.randint(4, 60), chance.choice([0, 4_000, 9_000, 20_000])
    is_full = False

    def fill(_: Event) -> None:
        nonlocal is_full
        if len(lab.ledger.entries) >= at and not is_full:
            disk.fill(but_bytes=room)
            is_full = True

    assert isinstance(lab.ledger, CrashingLedger)
    lab.ledger.witness = fill
    try:
        ended = _work(lab, place, report=True)
    except LedgerError as error:
        return "ledger" if "room on the disk" in error.hint else error.message
    if ended.reason is StopReason.SANDBOX_FAULT:
        return "sandbox_fault" if MAKE_ROOM in ended.explanation else ended.explanation
    return ended.reason


def _candidates_blamed(place: Place) -> list[AttemptFinished]:
    """Attempts that failed in a way in which the unbroken night has none."""
    events = [entry.event for entry in read_ledger(place.directory)]
    return [e for e in events if isinstance(e, AttemptFinished) and "disk" in e.reason]


@pytest.mark.docker
@pytest.mark.parametrize("full", ["run directory", "output directory"])
def test_a_full_disk_is_the_hosts_fault_and_never_the_programs(
    full: str, small_disk: SmallDisk, engine: Any, image: Any, tmp_path: Path
) -> None:
    on_disk, elsewhere = small_disk.root / "it", tmp_path / "it"
    on_disk.mkdir()
    elsewhere.mkdir()
    runs, output = (on_disk, elsewhere) if full == "run directory" else (elsewhere, on_disk)
    code = "open('/out/model', 'wb').write(b'x' * 100_000)"
    spec = python_spec(code, image=image.image_id)
    executor = DockerExecutor(engine.base_url, engine.api_version, runs)
    small_disk.fill()
    with pytest.raises(SandboxError) as refused:
        executor.run(spec, output_dir=output)
    assert MAKE_ROOM == refused.value.hint
    assert [] == list(runs.iterdir())
    small_disk.make_room()
    shutil.rmtree(output)
    output.mkdir()
    assert "ok" == executor.run(spec, output_dir=output).outcome


@pytest.mark.docker
def test_a_command_whose_disk_is_full_says_what_to_do_and_goes_on_later(
    place: CommandLine,
    small_disk: SmallDisk,
) -> None:
    place.rewrite("workspace/train.py", "PAUSE_SECONDS = 0.0", "PAUSE_SECONDS = 1.5")
    runs = small_disk.root / "runs"
    words = ["--researcher", "tpe", "--session", "full", "--attempts", "2", "--runs", str(runs)]
    running = place.start("run", *words)
    ledger = runs / "full" / LEDGER_NAME
    wait_for(lambda: ledger.is_file() and b"attempt_started" in ledger.read_bytes())
    small_disk.fill()
    told, said = running.communicate(timeout=120)

    assert 3 == running.returncode, said
    assert "room on the disk" in " ".join((told + said).split()), (told, said)
    assert "Traceback" not in said
    small_disk.make_room()
    done = place.nightlab("resume", "full", "--runs", str(runs))
    assert 0 == done.returncode, done.stderr
    entries = read_ledger(runs / "full")
    assert 2 == len(fold(entries).completed)
    assert [] == audit(runs / "full", entries)


# ---- kill -9 -----------------------------------------------------------------------------------


@pytest.mark.docker
def test_a_process_killed_six_times_ends_with_the_result_of_one_that_was_not(
    place: CommandLine,
) -> None:
    place.foretell_seeds()
    words = ["--researcher", "tpe", "--seed", "11", "--attempts", "3"]
    unbroken = place.nightlab("run", *words, "--session", "twin")
    assert 0 == unbroken.returncode, unbroken.stderr
    chance = random.Random(6)
    running = place.start("run", *words, "--session", "cut")
    for _ in range(6):
        target = _events_in(place, "cut") + chance.randint(2, 12)
        _wait_for_events(place, "cut", target, running)
        running.send_signal(signal.SIGKILL)
        running.communicate()
        running = place.start("resume", "cut")
    _, said = running.communicate(timeout=120)

    assert 0 == running.returncode, said
    entries = read_ledger(place.session("cut"))
    assert verdicts_of(read_ledger(place.session("twin"))) == verdicts_of(entries)
    assert [] == audit(place.session("cut"), entries)
    assert 1 < len([e for e in entries if isinstance(e.event, AttemptInterrupted)])
    assert place.containers("cut") == []


def _wait_for_events(
    place: CommandLine,
    name: str,
    target: int,
    running: subprocess.Popen[str],
) -> None:
    wait_for(lambda: running.poll() is not None or _events_in(place, name) >= target)


def _events_in(place: CommandLine, name: str) -> int:
    path = place.session(name) / LEDGER_NAME
    return path.read_bytes().count(b"\n") if path.exists() else 0


# ---- nights of two attempts --------------------------------------------------------------------


def _short_place(root: Path, attempts: int = 3) -> Place:
    return Place(root, Clock(), {"session": {"attempts": attempts, "max_failures_in_a_row": 10}})


def _unbroken(root: Path) -> Any:
    place = _short_place(root)
    _work(place.begin("tpe"), place)
    return read_ledger(place.directory)


def _work(lab: Lab, place: Place, *, report: bool = False) -> SessionEnded:
    """One life of our process, without a language model."""

    def refresh() -> None:
        if report:  # as the command does: a report that fails is for the morning
            try:
                write_report(lab.worker.directory, lab.ledger.entries, lab.ledger.get_blob)
            except OSError:
                return

    return work(lab, place.program, refresh=refresh)
