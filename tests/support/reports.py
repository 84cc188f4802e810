"""A report's texts, rendered anew from a ledger's entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from agent.record.events import Entry
from agent.record.history import fold
from agent.report.report import Report


def render_html(entries: Sequence[Entry], get_blob: Callable[[str], bytes]) -> str:
    return Report(get_blob).html(fold(entries), entries)


def render_markdown(entries: Sequence[Entry], get_blob: Callable[[str], bytes]) -> str:
    return Report(get_blob).markdown(fold(entries), entries)
