"""A ledger's events as lines for a person."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from agent.morning.audit import Difference
from agent.record.chain import Clock, utc_now
from agent.record.events import (
    EVENT_TYPES,
    AttemptFinished,
    Entry,
    Event,
    RunFinished,
    RunStarted,
    SessionStarted,
)
from agent.text import one_line
from sandbox.contract.errors import NightlabError

FACTS_CHARACTERS = 160
FACT_CHARACTERS = 60
SHA_DIGITS = 12

_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NOTED = re.compile(rf"[0-9a-f]{{{SHA_DIGITS},64}}")


class ListingError(NightlabError):
    """A filter that cannot be meant."""

    usual_hint = "see nightlab audit --help"


@dataclass(frozen=True)
class Filter:
    """Which events are asked for; what is not given lets everything through."""

    attempt: int | None = None
    types: frozenset[str] = frozenset()
    since: datetime | None = None

    def __call__(self, entry: Entry) -> bool:
        """Whether the event is one of those."""
        return (
            (self.attempt is None or self.attempt == attempt_of(entry.event))
            and (not self.types or entry.event.type in self.types)
            and (self.since is None or datetime.fromisoformat(entry.at) >= self.since)
        )


def make_filter(
    entries: Sequence[Entry],
    attempt: int | None,
    types: str | None,
    since: str | None,
    now: Clock = utc_now,
) -> Filter | None:
    """What the flags ask for; none when they ask for nothing.

    Args:
        entries: of the session.
        attempt: number of one that the session has.
        types: names of events, with commas between them.
        since: a time, local unless it names its zone, or a duration before now, such as 1h30m.
        now: the clock.

    Raises:
        ListingError: no such attempt, no such type, or no time.
    """
    if attempt is None and types is None and since is None:
        return None
    begin = None if since is None else _moment(since, now())
    return Filter(_known_attempt(entries, attempt), _known_types(types), begin)


def attempt_of(event: Event) -> int | None:
    """The attempt that an event is about, if it is about one."""
    number: int | None = getattr(event, "attempt", None)
    return number


def check_hash(noted: str | None) -> None:
    """Refuse what cannot be a head that somebody noted.

    Raises:
        ListingError: too short to mean one event, or no hash.
    """
    if noted is not None and not _NOTED.fullmatch(noted):
        message = f"{one_line(noted, 80)} is no hash"
        raise ListingError(message, f"give {SHA_DIGITS} to 64 digits of the head that you noted")


def sentence(difference: Difference) -> str:
    """A difference on one line."""
    where = "record" if difference.seq is None else f"seq {difference.seq}"
    return f"{where}: {one_line(difference.what, 300)}"


def lines(entries: Sequence[Entry], wanted: Filter | None, *, as_json: bool) -> Iterator[str]:
    """The events that were asked for, as a table or as JSON; none if nothing was asked."""
    if wanted is None:
        return
    chosen = [entry for entry in entries if wanted(entry)]
    if as_json:
        yield from (entry.model_dump_json() for entry in chosen)
    else:
        yield from table(chosen)


def table(entries: Sequence[Entry]) -> Iterator[str]:
    """A line for each event: number, time in UTC, type, attempt, facts."""
    yield f"{'seq':>6}  {'time (UTC)':<19}  {'type':<19}  {'attempt':>7}  facts"
    for entry in entries:
        number = attempt_of(entry.event)
        at = datetime.fromisoformat(entry.at).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
        yield (
            f"{entry.seq:>6}  {at}  {entry.event.type:<19}  "
            f"{'' if number is None else number:>7}  {facts(entry.event)}".rstrip()
        )


def facts(event: Event) -> str:
    """What an event says, on one line; hostile text is made visible and bounded."""
    named = ((n, value) for n, value in _named(event) if value not in (None, "", (), {}))
    return one_line("; ".join(f"{n} {_word(value)}" for n, value in named), FACTS_CHARACTERS)


def _named(event: Event) -> Iterator[tuple[str, Any]]:
    match event:
        case RunStarted():
            yield from (("for", event.purpose), ("box", event.box), ("seed", event.seed))
            yield "run", event.run_id
        case RunFinished():
            result = event.result
            yield from (("for", event.purpose), ("box", result.box), ("seed", event.seed))
            yield "outcome", result.outcome
            yield from (("seconds", result.wall_seconds), ("run", result.run_id))
        case AttemptFinished():
            yield from (("verdict", event.verdict), ("reason", event.reason))
            yield from (("value", event.value), ("explanation", event.explanation))
        case SessionStarted():
            yield from (("session", event.session), ("researcher", event.researcher))
            yield from (("nightlab", event.nightlab_version), ("program", event.program))
        case _:
            for name in type(event).model_fields:
                if name not in ("type", "attempt", "schema_version"):
                    yield name, getattr(event, name)


def _word(value: Any) -> str:
    if isinstance(value, str):
        return value[:SHA_DIGITS] if _SHA256.fullmatch(value) else one_line(value, FACT_CHARACTERS)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool | int):
        return str(value)
    plain = value.model_dump(mode="json") if hasattr(value, "model_dump") else value
    return one_line(json.dumps(plain, default=str, ensure_ascii=False), FACT_CHARACTERS)


def _known_attempt(entries: Sequence[Entry], attempt: int | None) -> int | None:
    if attempt is None or any(attempt_of(entry.event) == attempt for entry in entries):
        return attempt
    last = max((attempt_of(entry.event) or 0 for entry in entries), default=0)
    raise ListingError(f"there is no attempt {attempt}", f"its attempts are 0 to {last}")


def _known_types(types: str | None) -> frozenset[str]:
    names = frozenset(name.strip() for name in (types or "").split(",") if name.strip())
    if unknown := sorted(names - set(EVENT_TYPES)):
        message = f"there is no event of type {one_line(unknown[0], 60)}"
        raise ListingError(message, f"known types: {', '.join(EVENT_TYPES)}")
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
        hint = (
            "write for example --since 2026-03-07T23:30, or --since 1h30m for the last 90 minutes"
        )
        raise ListingError(message, hint) from None
