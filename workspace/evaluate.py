"""Scores a candidate in bits per byte and catches cheating.

    python3 evaluate.py model --workspace DIR --checkpoint DIR --device cpu
    python3 evaluate.py score --data DIR --output DIR --seed N --checks K

One box runs the scorer as long as the score takes; 1 + K boxes run the model, one after another:
each is dead before the next one begins. The scorer's socket (descriptor $NIGHTLAB_CHANNEL_FD)
brings it a socket to each model box when that box is started; it sends a byte there when it wants
the next one. The scorer sends token ids and gets logits; it alone has targets, byte counts and the
loss, and writes score.json. It trusts nothing it is sent: whatever a model does ends in a verdict.
A fault of the scorer itself ends in a traceback and no score.json, and that stops the night: it is
no candidate's.

Rows: the split's tokens cut into windows of `context`, across document borders, in random order.
A row's inputs are BOS and then its targets moved by one, so every byte is scored exactly once. BOS
is never counted.

The first model box gets the true rows, and its answers are the score. A row contains its own
targets one position on, so each check box gets some of the same rows with another end: each row
once, other text from a cut on, other company, and in the reverse order. That text comes from rows
of which the check box is asked nothing; a few rows have no company but nonsense. So whatever a
process remembers, at the cut the check box has not been shown the token that comes next, and
elsewhere the two have seen different text before. Before the cut both must answer alike. Each check
has a plan of its own, from a secret of its own. docs/score.md says what can still be hidden,
decision 0015 why there are several boxes and why never two of them at once.
"""

import argparse
import concurrent.futures
import contextlib
import importlib.util
import json
import math
import os
import secrets
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

METRIC = "bits_per_byte"
PROBES = 540  # rows whose end is replaced: a cheat at one position in 100 escapes one time in 200
WHOLE = 32  # rows that a check box gets as they are
ALONE = 8  # and such rows in a batch of nonsense; all of these are at most
MOST_CHECKS, MISSED = 8, 0.001  # what `hidden_gain` is computed for: checks, and odds to pass them
USUAL_PACE = 3.0  # times the median answer: what an answer takes beyond that is loading
TESTED_SHARE = 0.75  # of all rows: the others lend their text
BATCH_BYTES = 16 << 20  # of logits in one answer, so that memory is bounded for any vocabulary
BATCH_ROWS = 64
# In nats. Honest answers differ by rounding: one step of bfloat16 is 0.125 for logits of 16 to 32.
LARGEST_DIFFERENCE = 1.0
LARGEST_NOISE = 0.05  # root mean square
MEAN_ERRORS = 5.0  # a mean may be off by so many standard errors, and by
MEAN_FLOOR = 0.001  # besides, because rare steps of rounding are no bell curve

HEADER = struct.Struct("<4sBBHIIII")  # magic, kind, dtype, 0, number, rows, columns, vocabulary
MAGIC = b"NLE1"
READY, IDS, LOGITS, END = 1, 2, 3, 4
HUNG_UP = "a model box ended before it had answered: see its log"
NO_DTYPE, INT32, FLOAT32 = 0, 1, 2


class InvalidError(Exception):
    """The model broke the contract: a reason as a code, and a sentence."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Timeouts:
    """How long each box may take: to its first answer (loading included), to any other, in all."""

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
    """What one box is sent, in this order; each item shows a row up to its cut.

    An item with cut 0 only fills a batch and is not compared.
    """

    inputs: np.ndarray
    rows: np.ndarray
    cuts: np.ndarray
    is_alone: np.ndarray
    batch_rows: int

    def of(self, chosen: np.ndarray) -> "Plan":
        """The items so numbered, in that order."""
        parts = (self.inputs, self.rows, self.cuts, self.is_alone)
        return Plan(*(part[chosen] for part in parts), self.batch_rows)


@dataclass
class Measured:
    """Nats per item and position, up to its cut; seconds until ready, and of each answer."""

    nats: np.ndarray
    ready_seconds: float = 0.0
    answer_seconds: list[float] = field(default_factory=list)

    def seconds(self) -> dict[str, float]:
        """How long the box took until it answered at its usual pace, and in all.

        A model that trains on where it should only be loaded does so before it is ready or in some
        answers, which counts as loading alike; or in all of them.
        """
        usual = USUAL_PACE * float(np.median(self.answer_seconds))
        slow = sum(max(0.0, seconds - usual) for seconds in self.answer_seconds)
        in_all = self.ready_seconds + sum(self.answer_seconds)
        return {"load_seconds": self.ready_seconds + slow, "model_seconds": in_all}


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


def make_true_plan(split: Split, random: np.random.Generator) -> Plan:
    """Says what the first model box is sent: every row as it is."""
    rows, context = split.inputs.shape
    return filled(split, split.inputs, random.permutation(rows), np.full(rows, context))


def make_check_plan(split: Split, true: Plan, random: np.random.Generator) -> Plan:
    """Says what a check box is sent, beside what the first one was sent."""
    rows, context = split.inputs.shape
    cuts, alone = make_cuts(split, random)
    inputs = split.inputs.copy()
    lent = split.targets[cuts == 0].ravel()
    for row in np.flatnonzero((cuts > 0) & (cuts < context)):
        inputs[row, cuts[row] :] = other_end(inputs[row, cuts[row] :], lent, random)
    # Reversed, so that what a process may have learnt before a row is never the same in both.
    backwards = np.empty(rows)
    backwards[true.rows[:rows]] = -np.arange(rows)
    tested = np.setdiff1d(np.flatnonzero(cuts), alone)
    # With a little disorder, so that a row has other company there.
    mixed = backwards[tested] + random.random(len(tested)) * 4 * rows_in_batch(split)
    there = filled(split, inputs, tested[np.argsort(mixed)], cuts)
    return after_nonsense(split, there, alone, random)


def make_cuts(split: Split, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws where each row is cut, 0 for one that is not tested; and the rows that stand alone.

    The token at a cut is the target of the position before it: one that is counted.
    """
    rows, context = split.inputs.shape
    count = min(PROBES + WHOLE + ALONE, int(rows * TESTED_SHARE))
    if count < 3:
        raise ValueError("the split has too few rows: prepare more text")
    alone, whole = (min(most, max(1, count // 8)) for most in (ALONE, WHOLE))
    cuts = np.zeros(rows, dtype=np.int64)
    with_targets = np.flatnonzero(split.counted[:, :-1].any(axis=1))
    chosen = random.permutation(with_targets)[:count]
    cuts[chosen[: alone + whole]] = context
    for row in chosen[alone + whole :]:
        cuts[row] = random.choice(np.flatnonzero(split.counted[row, :-1])) + 1
    return cuts, chosen[:alone]


def other_end(end: np.ndarray, text: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """As much text as `end` has that begins with another token."""
    different = np.flatnonzero(text != end[0])
    if not len(different):
        raise ValueError("all tokens of the split are equal: prepare other data")
    return text[(random.choice(different) + np.arange(len(end))) % len(text)]


def rows_in_batch(split: Split) -> int:
    """How many rows one answer may hold."""
    row_bytes = split.inputs.shape[1] * split.vocab_size * 4
    return max(1, min(BATCH_ROWS, BATCH_BYTES // row_bytes))


def filled(split: Split, inputs: np.ndarray, order: np.ndarray, cuts: np.ndarray) -> Plan:
    """Puts rows in order and fills the last batch, so that all batches round alike."""
    batch_rows = rows_in_batch(split)
    rows = np.resize(order, -(-len(order) // batch_rows) * batch_rows)
    is_new = np.arange(len(rows)) < len(order)
    is_alone = np.zeros(len(rows), dtype=bool)
    return Plan(inputs[rows], rows, np.where(is_new, cuts[rows], 0), is_alone, batch_rows)


def after_nonsense(
    split: Split, plan: Plan, alone: np.ndarray, random: np.random.Generator
) -> Plan:
    """Begins with batches in which one row stands among random tokens.

    Text that a model could learn something from is what these rows lack: beside them and before.
    """
    size, context = plan.batch_rows, split.inputs.shape[1]
    shape = (len(alone), size)
    inputs = random.integers(split.vocab_size, size=(*shape, context)).astype(np.int32)
    here = random.integers(size, size=len(alone))
    inputs[np.arange(len(alone)), here] = split.inputs[alone]
    is_alone = np.zeros(shape, dtype=bool)
    is_alone[np.arange(len(alone)), here] = True
    return Plan(
        np.concatenate([inputs.reshape(-1, context), plan.inputs]),
        np.concatenate([np.repeat(alone, size), plan.rows]),
        np.concatenate([np.where(is_alone.ravel(), context, 0), plan.cuts]),
        np.concatenate([is_alone.ravel(), plan.is_alone]),
        size,
    )


# The channel


class Channel:
    """The scorer's end of the socket: every wait has a deadline, every length is known.

    It is made when its box is started, so that no box's time counts for another one.
    """

    def __init__(self, connection: socket.socket, timeouts: Timeouts) -> None:
        self.connection, self.timeouts = connection, timeouts
        self.batches_asked = 0
        self.began = time.monotonic()
        self.last_moment = self.began + timeouts.total_seconds
        self.deadline = min(self.last_moment, self.began + timeouts.start_seconds)

    def exchange(self, number: int, ids: np.ndarray, logits: np.ndarray) -> float:
        """Sends a batch, fills `logits` with the answer, and says how many seconds that took.

        Raises: InvalidError.
        """
        began = time.monotonic()
        if number:  # the first answer shares the time for loading: compilers work then
            self.deadline = min(self.last_moment, time.monotonic() + self.timeouts.answer_seconds)
        self.batches_asked += 1
        header = HEADER.pack(MAGIC, IDS, INT32, 0, number, *ids.shape, logits.shape[2])
        self.guarded(self.connection.sendall, header + ids.astype("<i4").tobytes())
        self.expect(LOGITS, FLOAT32, number, logits.shape)
        self.fill(memoryview(logits).cast("B"))
        return time.monotonic() - began

    def expect(self, kind: int, dtype: int, number: int, shape: tuple[int, ...]) -> None:
        """Reads a header that leaves the model no choice."""
        raw = bytearray(HEADER.size)
        self.fill(memoryview(raw))
        magic, got_kind, got_dtype, zero, got_number, *got_shape = HEADER.unpack(raw)
        if (magic, got_kind, zero, got_number) != (MAGIC, kind, 0, number):
            raise InvalidError("bad_message", "a model box sent something else than an answer")
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
            raise InvalidError("too_slow", "a model box did not answer in time") from None
        except OSError:
            raise InvalidError("hung_up", HUNG_UP) from None

    def hang_up(self) -> None:
        """Ends what is under way in other threads as soon as the verdict is known."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def finish(self) -> None:
        """Says goodbye; nothing may have come unasked."""
        self.connection.setblocking(False)
        try:
            unasked = bool(self.connection.recv(1))
        except OSError:  # nothing there, or nobody any more: all answers are in
            unasked = False
        if unasked:
            raise InvalidError("bad_message", "a model box sent more than it was asked for")
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
    # Picked before the logits are overwritten: a copy of all would double what memory it takes.
    picked = logits[np.arange(len(targets)), targets].astype(np.float64)
    # Two finite logits may lie further apart than float32 reaches: that is a bad guess, no fault.
    with np.errstate(over="ignore", under="ignore"):
        np.subtract(logits, highest[:, None], out=logits)
        np.exp(logits, out=logits)
    return np.log(logits.sum(axis=1).astype(np.float64)) - (picked - highest)


def measure(split: Split, plan: Plan, channel: Channel) -> Measured:
    """Gets every item answered; the next batch is on its way while this one is computed."""
    items, context = plan.inputs.shape
    measured = Measured(np.zeros((items, context)))
    shape = (plan.batch_rows, context, split.vocab_size)
    arriving, arrived = np.empty(shape, "<f4"), np.empty(shape, "<f4")
    with concurrent.futures.ThreadPoolExecutor(1) as courier, hanging_up_on_error(channel):
        channel.expect(READY, NO_DTYPE, 0, (0, 0, 0))
        measured.ready_seconds = time.monotonic() - channel.began
        coming = courier.submit(channel.exchange, 0, plan.inputs[: plan.batch_rows], arriving)
        for start in range(0, items, plan.batch_rows):
            measured.answer_seconds.append(coming.result())
            arriving, arrived = arrived, arriving
            following = plan.inputs[start + plan.batch_rows :][: plan.batch_rows]
            if len(following):
                number = start // plan.batch_rows + 1
                coming = courier.submit(channel.exchange, number, following, arriving)
            for item, logits in enumerate(arrived, start):
                cut = plan.cuts[item]
                targets = split.targets[plan.rows[item], :cut]
                measured.nats[item, :cut] = nats_of(logits[:cut], targets)
        channel.finish()
    return measured


@contextlib.contextmanager
def hanging_up_on_error(channel: Channel) -> Iterator[None]:
    """Ends the exchange that is under way, and with it the box, when an answer was no good."""
    try:
        yield
    except BaseException:
        channel.hang_up()
        raise


# The verdict


def compare(
    split: Split, plans: tuple[Plan, Plan], nats: np.ndarray, probe_nats: np.ndarray
) -> dict[str, float]:
    """Says by how many nats a check box's answers differ; above zero where it did worse.

    Args:
        split: what is scored.
        plans: what the first box and the check box were sent.
        nats: the first box's, in the order of the split [rows, context].
        probe_nats: the check box's, in the order in which it was asked.
    """
    context = split.inputs.shape[1]
    items = np.flatnonzero(plans[1].cuts)
    plan, learning = plans[1].of(items), learning_of(plans, items)
    compared = split.counted[plan.rows] & (np.arange(context) < plan.cuts[:, None])
    differences = np.where(compared, probe_nats[items] - nats[plan.rows], 0.0)
    counts, sums = compared.sum(axis=1), differences.sum(axis=1)
    cut, whole = plan.cuts < context, (plan.cuts == context) & ~plan.is_alone
    at_cut = differences[cut, plan.cuts[cut] - 1]
    noise = root_mean_square(differences[whole], counts[whole])
    alone = max(1, int(counts[plan.is_alone].sum()))
    sums[cut] -= at_cut
    before = ratio(sums[cut], counts[cut] - 1)
    usual = ~plan.is_alone
    learnt = ratio((learning * sums)[usual], (learning**2 * counts)[usual])
    scale = float(np.log1p(np.arange(len(split.inputs))).mean())
    return {
        "largest_difference_of_same_rows": largest(differences[~cut]),
        "largest_difference_before_cut": largest(differences[cut]),
        "noise": noise,
        "noise_before_cut": root_mean_square(differences[cut], counts[cut]),
        "mean_at_cut": float(at_cut.mean()),
        "mean_at_cut_error": noise / math.sqrt(len(at_cut)),
        "mean_before_cut": before[0],
        "mean_before_cut_error": before[1],
        "mean_alone": float(sums[plan.is_alone].sum()) / alone,
        "mean_alone_error": noise / math.sqrt(alone),
        "learnt": learnt[0] * scale,
        "learnt_error": learnt[1] * scale,
    }


def learning_of(plans: tuple[Plan, Plan], items: np.ndarray) -> np.ndarray:
    """How much more the first box had seen before each item, on the scale on which models learn."""
    first, second = (text_before(plan) for plan in plans)
    here = np.empty(len(plans[0].rows))
    shown = np.flatnonzero(plans[0].cuts)
    here[plans[0].rows[shown]] = first[shown]
    return np.asarray(np.log1p(here[plans[1].rows[items]]) - np.log1p(second[items]))


def text_before(plan: Plan) -> np.ndarray:
    """How many rows of the split a box was asked for before each item's batch."""
    asked = (plan.cuts > 0).reshape(-1, plan.batch_rows).sum(axis=1)
    return np.repeat(np.cumsum(asked) - asked, plan.batch_rows)


def root_mean_square(differences: np.ndarray, counts: np.ndarray) -> float:
    """Of the differences, zero where there is none; so many were compared."""
    return math.sqrt(float((differences**2).sum() / max(1, counts.sum())))


def ratio(sums: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """The sum of one value a row over the sum of another, with its standard error about zero."""
    size = max(float(sizes.sum()), 1e-9)
    return float(sums.sum()) / size, math.sqrt(float((sums**2).sum())) / size


def largest(differences: np.ndarray) -> float:
    """The largest difference either way."""
    return float(np.abs(differences).max(initial=0.0))


def refuse_cheating(found: dict[str, float]) -> None:
    """Holds what `compare` found against the tolerances.

    Raises: InvalidError.
    """
    if found["largest_difference_of_same_rows"] > LARGEST_DIFFERENCE:
        raise InvalidError("answers_change", "a row was answered differently in other company")
    if found["noise"] > LARGEST_NOISE:
        raise InvalidError("answers_change", "a row's answers differ by more than rounding")
    if is_off(found, "learnt"):
        raise InvalidError("answers_change", "answers get better with the rows seen before")
    if is_off(found, "mean_alone"):
        raise InvalidError("answers_change", "answers are worse without the other rows of a batch")
    if found["largest_difference_before_cut"] > LARGEST_DIFFERENCE:
        raise InvalidError("looks_ahead", "a position's answer depends on the tokens after it")
    if found["noise_before_cut"] > LARGEST_NOISE:
        raise InvalidError("looks_ahead", "a row's answers change with its end")
    if is_off(found, "mean_at_cut"):
        raise InvalidError("looks_ahead", "many answers depend a little on the next token")
    if is_off(found, "mean_before_cut"):
        raise InvalidError("looks_ahead", "many answers depend a little on the row's end")


def is_off(found: dict[str, float], name: str) -> bool:
    """Whether a mean is further from zero than chance and rounding bring it."""
    return abs(found[name]) > MEAN_ERRORS * found[name + "_error"] + MEAN_FLOOR


def hidden_gain(split: Split, nats: np.ndarray, probes: int) -> list[float]:
    """The most bits per byte that looking ahead gains and still passes 1, 2, ... checks by luck.

    Who looks at a share s of the positions passes K checks of so many cuts with probability
    (1 - s)^(K x cuts), and gains at most what its dearest positions cost.
    """
    costs = np.sort(nats[split.counted])[::-1]
    sums = np.concatenate([[0.0], costs.cumsum()]) / math.log(2) / split.total_bytes
    checks = np.arange(1, MOST_CHECKS + 1)
    shares = 1 - MISSED ** (1 / (max(1, probes) * checks))
    return [float(gain) for gain in np.interp(shares * len(costs), np.arange(len(sums)), sums)]


def score(
    next_box: Callable[[], socket.socket],
    data: Path,
    seed: int,
    secrets: list[int],
    timeouts: Timeouts,
) -> dict[str, object]:
    """Returns what score.json says.

    Args:
        next_box: starts a model box and returns the socket to it.
        data: folder of the split.
        seed: of the trial. The candidate may know it, so secrets hide the plans.
        secrets: one for the first box, and one for each check.
        timeouts: of each box.
    """
    split = read_split(data)
    first, *others = (np.random.default_rng([seed, secret]) for secret in secrets)
    plan = make_true_plan(split, first)
    rows, context = split.inputs.shape
    tokens, asked = int(split.counted.sum()), 0
    checks: list[dict[str, float]] = []
    details: dict[str, object] = {"seed": seed, "secrets": secrets, "context": context}
    details |= {"rows": rows, "tokens": tokens, "bytes": split.total_bytes, "checks": checks}
    try:
        channel = Channel(next_box(), timeouts)
        true = measure(split, plan, channel)
        asked = channel.batches_asked
        nats = np.empty_like(true.nats[:rows])
        nats[plan.rows[:rows]] = true.nats[:rows]  # as they lie in the split
        details |= true.seconds()
        for random in others:
            check = make_check_plan(split, plan, random)
            probes = int(((check.cuts > 0) & (check.cuts < context)).sum())
            details |= {"probes": probes, "hidden_gain": hidden_gain(split, nats, probes)}
            channel = Channel(next_box(), timeouts)
            probe = measure(split, check, channel)
            found = compare(split, (plan, check), nats, probe.nats)
            checks.append(found | probe.seconds())
            refuse_cheating(found)
    except InvalidError as error:
        # Whether the log of a model box can hold anything of the split depends on this.
        details["batches_asked"] = asked + channel.batches_asked
        return verdict(None, error.reason, str(error), details)
    total = float(nats[split.counted].sum())
    details["nats_per_token"] = total / tokens
    return verdict(total / math.log(2) / split.total_bytes, None, "", details)


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

    threading.Thread(target=leave_with_the_scorer, args=(connection,), daemon=True).start()
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


def leave_with_the_scorer(connection: socket.socket) -> None:
    """Ends this process when the scorer hangs up: whatever the candidate is at, nobody waits."""
    poll = select.poll()
    poll.register(connection, 0)  # hanging up is always reported
    poll.poll()
    os._exit(0)


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


def boxes_behind(channel: socket.socket) -> Callable[[], socket.socket]:
    """A function that gives the socket to the next model box, once that box is started.

    The first one comes unasked. Whoever starts them waits until the box before is gone.
    """
    wishes = iter([b""])

    def next_box() -> socket.socket:
        channel.sendall(next(wishes, b"next"))
        _, handles, _, _ = socket.recv_fds(channel, 16, 1)
        if len(handles) != 1:
            raise ValueError("this scorer is brought its boxes: set model_boxes = 2 in [scoring]")
        return socket.socket(fileno=handles[0])

    return next_box


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
    parser = argparse.ArgumentParser(description="Score a candidate's model, in boxes.")
    roles = parser.add_subparsers(dest="role", required=True)
    model = roles.add_parser("model", help="answer token ids with logits")
    model.add_argument("--workspace", type=Path, required=True)
    model.add_argument("--checkpoint", type=Path, required=True)
    model.add_argument("--device", choices=("cpu", "cuda"), required=True)
    scorer = roles.add_parser("score", help="compute bits per byte and write score.json")
    scorer.add_argument("--data", type=Path, required=True)
    scorer.add_argument("--output", type=Path, required=True)
    scorer.add_argument("--seed", type=int, required=True)
    scorer.add_argument("--checks", type=int, required=True, help="how many check boxes there are")
    scorer.add_argument("--start-seconds", type=float, default=120.0, help="until the first answer")
    scorer.add_argument("--answer-seconds", type=float, default=30.0, help="for every other answer")
    scorer.add_argument("--total-seconds", type=float, default=240.0, help="for each box")
    options = parser.parse_args()
    with socket.socket(fileno=int(os.environ["NIGHTLAB_CHANNEL_FD"])) as channel:
        if options.role == "model":
            with contextlib.suppress(ConnectionError):  # the scorer has its verdict already
                answer(channel, options.workspace, options.checkpoint, options.device)
            return
        timeouts = Timeouts(options.start_seconds, options.answer_seconds, options.total_seconds)
        drawn = [secrets.randbits(62) for _ in range(1 + options.checks)]
        found = score(boxes_behind(channel), options.data, options.seed, drawn, timeouts)
        write_score(options.output, found)


if __name__ == "__main__":
    main()
