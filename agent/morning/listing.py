"""A ledger's events as lines for a person."""

import json
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from typing import Any

from agent.morning.audit import Difference
from agent.record.chain import Clock, utc_now
from agent.record.events import EVENT_TYPES, Entry, Event
from agent.text import one_line
from sandbox.contract.errors import UsageError

FACTS_CHARACTERS = 160
FACT_CHARACTERS = 60
SHA_DIGITS = 12

_SHOWN = {
    "session_started": ("session", "researcher", "nightlab_version", "program"),
    "run_started": ("purpose", "box", "seed", "run_id"),
    "run_finished": (
        *("purpose", "result.box", "seed"),
        *("result.outcome", "result.wall_seconds", "result.run_id"),
    ),
    "attempt_finished": ("verdict", "reason", "value", "explanation"),
}
"""What is worth its place on one line; of other events everything is."""
_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NOTED = re.compile(rf"[0-9a-f]{{{SHA_DIGITS},64}}")


def asked_for(
    entries: Sequence[Entry],
    attempt: int | None,
    types: str | None,
    since: str | None,
    now: Clock = utc_now,
) -> list[Entry]:
    """The events that the flags ask for; none when they ask for nothing.

    Args:
        entries, attempt: of the session.
        types: names of events, with commas between them.
        since: a time, local unless it names its zone, or a duration before now, such as 1h30m.

    Raises:
        UsageError: no such attempt, no such type, or no time.
    """
    if attempt is None and types is None and since is None:
        return []
    names = _known_types(types)
    begin = None if since is None else _moment(since, now())
    numbers = {_attempt_of(entry.event) for entry in entries}
    if attempt is not None and attempt not in numbers:
        last = max((number or 0 for number in numbers), default=0)
        raise UsageError(f"there is no attempt {attempt}", f"its attempts are 0 to {last}")
    return [
        entry
        for entry in entries
        if (attempt is None or attempt == _attempt_of(entry.event))
        and (not names or entry.event.type in names)
        and (begin is None or datetime.fromisoformat(entry.at) >= begin)
    ]


def check_hash(noted: str | None) -> None:
    """Refuse what cannot be a head that somebody noted.

    Raises:
        UsageError: too short to mean one event, or no hash.
    """
    if noted is not None and not _NOTED.fullmatch(noted):
        message = f"{one_line(noted, 80)} is no hash"
        raise UsageError(message, f"give {SHA_DIGITS} to 64 digits of the head that you noted")


def sentence(difference: Difference) -> str:
    """A difference on one line."""
    where = "record" if difference.seq is None else f"seq {difference.seq}"
    return f"{where}: {one_line(difference.what, 300)}"


def table(entries: Sequence[Entry]) -> Iterator[str]:
    """A line for each event: number, time in UTC, type, attempt, facts."""
    yield f"{'seq':>6}  {'time (UTC)':<19}  {'type':<19}  {'attempt':>7}  facts"
    for entry in entries:
        number = _attempt_of(entry.event)
        at = datetime.fromisoformat(entry.at).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
        yield (
            f"{entry.seq:>6}  {at}  {entry.event.type:<19}  "
            f"{'' if number is None else number:>7}  {facts(entry.event)}".rstrip()
        )


def facts(event: Event) -> str:
    """What an event says, on one line; hostile text is made visible and bounded."""
    usual = (name for name in type(event).model_fields if name not in ("type", "attempt"))
    names = _SHOWN.get(event.type, usual)
    named = ((name.rpartition(".")[2], attrgetter(name)(event)) for name in names)
    shown = (f"{name} {_word(fact)}" for name, fact in named if fact not in (None, "", (), {}))
    return one_line("; ".join(shown), FACTS_CHARACTERS)


def _attempt_of(event: Event) -> int | None:
    number: int | None = getattr(event, "attempt", None)
    return number


def _word(value: Any) -> str:
    if isinstance(value, str):
        return value[:SHA_DIGITS] if _SHA256.fullmatch(value) else one_line(value, FACT_CHARACTERS)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool | int):
        return str(value)
    plain = value.model_dump(mode="json") if hasattr(value, "model_dump") else value
    return one_line(json.dumps(plain, default=str, ensure_ascii=False), FACT_CHARACTERS)


def _known_types(types: str | None) -> frozenset[str]:
    names = frozenset(name.strip() for name in (types or "").split(",") if name.strip())
    if unknown := sorted(names - set(EVENT_TYPES)):
        message = f"there is no event of type {one_line(unknown[0], 60)}"
        raise UsageError(message, f"known types: {', '.join(EVENT_TYPES)}")
    return names


def _moment(text: str, now: datetime) -> datetime:
    duration = _DURATION.fullmatch(text)
    if duration is not None and any(duration.groups()):
        days, hours, minutes, seconds = (int(part or 0) for part in duration.groups())
        return now - timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError:
        message = f"{one_line(text, 60)} is neither a time nor a duration"
        hint = "write --since 2026-03-07T23:30, or --since 1h30m for the last 90 minutes"
        raise UsageError(message, hint) from None
