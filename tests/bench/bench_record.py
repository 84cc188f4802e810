"""How long an audit takes: a synthetic session of many events, checked by the real command.

`python -m tests.bench.bench_record [--events N] [--json]`: an honest session of a language model,
about 50 events and 30 blobs an attempt, is made and `nightlab audit` checks all of it: chain,
blobs, runs, verdicts, diffs and prices. Prints seconds and peak memory of that process, start
included.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.attempt.judge import Ruling, judge, pooled_noise
from agent.candidate.diffs import unified_diff
from agent.record.events import (
    AttemptFinished,
    AttemptStarted,
    ConversationOpened,
    FileChanged,
    MessageAdded,
    ModelAsked,
    ModelCalled,
    Reserve,
    SessionEnded,
    StopReason,
    ToolCalled,
    ToolReturned,
    Usage,
    Verdict,
)
from agent.record.ledger import request_sha
from agent.researcher.base import cost_usd
from agent.settings import Direction
from tests.support import histories

MODEL = "claude-sonnet-5-5"
CALLS_OF_AN_ATTEMPT = 5
MESSAGES_OF_A_CONVERSATION = 60
MEASURED = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss]), file=sys.stderr)
sys.exit(done.returncode)
"""
"""Runs a command from a small process: a child's peak counts what its parent held at the fork."""
LINES = 200
DIRECTION: Direction = "minimize"


@dataclass
class LongNight:
    """A session that goes on for as many events as are asked for."""

    chance: random.Random = field(default_factory=lambda: random.Random(5))
    made: histories.Night = field(default_factory=histories.Night)
    groups: list[list[float]] = field(default_factory=list)
    best: int = 0
    best_values: list[float] = field(default_factory=list)
    source: bytes = b"DEPTH = 4\n"
    best_source: bytes = b"DEPTH = 4\n"
    conversation: int = 0
    shas: list[str] = field(default_factory=list)

    def begin(self) -> None:
        """The baseline."""
        limits = histories.SETTINGS["session"] | {"attempts": 100_000, "usd": None}
        histories.start(self.made, settings=histories.SETTINGS | {"session": limits})
        histories.baseline(self.made, self.chance)
        self.best_values = list(self.made.history.attempts[0].values().values())
        self.groups.append(self.best_values)

    def attempt(self, number: int) -> None:
        """One candidate, from the first thought to its verdict."""
        if not self.shas or len(self.shas) > MESSAGES_OF_A_CONVERSATION:
            self._open_conversation()
        for call in range(CALLS_OF_AN_ATTEMPT):
            self._call(f"{number}-{call}", changes=call == CALLS_OF_AN_ATTEMPT - 1)
        self.made.add(
            AttemptStarted(
                attempt=number,
                kind="candidate",
                hypothesis=self.chance.choice(histories.IDEAS),
                researcher="claude",
                files={"train.py": self._blob(self.source)},
                diff=self._blob(
                    unified_diff({"train.py": self.best_source}, {"train.py": self.source})
                ),
                parent=self.best,
            )
        )
        self._judge(number)

    def _judge(self, number: int) -> None:
        mean = sum(self.best_values) / len(self.best_values)
        aim = mean + self.chance.choice([-0.002, 0.0, 0.01, 0.03])
        values: list[float] = []
        for seed in (1, 2, 3):
            values.append(round(aim + self.chance.gauss(0, histories.NOISE), 6))
            histories.boxes(self.made, attempt=number, seed=seed)
            self.made.add(histories.scored(number, seed, values[-1], put_blob=self.made.put_blob))
            judgement = judge(
                values,
                self.best_values,
                pooled_noise(self.groups),
                direction=DIRECTION,
                confidence=histories.IN_FORCE.noise.confidence,
                max_repeats=3,
            )
            if judgement.ruling is not Ruling.REPEAT:
                break
        if len(values) > 1:
            self.groups.append(values)
        kept = judgement.ruling is Ruling.KEEP
        self.made.add(
            AttemptFinished(
                attempt=number,
                verdict=Verdict.KEPT if kept else Verdict.DISCARDED,
                reason=judgement.reason,
                explanation=judgement.explanation,
                value=judgement.arithmetic.candidate_mean,
                arithmetic=judgement.arithmetic,
                seconds=310.0,
            )
        )
        if kept:
            self.best, self.best_values, self.best_source = number, values, self.source
        self.source = self.best_source

    def _open_conversation(self) -> None:
        self.conversation += 1
        system, tools = self._blob(b"You improve train.py."), self._blob(b"[]")
        self.made.add(
            ConversationOpened(
                conversation=self.conversation,
                researcher=MODEL,
                system=system,
                tools=tools,
                reason="the conversation reached its token ceiling",
            )
        )
        self.shas = [system, tools]
        self._say("user", self._text(3000))

    def _call(self, name: str, *, changes: bool) -> None:
        reserve = Reserve(calls=1, tokens=60_000, usd=0.4)
        self.made.add(ModelAsked(conversation=self.conversation, model=MODEL, reserve=reserve))
        usage = Usage(
            input_tokens=self.chance.randint(200, 900),
            output_tokens=self.chance.randint(400, 2500),
            cache_read_tokens=self.chance.randint(10_000, 60_000),
            cache_write_tokens=self.chance.randint(900, 2500),
        )
        reply = self._text(1200)
        self.made.add(
            ModelCalled(
                conversation=self.conversation,
                model=MODEL,
                request_id=f"req_{name}",
                stop_reason="tool_use",
                usage=usage,
                cost_usd=cost_usd(MODEL, usage),
                seconds=12.0,
                request=request_sha(self.shas),
                reply=self._blob(reply),
            )
        )
        self._say("assistant", reply)
        tool = "edit" if changes else "read"
        arguments = self._blob(self._text(300))
        self.made.add(ToolCalled(call_id=f"toolu_{name}", name=tool, input=arguments))
        if changes:
            self._change()
        output = self._blob(self._text(2000))
        self.made.add(
            ToolReturned(call_id=f"toolu_{name}", name=tool, is_error=False, output=output)
        )
        self._say("user", self._text(2200))

    def _change(self) -> None:
        """Three lines of a file of two hundred; the first change writes it whole."""
        before, lines = self.source, self.source.splitlines(keepends=True)
        if len(lines) < LINES:
            lines = [self._text(30) + b"\n" for _ in range(LINES)]
        for place in self.chance.sample(range(LINES), 3):
            lines[place] = self._text(30) + b"\n"
        self.source = b"".join(lines)
        self.made.add(
            FileChanged(
                path="train.py",
                before=self._blob(before),
                after=self._blob(self.source),
                diff=self._blob(unified_diff({"train.py": before}, {"train.py": self.source})),
            )
        )

    def _say(self, role: Any, content: bytes) -> None:
        self.shas.append(self._blob(content))
        self.made.add(
            MessageAdded(conversation=self.conversation, role=role, message=self.shas[-1])
        )

    def _blob(self, content: bytes) -> str:
        return self.made.put_blob(content)

    def _text(self, length: int) -> bytes:
        return self.chance.randbytes(length // 2).hex().encode()


def long_session(events: int) -> histories.Night:
    """An honest session of at least so many events."""
    night, number = LongNight(), 0
    night.begin()
    while len(night.made.entries) < events - 1:
        number += 1
        night.attempt(number)
    night.made.add(SessionEnded(reason=StopReason.STOPPED, explanation=f"{number} attempts"))
    return night.made


def measured(events: int) -> dict[str, Any]:
    """What the audit of so many events takes."""
    with tempfile.TemporaryDirectory() as directory:
        made = long_session(events)
        made.write(Path(directory) / "night")
        size_bytes = (Path(directory) / "night" / "ledger.jsonl").stat().st_size
        audit = [sys.executable, "-P", "-m", "agent.cli", "audit", "night", "--runs", directory]
        command = [sys.executable, "-c", MEASURED, *audit]
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - started
    processor_seconds, peak_kib = json.loads(done.stderr.splitlines()[-1])
    return {
        "events": len(made.entries),
        "attempts": len(made.history.attempts) - 1,
        "blobs": len(made.blobs),
        "ledger_mb": round(size_bytes / 1e6, 1),
        "seconds": round(seconds, 2),
        "processor_seconds": round(processor_seconds, 2),
        "peak_memory_mb": round(peak_kib * 1024 / 1e6),
        "exit_code": done.returncode,
        "said": done.stdout[:200].strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    figures = measured(arguments.events)
    lines = [f"{name:<16} {value}" for name, value in figures.items()]
    sys.stdout.write((json.dumps(figures) if arguments.json else "\n".join(lines)) + "\n")
    sys.exit(figures["exit_code"])


if __name__ == "__main__":
    main()
