"""Whole sessions without boxes, night and morning, and a forger with write access to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agent.candidate.git import Git
from agent.morning.audit import audit
from agent.morning.export import Person, approve
from agent.morning.replay import replay
from agent.morning.review import review
from agent.record.chain import FIRST_PREVIOUS, LEDGER_NAME, canonical, entry_hash, read_ledger
from agent.record.events import Entry
from agent.record.history import fold
from tests.support.labs import play, work
from tests.support.messages_server import MessagesServer, tinker
from tests.support.nights import Place

Lines = list[dict[str, Any]]


def sampled(root: Path, attempts: int = 8) -> Place:
    """A night of the sampler with its review, a replay and an approval."""
    place = Place(root, changes={"session": {"attempts": attempts}})
    lab = place.begin("tpe")
    with lab.ledger:
        play(lab, place.program)
        review(lab, 2, lambda _: None)
        replay(lab, 1, lambda _: None)
        somebody = Person("Somebody", "somebody@example.org")
        approve(lab.ledger, somebody, "it is better", Git(root, {}))
    return place


def talked(root: Path, attempts: int = 3) -> Place:
    """A night of a language model behind the Messages API."""
    place = Place(root, changes={"session": {"attempts": attempts}})
    script: Iterator[Any] = iter(lambda: tinker, None)
    lab = place.begin("claude")
    with MessagesServer(script, clock=place.clock.monotonic, endless=True) as server:
        environ = {"ANTHROPIC_API_KEY": "not-a-real-key", "ANTHROPIC_BASE_URL": server.url}
        work(lab, place.program, "claude", environ=environ, clock=place.clock.monotonic)
    return place


def forge(directory: Path, change: Callable[[Lines], object]) -> None:
    """Change a ledger's lines and write the whole chain anew, as one with write access would."""
    path = directory / LEDGER_NAME
    lines: Lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    change(lines)
    previous = FIRST_PREVIOUS
    for seq, line in enumerate(lines):
        line |= {"seq": seq, "previous": previous}
        line["hash"] = previous = entry_hash(line)
    path.write_text("".join(canonical(line) + "\n" for line in lines), encoding="utf-8")


def only(lines: Lines, kind: str, **fields: Any) -> dict[str, Any]:
    """The last event of a kind with these fields."""
    events: Iterator[dict[str, Any]] = (line["event"] for line in reversed(lines))
    return next(
        e for e in events if e["type"] == kind and all(e[name] == v for name, v in fields.items())
    )


def resumed(lines: Lines, section: str, **changes: Any) -> None:
    """Append a resume whose settings differ."""
    start = lines[0]["event"]
    tables = json.loads(json.dumps(start["settings"]))
    tables[section] |= changes
    event = {
        "type": "session_resumed",
        "nightlab_version": "test",
        "settings": tables,
        "interrupted_attempts": (),
        "removed_containers": [],
        "engine": start["engine"],
        "machine": start["machine"],
        "researcher": None,
    }
    lines.append({**lines[-1], "event": event})


def found(directory: Path) -> list[str]:
    """What the audit says."""
    return [difference.what for difference in audit(directory, read_ledger(directory))]


@contextmanager
def restored(path: Path) -> Iterator[bytes]:
    """A file's bytes, which are back in it afterwards."""
    before = path.read_bytes()
    try:
        yield before
    finally:
        path.write_bytes(before)


def verdicts_of(entries: list[Entry]) -> list[Any]:
    """Every judged attempt but for its number and its time."""
    numbers: dict[int | None, int | None] = {None: None}
    verdicts: list[Any] = []
    for attempt in fold(entries).attempts:
        if attempt.finished is None:
            continue
        numbers[attempt.number] = len(verdicts)
        started, finished = attempt.started, attempt.finished
        told = started.model_dump(exclude={"attempt"}) | {"parent": numbers[started.parent]}
        end = finished.model_dump(exclude={"attempt", "seconds"})
        if end["arithmetic"]:
            end["arithmetic"]["against"] = numbers[end["arithmetic"]["against"]]
        verdicts.append((told, end, attempt.values(), attempt.values("holdout")))
    return verdicts
