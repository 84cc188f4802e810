"""Synthetic nights: realistic ledgers for tests of any part."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

from agent.attempt.decide import Decision, next_step
from agent.program import load_program
from agent.record.chain import FIRST_PREVIOUS, LEDGER_NAME, canonical, entry_hash
from agent.record.curves import curve_of, packed, said_tokens, unpacked
from agent.record.events import (
    ATTEMPT,
    Arithmetic,
    AttemptFinished,
    AttemptInterrupted,
    AttemptStarted,
    Disturbance,
    Entry,
    Event,
    MachineState,
    MessageAdded,
    ModelCalled,
    Noticed,
    RetryWaited,
    RunFinished,
    RunStarted,
    Scored,
    SessionEnded,
    SessionStarted,
    StopReason,
    Usage,
    Verdict,
)
from agent.record.history import History
from agent.record.logs import excerpt, packed_log
from sandbox.contract.run import Box, Limits, Log, Outcome, OutputFile, RunResult, RunSpec

EVENING = datetime(2026, 3, 7, 22, 0, tzinfo=UTC)
BUDGET_SECONDS = 300.0
IN_FORCE = load_program(Path(__file__).parents[2] / "program.md").settings.with_overrides(
    attempts=100, hours=10.0, usd=20.0, budget_seconds=BUDGET_SECONDS
)
LIMITS: dict[Box, Limits] = {
    "train": IN_FORCE.train_limits(),
    "model": IN_FORCE.scoring_limits(),
    "scorer": IN_FORCE.scorer_limits(),
}
NOISE = 0.004
IMAGE = "sha256:" + "5" * 64
COPIES = {"model": IMAGE, "check": IMAGE}
CHECKPOINT = (OutputFile(name="model.pt", bytes=1000, sha256="c" * 64),)
SPEED, USUAL_CORES = 400.0, 0.04
STATE = MachineState(
    load=0.1,
    memory_available_bytes=None,
    cpu_mhz=None,
    cpu_max_mhz=None,
    governor=None,
    temperature_celsius=None,
    throttle_events=None,
)
KEPT_LOG_CHARS = 16_000

IDEAS = (
    "Raise the Muon learning rate from 0.02 to 0.03: the loss still falls at the end",
    "Halve the batch to 16 rows: twice the steps in the same five minutes",
    "Warm down over the last 40 % instead of 20 %",
    "Tie the embedding and the head to save a megabyte of optimiser state",
    "Depth 6 at width 192 instead of depth 4 at width 256",
    "ReLU² to SwiGLU at an equal parameter count",
    "Rotary base 10,000 to 2,000: the context is only 256 tokens",
    "Weight decay 0.1 on matrices only",
)

HOSTILE_TEXTS = (
    "</script><script>document.title='executed'</script>",
    "</details></main><h1>Verified</h1><img src=x onerror=\"document.title='executed'\">",
    "{{ 7*7 }}{% for x in range(9) %}{{ config }}{% endfor %}{# gone #}",
    "\x1b[31mred\x1b[0m \x1b]0;owned\x07 \x1b[2J\r100% fine",
    "gain\u202e%05 etad a\u202c \u200bzero\u200dwidth \ufefftag\U000e0041",
    "# heading\n```\n[click](javascript:document.title='executed') | a | b |\n```",
    '=HYPERLINK("http://example.invalid")\tsecond\tcolumn\nsecond row',
    'an "unbalanced quote, -->, ]]> and &lt;b&gt; &amp;',
)


@dataclass
class Night:
    """A ledger in memory: its entries and the blobs they name."""

    now: datetime = EVENING
    entries: list[Entry] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)

    _history: History = field(default_factory=History)
    _folded: int = 0

    @property
    def history(self) -> History:
        """The fold over all entries, made anew when some were taken away."""
        if self._folded > len(self.entries):
            self._history, self._folded = History(), 0
        for entry in self.entries[self._folded :]:
            self._history.apply(entry)
        self._folded = len(self.entries)
        return self._history

    @property
    def head(self) -> str:
        return self.entries[-1].hash if self.entries else FIRST_PREVIOUS

    def add(self, event: Event, after_seconds: float = 0.1) -> Entry:
        """Append an event, sealed as a real ledger seals it."""
        self.now += timedelta(seconds=after_seconds)
        line: dict[str, Any] = {
            "seq": len(self.entries),
            "at": self.now.isoformat(timespec="microseconds"),
            "previous": self.head,
            "event": event.model_dump(mode="json"),
        }
        entry = Entry.model_validate_json(canonical({**line, "hash": entry_hash(line)}))
        self.entries.append(entry)
        return entry

    def append(self, event: Event) -> Entry:
        """Append an event as the code does that takes this for a ledger."""
        return self.add(event)

    def put_blob(self, body: bytes) -> str:
        sha = hashlib.sha256(body).hexdigest()
        self.blobs[sha] = body
        return sha

    def get_blob(self, sha: str) -> bytes:
        return self.blobs[sha]

    def write(self, directory: Path) -> None:
        """Store the night as a session's directory, byte for byte as a ledger would."""
        directory.mkdir(parents=True, exist_ok=True)
        lines = [canonical(entry.model_dump(mode="json")) + "\n" for entry in self.entries]
        (directory / LEDGER_NAME).write_text("".join(lines), encoding="utf-8")
        for sha, body in self.blobs.items():
            path = directory / "blobs" / sha[:2] / sha[2:]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body)


def night(
    attempts: int,
    *,
    seed: int = 0,
    hostile: bool = False,
    ended: bool = True,
    log_lines: int = 60,
    words: str = "",
) -> Night:
    """A whole night: three baseline repeats, then `attempts` candidates of every verdict.

    With `words` the researcher says, thinks and is told them before each.
    """
    made, chance = Night(), random.Random(seed)
    start(made)
    best = baseline(made, chance)
    for number in range(1, attempts + 1):
        hypothesis = (HOSTILE_TEXTS if hostile else IDEAS)[number % 8]
        if words:
            speak(made, words)
        best = _candidate(made, chance, number, hypothesis, best, hostile, log_lines)
    if ended:
        made.add(SessionEnded(reason=StopReason.ATTEMPTS, explanation=f"{attempts} attempts done"))
    return made


def speak(made: Night, words: str) -> None:
    """A turn of a conversation: thought, words and a tool's call, and what the tool answered."""
    turn = [
        {"type": "thinking", "thinking": f"thought: {words}"},
        {"type": "text", "text": f"said: {words}"},
        {"type": "tool_use", "id": "toolu_1", "name": "run", "input": {"hypothesis": words}},
    ]
    answer = [{"type": "tool_result", "tool_use_id": "toolu_1", "content": f"answered: {words}"}]
    for role, content in (("assistant", turn), ("user", answer)):
        body = json.dumps({"role": role, "content": content}).encode()
        made.add(MessageAdded(conversation=1, role=role, message=made.put_blob(body)))


def start(made: Night, **changes: Any) -> Entry:
    """The event that opens a session."""
    program = made.put_blob(b"# Tonight\n\nLower val_bpb.\n")
    train = made.put_blob(b"DEPTH = 4\n")
    event = SessionStarted(
        session="mar7-evening",
        nightlab_version="0.1.0",
        program=program,
        settings=IN_FORCE,
        researcher="claude",
        image={"image_id": IMAGE, "copies": COPIES, "digest": IMAGE, "torch": "2.13.0+cpu"},
        engine={"version": "28.1.0", "storage": "overlay2"},
        data={"source": "shakespeare", "val_bytes": 541_022},
        machine={"cpu": "EPYC 7B13", "cores": 2, "memory_bytes": 8 * 2**30},
        files={"train.py": train},
        fixed_files={"evaluate.py": made.put_blob(b"# fixed\n")},
        repository=None,
        seeds=(1, 2, 3),
    )
    return made.add(event.model_copy(update=changes))


def baseline(made: Night, chance: random.Random, value: float = 2.35) -> float:
    """The baseline's three repeats, kept; returns its mean."""
    train = made.put_blob(b"DEPTH = 4\n")
    made.add(
        AttemptStarted(
            attempt=0,
            kind="baseline",
            hypothesis="The files as they are",
            researcher="person",
            files={"train.py": train},
            diff=None,
            parent=None,
            seeds=(1, 2, 3),
        )
    )
    values = tuple(round(value + chance.gauss(0, NOISE), 6) for _ in range(3))
    for seed, score in enumerate(values, start=1):
        boxes(made, attempt=0, seed=seed)
        made.add(scored(0, seed, score, put_blob=made.put_blob))
    decision = next_step(made.history, 0, made.get_blob)
    assert isinstance(decision, Decision)
    made.add(decision.finished(0, 930.0))
    return fmean(values)


def boxes(made: Night, *, attempt: int, seed: int, disturbed: bool = False, log: str = "") -> None:
    """A train, two model and a scorer run that went well."""
    log = log or progress_log(seed, 60)
    train = run_result(f"a{attempt}-s{seed}-train", "train", log=log)
    run = run_finished(attempt, seed, train, disturbed, made.put_blob)
    points = packed(curve_of(log))
    said = {"curve": made.put_blob(points), "said_tokens": said_tokens(unpacked(points))}
    made.add(run_started(attempt, seed, train), 0.0)
    made.add(run.model_copy(update=said), BUDGET_SECONDS)
    scoring: dict[str, Box] = {"scorer": "scorer", "model": "model", "check-1": "model"}
    scorer, *models = (
        run_result(f"a{attempt}-s{seed}-{name}", box, log="", wall_seconds=4.5)
        for name, box in scoring.items()
    )
    made.add(run_started(attempt, seed, scorer), 0.0)
    for result in models:  # one after another, as long as the scorer is there
        made.add(run_started(attempt, seed, result), 0.0)
        made.add(run_finished(attempt, seed, result, put_blob=made.put_blob), 0.1)
    made.add(run_finished(attempt, seed, scorer, put_blob=made.put_blob), 0.1)


def run_started(attempt: int, seed: int, result: RunResult) -> RunStarted:
    """The event before a run whose result is known already."""
    spec = RunSpec(
        run_id=result.run_id,
        session="night",
        box=result.box,
        image=result.image_digest,
        argv=IN_FORCE.workspace.command,
        working_directory="/workspace",
        environment={"NIGHTLAB_SEED": str(seed)},
        mounts=(),
        gpus=(),
        limits=result.limits,
    )
    return RunStarted(purpose=ATTEMPT, attempt=attempt, seed=seed, spec=spec)


def run_finished(
    attempt: int,
    seed: int,
    result: RunResult,
    disturbed: bool = False,
    put_blob: Callable[[bytes], str] = lambda body: hashlib.sha256(body).hexdigest(),
) -> RunFinished:
    others = 0.9 if disturbed else 0.04
    limits = IN_FORCE.disturbance
    usual_speed = None if attempt == 0 and seed <= 3 else SPEED
    disturbance = Disturbance(
        other_cores=others,
        limit_cores=limits.max_other_cores,
        disturbed=disturbed,
        idle_cores=0.0,
        usual_cores=0.0 if usual_speed is None else USUAL_CORES,
        speed=SPEED,
        usual_speed=usual_speed,
        min_speed=limits.min_speed,
        before=STATE,
        after=STATE,
        held_back=(),
    )
    return RunFinished(
        purpose=ATTEMPT,
        attempt=attempt,
        seed=seed,
        result=result.model_copy(update={"log": excerpt(result.log)}),
        log=put_blob(packed_log(result.log)),
        disturbance=disturbance if result.box == "train" else None,
        over_budget_seconds=0.0,
    )


def run_result(
    run_id: str,
    box: Box,
    *,
    log: str,
    outcome: Outcome = Outcome.OK,
    wall_seconds: float = BUDGET_SECONDS - 2,
) -> RunResult:
    return RunResult(
        run_id=run_id,
        box=box,
        outcome=outcome,
        exit_code=0 if outcome is Outcome.OK else 1,
        signal=None,
        wall_seconds=wall_seconds,
        limits=LIMITS[box],
        peak_memory_bytes=3 * 2**29,
        cpu_seconds=wall_seconds * 1.9,
        oom_kills=1 if outcome is Outcome.OUT_OF_MEMORY else 0,
        gpus=(),
        gpu=(),
        log=kept_log(log),
        output=CHECKPOINT if box == "train" and outcome is Outcome.OK else (),
        image_digest=IMAGE,
        started_at=EVENING,
        finished_at=EVENING + timedelta(seconds=wall_seconds),
        evidence={"clock": "host", "oom_kill": 0},
    )


def kept_log(text: str) -> Log:
    """What a box keeps of an ASCII log: head and tail, the middle counted."""
    head, rest = text[:KEPT_LOG_CHARS], text[KEPT_LOG_CHARS:]
    tail = rest[-KEPT_LOG_CHARS:]
    return Log(head=head, tail=tail, omitted_bytes=len(rest) - len(tail))


def scored(
    attempt: int,
    seed: int,
    value: float | None,
    reason: str | None = None,
    put_blob: Callable[[bytes], str] = lambda body: hashlib.sha256(body).hexdigest(),
) -> Scored:
    """A score with its sheet."""
    explanation = "" if reason is None else "The model answered a probe with a different prefix."
    details = {"rows": 2114, "probes": 64, "largest_shift": 3.1e-7, "tokens": 541_184}
    details |= {"load_seconds": 2.6, "model_seconds": 6.8}
    sheet = {"metric": "val_bpb", "value": value, "valid": reason is None, "reason": reason}
    return Scored(
        purpose=ATTEMPT,
        source="scored",
        attempt=attempt,
        seed=seed,
        split="val",
        value=value,
        reason=reason,
        explanation=explanation,
        details=details,
        checks=1,
        sheet=put_blob(
            json.dumps(sheet | {"explanation": explanation, "details": details}).encode()
        ),
    )


def progress_log(seed: int, lines: int, note: str = "") -> str:
    """What train.py prints: JSON lines, the loss falling."""
    chance = random.Random(seed)
    rows = [
        json.dumps(
            {
                "step": 20 * n,
                "seconds": round(BUDGET_SECONDS * n / lines, 2),
                "loss": round(1.6 + 5.2 / (1 + 0.25 * n) + chance.gauss(0, 0.03), 4),
                "tokens": 20 * n * 4096,
            }
        )
        for n in range(lines)
    ]
    return "\n".join([f"device cpu, {lines} lines", *rows, note]) + "\n"


def _candidate(
    made: Night,
    chance: random.Random,
    number: int,
    hypothesis: str,
    best: float,
    hostile: bool,
    log_lines: int,
) -> float:
    _thinking(made, chance, number)
    body = f"DEPTH = {number}\n# {HOSTILE_TEXTS[number % 8] if hostile else 'depth'}\n"
    made.add(
        AttemptStarted(
            attempt=number,
            kind="candidate",
            hypothesis=hypothesis,
            researcher="claude",
            files={"train.py": made.put_blob(body.encode())},
            diff=made.put_blob(_diff(number, hypothesis if hostile else "").encode()),
            parent=0,
            seeds=(0, 1, 2, 3),
        ),
        20,
    )
    note = hypothesis if hostile else ""
    match number % 11:
        case 4 | 9:
            return _failed(made, number, best, progress_log(number, log_lines, note))
        case 7:
            return _invalid(made, number, best, progress_log(number, log_lines, note))
        case 10 if number > 20:
            made.add(
                AttemptInterrupted(attempt=number, is_box_lost=False, reason="nightlab was killed")
            )
            return best
    return _measured(made, chance, number, best, progress_log(number, log_lines, note))


def _measured(made: Night, chance: random.Random, number: int, best: float, log: str) -> float:
    gained = number % 5 == 1
    change = -0.25 * (best - 2.05) * chance.uniform(0.3, 1) if gained else chance.expovariate(20)
    repeats = 2 if abs(change) < 3 * NOISE else 1
    values = tuple(round(best + change + chance.gauss(0, NOISE), 6) for _ in range(repeats))
    for seed, value in enumerate(values, start=1):
        boxes(made, attempt=number, seed=seed, disturbed=number % 23 == 3, log=log)
        made.add(scored(number, seed, value, put_blob=made.put_blob))
    mean = sum(values) / repeats
    kept = best - mean > 2 * NOISE
    arithmetic = Arithmetic(
        candidate_mean=mean,
        candidate_values=values,
        against=0,
        best_mean=best,
        best_values=(best,),
        gain=best - mean,
        noise=NOISE,
        degrees_of_freedom=2 + number,
        own_noise=None,
        false_keep_rate_per_night=0.05,
        required_gain=2 * NOISE,
        doubt_of_a_look=0.03,
    )
    made.add(
        AttemptFinished(
            attempt=number,
            verdict=Verdict.KEPT if kept else Verdict.DISCARDED,
            reason="better" if kept else "not_better",
            explanation="Better than the best by more than the noise."
            if kept
            else "Not better than the best by more than the noise.",
            value=mean,
            arithmetic=arithmetic,
            seconds=repeats * BUDGET_SECONDS + 10,
        )
    )
    return mean if kept else best


def _failed(made: Night, number: int, best: float, log: str) -> float:
    memory = number % 2 == 0
    outcome = Outcome.OUT_OF_MEMORY if memory else Outcome.FAILED
    trace = (
        'Traceback (most recent call last):\n  File "/workspace/train.py", line 71\nKeyError: 4\n'
    )
    result = run_result(f"a{number}-s1-train", "train", log=log + trace, outcome=outcome)
    made.add(run_started(number, 1, result), 0.0)
    run = run_finished(number, 1, result, put_blob=made.put_blob)
    made.add(run.model_copy(update={"curve": made.put_blob(packed(curve_of(log)))}), 45)
    return _unmeasured(made, number, best, Verdict.FAILED, outcome.value, "The training failed.")


def _invalid(made: Night, number: int, best: float, log: str) -> float:
    boxes(made, attempt=number, seed=1, log=log)
    made.add(scored(number, 1, None, "not_causal", made.put_blob))
    text = "The prefix's probabilities moved when its future changed."
    return _unmeasured(made, number, best, Verdict.INVALID, "not_causal", text)


def _unmeasured(
    made: Night, number: int, best: float, verdict: Verdict, reason: str, explanation: str
) -> float:
    made.add(
        AttemptFinished(
            attempt=number,
            verdict=verdict,
            reason=reason,
            explanation=explanation,
            value=None,
            arithmetic=None,
            seconds=46.0,
        )
    )
    return best


def _thinking(made: Night, chance: random.Random, number: int) -> None:
    """The model calls before an attempt, with what can go wrong in between."""
    if number % 17 == 5:
        made.add(RetryWaited(conversation=1, error="overloaded_error", wait_seconds=30.0), 30)
    if number % 29 == 6:
        made.add(Noticed(kind="nudge", explanation="The model ended its turn; asked to go on."))
    for refused in (True, False) if number % 31 == 8 else (False,):
        made.add(
            ModelCalled(
                conversation=1,
                model="claude-sonnet-5-5",
                request_id=f"req_{number}",
                stop_reason="refusal" if refused else "tool_use",
                usage=Usage(
                    input_tokens=900,
                    output_tokens=chance.randint(400, 2500),
                    cache_read_tokens=20_000,
                    cache_write_tokens=1500,
                ),
                cost_usd=None if number % 37 == 9 else round(chance.uniform(0.02, 0.09), 4),
                seconds=chance.uniform(6, 40),
            ),
            25,
        )


def _diff(number: int, note: str) -> str:
    lines = [
        "--- train.py (best)",
        "+++ train.py (candidate)",
        "@@ -12,7 +12,7 @@",
        " # Model",
        "-DEPTH = 4  # blocks",
        f"+DEPTH = {number}  # blocks",
        " WIDTH = 256  # channels",
    ]
    if note:
        lines += [f"+{line}" for line in note.splitlines()]
    lines += [f" context_{n} = {n}" for n in range(number % 13)]
    return "\n".join(lines) + "\n"
