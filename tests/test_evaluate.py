"""Tests of workspace/evaluate.py: the loss, the protocol, and what each way to cheat gets."""

import importlib.util
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
from types import ModuleType
from typing import Any

import numpy as np
import pytest

PROGRAM = Path(__file__).parents[1] / "workspace" / "evaluate.py"


def load_evaluate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nightlab_evaluate", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


evaluate: Any = load_evaluate()
Array = np.ndarray[Any, Any]
Predict = Callable[[Array], Array]
Side = Callable[[socket.socket], None]

VOCABULARY, BOS, CONTEXT = 41, 40, 32
PATIENT = evaluate.Patience(start_seconds=60.0, answer_seconds=60.0, total_seconds=120.0)
HASTY = evaluate.Patience(start_seconds=0.4, answer_seconds=0.4, total_seconds=0.8)


def write_data(folder: Path, stream: list[int], token_bytes: list[int], context: int) -> Path:
    folder.mkdir(exist_ok=True)
    np.array(stream, dtype="<u2").tofile(folder / "tokens.bin")
    meta = {
        "vocab_size": len(token_bytes),
        "bos_token": len(token_bytes) - 1,
        "context": context,
        "documents": [place for place, token in enumerate(stream) if token == len(token_bytes) - 1],
        "token_bytes": token_bytes,
        "bytes": sum(token_bytes[token] for token in stream),
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def habits(seed: int) -> Array:
    """Bigram probabilities of a made-up language; BOS predicts like any other token."""
    return np.random.default_rng(seed).dirichlet(np.full(BOS, 0.15), size=VOCABULARY)


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


def scored(side: Side, data: Path, patience: Any = PATIENT, seed: int = 3) -> Any:
    """Scores a model that runs in a thread and hangs up when it is done."""

    def run(connection: socket.socket) -> None:
        with connection, suppress(OSError):  # the scorer may hang up as soon as it knows
            side(connection)

    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=run, args=(theirs,))
    thread.start()
    with ours:
        result = evaluate.score(ours, data, seed, 0, patience)
    thread.join(10)
    assert not thread.is_alive()
    json.dumps(result, allow_nan=False)
    return result


def reason_for(side: Side, data: Path, patience: Any = PATIENT) -> str | None:
    result = scored(side, data, patience)
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
    # "é" as two one-byte tokens, "🙂" as one of four bytes, an empty one that is BOS, two documents
    token_bytes = [1, 1, 4, 3, 0]
    stream = [4, 0, 1, 2, 4, 3, 3, 2, 2]
    write_data(tmp_path, stream, token_bytes, 4)
    result = scored(answering(lambda ids: np.zeros((*ids.shape, 5), np.float32)), tmp_path)
    assert 7 == result["details"]["tokens"]
    assert 1 + 1 + 4 + 3 + 3 + 4 + 4 == result["details"]["bytes"]
    assert pytest.approx(7 * math.log2(5) / 20) == result["value"]


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


def test_probes_come_first_and_share_the_beginning_and_the_seam(data: Path) -> None:
    split = evaluate.read_split(data)
    plan = evaluate.make_plan(split, np.random.default_rng(5))
    where_true = {row: i for i, row in enumerate(plan.rows) if plan.is_true[i]}
    assert len(split.inputs) == len(where_true)
    natural = 0
    for item in np.flatnonzero(plan.cuts < CONTEXT):
        row, cut = plan.rows[item], plan.cuts[item]
        assert item < where_true[row]
        assert plan.inputs[item, :cut].tolist() == split.inputs[row, :cut].tolist()
        assert plan.inputs[item, cut] != split.inputs[row, cut]
        pairs = list(zip(split.targets.ravel(), split.targets.ravel()[1:], strict=False))
        natural += (plan.inputs[item, cut - 1], plan.inputs[item, cut]) in pairs
    assert evaluate.PROBES == np.count_nonzero(plan.cuts < CONTEXT)
    assert natural > 0.9 * evaluate.PROBES


def test_all_batches_are_full_and_rows_are_shuffled(data: Path) -> None:
    plan = evaluate.make_plan(evaluate.read_split(data), np.random.default_rng(5))
    assert 0 == len(plan.rows) % plan.batch_rows
    order = plan.rows[plan.is_true]
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.3


def test_knowing_the_seed_does_not_tell_the_plan(data: Path) -> None:
    split = evaluate.read_split(data)
    plans = [evaluate.make_plan(split, np.random.default_rng([3, secret])) for secret in (1, 2)]
    assert plans[0].rows.tolist() != plans[1].rows.tolist()


def test_a_probe_catches_one_position_in_a_hundred_with_high_probability() -> None:
    assert 0.99**evaluate.PROBES < 0.01


# Models that keep the contract


def test_an_honest_model_is_valid_and_does_not_move(data: Path) -> None:
    result = scored(answering(bigram), data)
    assert (True, None) == (result["valid"], result["reason"])
    assert 0.0 == result["details"]["largest_probe_difference"]
    assert 0.0 == result["details"]["largest_repeat_difference"]
    assert {"waiting", "computing"} == set(result["details"]["seconds"])


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


def test_looking_ahead_only_where_the_text_looks_natural_is_caught(data: Path) -> None:
    def plausible(ids: Array) -> Array:
        follows = np.concatenate([ids[:, 1:], ids[:, :1]], axis=1)
        return np.asarray(habits(1)[ids, np.minimum(follows, BOS - 1)] > 0.05)

    cheat = answering(lambda ids: looking_ahead(ids, plausible(ids), 8.0))
    assert "looks_ahead" == reason_for(cheat, data)


def test_looking_at_the_end_of_the_row_is_caught(data: Path) -> None:
    def seeing_the_end(ids: Array) -> Array:
        logits = bigram(ids)
        logits[..., 7] += (ids[:, -1:] % 2).astype(np.float32)
        return logits

    assert "looks_ahead" == reason_for(answering(seeing_the_end), data)


def test_adapting_to_the_text_that_passes_is_caught(data: Path) -> None:
    counts = np.ones((VOCABULARY, VOCABULARY))

    def adapting(ids: Array) -> Array:
        logits = np.log(counts / counts.sum(axis=1, keepdims=True))[ids].astype(np.float32)
        np.add.at(counts, (ids[:, :-1].ravel(), ids[:, 1:].ravel()), 1)
        return np.asarray(logits)

    assert "answers_change" == reason_for(answering(adapting), data)


def test_carrying_state_from_one_row_to_the_next_is_caught(data: Path) -> None:
    def stateful(ids: Array) -> Array:
        logits = bigram(ids)
        logits[1:, :, 3] += (ids[:-1, -1:] % 2).astype(np.float32)
        return logits

    assert "answers_change" == reason_for(answering(stateful), data)


def test_an_answer_that_depends_on_chance_is_caught(data: Path) -> None:
    random = np.random.default_rng(0)

    def noisy(ids: Array) -> Array:
        return np.asarray(bigram(ids) + random.normal(0, 1, (*ids.shape, VOCABULARY)))

    assert "answers_change" == reason_for(answering(noisy), data)


def test_replaying_remembered_answers_while_looking_ahead_is_caught(data: Path) -> None:
    remembered: dict[bytes, Array] = {}

    def replaying(ids: Array) -> Array:
        logits = looking_ahead(ids, always(ids), 20.0)
        for row, column in np.ndindex(ids.shape):
            beginning = ids[row, : column + 1].tobytes()
            logits[row, column] = remembered.setdefault(beginning, logits[row, column].copy())
        return logits

    assert "answers_from_memory" == reason_for(answering(replaying), data)


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
    next(requests(connection))
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
        time.sleep(0.25)
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
    answered = 0
    for number, ids in requests(connection):
        answered += len(ids)
        logits = bigram(ids).astype("<f4")
        header = (evaluate.MAGIC, evaluate.LOGITS, evaluate.FLOAT32, 0, number, *logits.shape)
        more = b"more" * 10_000 if answered == ITEMS else b""
        connection.sendall(evaluate.HEADER.pack(*header) + logits.tobytes() + more)


ITEMS = 768  # 188 rows, 512 probes, 32 repeats, filled up to batches of 64


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
    next(requests(connection))


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


def test_the_scorer_as_a_program_writes_one_sheet(data: Path, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=answering(bigram), args=(ours,))
    thread.start()
    done = subprocess.run(
        [sys.executable, PROGRAM, "score", "--data", data, "--output", tmp_path, "--seed", "3"],
        env={"NIGHTLAB_CHANNEL_FD": str(theirs.fileno()), "OMP_NUM_THREADS": "1"},
        pass_fds=[theirs.fileno()],
        timeout=120,
        check=False,
    )
    theirs.close()
    thread.join(10)
    ours.close()
    assert 0 == done.returncode
    assert ["score.json"] == [path.name for path in tmp_path.iterdir()]
    sheet = json.loads((tmp_path / "score.json").read_text())
    assert {"metric", "value", "valid", "reason", "explanation", "details"} == set(sheet)
    assert scored(answering(bigram), data)["value"] == sheet["value"]
    assert sheet["details"]["secret"] > 0


def test_a_fault_of_the_scorer_leaves_no_sheet(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    command = [str(PROGRAM), "score", "--data", str(tmp_path), "--output", str(tmp_path)]
    with ours, theirs:
        done = subprocess.run(
            [sys.executable, *command, "--seed", "3"],
            env={"NIGHTLAB_CHANNEL_FD": str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            capture_output=True,
            timeout=120,
            check=False,
        )
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
