"""Curves are bounded, finite, and keep the first and the last point."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.curves import MAX_POINTS, NAMES, CurveCollector, curve_of, packed, read_point, unpacked

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


def test_a_stored_curve_is_read_back_and_small() -> None:
    curve = curve_of(lines(5000))
    stored = packed(curve)
    assert len(stored) < 20_000
    for before, after in zip(curve, unpacked(stored), strict=True):
        assert after == pytest.approx(before)


@pytest.mark.parametrize(
    "stored", [b"", b"[]", b"{}", b'{"names": 1, "rows": 2}', b'{"names": ["a"], "rows": [[1, 2]]}']
)
def test_bytes_that_are_no_curve_are_refused(stored: bytes) -> None:
    with pytest.raises(ValueError, match=r".*"):
        unpacked(stored)


def test_an_empty_curve_is_stored_too() -> None:
    assert unpacked(packed([])) == []
    assert json.loads(packed([])) == {"names": [], "rows": []}
