"""Trains a small GPT for a fixed time: the one file the agent edits.

nightlab runs `python3 train.py` in a box: token files are in $NIGHTLAB_DATA, the checkpoint goes to
$NIGHTLAB_OUTPUT, and the budget counts from the start of the process, importing torch and saving
included. By hand: `python workspace/prepare.py --output data`, then `python workspace/train.py`.

evaluate.py scores `load_model(checkpoint_dir, device)`: rows of token ids in, logits out. It only
loads: time that it, or the answers, take beyond what is usual counts against the budget.
"""

import gc
import json
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

STARTED_SECONDS = time.monotonic()

import torch  # noqa: E402 - the clock comes first: this import takes two seconds
import torch.nn.functional as F  # noqa: E402, N812 - its usual name

# Knobs. A comment ends with the range worth searching, [low..high], [low..high log] or {a, b, c},
# or with `fixed` where a sampler has better things to do.
DEPTH = 4  # transformer blocks {1, 2, 4, 6}
WIDTH = 128  # residual stream; a multiple of 4 x HEADS {64, 96, 128, 192, 256}
HEADS = 2  # attention heads; fixed
MLP_RATIO = 4  # hidden units of a block's MLP, as a multiple of WIDTH; fixed
SEQUENCE = 64  # tokens a model sees at once, in training and when scored {32, 64, 128}
BATCH = 16  # sequences per step {8, 16, 24, 32}
BIGRAM_ROWS = 0  # embeddings of hashed token pairs; 0 leaves them out {0, 8192, 32768}
MATRIX_RATE = 0.02  # Muon's learning rate, for the matrices inside the blocks [0.005..0.08 log]
EMBEDDING_RATE = 0.3  # AdamW's learning rate for the embeddings [0.05..2.0 log]
HEAD_RATE = 0.01  # AdamW's learning rate for the output matrix [0.001..0.05 log]
MOMENTUM = 0.95  # Muon's memory of gradients; fixed
BETA1 = 0.8  # AdamW's memory of gradients; fixed
BETA2 = 0.95  # AdamW's memory of squared gradients [0.9..0.999]
WEIGHT_DECAY = 0.1  # of the matrices, relative to their learning rate [0.0..0.5]
WARMDOWN = 0.4  # last share of the budget, in which learning rates fall linearly [0.1..1.0]
FINAL_RATE = 0.1  # share of the learning rates that is left at the end [0.0..0.3]

CHECKPOINT = "checkpoint.pt"  # fixed
RESERVED_SECONDS = 1.0  # fixed: for saving and leaving before the budget ends
RESERVED_ON_GPU_SECONDS = 3.0  # fixed: the same where weights come back from a device first
STEPS_AHEAD = 2  # fixed: steps that may be queued on a GPU while the host goes on
ROTARY_BASE = 10_000.0  # fixed


def setting(name: str, default: str) -> str:
    """Reads what nightlab sets; by hand a missing one is named and replaced."""
    if name not in os.environ:
        print(f"{name} is not set: using {default}", file=sys.stderr)
    return os.environ.get(name, default)


@dataclass(frozen=True)
class Way:
    """How one kind of machine computes."""

    device: str
    dtype: torch.dtype  # of the arithmetic; the weights themselves are float32
    fused: bool  # attention in one kernel
    compiled: bool  # parts of the step through torch.compile

    @property
    def on_gpu(self) -> bool:
        """Whether the host queues work for a device, instead of doing it."""
        return self.device != "cpu"


def way_of(device: str) -> Way:
    """What suits a device.

    On CPUs the fused kernel is slower (its bfloat16 backward takes twice as long), and compiling
    takes longer than a short budget has. On GPUs it needs a C compiler in the image.
    """
    on_gpu = device != "cpu"
    compiles = on_gpu and any(shutil.which(name) for name in ("cc", "gcc", "clang"))
    return Way(device, compute_dtype(device), fused=on_gpu, compiled=compiles)


def compute_dtype(device: str) -> torch.dtype:
    """What nightlab says; else bfloat16 where it is multiplied at full speed, float32 elsewhere."""
    if named := os.environ.get("NIGHTLAB_DTYPE"):
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[named]
    if device != "cpu":
        return torch.bfloat16
    processor = Path("/proc/cpuinfo")
    flags = processor.read_text() if processor.exists() else ""
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32


def compiled(function: Callable, way: Way) -> Callable:
    """The function through torch.compile, without a break and for fixed shapes, where that pays."""
    return torch.compile(function, dynamic=False, fullgraph=True) if way.compiled else function


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm without a gain."""
    return F.rms_norm(x, x.shape[-1:])


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turns pairs of channels by an angle that grows with the position (RoPE)."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cosine - right * sine, left * sine + right * cosine], dim=-1)


def spread(*shape: int) -> torch.nn.Parameter:
    """Matrices over the residual stream for every block, with entries of variance 1 / WIDTH."""
    limit = (3 / WIDTH) ** 0.5
    return torch.nn.Parameter(torch.empty(DEPTH, *shape, WIDTH).uniform_(-limit, limit))


def block(x: torch.Tensor, weights: tuple, positions: tuple) -> torch.Tensor:
    """One transformer block. All have the same shapes, so that compiling one compiles all."""
    qkv, mix, up, down = weights
    x = x + F.linear(attend(norm(x), qkv, *positions), mix)
    return x + F.linear(F.relu(F.linear(norm(x), up)).square(), down)


def attend(
    x: torch.Tensor,
    qkv: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    future: torch.Tensor | None,
) -> torch.Tensor:
    """Mixes each position with those before it, per head; in one kernel without a mask."""
    rows, length, _ = x.shape
    heads = F.linear(x, qkv.flatten(0, 1)).view(rows, length, 3, HEADS, -1)
    query, key, value = heads.permute(2, 0, 3, 1, 4)
    query = norm(rotate(query, cosine, sine))
    key = norm(rotate(key, cosine, sine))
    if future is None:
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    else:
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        mixed = torch.softmax(scores + future, dim=-1) @ value
    return mixed.transpose(1, 2).reshape(rows, length, -1)


def logits_of(x: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """The last layer."""
    return F.linear(norm(x), head).float()


def loss_of(x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The last layer and its loss: together, logits need not be stored as float32."""
    return F.cross_entropy(logits_of(x, head).flatten(0, 1), targets.flatten())


class Model(torch.nn.Module):
    """A decoder-only transformer: RoPE, RMSNorm, QK-norm, squared ReLU, no biases.

    The matrices of all blocks lie in one tensor, so that Muon treats them in one batched product.
    """

    def __init__(self, vocab_size: int, way: Way) -> None:
        super().__init__()
        self.way = way
        self.block, self.loss_of = compiled(block, way), compiled(loss_of, way)
        self.embedding = torch.nn.Parameter(torch.randn(vocab_size, WIDTH))
        # Zeros where something is added to the residual stream: it begins as the embedding alone.
        self.bigram = torch.nn.Parameter(torch.zeros(BIGRAM_ROWS, WIDTH))
        self.qkv = spread(3, WIDTH)
        self.mix = torch.nn.Parameter(torch.zeros(DEPTH, WIDTH, WIDTH))
        self.up = spread(MLP_RATIO * WIDTH)
        self.down = torch.nn.Parameter(torch.zeros(DEPTH, WIDTH, MLP_RATIO * WIDTH))
        self.head = torch.nn.Parameter(torch.randn(vocab_size, WIDTH) * 0.001)
        channels = WIDTH // HEADS // 2
        speeds = ROTARY_BASE ** (-torch.arange(channels) / channels)
        angles = torch.arange(SEQUENCE)[:, None] * speeds
        self.register_buffer("cosine", angles.cos().to(way.dtype), persistent=False)
        self.register_buffer("sine", angles.sin().to(way.dtype), persistent=False)
        future = torch.full((SEQUENCE, SEQUENCE), -torch.inf).triu(1)
        self.register_buffer("future", future.to(way.dtype), persistent=False)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids [rows, length] -> what the last layer reads, [rows, length, WIDTH]."""
        x = F.embedding(tokens, self.embedding)
        if BIGRAM_ROWS:
            x = x + F.embedding(hashed_pairs(tokens), self.bigram)
        x = norm(x.to(self.way.dtype))
        length = tokens.shape[1]
        future = None if self.way.fused else self.future[:length, :length]
        positions = self.cosine[:length], self.sine[:length], future
        stacks = (self.qkv, self.mix, self.up, self.down)
        for weights in zip(*(stack.to(self.way.dtype) for stack in stacks), strict=True):
            x = self.block(x, weights, positions)
        return x

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids [rows, length] -> logits [rows, length, vocabulary]."""
        return logits_of(self.hidden(tokens), self.head.to(self.way.dtype))

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean loss of these rows, in nats per token."""
        return self.loss_of(self.hidden(tokens), self.head.to(self.way.dtype), targets)

    def flops_per_token(self) -> int:
        """Of forward and backward, attention in full (Chowdhery et al. 2022, appendix B)."""
        matrices = (self.qkv, self.mix, self.up, self.down, self.head)
        return 6 * sum(m.numel() for m in matrices) + 12 * DEPTH * WIDTH * SEQUENCE


def hashed_pairs(tokens: torch.Tensor) -> torch.Tensor:
    """Gives each token together with the one before it a row of the bigram table."""
    before = F.pad(tokens, (1, 0))[:, :-1]
    return (before * 1_000_003 + tokens * 7_919) % BIGRAM_ROWS


def load_model(checkpoint_dir: str, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns what is scored: token ids [rows, context] -> logits [rows, context, vocabulary].

    Rows may be longer than SEQUENCE: they are then read piece by piece, each piece on its own.
    """
    saved = torch.load(Path(checkpoint_dir) / CHECKPOINT, map_location=device, weights_only=True)
    # Not compiled: that takes longer than all the scoring.
    model = Model(saved["vocab_size"], replace(way_of(device), compiled=False)).to(device)
    model.load_state_dict(saved["weights"])
    return lambda rows: torch.cat([model(piece) for piece in rows.split(SEQUENCE, dim=1)], dim=1)


class Muon:
    """Momentum whose step is made orthogonal (Jordan et al. 2024), for stacks of matrices."""

    def __init__(self, weights: list[torch.nn.Parameter], way: Way) -> None:
        self.weights = weights
        self.memories = [torch.zeros_like(weight) for weight in weights]
        self.orthogonal = compiled(orthogonal, way)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Takes one step and forgets the gradients."""
        for weight, memory in zip(self.weights, self.memories, strict=True):
            memory.lerp_(weight.grad, 1 - MOMENTUM)
            change = self.orthogonal(weight.grad.lerp_(memory, MOMENTUM))
            stretch = max(1.0, weight.shape[-2] / weight.shape[-1]) ** 0.5
            weight.mul_(1 - rate * WEIGHT_DECAY).add_(change, alpha=-rate * stretch)
            weight.grad = None


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Brings all singular values near one, by five Newton-Schulz iterations."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = (matrices if wide else matrices.mT).flatten(0, -3).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):  # coefficients for speed: the values end near one, not at it
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if wide else x.mT).reshape(matrices.shape).to(matrices.dtype)


class Adam:
    """AdamW without decay. torch's own takes 1.5 seconds to import, out of the budget."""

    def __init__(self, weights: list[torch.nn.Parameter]) -> None:
        self.weights = weights
        self.means = [torch.zeros_like(weight) for weight in weights]
        self.squares = [torch.zeros_like(weight) for weight in weights]
        self.steps = [torch.zeros((), device=weight.device) for weight in weights]

    @torch.no_grad()
    def step(self, rates: list[float]) -> None:
        """Takes one step and forgets the gradients."""
        for number, rate in enumerate(rates):
            one = slice(number, number + 1)
            self.steps[number] += 1
            torch._fused_adamw_(
                self.weights[one], [self.weights[number].grad], self.means[one], self.squares[one],
                [], self.steps[one], lr=rate, beta1=BETA1, beta2=BETA2, weight_decay=0.0, eps=1e-10,
                amsgrad=False, maximize=False,
            )  # fmt: skip
            self.weights[number].grad = None


class Budget:
    """How much of the wall time, or of the tokens when they are what is counted, has been used."""

    def __init__(self, *, on_gpu: bool) -> None:
        self.started_seconds = float(os.environ.get("NIGHTLAB_STARTED_MONOTONIC", STARTED_SECONDS))
        self.tokens = int(os.environ.get("NIGHTLAB_BUDGET_TOKENS", "0"))
        seconds = 0.0 if self.tokens else float(setting("NIGHTLAB_BUDGET_SECONDS", "20"))
        self.first_step_seconds = self.elapsed_seconds()
        reserved = RESERVED_ON_GPU_SECONDS if on_gpu else RESERVED_SECONDS
        self.training_seconds = max(0.1, seconds - reserved - self.first_step_seconds)

    def elapsed_seconds(self) -> float:
        """Time since the box started the program."""
        return time.monotonic() - self.started_seconds

    def used(self, tokens: int, step_seconds: float) -> float:
        """The share of the training that is over; 1 when there is no time for one more step."""
        if self.tokens:
            return tokens / self.tokens
        seconds = self.elapsed_seconds() - self.first_step_seconds
        return (seconds + step_seconds) / self.training_seconds


class Pace:
    """Keeps the host a few steps ahead of a GPU at most, so that its clock tells the truth.

    Waiting for an earlier step drains no queue. Not waiting would count steps that are only queued.
    """

    def __init__(self, new_mark: Callable | None) -> None:
        self.new_mark = new_mark
        self.marks: deque = deque()

    def step_queued(self) -> None:
        """Waits until the step before the last `STEPS_AHEAD` is done."""
        if self.new_mark is None:
            return
        self.marks.append(self.new_mark())
        self.marks[-1].record()
        if len(self.marks) > STEPS_AHEAD:
            self.marks.popleft().synchronize()


class Batches:
    """Random windows of the training tokens."""

    def __init__(self, folder: Path, way: Way) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        self.vocab_size, self.bos_token = int(meta["vocab_size"]), int(meta["bos_token"])
        self.share_at_start = SEQUENCE / int(meta["context"])
        self.way = way
        path = folder / "tokens.bin"
        count = path.stat().st_size // 2
        # int16 and not uint16, which torch 2.6 cannot index; `draw` takes the sign away.
        self.tokens = torch.from_file(str(path), shared=False, size=count, dtype=torch.int16)

    def draw(self, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of BATCH windows, or of fewer when only `limit` tokens are left."""
        length = min(SEQUENCE, limit)
        rows = min(BATCH, limit // length)
        starts = torch.randint(len(self.tokens) - length, (rows, 1))
        windows = self.tokens[starts + torch.arange(length + 1)].to(torch.int64) & 0xFFFF
        inputs, targets = windows[:, :-1].clone(), windows[:, 1:]
        inputs[: round(rows * self.share_at_start), 0] = self.bos_token  # a scored row begins so
        return self.sent(inputs), self.sent(targets)

    def sent(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows on the device; a GPU fetches them from pinned memory while it still computes."""
        if not self.way.on_gpu:
            return rows
        return rows.pin_memory().to(self.way.device, non_blocking=True)


def rate_scale(used: float) -> float:
    """The share of the learning rates at a point of the budget: flat, then falling linearly."""
    return FINAL_RATE + (1 - FINAL_RATE) * min(1.0, max(0.0, 1 - used) / WARMDOWN)


def report(**facts: float) -> None:
    """Prints one line of progress as JSON."""
    print(json.dumps({name: round(fact, 4) for name, fact in facts.items()}), flush=True)


def train(model: Model, batches: Batches, budget: Budget) -> None:
    """Takes steps until the budget is used, reporting the mean loss about once a second.

    Only a report waits for the device. A first step that compiles counts, but foretells nothing.
    """
    muon = Muon([model.qkv, model.mix, model.up, model.down], model.way)
    adam = Adam([model.head, model.embedding, *([model.bigram] if BIGRAM_ROWS else [])])
    # Events of the device's own kind; none where the host does the work itself.
    pace = Pace(getattr(torch, model.way.device).Event if model.way.on_gpu else None)
    flops = model.flops_per_token()
    step, tokens, step_seconds, losses = 0, 0, 0.0, []
    seconds = reported_seconds = budget.elapsed_seconds()
    while (used := budget.used(tokens, step_seconds)) < 1:
        left = budget.tokens - tokens if budget.tokens else BATCH * SEQUENCE
        inputs, targets = batches.draw(left)
        loss = model.loss(inputs, targets)
        loss.backward()
        losses.append(loss.detach())
        scale = rate_scale(used)
        muon.step(MATRIX_RATE * scale)
        adam.step([HEAD_RATE * scale, *[EMBEDDING_RATE * scale] * (len(adam.weights) - 1)])
        pace.step_queued()
        step, tokens = step + 1, tokens + inputs.numel()
        step_seconds, seconds = budget.elapsed_seconds() - seconds, budget.elapsed_seconds()
        if step == 1 and model.way.compiled:
            step_seconds = 0.0
        if seconds - reported_seconds >= 1 or budget.used(tokens, step_seconds) >= 1:
            mean_loss = torch.stack(losses).mean().item()
            reported_seconds, losses = seconds, []
            report(
                step=step,
                tokens=tokens,
                seconds=seconds,
                loss=mean_loss,
                tokens_per_second=tokens / (seconds - budget.first_step_seconds),
                flops_per_token=flops,
            )
            if not math.isfinite(mean_loss):
                sys.exit("the loss is no longer a number: lower the learning rates")


def run(way: Way) -> None:
    """Trains one model within the budget and saves it."""
    budget = Budget(on_gpu=way.on_gpu)
    if way.on_gpu:
        torch.set_float32_matmul_precision("high")  # TF32 for what is float32 on purpose
        gc.disable()  # a collection stops the host, and then the device, for half a second
    torch.manual_seed(int(setting("NIGHTLAB_SEED", "1")))
    output = Path(setting("NIGHTLAB_OUTPUT", "checkpoint"))
    output.mkdir(parents=True, exist_ok=True)
    batches = Batches(Path(setting("NIGHTLAB_DATA", "data/train")), way)
    model = Model(batches.vocab_size, way).to(way.device)
    train(model, batches, budget)
    saved = {"vocab_size": batches.vocab_size, "weights": model.state_dict()}
    torch.save(saved, output / CHECKPOINT)
    parameters = sum(weight.numel() for weight in model.parameters())
    report(done=1, parameters=parameters, seconds=budget.elapsed_seconds())


if __name__ == "__main__":
    run(way_of(setting("NIGHTLAB_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")))
