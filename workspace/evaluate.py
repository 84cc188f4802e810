"""Scores a candidate in bits per byte and catches cheating.

    python3 evaluate.py model --workspace DIR --checkpoint DIR --device cpu
    python3 evaluate.py score --data DIR --output DIR --seed N

Two processes in two boxes, joined by one socket (descriptor $NIGHTLAB_CHANNEL_FD). The scorer sends
token ids and gets logits; it alone has targets, byte counts and the loss, and writes score.json. It
trusts nothing it is sent: whatever the model does ends in a verdict. A fault of the scorer itself
ends in a traceback and no score.json.

Rows: the split's tokens cut into windows of `context`, across document borders, in random order.
A row's inputs are BOS and then its targets moved by one, so every byte is scored exactly once. BOS
is never counted.

Probes: a row contains its own targets one position on. So, before the true row and mixed among
others, PROBES rows are sent whose end is replaced by other text of the split, taken from where the
two tokens before it are the same, so that the seam reads naturally. Before the cut, answers must
not move; the last position before it has a true and a planted successor, so it tests looking one
ahead. A model that looks ahead at a share s of the positions is missed with probability
(1 - s) ** PROBES: 0.6 % for one position in a hundred. Some rows are sent twice as they are.

A model that looks ahead and also replays its answer when a row's beginning comes again is not seen
by comparing; the planted tokens then look likelier than the true ones, and that is what it is
caught by when it does so at about a quarter of the positions.
"""

import argparse
import concurrent.futures
import contextlib
import importlib.util
import json
import math
import os
import secrets
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

METRIC = "bits_per_byte"
PROBES = 512
REPEATS = 32
BATCH_BYTES = 16 << 20  # of logits in one answer, so that memory is bounded for any vocabulary
BATCH_ROWS = 64
# In nats. A row in other company may move by rounding: one step of bfloat16 is 0.125 for logits of
# 16 to 32. Two steps are let pass, unless they point one way on the whole: a gain has to.
LARGEST_DIFFERENCE = 0.25
LARGEST_MEAN_AT_CUT = 0.01
LARGEST_MEAN_BEFORE_CUT = 0.002
MEMORY_ERRORS = 6.0  # standard errors

HEADER = struct.Struct("<4sBBHIIII")  # magic, kind, dtype, 0, number, rows, columns, vocabulary
MAGIC = b"NLE1"
READY, IDS, LOGITS, END = 1, 2, 3, 4
HUNG_UP = "the model box ended before it had answered: see its log"
NO_DTYPE, INT32, FLOAT32 = 0, 1, 2


class InvalidError(Exception):
    """The model broke the contract: a reason as a code, and a sentence."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Patience:
    """How long the scorer waits: for the first answer (loading included), for any other, in all."""

    start_seconds: float
    answer_seconds: float
    total_seconds: float


@dataclass(frozen=True)
class Split:
    """What is scored. Tokens [rows, context]; a target that is BOS is not counted."""

    inputs: np.ndarray
    targets: np.ndarray
    counted: np.ndarray
    bos_token: int
    vocab_size: int
    total_bytes: int


@dataclass(frozen=True)
class Plan:
    """What is sent, in this order; each item shows a row up to its cut, or the whole row."""

    inputs: np.ndarray
    rows: np.ndarray
    cuts: np.ndarray
    is_true: np.ndarray
    batch_rows: int


@dataclass
class Measured:
    """Nats per item and position, and of each probe's planted token; seconds spent."""

    nats: np.ndarray
    planted_nats: np.ndarray
    seconds: dict[str, float] = field(default_factory=lambda: {"waiting": 0.0, "computing": 0.0})


# What is sent


def read_split(folder: Path) -> Split:
    """Reads a split and checks that its byte table adds up."""
    meta = json.loads((folder / "meta.json").read_text())
    stream = np.fromfile(folder / "tokens.bin", dtype="<u2").astype(np.int32)
    bos, context = int(meta["bos_token"]), int(meta["context"])
    token_bytes = np.array(meta["token_bytes"], dtype=np.int64)
    if token_bytes[stream].sum() != meta["bytes"] or token_bytes[bos] != 0 or meta["bytes"] < 1:
        raise ValueError(f"{folder}: the byte table does not add up: prepare the data again")
    padding = np.full(-len(stream) % context, bos, dtype=np.int32)
    targets = np.concatenate([stream, padding]).reshape(-1, context)
    starts = np.full((len(targets), 1), bos, dtype=np.int32)
    inputs = np.concatenate([starts, targets[:, :-1]], axis=1)
    return Split(inputs, targets, targets != bos, bos, int(meta["vocab_size"]), int(meta["bytes"]))


def make_plan(split: Split, random: np.random.Generator) -> Plan:
    """Mixes true rows, probes and repeats; all batches are full, so they round alike."""
    rows, context = split.inputs.shape
    batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES // (context * split.vocab_size * 4)))
    probes = make_probes(split, random)
    repeats = random.integers(rows, size=REPEATS + -(rows + len(probes) + REPEATS) % batch_rows)
    probed = np.array([row for row, _, _ in probes], dtype=np.int64)
    shown = np.concatenate([np.arange(rows), probed, repeats])
    cuts = np.full(len(shown), context)
    inputs = split.inputs[shown]
    for item, (_, cut, end) in enumerate(probes, start=rows):
        cuts[item], inputs[item, cut:] = cut, end
    when = random.random(len(shown))
    for item, (row, _, _) in enumerate(probes, start=rows):
        when[item], when[row] = min(when[item], when[row]), max(when[item], when[row])
    order = np.argsort(when)
    is_true = np.arange(len(shown)) < rows
    return Plan(inputs[order], shown[order], cuts[order], is_true[order], batch_rows)


def make_probes(split: Split, random: np.random.Generator) -> list[tuple[int, int, np.ndarray]]:
    """Draws rows, cuts and the text that replaces the inputs from the cut on."""
    context = split.inputs.shape[1]
    stream = split.targets.ravel()
    columns = np.arange(len(stream)) % context
    places = np.flatnonzero(split.counted.ravel() & (columns < context - 1))
    before = [np.roll(stream, 1).astype(np.int64), np.roll(stream, 2).astype(np.int64)]
    alike = [by_key(before[1] * split.vocab_size + before[0]), by_key(before[0])]
    probes = []
    for place in random.choice(places, size=PROBES):
        other = find_other(int(place), stream, alike, random)
        cut = int(columns[place]) + 1
        end = stream[(other + np.arange(context - cut)) % len(stream)]
        probes.append((int(place) // context, cut, end))
    return probes


def by_key(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The keys, their sorted order and the sorted keys: finds all places with one key."""
    order = np.argsort(keys, kind="stable")
    return keys, order, keys[order]


def find_other(
    place: int,
    stream: np.ndarray,
    alike: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
    random: np.random.Generator,
) -> int:
    """Finds where other text goes on after the same two tokens, else after one, else anywhere."""
    for keys, order, in_order in alike:
        first, last = (np.searchsorted(in_order, keys[place], side) for side in ("left", "right"))
        for choice in random.integers(first, last, size=32):
            if stream[order[choice]] != stream[place]:
                return int(order[choice])
    different = np.flatnonzero(stream != stream[place])
    if not len(different):
        raise ValueError("all tokens of the split are equal: prepare other data")
    return int(random.choice(different))


# The channel


class Channel:
    """The scorer's end of the socket: every wait has a deadline, every length is known."""

    def __init__(self, connection: socket.socket, patience: Patience) -> None:
        self.connection, self.patience = connection, patience
        self.last_moment = time.monotonic() + patience.total_seconds
        self.deadline = min(self.last_moment, time.monotonic() + patience.start_seconds)

    def exchange(self, number: int, ids: np.ndarray, logits: np.ndarray) -> None:
        """Sends a batch and fills `logits` with the answer.

        Raises: InvalidError.
        """
        if number:  # the first answer shares the time for loading: compilers work then
            self.deadline = min(self.last_moment, time.monotonic() + self.patience.answer_seconds)
        header = HEADER.pack(MAGIC, IDS, INT32, 0, number, *ids.shape, logits.shape[2])
        self.guarded(self.connection.sendall, header + ids.astype("<i4").tobytes())
        self.expect(LOGITS, FLOAT32, number, logits.shape)
        self.fill(memoryview(logits).cast("B"))

    def expect(self, kind: int, dtype: int, number: int, shape: tuple[int, ...]) -> None:
        """Reads a header that leaves the model no choice."""
        raw = bytearray(HEADER.size)
        self.fill(memoryview(raw))
        magic, got_kind, got_dtype, zero, got_number, *got_shape = HEADER.unpack(raw)
        if (magic, got_kind, zero, got_number) != (MAGIC, kind, 0, number):
            raise InvalidError("bad_message", "the model box sent something else than an answer")
        if got_dtype != dtype:
            raise InvalidError("wrong_dtype", "the logits are not float32")
        if tuple(got_shape) != shape:
            raise InvalidError("wrong_shape", f"the logits are {got_shape}, not {list(shape)}")

    def fill(self, view: memoryview) -> None:
        """Receives exactly as many bytes as fit."""
        while view:
            received = self.guarded(self.connection.recv_into, view)
            if not received:
                raise InvalidError("hung_up", HUNG_UP)
            view = view[received:]

    def guarded(self, act: Callable[[Any], Any], argument: object) -> Any:
        """Does one thing with the socket before the deadline."""
        left_seconds = self.deadline - time.monotonic()
        try:
            if left_seconds <= 0:
                raise TimeoutError
            self.connection.settimeout(left_seconds)
            return act(argument)
        except TimeoutError:
            raise InvalidError("too_slow", "the model box did not answer in time") from None
        except OSError:
            raise InvalidError("hung_up", HUNG_UP) from None

    @contextlib.contextmanager
    def hanging_up_on_error(self) -> Iterator[None]:
        """Ends what is under way in the other thread as soon as the verdict is known."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            raise

    def finish(self) -> None:
        """Says goodbye; nothing may have come unasked."""
        self.connection.setblocking(False)
        try:
            unasked = bool(self.connection.recv(1))
        except OSError:  # nothing there, or nobody any more: all answers are in
            unasked = False
        if unasked:
            raise InvalidError("bad_message", "the model box sent more than it was asked for")
        with contextlib.suppress(OSError):
            self.connection.sendall(HEADER.pack(MAGIC, END, NO_DTYPE, 0, 0, 0, 0, 0))


# The loss


def nats_of(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Negative log-probability of each target: logits [n, vocabulary] (overwritten), targets [n].

    Raises: InvalidError when a logit is NaN or infinite.
    """
    highest = logits.max(axis=1)
    if not (np.isfinite(highest).all() and np.isfinite(logits.min(axis=1)).all()):
        raise InvalidError("not_finite", "a logit is NaN or infinite")
    picked = logits[np.arange(len(targets)), targets].astype(np.float64)
    with np.errstate(
        over="ignore", under="ignore"
    ):  # two finite logits may lie further apart than float32
        np.subtract(logits, highest[:, None], out=logits)
        np.exp(logits, out=logits)
    return np.log(logits.sum(axis=1).astype(np.float64)) - (picked - highest)


def measure(split: Split, plan: Plan, channel: Channel) -> Measured:
    """Gets every item answered; the next batch is on its way while this one is computed."""
    items, context = plan.inputs.shape
    measured = Measured(np.zeros((items, context)), np.zeros(items))
    shape = (plan.batch_rows, context, split.vocab_size)
    arriving, arrived = np.empty(shape, "<f4"), np.empty(shape, "<f4")
    channel.expect(READY, NO_DTYPE, 0, (0, 0, 0))
    with concurrent.futures.ThreadPoolExecutor(1) as courier, channel.hanging_up_on_error():
        coming = courier.submit(channel.exchange, 0, plan.inputs[: plan.batch_rows], arriving)
        for start in range(0, items, plan.batch_rows):
            began = time.monotonic()
            coming.result()
            measured.seconds["waiting"] += time.monotonic() - began
            began = time.monotonic()
            arriving, arrived = arrived, arriving
            following = plan.inputs[start + plan.batch_rows :][: plan.batch_rows]
            if len(following):
                number = start // plan.batch_rows + 1
                coming = courier.submit(channel.exchange, number, following, arriving)
            for slot, logits in enumerate(arrived):
                measure_item(split, plan, start + slot, logits, measured)
            measured.seconds["computing"] += time.monotonic() - began
    channel.finish()
    return measured


def measure_item(
    split: Split, plan: Plan, item: int, logits: np.ndarray, measured: Measured
) -> None:
    """Computes one row's nats up to its cut."""
    cut = plan.cuts[item]
    if cut < len(logits):
        planted = plan.inputs[item, cut : cut + 1]
        measured.planted_nats[item] = nats_of(logits[cut - 1 : cut].copy(), planted)[0]
    measured.nats[item, :cut] = nats_of(logits[:cut], split.targets[plan.rows[item], :cut])


# The verdict


def compare(split: Split, plan: Plan, measured: Measured) -> dict[str, float]:
    """Says by how many nats probes and repeats moved against the true rows."""
    true_nats = in_row_order(plan, measured)
    moved = np.where(split.counted[plan.rows], measured.nats - true_nats[plan.rows], 0.0)
    moved[np.arange(moved.shape[1]) >= plan.cuts[:, None]] = 0.0
    probes = np.flatnonzero(plan.cuts < moved.shape[1])
    last = plan.cuts[probes] - 1
    at_cut = moved[probes, last].sum()
    worse = true_nats[plan.rows[probes], last] - measured.planted_nats[probes]
    first_of_row = np.unique(plan.rows, return_index=True)[1]
    return {
        "largest_repeat_difference": largest(np.delete(moved, probes, axis=0)),
        "largest_probe_difference": largest(moved[probes]),
        "mean_difference_at_cut": float(at_cut / max(1, len(probes))),
        "mean_difference_before_cut": float((moved[probes].sum() - at_cut) / max(1, last.sum())),
        "planted_likelier_errors": standard_errors(worse[np.isin(probes, first_of_row)]),
    }


def in_row_order(plan: Plan, measured: Measured) -> np.ndarray:
    """The nats of the true rows, as they lie in the split."""
    nats = np.empty((int(plan.is_true.sum()), measured.nats.shape[1]))
    nats[plan.rows[plan.is_true]] = measured.nats[plan.is_true]
    return nats


def largest(moved: np.ndarray) -> float:
    """The largest difference either way."""
    return float(np.abs(moved).max(initial=0.0))


def standard_errors(sample: np.ndarray) -> float:
    """By how many standard errors a mean lies above zero; 0 when there are too few to say."""
    if len(sample) < 30 or not sample.std():
        return 0.0
    return float(sample.mean() / sample.std() * math.sqrt(len(sample)))


def refuse_cheating(found: dict[str, float]) -> None:
    """Holds what `compare` found against the tolerances."""
    if found["largest_repeat_difference"] > LARGEST_DIFFERENCE:
        raise InvalidError("answers_change", "a row sent twice was answered differently")
    if abs(found["mean_difference_before_cut"]) > LARGEST_MEAN_BEFORE_CUT:
        raise InvalidError("answers_change", "rows were answered differently when they came again")
    if found["largest_probe_difference"] > LARGEST_DIFFERENCE:
        raise InvalidError("looks_ahead", "a position's answer depends on the tokens after it")
    if abs(found["mean_difference_at_cut"]) > LARGEST_MEAN_AT_CUT:
        raise InvalidError("looks_ahead", "many answers depend a little on the next token")
    if found["planted_likelier_errors"] > MEMORY_ERRORS:
        raise InvalidError("answers_from_memory", "planted tokens were likelier than the true ones")


def score(
    connection: socket.socket, data: Path, seed: int, secret: int, patience: Patience
) -> dict[str, object]:
    """Returns what score.json says. The candidate may know the seed, so a secret hides the plan."""
    split = read_split(data)
    plan = make_plan(split, np.random.default_rng([seed, secret]))
    rows, context = split.inputs.shape
    tokens = int(split.counted.sum())
    details: dict[str, object] = {"seed": seed, "secret": secret, "context": context, "rows": rows}
    details |= {
        "tokens": tokens,
        "bytes": split.total_bytes,
        "probes": PROBES,
        "sent": len(plan.rows),
    }
    try:
        measured = measure(split, plan, Channel(connection, patience))
        details |= {"seconds": measured.seconds}
        found = compare(split, plan, measured)
        details |= found
        refuse_cheating(found)
    except InvalidError as error:
        return verdict(None, error.reason, str(error), details)
    nats = float(in_row_order(plan, measured)[split.counted].sum())
    details["nats_per_token"] = nats / tokens
    return verdict(nats / math.log(2) / split.total_bytes, None, "", details)


def verdict(
    value: float | None, reason: str | None, explanation: str, details: dict[str, object]
) -> dict[str, object]:
    """The content of score.json: a value or a reason, never both."""
    return {
        "metric": METRIC,
        "value": value,
        "valid": reason is None,
        "reason": reason,
        "explanation": explanation,
        "details": details,
    }


def write_score(output: Path, content: dict[str, object]) -> None:
    """Writes score.json whole or not at all."""
    partial = output / "score.json.partial"
    partial.write_text(json.dumps(content, sort_keys=True, allow_nan=False) + "\n")
    partial.rename(output / "score.json")


# The model's side


def answer(connection: socket.socket, workspace: Path, checkpoint: Path, device: str) -> None:
    """Loads the candidate's model and answers until the scorer has enough."""
    import torch

    predict = load_candidate(workspace).load_model(str(checkpoint), device)
    connection.sendall(HEADER.pack(MAGIC, READY, NO_DTYPE, 0, 0, 0, 0, 0))
    while True:
        _, kind, _, _, number, rows, columns, _ = HEADER.unpack(receive(connection, HEADER.size))
        if kind == END:
            return
        ids = np.frombuffer(receive(connection, rows * columns * 4), "<i4").reshape(rows, columns)
        with torch.inference_mode():
            logits = predict(torch.from_numpy(ids.astype(np.int64)).to(device))
        logits = logits.float().cpu().contiguous()
        shape = tuple(logits.shape) if logits.ndim == 3 else (0, 0, 0)
        connection.sendall(HEADER.pack(MAGIC, LOGITS, FLOAT32, 0, number, *shape))
        connection.sendall(memoryview(logits.numpy()).cast("B"))


def load_candidate(workspace: Path) -> Any:
    """Imports the candidate's train.py."""
    sys.path.insert(0, str(workspace))
    spec = importlib.util.spec_from_file_location("train", workspace / "train.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{workspace} has no train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module
    spec.loader.exec_module(module)
    return module


def receive(connection: socket.socket, length: int) -> bytes:
    """Receives exactly so many bytes."""
    received = bytearray()
    while len(received) < length:
        piece = connection.recv(length - len(received))
        if not piece:
            raise ConnectionError("the scorer hung up")
        received += piece
    return bytes(received)


def main() -> None:
    """Runs one of the two roles."""
    parser = argparse.ArgumentParser(description="Score a candidate's model, in two boxes.")
    roles = parser.add_subparsers(dest="role", required=True)
    model = roles.add_parser("model", help="answer token ids with logits")
    model.add_argument("--workspace", type=Path, required=True)
    model.add_argument("--checkpoint", type=Path, required=True)
    model.add_argument("--device", choices=("cpu", "cuda"), required=True)
    scorer = roles.add_parser("score", help="compute bits per byte and write score.json")
    scorer.add_argument("--data", type=Path, required=True)
    scorer.add_argument("--output", type=Path, required=True)
    scorer.add_argument("--seed", type=int, required=True)
    scorer.add_argument("--start-seconds", type=float, default=120.0, help="until the first answer")
    scorer.add_argument("--answer-seconds", type=float, default=30.0, help="for every other answer")
    scorer.add_argument("--total-seconds", type=float, default=600.0, help="for all of them")
    options = parser.parse_args()
    with socket.socket(fileno=int(os.environ["NIGHTLAB_CHANNEL_FD"])) as connection:
        if options.role == "model":
            answer(connection, options.workspace, options.checkpoint, options.device)
            return
        patience = Patience(options.start_seconds, options.answer_seconds, options.total_seconds)
        secret = secrets.randbits(62)
        write_score(options.output, score(connection, options.data, options.seed, secret, patience))


if __name__ == "__main__":
    main()
