"""Curves are bounded, finite, and keep the first and the last point."""

from __future__ import annotations

import json
import math
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.night.waiting import run_with_retries
from agent.record.curves import (
    MAX_POINTS,
    NAMES,
    Curve,
    CurveCollector,
    curve_of,
    packed,
    progress_read,
    read_point,
    unpacked,
)
from agent.record.events import Verdict
from agent.record.reported import likely_progress
from agent.report.activity import RunNotes
from agent.report.attempt_page import TextRoom, attempt_page
from sandbox.contract.run import Outcome
from tests.support.histories import night
from tests.support.labs import play
from tests.support.nights import Place

FORGED = (
    b'{"names": ["seconds", "loss"], "rows": [[1, NaN]]}',
    b'{"names": ["seconds", "loss"], "rows": [[-1, 2]]}',
    b'{"names": ["seconds", "loss"], "rows": [[1, 1e16]]}',
    b'{"names": ["seconds", "loss"], "rows": [[1, null]]}',
    b'{"names": ["seconds", "loss", "<b>"], "rows": [[1, 2, 3]]}',
)
GOOD = '{"seconds": 3, "loss": 2.5}\n{"seconds": 4, "loss": 2.0}\n'


def lines(count: int) -> str:
    row = '{{"step": {0}, "seconds": {0}.5, "loss": {1}}}\n'
    return "".join(row.format(n, 9 - n / count) for n in range(count))


@pytest.mark.parametrize("count", [1, 2, 499, 500, 501, 1000, 1001, 12_345])
def test_a_curve_of_any_length_keeps_first_and_last_and_few(count: int) -> None:
    curve = curve_of(lines(count))
    assert (curve[0]["step"], curve[-1]["step"]) == (0, count - 1)
    assert min(count, MAX_POINTS // 2) <= len(curve) <= MAX_POINTS
    steps = [point["step"] for point in curve]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("size", [1, 7, 64, 100_000])
def test_the_pieces_in_which_a_log_comes_do_not_matter(size: int) -> None:
    log, handed_on = lines(700).encode(), bytearray()
    collector = CurveCollector(handed_on.extend)
    for start in range(0, len(log), size):
        collector(log[start : start + size])
    assert collector.curve() == curve_of(lines(700))
    assert bytes(handed_on) == log


@pytest.mark.parametrize(
    "line",
    [
        '{"seconds": 1, "loss": NaN}',
        '{"seconds": 1, "loss": Infinity}',
        '{"seconds": 1, "loss": 1e999}',
        '{"seconds": -1, "loss": 1}',
        '{"seconds": "1", "loss": [1]}',
        '{"seconds": true, "loss": 1}',
        '{"seconds": 1, "loss": ' + "9" * 400 + "}",
        '{"seconds": 1, "loss": ' + "9" * 5000 + "}",
        '{"seconds": 1, "loss": 1' + " " * 1000 + "}",
        '{"a":' * 190 + "1" + "}" * 40,
        "{" + "[" * 900,
        "[1, 2]",
        "{\xff",
    ],
)
def test_a_line_that_cannot_be_true_leaves_no_point(line: str) -> None:
    assert curve_of(GOOD + line + "\n" + GOOD) == curve_of(GOOD + GOOD)


@pytest.mark.parametrize("seconds", ["9" * 400, "Infinity", "NaN", "-1", "true", '"1"', "[]"])
def test_no_progress_line_breaks_the_bar(tmp_path: Path, seconds: str) -> None:
    notes = RunNotes(tmp_path, lambda: 0.0)
    notes.begin("train", 1)
    notes.log(f'{{"seconds": {seconds}, "loss": 1}}\n'.encode())
    assert notes.seconds is None
    notes.log(b'{"seconds": 2, "loss": 1}\n')
    assert 2 == notes.seconds


def test_a_line_without_an_end_takes_no_memory() -> None:
    collector = CurveCollector(lambda _piece: None)
    for _ in range(200):
        collector(b"{" * 10_000)
    collector(b"\n" + GOOD.encode())
    assert len(collector.curve()) == 2
    assert len(collector._partial) == 0


def test_names_that_nobody_knows_are_not_kept() -> None:
    point = read_point(b'{"seconds": 1, "loss": 2, "<b>": 3, "lr": 0.1}')
    assert point == {"seconds": 1.0, "loss": 2.0, "lr": 0.1}


@given(st.binary(max_size=400))
def test_no_log_breaks_the_collector(log: bytes) -> None:
    collector = CurveCollector(lambda _piece: None)
    collector(GOOD.encode() + log + b"\n")
    for point in collector.curve():
        assert set(point) <= set(NAMES)
        assert all(math.isfinite(number) for number in point.values())


NUMBERS: st.SearchStrategy[object] = st.one_of(
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.sampled_from([0, -1, 7, 7.5, 1e15, 1.1e15, -1e300, "1", None, True, [], {}]),
)
ROWS = st.dictionaries(st.sampled_from([*NAMES, "<b>", ""]), NUMBERS, max_size=9)
GOOD_ROWS = st.fixed_dictionaries(
    {"step": st.integers(-3, 3), "seconds": st.floats(0, 1e15), "loss": st.floats(-1e15, 1e15)}
)


@given(st.lists(st.one_of(ROWS, GOOD_ROWS), max_size=60), st.integers(1, 40))
def test_whatever_is_said_a_curve_is_bounded_ordered_and_can_be_stored(
    rows: list[dict[str, object]], times: int
) -> None:
    said = [json.dumps(row) for row in rows] * times
    curve = curve_of("\n".join(said))
    points = [point for line in said if (point := read_point(line.encode())) is not None]
    assert len(curve) <= MAX_POINTS
    assert curve[:1] + curve[-1:] == points[:1] + points[-1:]
    remaining = iter(points)
    assert all(point in remaining for point in curve)
    for point in curve:
        assert {"seconds", "loss"} <= set(point) <= set(NAMES)
        assert all(abs(number) <= 1e15 for number in point.values())
        assert point["seconds"] >= 0
    stored = packed(curve)
    assert len(stored) <= 100_000
    for before, after in zip(curve, unpacked(stored), strict=True):
        assert after == pytest.approx(before, rel=1e-6)


def test_a_program_that_never_stops_talking_costs_little_and_keeps_its_shape() -> None:
    collector = CurveCollector(lambda _piece: None, max_lines=50_000)
    row, rows = '{{"seconds":{0},"loss":1}}\n', 1000
    for start in range(0, 60_000, rows):
        collector("".join(row.format(n) for n in range(start, start + rows)).encode())
    curve = collector.curve()
    assert MAX_POINTS // 2 <= len(curve) <= MAX_POINTS
    assert (0, 49_999) == (curve[0]["seconds"], curve[-1]["seconds"])
    gaps = {after["seconds"] - before["seconds"] for before, after in pairwise(curve[:-1])}
    assert 1 == len(gaps)


@pytest.mark.parametrize("verdict", Verdict)
def test_the_curves_of_every_verdict_are_shown(verdict: Verdict) -> None:
    made = night(8)
    shown = {
        page.attempt.number: page.curve is not None
        for page in (
            attempt_page(a, made.get_blob, TextRoom(10_000, 0)) for a in made.history.attempts
        )
        if page.attempt.finished is not None and page.attempt.finished.verdict is verdict
    }
    assert shown
    assert all(shown.values())


def test_the_curve_of_a_training_that_fails_is_stored_too(tmp_path: Path) -> None:
    lab = Place(tmp_path, changes={"economy": {"smoke": "off"}}).begin("random")
    with lab.ledger:
        run_with_retries(lab, "baseline", "the files as they are", "test")
        files = lab.workspace.candidate()
        lab.workspace.restore({**files, "train.py": files["train.py"] + b"\nX = 5.0\n"})
        failed = run_with_retries(lab, "candidate", "too far out", "test")
    trainings = [r for r in failed.runs if r.result.box == "train"]
    assert [Outcome.OUT_OF_MEMORY] == [run.result.outcome for run in trainings]
    for run in trainings:
        assert run.curve is not None
        said = [{"step": 1.0, "seconds": 0.1, "loss": 1.0}]
        assert said == unpacked(lab.ledger.get_blob(run.curve))


def test_a_stored_curve_is_read_back_and_small() -> None:
    curve = curve_of(lines(5000))
    stored = packed(curve)
    assert len(stored) < 20_000
    for before, after in zip(curve, unpacked(stored), strict=True):
        assert after == pytest.approx(before)


@pytest.mark.parametrize(
    "stored",
    [b"", b"[]", b"{}", b'{"names": 1, "rows": 2}', b'{"names": ["a"], "rows": [[1, 2]]}', *FORGED],
)
def test_bytes_that_are_no_curve_are_refused(stored: bytes) -> None:
    with pytest.raises(ValueError, match=r".*"):
        unpacked(stored)


def test_an_empty_curve_is_stored_too() -> None:
    assert unpacked(packed([])) == []
    assert json.loads(packed([])) == {"names": [], "rows": []}


# --- lines of other forms than JSON ---------------------------------------------------------------

PATTERN = r"iter (?P<step>\d+): loss (?P<loss>nan|\d+(?:,\d{3})*\.\d+)(?:, (?P<tokens>\d+) tokens)?"


def curve_by(pattern: str, *pieces: bytes) -> Curve:
    """The curve of a log that comes in these pieces, a second each."""
    seconds = iter(range(100))
    collector = CurveCollector(lambda _piece: None)
    with progress_read(pattern, collector, lambda: float(next(seconds))) as on_log:
        for piece in pieces:
            on_log(piece)
    return collector.curve()


def test_a_pattern_reads_other_lines_and_the_host_tells_the_seconds() -> None:
    curve = curve_by(
        PATTERN,
        b"starting\niter 0: loss 4.5\nit",
        b"er 10: loss 3.25, 4096 tokens\n\x1b[32miter 20: loss 3.0\x1b[0m\r",
        b"iter 30: loss nan\n" + 2000 * b"x" + b"iter 40: loss 1.0\niter 50: loss 1,000.5\n",
    )

    first, second, third, last = curve
    assert {"seconds": 1.0, "step": 0.0, "loss": 4.5} == first
    assert {"seconds": 2.0, "step": 10.0, "loss": 3.25, "tokens": 4096.0} == second
    assert (3.0, 20.0) == (third["loss"], third["step"])
    assert (1000.5, 50.0) == (last["loss"], last["step"])


def test_a_pattern_that_takes_too_long_ends_the_curve_and_nothing_else() -> None:
    began = time.monotonic()
    endless = b"a" * 60 + b"!\n"

    curve = curve_by("(?P<loss>[0-9.]+)$|(a+)+$", b"1.5\n", endless, *[b"2.5\n"] * 50)

    assert [1.5] == [point["loss"] for point in curve]
    assert time.monotonic() - began < 30


def test_without_a_pattern_a_log_goes_where_it_went() -> None:
    collector = CurveCollector(lambda _piece: None)
    with progress_read(None, collector) as on_log:
        assert on_log is collector


@pytest.mark.parametrize(
    ("form", "is_progress"),
    [
        ("iter {n}: loss 1.9223, time 43.1ms", True),
        ("step {n}: train loss 1.92, val loss 2.05", True),
        ("Train Epoch: {n} [0/60000 (0%)]\tLoss: 2.3", True),
        ("Epoch {n}/10: 100%|##| 9/9 [00:02, loss=0.5]", True),
        ("{{'step': {n}, 'loss': 0.31}}", True),
        ("loss of 2.3 percent in {n}", False),
        ("val_bpb: 0.{n}", False),
    ],
)
def test_a_pattern_for_progress_is_proposed_where_lines_repeat(
    form: str, is_progress: bool
) -> None:
    said = [form.format(n=n) for n in (1, 2, 3)]

    found = likely_progress(["begin", *said, "end"])

    assert is_progress == (found is not None)
    assert likely_progress(said[:1]) is None
    if found is not None:
        assert 3 == len(curve_by(found[1], *[f"{line}\n".encode() for line in said]))


def test_a_night_keeps_the_curves_that_a_pattern_reads(tmp_path: Path) -> None:
    pattern = {"pattern": r"step (?P<step>\d+) has loss (?P<loss>[\d.]+)"}
    place = Place(tmp_path, changes={"session": {"attempts": 1}, "progress": pattern})
    place.boxes.shows_progress = True

    def as_words(line: bytes) -> bytes:
        said = json.loads(line)
        return f"step {said['step']} has loss {said['loss']}\n".encode()

    place.boxes.log_line = as_words
    lab = place.begin("tpe")
    with lab.ledger:
        play(lab, place.program)
        baseline = lab.history.attempts[0]
        curve = unpacked(lab.ledger.get_blob(baseline.trainings[-1].curve or ""))

    assert [float(n) for n in range(1, 21)] == [point["step"] for point in curve]


@pytest.mark.parametrize("pattern", ["loss (", r"loss ([\d.]+)", r"(?P<loss>\d)(?P<other>\d)"])
def test_a_pattern_without_a_loss_is_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ValueError, match=r"no regular expression|needs a group"):
        Place(tmp_path, changes={"progress": {"pattern": pattern}})
