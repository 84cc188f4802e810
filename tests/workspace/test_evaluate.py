"""Tests of workspace/evaluate.py: the loss, the protocol, and what each way to cheat gets."""

import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.scorer import (
    BOS,
    CONTEXT,
    PROGRAM,
    VOCABULARY,
    Array,
    habits,
    load_evaluate,
    write_data,
)

evaluate: Any = load_evaluate()
Predict = Callable[[Array], Array]
Side = Callable[[socket.socket], None]

PATIENT = evaluate.Timeouts(start_seconds=60.0, answer_seconds=60.0, total_seconds=120.0)
HASTY = evaluate.Timeouts(start_seconds=0.4, answer_seconds=0.4, total_seconds=0.8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split of 12 documents in a language with habits, 6,000 tokens in all."""
    random, likely = np.random.default_rng(1), habits(1)
    stream: list[int] = []
    for length in random.multinomial(6000, np.full(12, 1 / 12)):
        stream.append(BOS)
        for _ in range(length):
            stream.append(int(random.choice(BOS, p=likely[stream[-1]])))
    sizes = [1 + token % 3 for token in range(BOS)] + [0]
    return write_data(tmp_path_factory.mktemp("data"), stream, sizes, CONTEXT)


def bigram(ids: Array) -> Array:
    """The honest model: it knows the language's habits."""
    logits = np.full((*ids.shape, VOCABULARY), -20.0, dtype=np.float32)
    logits[..., :BOS] = np.log(habits(1)[ids] + 1e-9)
    return logits


def looking_ahead(ids: Array, where: Array, gain: float) -> Array:
    """The honest answers, with the next token of the row made likelier at some positions."""
    logits = bigram(ids)
    rows, columns = np.nonzero(where[:, :-1])
    logits[rows, columns, ids[rows, columns + 1]] += gain
    return logits


def read_exactly(connection: socket.socket, length: int) -> bytes:
    received = b""
    while len(received) < length and (piece := connection.recv(length - len(received))):
        received += piece
    return received


def requests(connection: socket.socket) -> Iterator[tuple[int, Array]]:
    """Says ready, then gives each batch that is asked for."""
    connection.sendall(evaluate.HEADER.pack(evaluate.MAGIC, evaluate.READY, 0, 0, 0, 0, 0, 0))
    while True:
        raw = read_exactly(connection, evaluate.HEADER.size)
        if not raw:
            return
        _, kind, _, _, number, rows, columns, _ = evaluate.HEADER.unpack(raw)
        if kind == evaluate.END:
            return
        ids = np.frombuffer(read_exactly(connection, rows * columns * 4), "<i4")
        yield number, ids.reshape(rows, columns)


def asked_once(connection: socket.socket) -> None:
    """Says ready and reads one batch; the scorer may hang up first."""
    next(requests(connection), None)


def send_logits(
    connection: socket.socket, number: int, logits: Array, dtype: int = evaluate.FLOAT32
) -> None:
    header = (evaluate.MAGIC, evaluate.LOGITS, dtype, 0, number, *logits.shape)
    connection.sendall(evaluate.HEADER.pack(*header) + logits.tobytes())


def answering(predict: Predict) -> Side:
    def side(connection: socket.socket) -> None:
        for number, ids in requests(connection):
            send_logits(connection, number, predict(ids).astype("<f4"))

    return side


def scored(
    side: Side | tuple[Side, ...],
    data: Path,
    timeouts: Any = PATIENT,
    seed: int = 3,
    scorer: Any = evaluate,
    checks: int = 1,
    secret: int = 0,
) -> Any:
    """Scores a model that runs in a thread for each box, which hangs up when it is done."""

    def run(side: Side, connection: socket.socket) -> None:
        with connection, suppress(OSError):  # the scorer may hang up as soon as it knows
            side(connection)

    sides = iter(side if isinstance(side, tuple) else (side,) * (1 + checks))
    threads: list[threading.Thread] = []
    ours: list[socket.socket] = []

    def next_box() -> socket.socket:
        for thread in threads:  # a box is gone before the next one begins
            thread.join(10)
        end, theirs = socket.socketpair()
        threads.append(threading.Thread(target=run, args=(next(sides), theirs)))
        threads[-1].start()
        ours.append(end)
        return end

    try:
        result = scorer.score(
            next_box, data, seed, list(range(secret, secret + 1 + checks)), timeouts
        )
    finally:
        for end in ours:
            end.close()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    json.dumps(result, allow_nan=False)
    return result


def twice(make: Callable[[], Predict]) -> tuple[Side, Side]:
    """The same program in two processes: what one remembers, the other does not."""
    return answering(make()), answering(make())


def reason_for(side: Side | tuple[Side, Side], data: Path, timeouts: Any = PATIENT) -> str | None:
    result = scored(side, data, timeouts)
    assert (result["value"] is None) == (not result["valid"]) == (result["reason"] is not None)
    assert bool(result["explanation"]) == (not result["valid"])
    reason: str | None = result["reason"]
    return reason


# The value


def reference(predict: Predict, data: Path) -> tuple[float, int]:
    """Bits per byte the slow way, in float64 and with plain loops; and the tokens counted."""
    meta = json.loads((data / "meta.json").read_text())
    stream = np.fromfile(data / "tokens.bin", "<u2").astype(int).tolist()
    context, bos = meta["context"], meta["bos_token"]
    nats, counted = 0.0, 0
    for start in range(0, len(stream), context):
        targets = stream[start : start + context]
        answer = predict(np.array([[bos, *targets[:-1]]]))[0].astype(np.float64)
        for position, target in enumerate(targets):
            if target != bos:
                row = answer[position]
                top = row.max()
                nats += math.log(sum(math.exp(x - top) for x in row)) + top - row[target]
                counted += 1
    return nats / math.log(2) / meta["bytes"], counted


@pytest.mark.parametrize("scale", [1.0, 1e-3, 40.0])
def test_the_value_equals_a_float64_reference(data: Path, scale: float) -> None:
    result = scored(answering(lambda ids: bigram(ids) * scale), data)
    expected, counted = reference(lambda ids: bigram(ids) * np.float32(scale), data)
    assert pytest.approx(expected, rel=1e-6) == result["value"]
    assert counted == result["details"]["tokens"] == 6000


def test_the_value_does_not_depend_on_the_seed(data: Path) -> None:
    values = [scored(answering(bigram), data, seed=seed)["value"] for seed in (1, 2)]
    assert values[0] == values[1]


def test_adding_a_constant_to_the_logits_gains_nothing(data: Path) -> None:
    plain, lifted = (
        scored(answering(lambda ids, by=by: bigram(ids) + by), data)["value"]  # type: ignore[misc]
        for by in (np.float32(0), np.float32(1000))
    )
    assert pytest.approx(plain, rel=1e-4) == lifted


def test_bytes_are_counted_and_not_tokens(tmp_path: Path) -> None:
    # "é" as two one-byte tokens, "🙂" as one of four bytes, BOS without any, four documents
    token_bytes = [1, 1, 4, 3, 0]
    stream = [4, 0, 1, 2, 4, 3, 3, 2, 2] * 2
    write_data(tmp_path, stream, token_bytes, 4)
    result = scored(answering(lambda ids: np.zeros((*ids.shape, 5), np.float32)), tmp_path)
    assert 14 == result["details"]["tokens"]
    assert 2 * (1 + 1 + 4 + 3 + 3 + 4 + 4) == result["details"]["bytes"]
    assert pytest.approx(14 * math.log2(5) / 40) == result["value"]


def test_a_perfect_guess_costs_nothing_and_never_less(tmp_path: Path) -> None:
    write_data(tmp_path, [0, 1] * 40, [1, 1, 0], 8)

    def certain(ids: Array) -> Array:
        return np.eye(3, dtype=np.float32)[np.where(ids == 0, 1, 0)] * np.float32(3e38)

    result = scored(answering(certain), tmp_path)
    assert (0.0, True) == (result["value"], result["valid"])


def test_every_token_is_a_target_exactly_once(data: Path) -> None:
    split = evaluate.read_split(data)
    stream = np.fromfile(data / "tokens.bin", "<u2")
    assert stream[stream != BOS].tolist() == split.targets[split.counted].tolist()
    assert {BOS} == set(split.inputs[:, 0].tolist())
    assert (split.inputs[:, 1:] == split.targets[:, :-1]).all()


@pytest.mark.parametrize("change", [{"bytes": 1}, {"token_bytes": [1] * VOCABULARY}])
def test_a_byte_table_that_does_not_add_up_is_our_fault(
    data: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    meta = json.loads((data / "meta.json").read_text()) | change
    (tmp_path / "tokens.bin").write_bytes((data / "tokens.bin").read_bytes())
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="does not add up"):
        scored(answering(bigram), tmp_path)


# What is sent


def plans_of(data: Path, seed: int = 5) -> tuple[Any, Any, Any]:
    split, random = evaluate.read_split(data), np.random.default_rng(seed)
    true = evaluate.make_true_plan(split, random)
    return split, true, evaluate.make_check_plan(split, true, random)


def test_the_first_box_gets_every_row_as_it_is(data: Path) -> None:
    split, true, _ = plans_of(data)
    rows = len(split.inputs)
    assert list(range(rows)) == sorted(true.rows[:rows].tolist())
    assert (true.inputs == split.inputs[true.rows]).all()
    assert {CONTEXT} == set(true.cuts[:rows].tolist())
    assert {0} == set(true.cuts[rows:].tolist())


def test_the_second_box_gets_the_beginning_and_another_token_at_the_cut(data: Path) -> None:
    split, _, probe = plans_of(data)
    for item in np.flatnonzero(probe.cuts):
        row, cut = probe.rows[item], probe.cuts[item]
        assert probe.inputs[item, :cut].tolist() == split.inputs[row, :cut].tolist()
        if cut < CONTEXT:
            assert probe.inputs[item, cut] != split.inputs[row, cut]
            assert split.counted[row, cut - 1]


def test_the_second_box_is_asked_a_row_once_and_never_shown_what_follows_a_cut(data: Path) -> None:
    split, _, probe = plans_of(data)
    asked = np.flatnonzero(probe.cuts)
    tested = set(probe.rows[asked].tolist())
    assert len(tested) == len(asked) == int(len(split.inputs) * evaluate.TESTED_SHARE)
    lent = np.concatenate(
        [split.targets[row] for row in range(len(split.inputs)) if row not in tested]
    )
    text = "".join(map(chr, [*lent.tolist(), *lent.tolist()]))
    for item in asked:
        cut = probe.cuts[item]
        assert "".join(map(chr, probe.inputs[item, cut:].tolist())) in text


def test_a_row_that_stands_alone_has_no_row_of_the_split_beside_it(data: Path) -> None:
    split, _, probe = plans_of(data)
    rows = {row.tobytes() for row in split.inputs}
    batches = probe.inputs.reshape(-1, probe.batch_rows, CONTEXT)
    alone = probe.is_alone.reshape(-1, probe.batch_rows)
    assert evaluate.ALONE == alone.sum()
    for batch, marks in zip(batches, alone, strict=True):
        if marks.any():
            assert [bool(mark) for mark in marks] == [row.tobytes() in rows for row in batch]


def test_every_position_before_the_last_can_be_at_a_cut(data: Path) -> None:
    split = evaluate.read_split(data)
    found = {
        int(cut)
        for seed in range(30)
        for cut in evaluate.make_cuts(split, np.random.default_rng(seed))[0]
    }
    assert set(range(CONTEXT + 1)) == found


def test_what_the_two_boxes_saw_before_a_row_is_as_different_as_can_be(data: Path) -> None:
    _, true, probe = plans_of(data)
    here = {row: place for place, row in enumerate(true.rows[:188].tolist())}
    asked = np.flatnonzero((probe.cuts > 0) & ~probe.is_alone)
    order = [here[row] for row in probe.rows[asked].tolist()]
    assert np.corrcoef(order, np.arange(len(order)))[0, 1] < -0.5


def test_all_batches_are_full_and_rows_are_shuffled(data: Path) -> None:
    _, true, probe = plans_of(data)
    assert 0 == len(true.rows) % true.batch_rows
    assert 0 == len(probe.rows) % probe.batch_rows
    order = true.rows[:188]
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.3


def test_knowing_the_seed_does_not_tell_the_plan(data: Path) -> None:
    split, true, _ = plans_of(data)
    plans = [
        evaluate.make_check_plan(split, true, np.random.default_rng([3, secret]))
        for secret in (1, 2)
    ]
    assert plans[0].rows.tolist() != plans[1].rows.tolist()


def test_a_probe_catches_one_position_in_a_hundred_with_high_probability() -> None:
    assert 0.99**evaluate.PROBES < 0.005


# Models that keep the contract


def test_an_honest_model_is_valid_and_does_not_move(data: Path) -> None:
    result = scored(answering(bigram), data)
    assert (True, None) == (result["valid"], result["reason"])
    [check] = result["details"]["checks"]
    assert 0.0 == check["largest_difference_before_cut"]
    assert 0.0 == check["largest_difference_of_same_rows"]
    for times in (result["details"], check):
        assert 0 < times["load_seconds"] < times["model_seconds"]


@pytest.mark.parametrize("seed", range(5))
def test_rounding_as_coarse_as_bfloat16_is_no_cheating(data: Path, seed: int) -> None:
    random = np.random.default_rng(seed)

    def rounded(ids: Array) -> Array:
        logits = bigram(ids) * (1 + random.normal(0, 2**-9, (*ids.shape, VOCABULARY)))
        coarse: Array = logits.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        return coarse.view(np.float32)

    assert reason_for(answering(rounded), data) is None


def test_a_model_that_knows_nothing_is_valid(data: Path) -> None:
    flat = answering(lambda ids: np.zeros((*ids.shape, VOCABULARY), np.float32))
    assert reason_for(flat, data) is None


@pytest.mark.parametrize("checks", [0, 3])
def test_so_many_boxes_are_asked_as_there_are_checks(data: Path, checks: int) -> None:
    asked: list[int] = []

    def counting(connection: socket.socket) -> None:
        asked.append(1)
        answering(bigram)(connection)

    result = scored(counting, data, checks=checks)
    assert result["valid"]
    assert 1 + checks == len(asked) == len(result["details"]["secrets"])
    assert checks == len(result["details"]["checks"])


def test_a_screening_score_probes_nothing_and_has_the_same_value(data: Path) -> None:
    honest = scored(answering(bigram), data, checks=1)["value"]
    assert honest == scored(answering(bigram), data, checks=0)["value"]
    cheat = answering(lambda ids: looking_ahead(ids, always(ids), 20.0))
    assert scored(cheat, data, checks=0)["valid"]


def test_each_check_has_a_plan_of_its_own_and_is_held_against_the_first_box(data: Path) -> None:
    """Whoever answers otherwise in the second check alone is found there."""
    sides = (answering(bigram), answering(bigram), answering(a_little))
    result = scored(sides, data, checks=2)
    assert "answers_change" == result["reason"]
    assert 2 == len(result["details"]["checks"])
    assert scored(sides[:2], data)["valid"]


# Models that cheat


def always(ids: Array) -> Array:
    return np.ones(ids.shape, bool)


def test_looking_at_the_next_token_is_caught(data: Path) -> None:
    cheat = answering(lambda ids: looking_ahead(ids, always(ids), 20.0))
    assert "looks_ahead" == reason_for(cheat, data)


def test_looking_ahead_a_little_everywhere_is_caught(data: Path) -> None:
    cheat = answering(lambda ids: looking_ahead(ids, always(ids), 0.1))
    assert "looks_ahead" == reason_for(cheat, data)


def test_looking_ahead_at_one_position_in_a_hundred_is_caught(data: Path) -> None:
    def rarely(ids: Array) -> Array:
        before = np.concatenate([ids[:, :1], ids[:, :-1]], axis=1)
        return np.asarray((before * 7 + ids * 13 + np.arange(ids.shape[1]) * 29) % 100 == 0)

    cheat = answering(lambda ids: looking_ahead(ids, rarely(ids), 8.0))
    assert "looks_ahead" == reason_for(cheat, data)


def looking_at_the_dearest(share: float, data: Path) -> Predict:
    """Looks ahead at a share of all positions, where the honest answer costs the most."""
    split = evaluate.read_split(data)
    honest = bigram(split.inputs)
    costs = np.log(np.exp(honest).sum(2)) - np.take_along_axis(
        honest, split.targets[..., None], axis=2
    ).squeeze(2)
    dear = np.quantile(costs[:, :-1][split.counted[:, :-1]], 1 - share)

    def predict(ids: Array) -> Array:
        logits = bigram(ids)
        follows = np.roll(ids, -1, axis=1)
        here = np.take_along_axis(logits, follows[..., None], axis=2).squeeze(2)
        return looking_ahead(ids, np.log(np.exp(logits).sum(2)) - here > dear, 20.0)

    return predict


def test_who_looks_rarely_passes_one_check_often_and_several_hardly_ever(data: Path) -> None:
    def rarely(ids: Array) -> Array:
        before = np.concatenate([ids[:, :1], ids[:, :-1]], axis=1)
        return np.asarray((before * 7 + ids * 13 + np.arange(ids.shape[1]) * 29) % 97 == 0)

    cheat = answering(lambda ids: looking_ahead(ids, rarely(ids), 8.0))
    honest = scored(answering(bigram), data)["value"]

    def passed(checks: int) -> list[float]:
        found = [scored(cheat, data, checks=checks, secret=100 * n) for n in range(20)]
        return [one["value"] for one in found if one["valid"]]

    once = passed(checks=1)
    assert 2 <= len(once) <= 12  # 0.99 to the 116th is 0.31
    assert all(value < honest for value in once)
    assert [] == passed(checks=6)  # one time in a thousand


def test_what_can_be_hidden_is_what_the_dearest_positions_cost(data: Path) -> None:
    details = scored(answering(bigram), data)["details"]
    gains, probes = details["hidden_gain"], details["probes"]
    assert 8 == len(gains)
    assert gains == sorted(gains, reverse=True)
    for checks in (1, 3, 8):
        share = 1 - 0.001 ** (1 / (probes * checks))
        cheat = answering(looking_at_the_dearest(share, data))
        looked = scored(cheat, data, checks=0)["value"]
        gained = scored(answering(bigram), data, checks=0)["value"] - looked
        assert 0.7 * gains[checks - 1] < gained <= 1.01 * gains[checks - 1]


def test_looking_ahead_only_where_the_text_looks_natural_is_caught(data: Path) -> None:
    def plausible(ids: Array) -> Array:
        follows = np.concatenate([ids[:, 1:], ids[:, :1]], axis=1)
        return np.asarray(habits(1)[ids, np.minimum(follows, BOS - 1)] > 0.05)

    cheat = answering(lambda ids: looking_ahead(ids, plausible(ids), 8.0))
    assert "looks_ahead" == reason_for(cheat, data)


def seeing_the_end(ids: Array) -> Array:
    logits = bigram(ids)
    logits[..., 7] += (ids[:, -1:] % 2).astype(np.float32)
    return logits


def test_looking_at_the_end_of_the_row_is_caught(data: Path) -> None:
    assert "looks_ahead" == reason_for(answering(seeing_the_end), data)


def adapting(share: float) -> Predict:
    """Learns pairs of tokens from the rows it has seen, and believes them by a share."""
    counts = np.ones((VOCABULARY, VOCABULARY))

    def predict(ids: Array) -> Array:
        seen = counts / counts.sum(axis=1, keepdims=True)
        logits = np.log((1 - share) / VOCABULARY + share * seen)[ids].astype(np.float32)
        text = ids[ids[:, 0] == BOS]  # and nothing from nonsense
        np.add.at(counts, (text[:, :-1].ravel(), text[:, 1:].ravel()), 1)
        return np.asarray(logits)

    return predict


@pytest.mark.parametrize("share", [1.0, 0.05, 0.01])
def test_adapting_to_the_text_that_passes_is_caught(data: Path, share: float) -> None:
    assert "answers_change" == reason_for(twice(lambda: adapting(share)), data)


def test_carrying_state_from_one_row_to_the_next_is_caught(data: Path) -> None:
    def stateful(ids: Array) -> Array:
        logits = bigram(ids)
        logits[1:, :, 3] += (ids[:-1, -1:] % 2).astype(np.float32)
        return logits

    assert "answers_change" == reason_for(answering(stateful), data)


def test_an_answer_that_depends_on_chance_is_caught(data: Path) -> None:
    def noisy() -> Predict:
        random = np.random.default_rng()
        return lambda ids: np.asarray(bigram(ids) + random.normal(0, 0.2, (*ids.shape, VOCABULARY)))

    assert "answers_change" == reason_for(twice(noisy), data)


def replaying() -> Predict:
    """Looks ahead, and answers as before when a row's beginning comes again."""
    remembered: dict[bytes, Array] = {}

    def predict(ids: Array) -> Array:
        logits = looking_ahead(ids, always(ids), 20.0)
        for row, column in np.ndindex(ids.shape):
            beginning = ids[row, : column + 1].tobytes()
            logits[row, column] = remembered.setdefault(beginning, logits[row, column].copy())
        return logits

    return predict


def test_replaying_remembered_answers_while_looking_ahead_is_caught(data: Path) -> None:
    # Each process keeps its own first answer to a beginning that several rows share.
    assert "answers_change" == reason_for(twice(replaying), data)


def test_replaying_would_pass_if_one_process_answered_both(data: Path) -> None:
    one, lock = replaying(), threading.Lock()

    def shared(ids: Array) -> Array:
        with lock:
            return one(ids)

    side = answering(shared)
    assert reason_for((side, side), data) is None


# A cheat that one wall alone stops, and the same without the wall


def knowing_the_box(ids: Array, is_first: bool) -> Array:
    return looking_ahead(ids, always(ids), 20.0) if is_first else bigram(ids)


def test_knowing_which_box_it_is_in_helps_no_model(data: Path) -> None:
    first = answering(lambda ids: knowing_the_box(ids, True))
    second = answering(lambda ids: knowing_the_box(ids, False))
    assert "answers_change" == reason_for((first, second), data)


def a_little(ids: Array) -> Array:
    return looking_ahead(ids, always(ids), 0.1)


def company(ids: Array) -> Array:
    logits = bigram(ids)
    logits[1:, :, 3] += 0.55 * (ids[:-1, -1:] % 2).astype(np.float32)
    return logits


def numbers_that_are_none(ids: Array) -> Array:
    logits = bigram(ids)
    logits[..., -1] = -np.inf
    return logits


def common_in_the_batch(ids: Array) -> Array:
    """Mixes in a little of how often each token comes in the batch."""
    often = np.bincount(ids.ravel(), minlength=VOCABULARY) + 1.0
    flat = np.full((*ids.shape, VOCABULARY), 1 / VOCABULARY)
    return np.asarray(np.log(0.7 * flat + 0.3 * often / often.sum()).astype(np.float32))


RARE = 20
"""A token that few rows have in their second place."""


def worse(logits: Array, where: Array, nats: float) -> Array:
    """The logits, with answers at some places that are worse by so much for any text."""
    logits[..., :BOS] -= nats * where[..., None]
    logits[where, BOS] = math.log(-math.expm1(-nats))
    return logits


def at(rows: Array, column: int) -> Array:
    """One place of some rows."""
    return np.asarray(rows[:, None] & np.equal(np.arange(CONTEXT), column)[None, :])


def now_and_then(ids: Array) -> Array:
    """The last answer in very few rows depends on where in its batch the row stands."""
    odd = np.arange(len(ids)) % 2 == 1
    return worse(bigram(ids), at(odd & np.equal(ids[:, 1], RARE), CONTEXT - 1), 1.1)


def now_and_then_the_end(ids: Array) -> Array:
    """One early answer in very few rows depends on how the row ends."""
    even = np.equal(ids[:, -1] % 2, 0)
    return worse(bigram(ids), at(even & np.equal(ids[:, 1], RARE), 2), 1.2)


ALONE = {
    "one answer": (
        'if found["largest_difference_of_same_rows"] > LARGEST_DIFFERENCE',
        lambda: now_and_then,
        "answers_change", 4,
    ),
    "one answer before the cut": (
        'if found["largest_difference_before_cut"] > LARGEST_DIFFERENCE',
        lambda: now_and_then_the_end,
        "looks_ahead", 3,
    ),
    "the mean at the cut": (
        'if is_off(found, "mean_at_cut")', lambda: a_little, "looks_ahead", 0,
    ),
    "noise": (
        'if found["noise"] > LARGEST_NOISE', lambda: company, "answers_change", 1,
    ),
    "noise before the cut": (
        'if found["noise_before_cut"] > LARGEST_NOISE', lambda: seeing_the_end, "looks_ahead", 1,
    ),
    "company": (
        'if is_off(found, "mean_alone")', lambda: common_in_the_batch, "answers_change", 0,
    ),
    "learning": (
        'if is_off(found, "learnt")', lambda: adapting(0.01), "answers_change", 3,
    ),
    "finite numbers": (
        "if not (np.isfinite(highest).all() and np.isfinite(logits.min(axis=1)).all())",
        lambda: numbers_that_are_none,
        "not_finite", 0,
    ),
}  # fmt: skip
"""A wall, who is stopped by it, how, and a secret with whose plan no other wall sees it."""


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what the missing wall lets through
@pytest.mark.parametrize("name", ALONE)
def test_a_cheat_that_one_wall_stops_passes_without_it(data: Path, name: str) -> None:
    wall, make, reason, secret = ALONE[name]
    assert reason == scored(twice(make), data, secret=secret)["reason"]
    without = load_evaluate(wall, "if False")
    assert scored(twice(make), data, scorer=without, secret=secret)["reason"] is None


def test_a_mean_before_the_cut_catches_who_knows_the_text_by_heart(data: Path) -> None:
    """Each answer is a little worse before the place where a row leaves the text."""
    text = evaluate.read_split(data).inputs

    def by_heart(ids: Array) -> Array:
        alike = np.cumprod(ids[:, None, :] == text[None, :, :], axis=2).sum(axis=2).max(axis=1)
        ends = np.where(alike < CONTEXT, alike - 1, 0)
        return worse(bigram(ids), np.arange(CONTEXT)[None, :] < ends[:, None], 0.02)

    wall = 'if is_off(found, "mean_before_cut")'
    assert "looks_ahead" == reason_for(answering(by_heart), data)
    without = load_evaluate(wall, "if False")
    assert scored(twice(lambda: by_heart), data, scorer=without)["reason"] is None


def test_without_the_deadline_a_silent_model_is_waited_for(data: Path) -> None:
    without = load_evaluate("self.connection.settimeout(left_seconds)", "pass")

    def silent_for_long(connection: socket.socket) -> None:
        asked_once(connection)
        connection.settimeout(3 * HASTY.total_seconds)
        while connection.recv(1 << 16):
            pass

    began = time.monotonic()
    assert "too_slow" == scored(silent_for_long, data, HASTY)["reason"]
    assert time.monotonic() - began < 2 * HASTY.total_seconds
    began = time.monotonic()
    scored(silent_for_long, data, HASTY, scorer=without)
    assert time.monotonic() - began >= 3 * HASTY.total_seconds


# Models that break the protocol


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused(data: Path, value: float) -> None:
    def broken(ids: Array) -> Array:
        logits = bigram(ids)
        logits[-1, 0, 5] = value
        return logits

    assert "not_finite" == reason_for(answering(broken), data)


def test_huge_logits_are_only_bad_guesses(data: Path) -> None:
    def shouting(ids: Array) -> Array:
        logits = np.full((*ids.shape, VOCABULARY), -3e38, np.float32)
        logits[..., 0] = 3e38
        return logits

    result = scored(answering(shouting), data)
    assert (True, True) == (result["valid"], result["value"] > 1e37)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits[:, :, :-1],
        lambda logits: logits[:, :-1],
        lambda logits: logits[:-1],
        lambda logits: np.concatenate([logits, logits]),
    ],
)
def test_a_wrong_shape_is_refused(data: Path, change: Predict) -> None:
    side = answering(lambda ids: change(bigram(ids)))
    assert "wrong_shape" == reason_for(side, data)


def test_another_dtype_is_refused(data: Path) -> None:
    def side(connection: socket.socket) -> None:
        for number, ids in requests(connection):
            send_logits(connection, number, bigram(ids).astype("<f8"), dtype=3)

    assert "wrong_dtype" == reason_for(side, data)


def silent(connection: socket.socket) -> None:
    connection.recv(1, socket.MSG_PEEK)
    read_exactly(connection, 1 << 30)


def silent_after_ready(connection: socket.socket) -> None:
    asked_once(connection)
    read_exactly(connection, 1 << 30)


def dripping(connection: socket.socket) -> None:
    for _ in requests(connection):
        while True:
            connection.sendall(b"N")
            time.sleep(0.05)


def dripping_logits(connection: socket.socket) -> None:
    for number, ids in requests(connection):
        header = (evaluate.MAGIC, evaluate.LOGITS, evaluate.FLOAT32, 0, number, *ids.shape)
        connection.sendall(evaluate.HEADER.pack(*header, VOCABULARY))
        while True:
            connection.sendall(b"\0" * 100)
            time.sleep(0.01)


def slow_in_all(connection: socket.socket) -> None:
    for number, ids in requests(connection):
        time.sleep(0.35)
        send_logits(connection, number, bigram(ids).astype("<f4"))


@pytest.mark.parametrize("side", [silent, silent_after_ready, dripping_logits, slow_in_all])
def test_a_slow_or_silent_model_gets_a_verdict_in_time(data: Path, side: Side) -> None:
    began = time.monotonic()
    assert "too_slow" == reason_for(side, data, HASTY)
    assert time.monotonic() - began < 5


def flooding(connection: socket.socket) -> None:
    while True:
        connection.sendall(os.urandom(1 << 16))


def flooding_later(connection: socket.socket) -> None:
    for number, ids in requests(connection):
        send_logits(connection, number, bigram(ids).astype("<f4"))
        send_logits(connection, number, bigram(ids).astype("<f4"))


def answering_before_the_question(connection: socket.socket) -> None:
    for number, ids in requests(connection):
        send_logits(connection, number + 1, bigram(ids).astype("<f4"))


def sending_too_much_at_the_end(connection: socket.socket) -> None:
    for number, ids in requests(connection):
        logits = bigram(ids).astype("<f4")
        header = (evaluate.MAGIC, evaluate.LOGITS, evaluate.FLOAT32, 0, number, *logits.shape)
        more = b"more" * 10_000 if number == LAST_BATCH else b""
        connection.sendall(evaluate.HEADER.pack(*header) + logits.tobytes() + more)


LAST_BATCH = 2  # 188 rows in batches of 64


@pytest.mark.parametrize(
    "side", [flooding, flooding_later, answering_before_the_question, sending_too_much_at_the_end]
)
def test_what_was_not_asked_for_is_refused(data: Path, side: Side) -> None:
    assert "bad_message" == reason_for(side, data)


def test_a_trickle_of_nonsense_is_refused(data: Path) -> None:
    assert reason_for(dripping, data, HASTY) in ("bad_message", "too_slow")


def gone_at_once(connection: socket.socket) -> None:
    connection.close()


def gone_after_ready(connection: socket.socket) -> None:
    asked_once(connection)


def gone_in_the_middle(connection: socket.socket) -> None:
    for number, ids in requests(connection):
        logits = bigram(ids).astype("<f4")
        header = (evaluate.MAGIC, evaluate.LOGITS, evaluate.FLOAT32, 0, number, *logits.shape)
        connection.sendall(evaluate.HEADER.pack(*header) + logits.tobytes()[:1000])
        if number == 2:
            return
        connection.sendall(logits.tobytes()[1000:])


@pytest.mark.parametrize("side", [gone_at_once, gone_after_ready, gone_in_the_middle])
def test_a_model_that_hangs_up_has_no_score(data: Path, side: Side) -> None:
    assert "hung_up" == reason_for(side, data)


@pytest.mark.parametrize(("side", "asked"), [(gone_at_once, False), (gone_after_ready, True)])
def test_the_scorer_tells_whether_a_model_was_sent_anything(
    data: Path, side: Side, asked: bool
) -> None:
    assert asked == (scored(side, data)["details"]["batches_asked"] > 0)


def run_as_a_program(data: Path, output: Path, sockets: int) -> subprocess.CompletedProcess[bytes]:
    """The scorer in a process of its own, with honest models behind so many sockets."""
    channel, bringer = socket.socketpair()
    pairs = [socket.socketpair() for _ in range(sockets)]
    for _, theirs in pairs:
        socket.send_fds(bringer, [b"a model box"], [theirs.fileno()])
    if not pairs:
        bringer.sendall(b"an answer")

    def side(connection: socket.socket) -> None:
        with suppress(OSError):  # the scorer may end before it asks
            answering(bigram)(connection)

    threads = [threading.Thread(target=side, args=(ours,)) for ours, _ in pairs]
    for thread, (_, theirs) in zip(threads, pairs, strict=True):
        theirs.close()
        thread.start()
    with channel, bringer:
        done = subprocess.run(
            [
                *(sys.executable, PROGRAM, "score", "--data", data, "--output", output),
                *("--seed", "3", "--checks", "1"),
            ],
            env={"NIGHTLAB_CHANNEL_FD": str(channel.fileno()), "OMP_NUM_THREADS": "1"},
            pass_fds=[channel.fileno()],
            capture_output=True,
            timeout=120,
            check=False,
        )
    for thread, (ours, _) in zip(threads, pairs, strict=True):
        thread.join(10)
        ours.close()
    return done


def test_the_scorer_as_a_program_writes_one_sheet(data: Path, tmp_path: Path) -> None:
    done = run_as_a_program(data, tmp_path, 2)
    assert (0, b"") == (done.returncode, done.stderr)
    assert ["score.json"] == [path.name for path in tmp_path.iterdir()]
    sheet = json.loads((tmp_path / "score.json").read_text())
    assert {"metric", "value", "valid", "reason", "explanation", "details"} == set(sheet)
    assert scored(answering(bigram), data)["value"] == sheet["value"]
    assert all(secret > 0 for secret in sheet["details"]["secrets"])
    assert 2 == len(set(sheet["details"]["secrets"]))


def test_one_model_box_is_too_few_and_the_message_says_what_to_do(
    data: Path, tmp_path: Path
) -> None:
    done = run_as_a_program(data, tmp_path, 0)
    assert 1 == done.returncode
    assert b"set model_boxes = 2 in [scoring]" in done.stderr
    assert [] == list(tmp_path.iterdir())


def test_a_fault_of_the_scorer_leaves_no_sheet(tmp_path: Path) -> None:
    done = run_as_a_program(tmp_path, tmp_path, 2)
    assert 1 == done.returncode
    assert b"FileNotFoundError" in done.stderr
    assert [] == list(tmp_path.iterdir())


def test_a_verdict_does_not_wait_for_an_answer_that_no_longer_matters(data: Path) -> None:
    def broken_then_silent(connection: socket.socket) -> None:
        for number, ids in requests(connection):
            if number:
                read_exactly(connection, 1 << 30)
                return
            send_logits(connection, number, np.full((*ids.shape, VOCABULARY), np.nan, "<f4"))

    began = time.monotonic()
    assert "not_finite" == reason_for(broken_then_silent, data)
    assert time.monotonic() - began < 10
