"""The ledger keeps what it was given, and shows what was done to it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.record.chain import (
    FIRST_PREVIOUS,
    LEDGER_NAME,
    Clock,
    LedgerError,
    canonical,
    entry_hash,
    read_blob,
    read_ledger,
    steady_clock,
    utc_now,
)
from agent.record.events import (
    AttemptInterrupted,
    AttemptStarted,
    Event,
    Noticed,
    RetryWaited,
    Scored,
    SessionEnded,
    StopReason,
)
from agent.record.files import sync_directory
from agent.record.history import fold
from agent.record.ledger import Ledger
from tests.support import histories

NOON = datetime(2026, 3, 7, 12, 0, 0, 250000, tzinfo=UTC)
MADE = histories.night(4)
WRITTEN = "".join(canonical(e.model_dump(mode="json")) + "\n" for e in MADE.entries).encode()
LINES = WRITTEN.splitlines(keepends=True)

INTERRUPTIBLE = ("ledger.py", "history.py", "replacing.py")

BEGUN = AttemptStarted(
    attempt=1,
    kind="baseline",
    hypothesis="",
    researcher="tpe",
    files={},
    diff=None,
    parent=None,
    seeds=(),
)


def notice(text: str) -> Noticed:
    return Noticed(kind="test", explanation=text)


def damaged(directory: Path, written: bytes) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / LEDGER_NAME).write_bytes(written)
    return directory


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ledger")


def test_what_was_appended_is_read_back(tmp_path: Path) -> None:
    events = [entry.event for entry in MADE.entries]
    with Ledger.create(tmp_path / "night") as ledger:
        appended = [ledger.append(event) for event in events]
    read = read_ledger(tmp_path / "night")
    assert appended == read
    assert events == [entry.event for entry in read]


def test_a_step_of_the_clock_moves_no_event_of_a_night(tmp_path: Path) -> None:
    """The machine's clock says noon, then two hours earlier, then two later."""
    says = iter([NOON, NOON - timedelta(hours=2), NOON + timedelta(hours=2)])

    def hours_of(name: str, now: Clock) -> float:
        with Ledger.create(tmp_path / name, now) as ledger:
            for text in ("one", "two", "three"):
                ledger.append(notice(text))
            return ledger.history.time.active_seconds / 3600

    assert hours_of("steady", steady_clock(lambda: next(says))) < 0.1
    says = iter([NOON, NOON - timedelta(hours=2), NOON + timedelta(hours=2)])
    assert hours_of("as it is", lambda: next(says)) > 2
    with Ledger.create(tmp_path / "default") as ledger:
        assert ledger.now is not utc_now


def test_history_and_head_are_current_after_each_append_and_after_reopening(tmp_path: Path) -> None:
    with Ledger.create(tmp_path) as ledger:
        assert ledger.head == FIRST_PREVIOUS
        for entry in MADE.entries:
            ledger.append(entry.event)
        assert fold(ledger.entries) == ledger.history
        head, history = ledger.head, ledger.history
    with Ledger.open(tmp_path) as again:
        assert head == again.head
        assert history == again.history


def test_a_line_is_canonical_json_chained_by_hash(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, now=lambda: NOON) as ledger:
        first, second = ledger.append(notice("ä")), ledger.append(notice("b"))
    line = (tmp_path / LEDGER_NAME).read_text(encoding="utf-8").splitlines()[1]
    assert line == (
        '{"at":"2026-03-07T12:00:00.250000+00:00",'
        '"event":{"explanation":"b","kind":"test","type":"noticed"},'
        f'"hash":"{second.hash}","previous":"{first.hash}","seq":1}}'
    )
    assert second.hash == entry_hash(json.loads(line))
    assert first.previous == FIRST_PREVIOUS


def scored(details: dict[str, Any]) -> Scored:
    """A score whose details are what the scorer liked to write."""
    return histories.scored(1, 1, 2.0).model_copy(update={"details": details})


@given(st.floats(allow_nan=False, allow_infinity=False), st.text())
@settings(deadline=None, max_examples=50)
def test_any_float_and_any_text_survive_the_round_trip(
    scratch: Path, number: float, text: str
) -> None:
    directory = scratch / "floats"
    (directory / LEDGER_NAME).unlink(missing_ok=True)
    events: list[Event] = [
        BEGUN,
        scored({"n": number, text: [text, None, True, number]}),
        RetryWaited(conversation=1, error=text, wait_seconds=number),
    ]
    with Ledger.create(directory) as ledger:
        for event in events:
            ledger.append(event)
    assert events == [entry.event for entry in read_ledger(directory)]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_stored_as_null(tmp_path: Path, number: float) -> None:
    details = {"loss": number, "losses": [1.5, number]}
    with Ledger.create(tmp_path) as ledger:
        ledger.append(BEGUN)
        ledger.append(scored(details))
    event = read_ledger(tmp_path)[1].event
    assert isinstance(event, Scored)
    assert event.details == {"loss": None, "losses": [1.5, None]}
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical(number)


@given(st.integers(0, len(WRITTEN) - len(LINES[-1]) - 2), st.integers(1, 255))
@settings(deadline=None, max_examples=150)
def test_any_changed_byte_before_the_last_line_is_found(
    scratch: Path, position: int, flip: int
) -> None:
    changed = bytearray(WRITTEN)
    changed[position] ^= flip
    with pytest.raises(LedgerError, match=r"line \d+ \(seq \d+\)"):
        read_ledger(damaged(scratch / "byte", bytes(changed)))


@given(st.integers(1, len(LINES[-1])), st.integers(1, 255))
@settings(deadline=None, max_examples=80)
def test_a_changed_byte_in_the_last_line_is_found_or_changes_the_head(
    scratch: Path, from_end: int, flip: int
) -> None:
    changed = bytearray(WRITTEN)
    changed[-from_end] ^= flip
    directory = damaged(scratch / "last", bytes(changed))
    try:
        entries = read_ledger(directory)
    except LedgerError:
        return
    assert entries[-1].hash != MADE.head


@given(st.integers(0, len(LINES) - 2))
@settings(deadline=None, max_examples=20)
def test_a_removed_line_is_found(scratch: Path, number: int) -> None:
    kept = LINES[:number] + LINES[number + 1 :]
    with pytest.raises(LedgerError, match="missing, extra or moved"):
        read_ledger(damaged(scratch / "removed", b"".join(kept)))


@given(st.data())
@settings(deadline=None, max_examples=20)
def test_two_swapped_lines_are_found(scratch: Path, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(LINES) - 2))
    second = data.draw(st.integers(first + 1, len(LINES) - 1))
    lines = list(LINES)
    lines[first], lines[second] = lines[second], lines[first]
    with pytest.raises(LedgerError, match=rf"line {first + 1} \(seq {first}\)"):
        read_ledger(damaged(scratch / "swapped", b"".join(lines)))


def test_a_line_rewritten_with_a_fresh_hash_is_found_by_the_next_one(scratch: Path) -> None:
    line = json.loads(LINES[0])
    line["event"]["researcher"] = "someone else"
    line["hash"] = entry_hash(line)
    lines = [canonical(line).encode() + b"\n", *LINES[1:]]
    with pytest.raises(LedgerError, match=r"line 2 \(seq 1\): its `previous`"):
        read_ledger(damaged(scratch / "rewritten", b"".join(lines)))


def test_a_line_that_means_the_same_in_other_words_is_found(scratch: Path) -> None:
    lines = [LINES[0].replace(b'"seq":0', b'"seq": 0'), *LINES[1:]]
    with pytest.raises(LedgerError, match="not in the form"):
        read_ledger(damaged(scratch / "spaced", b"".join(lines)))


def test_an_event_of_a_newer_nightlab_is_named(tmp_path: Path) -> None:
    line = json.loads(LINES[0])
    line["event"]["schema_version"] = 3
    line["hash"] = entry_hash(line)
    directory = damaged(tmp_path, canonical(line).encode() + b"\n")
    with pytest.raises(LedgerError, match="its schema_version is 3; this nightlab reads 2"):
        Ledger.open(directory)


def test_a_cut_tail_is_not_damage_but_changes_the_head(scratch: Path) -> None:
    entries = read_ledger(damaged(scratch / "cut", b"".join(LINES[:-1])))
    assert entries == MADE.entries[:-1]
    assert entries[-1].hash != MADE.head


def test_a_last_line_torn_at_any_byte_is_cut_off_and_set_aside(tmp_path: Path) -> None:
    whole, last = b"".join(LINES[:-1]), LINES[-1]
    for length in range(1, len(last)):
        directory = damaged(tmp_path / str(length), whole + last[:length])
        assert read_ledger(directory) == MADE.entries[:-1]
        with Ledger.open(directory) as ledger:
            assert ledger.entries == MADE.entries[:-1]
        assert whole == (directory / LEDGER_NAME).read_bytes()
        assert last[:length] == (directory / "ledger.torn-1").read_bytes()


def test_a_last_line_of_unwritten_pages_is_cut_off(tmp_path: Path) -> None:
    whole, last = b"".join(LINES[:-1]), LINES[-1]
    directory = damaged(tmp_path, whole + bytes(len(last) - 9) + last[-9:])
    with Ledger.open(directory) as ledger:
        assert ledger.entries == MADE.entries[:-1]
        ledger.append(notice("on we go"))
    assert len(read_ledger(directory)) == len(LINES)


def test_torn_lines_of_several_nights_are_all_kept(tmp_path: Path) -> None:
    for piece in (b'{"at"', b'{"at":"2026'):
        with (damaged(tmp_path, b"".join(LINES)) / LEDGER_NAME).open("ab") as file:
            file.write(piece)
        Ledger.open(tmp_path).close()
    torn = [(tmp_path / f"ledger.torn-{n}").read_bytes() for n in (1, 2)]
    assert torn == [b'{"at"', b'{"at":"2026']


def test_damage_is_refused_without_touching_the_file(tmp_path: Path) -> None:
    written = b"".join([LINES[0], *LINES[2:]]) + b"torn"
    with pytest.raises(LedgerError) as caught:
        Ledger.open(damaged(tmp_path, written))
    assert "copy" in caught.value.hint
    assert written == (tmp_path / LEDGER_NAME).read_bytes()
    assert list(tmp_path.glob("ledger.torn-*")) == []


HOLDER = """
import sys
from pathlib import Path
from agent.record.ledger import Ledger
ledger = Ledger.open(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.readline()
ledger.close()
print("released", flush=True)
sys.stdin.readline()
"""


def test_a_second_process_is_turned_away_with_the_pid_of_the_first(tmp_path: Path) -> None:
    Ledger.create(tmp_path).close()
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LedgerError, match=rf"pid {holder.pid}\b"):
            Ledger.open(tmp_path)
        assert read_ledger(tmp_path) == []
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == "released\n"
        Ledger.open(tmp_path).close()
        holder.stdin.write("\n")


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    Ledger.create(tmp_path).close()
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        holder.kill()
        holder.wait()
    with Ledger.open(tmp_path) as ledger:
        ledger.append(notice("mine now"))


@contextmanager
def files_no_longer_than(limit_bytes: int) -> Iterator[None]:
    """A disk that is full, as far as this process can tell: writes stop in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def ignore(_number: int, _frame: FrameType | None) -> None:
        """The kernel's signal for it; the write's own error says the same."""

    handler = signal.signal(signal.SIGXFSZ, ignore)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_stops_the_append_and_keeps_the_ledger_valid(tmp_path: Path) -> None:
    with Ledger.create(tmp_path) as ledger:
        ledger.append(notice("before"))
        size = (tmp_path / LEDGER_NAME).stat().st_size
        with (
            files_no_longer_than(size + 100),
            pytest.raises(LedgerError, match="cannot be written") as caught,
        ):
            ledger.append(notice("x" * 1000))
        assert "Make room" in caught.value.hint
        assert size == (tmp_path / LEDGER_NAME).stat().st_size
        ledger.append(notice("after"))
        assert [entry.seq for entry in ledger.entries] == [0, 1]
    assert len(read_ledger(tmp_path)) == 2


# --- Ctrl-C in the middle ---


def is_broken_off(step: int, act: Callable[[], object]) -> bool:
    """Do something, with Ctrl-C before that bytecode of our own; whether it came to it."""
    left = step

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal left
        if Path(frame.f_code.co_filename).name not in INTERRUPTIBLE:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def append_if_possible(ledger: Ledger, event: Event) -> None:
    with suppress(LedgerError):
        ledger.append(event)


@contextmanager
def synced_directories() -> Iterator[list[Path]]:
    """The directories that were synced meanwhile, to the end."""
    synced: list[Path] = []

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        is_ours = frame.f_code is sync_directory.__code__
        if is_ours and event == "c_return" and argument is os.fsync:
            synced.append(frame.f_locals["directory"])

    sys.setprofile(profile)
    try:
        yield synced
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize(("disk", "lengths"), [("free", {1, 2}), ("full", {1})])
def test_an_append_broken_off_at_any_step_leaves_a_session_that_goes_on(
    tmp_path: Path, disk: str, lengths: set[int]
) -> None:
    """Free, a line is written whole; full, in two pieces, of which the disk takes the first."""
    known = [n for n, entry in enumerate(MADE.entries) if isinstance(entry.event, Scored)][1]
    event, stopped = (
        MADE.entries[known].event,
        AttemptInterrupted(is_box_lost=False, attempt=0, reason="stopped"),
    )
    begun = b"".join(LINES[:known])
    found = set()
    for step in count():
        directory = damaged(tmp_path / str(step), begun)
        limit = files_no_longer_than(len(begun) + 100) if disk == "full" else nullcontext()
        with Ledger.open(directory) as ledger:
            with limit:
                was_broken_off = is_broken_off(step, partial(append_if_possible, ledger, event))
            assert len(read_ledger(directory)) in (known, known + 1)
            ledger.append(stopped)
            assert fold(ledger.entries) == ledger.history
        assert ledger.entries == read_ledger(directory)
        later = [entry.event for entry in ledger.entries[known:]]
        assert later in ([stopped], [event, stopped])
        found.add(len(later))
        if not was_broken_off:
            break
    assert lengths == found
    assert step > 100


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_blob_whose_storing_was_broken_off_is_synced_before_an_event_can_name_it(
    tmp_path: Path,
) -> None:
    for step in count():
        with Ledger.create(tmp_path / str(step)) as ledger, synced_directories() as synced:
            was_broken_off = is_broken_off(step, partial(ledger.put_blob, b"a diff"))
            sha = ledger.put_blob(b"a diff")
        folder = tmp_path / str(step) / "blobs" / sha[:2]
        assert {folder, folder.parent} <= set(synced)
        assert b"a diff" == read_blob(tmp_path / str(step), sha)
        if not was_broken_off:
            break
    assert step > 50


def test_a_full_disk_leaves_no_half_blob(tmp_path: Path) -> None:
    with Ledger.create(tmp_path) as ledger:
        with files_no_longer_than(100), pytest.raises(LedgerError, match="blob"):
            ledger.put_blob(b"x" * 1000)
        assert [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()] == []


def test_an_existing_ledger_is_not_begun_again(tmp_path: Path) -> None:
    Ledger.create(tmp_path).close()
    with pytest.raises(LedgerError, match="already holds a ledger"):
        Ledger.create(tmp_path)
    Ledger.open(tmp_path).close()


def test_a_directory_without_a_ledger_is_named_and_left_alone(tmp_path: Path) -> None:
    for read in (Ledger.open, read_ledger):
        with pytest.raises(LedgerError, match="there is no ledger in"):
            read(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_closed_ledger_takes_no_event(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path)
    ledger.close()
    ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        ledger.append(SessionEnded(reason=StopReason.FINISHED, explanation=""))


@given(st.binary(max_size=5000))
@settings(deadline=None, max_examples=25)
def test_a_blob_comes_back_as_it_was_and_is_stored_once(scratch: Path, body: bytes) -> None:
    directory = scratch / "blobs"
    (directory / LEDGER_NAME).unlink(missing_ok=True)
    with Ledger.create(directory) as ledger:
        sha = ledger.put_blob(body)
        assert sha == ledger.put_blob(body)
        assert body == ledger.get_blob(sha)
    assert body == read_blob(directory, sha)


def test_a_changed_or_missing_blob_is_named(tmp_path: Path) -> None:
    with Ledger.create(tmp_path) as ledger:
        sha = ledger.put_blob(b"a diff")
        path = tmp_path / "blobs" / sha[:2] / sha[2:]
        path.write_bytes(b"a lie!")
        with pytest.raises(LedgerError, match=f"blob {sha} is damaged"):
            ledger.get_blob(sha)
        path.unlink()
        with pytest.raises(LedgerError, match=f"blob {sha} cannot be read"):
            ledger.get_blob(sha)


@pytest.mark.parametrize("name", ["../" * 8 + "etc/passwd", "", "A" * 64, "0" * 63])
def test_a_name_that_is_no_hash_reaches_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(LedgerError, match="not the name of a blob"):
        read_blob(tmp_path, name)
