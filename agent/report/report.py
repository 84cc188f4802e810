"""The morning after: report, results.tsv, picture.

All of it is computed from the ledger each time; nothing here keeps state. Whatever a model or a
run wrote is bounded, made visible and escaped on its way into a report.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from agent.candidate.knobs import KnobValue, knob_values
from agent.morning.ablation import MEANING, ablation, decision, reviews
from agent.record.attempts import Attempt
from agent.record.chain import GetBlob, canonical
from agent.record.events import Entry, SessionStarted, Verdict
from agent.record.files import replace_file
from agent.record.history import History, direction_of, fold
from agent.report import charts
from agent.report.activity import Activity
from agent.report.attempt_page import (
    Around,
    AttemptPage,
    TextRoom,
    attempt_page,
    is_self_reported,
    messages_of,
)
from agent.report.overview.influence import Measured, Slice, influence
from agent.report.overview.lineage import lineage, rates
from agent.report.rendering import MAX_ROWS, MOST_TEXT_BYTES, flat, template, whole_page
from agent.report.summary import noise_of, summary, way_on
from agent.report.tables import (
    machine_state,
    repeats,
    spend_by_model,
    spend_by_outcome,
    survival,
    time_spent,
)
from agent.text import one_line

REPORT_NAME = "report.html"
MARKDOWN_NAME = "report.md"
RESULTS_NAME = "results.tsv"
PICTURE_NAME = "progress.png"
_RESULTS_HEADER = ("commit", "val_bpb", "memory_gb", "status", "description")
_NOT_MEASURED = "nan"
_TEXT_BYTES_PER_REPORT = 900_000
_MAX_REPEATS = 60
_LEAST_TEXT_BYTES = 1_500
_LEAST_WORDS_BYTES = 500
_WORDS_BYTES_PER_REPORT = 450_000  # halves when the texts' share does
_MOST_WORDS_BYTES = 30_000
_CHAIN_BYTES_PER_REPORT = 200_000
_MOST_CHAIN_BYTES = 20_000
_FACTS = (
    *("nightlab_version", "program", "seeds", "image", "engine", "machine", "calibration"),
    *("data", "settings", "files", "fixed_files"),
)
"""What a session's first event says, the most important first: a long list is cut at its end."""
_HEAD = re.compile(r"head hash (?:<code>|`)([0-9a-f]{64})")
_PARTS = ("header", "first", "chart", "chain", "tables")


def write_report(directory: Path, entries: Sequence[Entry], get_blob: GetBlob) -> None:
    """Write the four files of a session's report; see `Report.write`."""
    Report(get_blob).write(directory, fold(entries), entries)


def report_differences(
    directory: Path, entries: Sequence[Entry], get_blob: GetBlob
) -> Iterator[str]:
    """Which of a session's report files are not what the record came to when they were written.

    Each page names the head of that moment, so it can be made again. The picture is not compared:
    another version of what draws it draws other bytes.
    """
    places = {entry.hash: number for number, entry in enumerate(entries, 1)}
    made: dict[str, Callable[[Sequence[Entry]], str]] = {
        REPORT_NAME: lambda told: Report(get_blob).html(fold(told), told),
        MARKDOWN_NAME: lambda told: Report(get_blob).markdown(fold(told), told),
        RESULTS_NAME: lambda told: results_tsv(fold(told)),
    }
    told: Sequence[Entry] = ()
    for name, render in made.items():
        if not (path := directory / name).is_file():
            continue
        text = path.read_text("utf-8", errors="replace")
        # A table names no head: it was written together with the pages.
        if head := _HEAD.search(text):
            told = entries[: places.get(head[1], 0)]
        if not told or text != render(told):
            yield f"{name} is not what the record came to; nightlab report writes it anew"


def results_tsv(history: History) -> str:
    """The table that people's notebooks read: one row for each attempt with a verdict.

    Columns and words are those of karpathy/autoresearch. An attempt without a score has `nan`,
    which pandas, R and Python's float() read as missing: the 0.000000 written elsewhere would be
    the best of all. Failed and invalid attempts are `crash`, the status that notebooks leave out.
    They take the least for the best, so a score that is to grow stands there with its sign turned.
    """
    sign = -1.0 if direction_of(history) == "maximize" else 1.0
    rows = [_RESULTS_HEADER, *(_result_row(a, sign) for a in history.attempts if a.finished)]
    return "".join("\t".join(row) + "\n" for row in rows)


def candidate_id(files: Mapping[str, str]) -> str:
    """Seven hex digits for a candidate, from its files' paths and hashes."""
    return hashlib.sha256(canonical(dict(files)).encode()).hexdigest()[:7]


def _result_row(attempt: Attempt, sign: float) -> tuple[str, ...]:
    assert attempt.finished is not None
    value, memory_bytes = attempt.finished.value, _peak_memory_bytes(attempt)
    if attempt.dethroned is not None:
        value = None  # notebooks draw a running best of what they find
    statuses = {Verdict.KEPT.value: "keep", Verdict.DISCARDED.value: "discard"}
    return (
        candidate_id(attempt.started.files),
        _NOT_MEASURED if value is None else f"{sign * value:.6f}",
        _NOT_MEASURED if memory_bytes is None else f"{memory_bytes / 2**30:.1f}",
        statuses.get(attempt.standing, "crash"),
        _description(attempt),
    )


def _description(attempt: Attempt) -> str:
    """One line that neither a TSV parser nor a spreadsheet takes for anything but text."""
    assert attempt.finished is not None
    text = one_line(attempt.started.hypothesis, 200).replace('"', "'") or "(no hypothesis)"
    if is_self_reported(attempt):
        text += " [self-reported]"
    if attempt.finished.verdict in (Verdict.FAILED, Verdict.INVALID):
        text = f"{text} [{attempt.finished.verdict.value}: {one_line(attempt.finished.reason, 60)}]"
    if attempt.dethroned is not None:
        text = f"{text} [{attempt.standing}: {one_line(attempt.dethroned.reason, 60)}]"
    return f"'{text}" if text[0] in "=+-@" else text


def _peak_memory_bytes(attempt: Attempt) -> int | None:
    peaks = [run.result.peak_memory_bytes for run in attempt.trainings]
    return max((peak for peak in peaks if peak is not None), default=None)


@dataclass(frozen=True)
class _Rendered:
    """One attempt in both forms, and what the tables above it need of it."""

    state: tuple[object, ...]
    """How much was on record when it was rendered; for more it is rendered again."""
    page: AttemptPage
    html: Markup
    markdown: Markup


class Report:
    """A session's report; an attempt is rendered again only when the record has more of it.

    So writing it after every attempt costs what is new, not what the whole night holds.
    """

    def __init__(self, get_blob: GetBlob, *, is_live: bool = False) -> None:
        self._get_blob = get_blob
        self._is_live = is_live
        self._rendered: dict[int, _Rendered] = {}
        self._knobs: dict[int, Mapping[str, KnobValue]] = {}

    def write(self, directory: Path, history: History, entries: Sequence[Entry]) -> None:
        """Write report.html, report.md, results.tsv and progress.png, each whole or not at all."""
        # results.tsv comes first: notebooks want it even when a page cannot be rendered.
        replace_file(directory / RESULTS_NAME, results_tsv(history).encode())
        replace_file(directory / REPORT_NAME, self.html(history, entries).encode())
        replace_file(directory / MARKDOWN_NAME, self.markdown(history, entries).encode())
        replace_file(directory / PICTURE_NAME, charts.progress_png(history))

    def html(self, history: History, entries: Sequence[Entry]) -> str:
        """The whole report as one HTML text that asks nothing of any network."""
        return whole_page(
            self.parts(history, entries), self.attempts(history, entries), summary(entries, history)
        )

    def markdown(self, history: History, entries: Sequence[Entry]) -> str:
        """The same facts as Markdown; hostile text renders as nothing but itself."""
        rendered = self._up_to_date(history, entries)
        contents = _contents(history, entries, [one.page for one in rendered])
        text = template("report.md").render(attempts=[one.markdown for one in rendered], **contents)
        return text.strip() + "\n"

    def parts(self, history: History, entries: Sequence[Entry]) -> dict[str, str]:
        """Everything but the attempts, as HTML by the name of its place on the page."""
        pages = [one.page for one in self._up_to_date(history, entries)]
        contents = _contents(history, entries, pages) | {
            "is_live": self._is_live,
            "marks": {page.mark for page in pages},
            # One for wide screens, one for phones: no script has to know the width.
            "figures": [charts.progress_chart(history, f) for f in (charts.WIDE, charts.NARROW)],
        }
        return {name: template(f"{name}.html").render(**contents) for name in _PARTS}

    def attempts(self, history: History, entries: Sequence[Entry]) -> dict[int, str]:
        """Each attempt as HTML, by its number."""
        return {one.page.attempt.number: one.html for one in self._up_to_date(history, entries)}

    def _up_to_date(self, history: History, entries: Sequence[Entry]) -> list[_Rendered]:
        count, kept = len(history.attempts), 1 + history.count(Verdict.KEPT)
        text_bytes = _share(_TEXT_BYTES_PER_REPORT, count, _LEAST_TEXT_BYTES, MOST_TEXT_BYTES)
        words_bytes = _share(_WORDS_BYTES_PER_REPORT, count, _LEAST_WORDS_BYTES, _MOST_WORDS_BYTES)
        chain_bytes = _share(_CHAIN_BYTES_PER_REPORT, kept, 0, _MOST_CHAIN_BYTES)
        messages = messages_of(entries)
        first, knobs = history.baseline, self._baseline_knobs(history.baseline)
        numbered = {attempt.number: attempt for attempt in history.attempts}
        for attempt in history.attempts:
            said = messages.get(attempt.number, ())
            room = TextRoom(text_bytes, words_bytes, chain_bytes if attempt.kept else 0)
            counts = (len(attempt.runs), len(attempt.scores), len(said), first and first.number)
            state = (*counts, attempt.standing, *room)
            known = self._rendered.get(attempt.number)
            if known is None or known.state != state:
                parent = numbered.get(
                    -1 if attempt.started.parent is None else attempt.started.parent
                )
                around = Around(said, parent, {} if attempt is first else knobs)
                page = attempt_page(attempt, self._get_blob, room, around)
                self._rendered[attempt.number] = _render(page, state)
        return [self._rendered[attempt.number] for attempt in history.attempts]

    def _baseline_knobs(self, baseline: Attempt | None) -> Mapping[str, KnobValue]:
        if baseline is not None and baseline.number not in self._knobs:
            self._knobs[baseline.number] = knob_values(baseline.started.files, self._get_blob)
        return self._knobs[baseline.number] if baseline else {}


def _share(total_bytes: int, count: int, least_bytes: int, most_bytes: int) -> int:
    """What one of `count` texts may take: a bound that halves, so that it seldom changes."""
    share = most_bytes
    while share > least_bytes and share * count > total_bytes:
        share //= 2
    return max(share, least_bytes)


def _render(page: AttemptPage, state: tuple[object, ...]) -> _Rendered:
    html = template("attempt.html").render(page=page)
    markdown = template("attempt.md").render(page=page)
    return _Rendered(
        state=state,
        page=replace(
            page, diff=[], logs=[], words=[], curve=None
        ),  # a long night's texts fill the memory
        html=Markup(html),  # noqa: S704 - rendered with autoescape
        markdown=Markup(markdown),  # noqa: S704 - every value in it was escaped
    )


def now_part(now: Activity, problem: str) -> str:
    """What the session is at, or what is wrong with its record, for the live page."""
    loss = charts.loss_curve([list(now.curve)])
    return template("now.html").render(now=now, problem=problem, loss=loss)


def _contents(
    history: History, entries: Sequence[Entry], pages: Sequence[AttemptPage]
) -> dict[str, Any]:
    """What both forms of the report show."""
    repeated = repeats(history)
    checked = reviews(entries)
    review = ablation(checked[-1], history) if checked else None
    return {
        "review": review,
        "survival": survival(history, review),
        "meaning": MEANING,
        "decision": decision(entries),
        "lineage": lineage(history),
        "rates": list(rates(history)),
        "slices": _slices(history, pages),
        "summary": (numbers := summary(entries, history)),
        "way_on": way_on(numbers) if numbers.baseline_failure else "",
        "pages": pages,
        "numbered": {page.attempt.number: page for page in pages},
        "time": time_spent(entries),
        "repeats": repeated[:_MAX_REPEATS],
        "repeats_left_out": max(0, len(repeated) - _MAX_REPEATS),
        "models": spend_by_model(entries)[:MAX_ROWS],
        "outcomes": spend_by_outcome(history),
        "machine": machine_state(history, entries),
        "facts": [] if history.session is None else _facts(history.session),
    }


def _slices(history: History, pages: Sequence[AttemptPage]) -> tuple[Slice, ...]:
    """What the knobs had to do with the scores of this night's own measurements."""
    first = next((page for page in pages if page.attempt is history.baseline), None)
    if first is None:
        return ()
    seen = [
        Measured(
            attempt=page.attempt.number,
            mark=page.mark,
            score=page.value,
            knobs={**first.knobs, **page.knobs},
        )
        for page in pages
        if page.value is not None
    ]
    return influence(seen, direction_of(history), noise_of(history))


def _facts(session: SessionStarted) -> list[tuple[str, str]]:
    """What an auditor asks for first, flat."""
    dumped = session.model_dump(mode="json")
    if calibration := dumped["calibration"]:  # the rest of it stands elsewhere in the facts
        names = ("measured_at", "rates", "at_budgets", "proposals")
        dumped["calibration"] = {name: calibration[name] for name in names if name in calibration}
    known = {name.replace("_", " "): dumped[name] for name in _FACTS if dumped[name] is not None}
    return [(one_line(name, 80), one_line(fact, 200)) for name, fact in flat(known, "")][:120]
