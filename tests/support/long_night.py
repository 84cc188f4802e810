"""An honest session of as many events as are asked for."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from agent.attempt.decide import Decision, Step, next_step
from agent.candidate.diffs import unified_diff
from agent.record.chain import request_sha
from agent.record.events import (
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
from agent.researcher.providers import cost_usd
from agent.settings import Settings
from tests.support import histories

MODEL = "claude-sonnet-5-5"
CALLS_OF_AN_ATTEMPT = 5
MESSAGES_OF_A_CONVERSATION = 60
LINES = 200


@dataclass
class LongNight:
    """A session that goes on for as many events as are asked for."""

    chance: random.Random = field(default_factory=lambda: random.Random(5))
    made: histories.Night = field(default_factory=histories.Night)
    best: int = 0
    source: bytes = b"DEPTH = 4\n"
    best_source: bytes = b"DEPTH = 4\n"
    conversation: int = 0
    shas: list[str] = field(default_factory=list)

    def begin(self) -> None:
        """The baseline."""
        tables = histories.IN_FORCE.model_dump()
        tables["session"] |= {"attempts": 100_000, "usd": None}
        histories.start(self.made, settings=Settings.model_validate(tables))
        histories.baseline(self.made, self.chance)

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
                seeds=(1, *range(100 * number, 100 * number + 8)),
            )
        )
        self._judge(number)

    def _judge(self, number: int) -> None:
        best = self.made.history.best
        assert best is not None
        mean = fmean(best.values().values())
        aim = mean + self.chance.choice([-0.002, 0.0, 0.01, 0.03])
        while not isinstance(step := self._next(number), Decision):
            center = aim if step.attempt == number else mean
            value = round(center + self.chance.gauss(0, histories.NOISE), 6)
            histories.boxes(self.made, attempt=step.attempt, seed=step.seed)
            scored = histories.scored(step.attempt, step.seed, value, put_blob=self.made.put_blob)
            self.made.add(scored)
        self.made.add(step.finished(number, 310.0))
        if step.verdict is Verdict.KEPT:
            self.best, self.best_source = number, self.source
        self.source = self.best_source

    def _next(self, number: int) -> Step | Decision:
        return next_step(self.made.history, number, self.made.get_blob)

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
