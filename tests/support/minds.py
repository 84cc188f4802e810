"""Researchers of few thoughts, and short sessions against a script."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.attempt.lab import Lab
from agent.record.chain import read_ledger
from agent.record.events import Noticed, SessionEnded
from agent.record.history import History, fold
from tests.support.labs import work
from tests.support.messages_server import MessagesServer, Request, Turn, say, thinking, tool
from tests.support.nights import Place

SHOWN = re.compile(r"^\s*\d+\s+X = (\S+) .*\n\s*\d+\s+Y = (\d+) ", re.MULTILINE)
DETAILS = {"type": "refusal", "category": "frontier_llm", "explanation": "It may compete."}


@dataclass
class Mind:
    """A researcher of few thoughts: it reads the file, moves the point a little, and runs."""

    chance: random.Random

    def answer(self, request: Request) -> Turn:
        last = request["messages"][-1]["content"]
        results = (block["content"] for block in last if block["type"] == "tool_result")
        shown = SHOWN.search("\n".join(results))
        words = thinking("I wonder where the point should go next. " * 12)
        if shown is None:
            return say(words, tool("read", file_path="train.py"))
        x, y = shown[1], shown[2]
        new_x = f"{float(x) + self.chance.gauss(0, 0.4):.4f}"
        new_y = str(self.chance.choice([4, 8, 16, 32]))
        edits = [_edit(f"X = {x} ", f"X = {new_x} ")]
        if new_y != y:
            edits.append(_edit(f"Y = {y} ", f"Y = {new_y} "))
        return say(words, *edits, tool("run", hypothesis=f"the point at {new_x}, {new_y}"))


def _edit(old: str, new: str) -> dict[str, Any]:
    return tool("edit", file_path="train.py", old_string=old, new_string=new)


def work_with_claude(lab: Lab, place: Place, server: MessagesServer) -> SessionEnded:
    """One life of our process."""
    environ = {"ANTHROPIC_API_KEY": "not-a-real-key", "ANTHROPIC_BASE_URL": server.url}
    return work(lab, place.program, "claude", environ=environ, clock=place.clock.monotonic)


class Scene:
    """A short session against a script."""

    def __init__(self, root: Path, **changes: dict[str, Any]) -> None:
        session = {"attempts": 2, "max_failures_in_a_row": 10} | changes.pop("session", {})
        self.place = Place(root, changes={"session": session, **changes})
        self.mind = Mind(random.Random(5))

    def play(self, script: Iterable[Any]) -> SessionEnded:
        clock = self.place.clock
        with MessagesServer(script, clock=clock.monotonic, endless=True) as self.server:
            return work_with_claude(self.place.begin("claude"), self.place, self.server)

    def then(self, *script: Any) -> Iterable[Any]:
        """The script, and after it a researcher that works."""
        return itertools.chain(script, itertools.repeat(self.mind.answer))

    @property
    def history(self) -> History:
        return fold(read_ledger(self.place.directory))

    def events(self, kind: type) -> list[Any]:
        return [e.event for e in read_ledger(self.place.directory) if isinstance(e.event, kind)]

    def notices(self) -> list[str]:
        return [event.kind for event in self.events(Noticed)]
