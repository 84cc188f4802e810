"""Habits of servers that this project did not write, as data: what they do to each answer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from tests.support.messages_server import Answer, Raw, Request, Turn

Event = dict[str, Any]
Events = list[Any]


class Http(BaseModel):
    """An answer that is no stream."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    status: int
    body: Any
    """A text, or what is sent as JSON."""
    headers: dict[str, str] = {}


class Habit(BaseModel):
    """What a server does, and what becomes of a night with it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    does: str
    """The server, and its habit, in words."""
    ends: str
    """How a night of two attempts ends."""
    calls: int = 0
    """How often the server is asked."""
    unpriced: bool = False
    """Whether what the night cost is not known in the end."""
    miscounts: bool = False
    """Whether the server counts otherwise than it bills."""
    begins: str | None = None
    """What the call before the night refuses it with, in part; None where it lets it begin."""
    times: int | None = None
    """So many answers have the habit; None for all of them."""
    bend: list[list[Any]] = []
    """Changes to the events of the stream: see `BENDS`."""
    http: Http | None = None
    error: tuple[str, str] | None = None
    """Type and text of an error inside the stream, in place of the answer."""
    blocks: list[dict[str, Any]] | None = None
    """What the answer holds, in place of what a researcher of few thoughts does."""
    stop_reason: str | None = None
    notices: list[str] = []
    """Kinds that must be on record."""
    says: str = ""
    """What must be in the words of the record."""
    settings: dict[str, dict[str, Any]] = {}

    def script(self, mind: Callable[[Request], Turn]) -> Iterator[Callable[[Request], Answer]]:
        """The server's answers."""
        if self.times is None:
            return itertools.repeat(lambda request: self._answer(request, mind))
        odd = [lambda request: self._answer(request, mind)] * self.times
        return itertools.chain(odd, itertools.repeat(mind))

    def _answer(self, request: Request, mind: Callable[[Request], Turn]) -> Answer:
        if self.http is not None:
            body = self.http.body
            text = body if isinstance(body, str) else json.dumps(body)
            return Raw(self.http.status, text.encode(), self.http.headers)
        turn = mind(request) if self.blocks is None else Turn(tuple(self.blocks), odd=True)
        turn = replace(turn, stop_reason=self.stop_reason, odd=True)
        # Signed thinking would not survive a server that changes what comes with it.
        blocks = [block for block in turn.blocks if block["type"] != "thinking" or not self.bend]
        turn = replace(turn, blocks=tuple(blocks))
        if self.error is not None:
            error = {"type": self.error[0], "message": self.error[1]}
            event = {"type": "error", "error": error}
            return replace(turn, bend=lambda events: [*events[:2], event])
        return replace(turn, bend=self._bent if self.bend else None)

    def _bent(self, events: Events) -> Events:
        for name, *how in self.bend:
            events = BENDS[name](events, *how)
        return events


def _drop(events: Events, kind: str) -> Events:
    """Without the events of a kind."""
    return [event for event in events if event["type"] != kind]


def _keep(events: Events, count: int) -> Events:
    """Only so many."""
    return events[:count]


def _twice(events: Events, kind: str) -> Events:
    """Each event of a kind twice."""
    return [e for event in events for e in [event] * (1 + (event["type"] == kind))]


def _put(events: Events, path: str, value: Any) -> Events:
    """Another value: the path begins with the kind of the event; null may be one."""
    kind, *steps, last = path.split(".")
    for event in events:
        place = event if event["type"] == kind else None
        for step in steps:
            place = place.get(step) if isinstance(place, dict) else None
        if isinstance(place, dict) and (last in place or last != "text"):
            place[last] = value
    return events


def _take(events: Events, path: str) -> Events:
    """A value left out."""
    kind, *steps, last = path.split(".")
    for event in events:
        place = event if event["type"] == kind else None
        for step in steps:
            place = place.get(step) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place.pop(last, None)
    return events


def _input(events: Events, text: str) -> Events:
    """Another text as the input of every tool call; % stands for what it would have been."""
    bent: Events = []
    indices = {e["index"] for e in events if _is_call(e)}
    for index in indices:
        pieces = [e["delta"].get("partial_json", "") for e in events if _is_delta(e, index)]
        whole, done = "".join(pieces), False
        for event in [e for e in events if _is_delta(e, index)]:
            event["delta"]["partial_json"] = "" if done else text.replace("%", whole)
            done = True
    bent += events
    return bent


def _encoded(events: Events) -> Events:
    """Every tool's input as a JSON text inside JSON."""
    for index in {e["index"] for e in events if _is_call(e)}:
        deltas = [e for e in events if _is_delta(e, index)]
        whole = "".join(e["delta"]["partial_json"] for e in deltas)
        for place, event in enumerate(deltas):
            event["delta"]["partial_json"] = "" if place else json.dumps(whole)
    return events


def _in_start(events: Events) -> Events:
    """Every tool's input whole in the event that begins its block."""
    for index in {e["index"] for e in events if _is_call(e)}:
        whole = "".join(e["delta"]["partial_json"] for e in events if _is_delta(e, index))
        for event in events:
            if _is_call(event) and event["index"] == index:
                event["content_block"]["input"] = json.loads(whole)
        events = [e for e in events if not _is_delta(e, index)]
    return events


def _raw(events: Events, at: int, text: str) -> Events:
    """Bytes of the server's own at a place."""
    return [*events[:at], text, *events[at:]]


def _is_call(event: Event) -> bool:
    return bool(event.get("content_block", {}).get("type") == "tool_use")


def _is_delta(event: Event, index: int) -> bool:
    return bool(event["type"] == "content_block_delta" and event["index"] == index)


BENDS: dict[str, Callable[..., Events]] = {
    "drop": _drop,
    "keep": _keep,
    "twice": _twice,
    "put": _put,
    "take": _take,
    "input": _input,
    "encoded": _encoded,
    "in_start": _in_start,
    "raw": _raw,
}


def all_habits(directory: Path) -> dict[str, Habit]:
    """Every habit in the files of a directory, by its name."""
    return {
        name: Habit.model_validate(told)
        for path in sorted(directory.glob("*.json"))
        for name, told in json.loads(path.read_text(encoding="utf-8")).items()
    }
