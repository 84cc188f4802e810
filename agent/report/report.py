"""The morning after: report, results.tsv, picture.

All of it is computed from the ledger each time; nothing here keeps state. Whatever a model or a
run wrote is bounded, made visible and escaped on its way into a report.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from agent.morning.ablation import MEANING, ablation, decision, reviews
from agent.record.curves import Curve, unpacked
from agent.record.events import Arithmetic, Entry, RunFinished, SessionStarted, Verdict
from agent.record.files import replace_file
from agent.record.history import Attempt, History, direction_of, fold, label_of
from agent.record.ledger import LedgerError, canonical
from agent.record.logs import unpacked_log
from agent.report import charts
from agent.report.activity import Activity
from agent.report.summary import Summary, noise_of, summary_of, value_of
from agent.report.tables import (
    machine_state,
    repeats,
    spend_by_model,
    spend_by_outcome,
    survival,
    time_spent,
)
from agent.text import fenced, for_markdown, one_line, visible
from sandbox.contract.record import Record
from sandbox.contract.run import Log, Outcome

REPORT_NAME = "report.html"
MARKDOWN_NAME = "report.md"
RESULTS_NAME = "results.tsv"
PICTURE_NAME = "progress.png"

_TEMPLATES = Path(__file__).parent / "templates"
_RESULTS_HEADER = ("commit", "val_bpb", "memory_gb", "status", "description")
_NOT_MEASURED = "nan"
_TEXT_BYTES_PER_REPORT = 900_000
_MOST_TEXT_BYTES, _LEAST_TEXT_BYTES = 60_000, 1_500
_MAX_LINE_CHARS = 400
_MAX_ROWS = 12
_MAX_REPEATS = 60
_CHAIN_BYTES_PER_REPORT = 200_000
_MOST_CHAIN_BYTES = 20_000
_MARKDOWN_CHARS = 600
_MAX_FACTS = 40
_MANY = 100
"""So many times the noise say nothing that one more would not say, and leave no room."""
_FRACTION = re.compile(r"-?\d+\.\d+(e-?\d+)?")
_SIGNS = re.compile(r"[_·\s]+")
_PARTS = ("header", "first", "chart", "chain", "tables")

GetBlob = Callable[[str], bytes]


class ReportPaths(Record):
    """Where the report's files lie."""

    html: Path
    markdown: Path
    results: Path
    picture: Path


def write_report(directory: Path, entries: Sequence[Entry], get_blob: GetBlob) -> ReportPaths:
    """Write report.html, report.md, results.tsv and progress.png, each whole or not at all."""
    return Report(get_blob).write(directory, fold(entries), entries)


def results_tsv(history: History) -> str:
    """The table that people's notebooks read: one row for each attempt with a verdict.

    Columns and words are those of karpathy/autoresearch. An attempt without a score has `nan`,
    which pandas, R and Python's float() read as missing: the 0.000000 written elsewhere would be
    the best of all. Failed and invalid attempts are `crash`, the status that notebooks leave out.
    """
    rows = [_RESULTS_HEADER, *(_result_row(a) for a in history.attempts if a.finished)]
    return "".join("\t".join(row) + "\n" for row in rows)


def candidate_id(files: Mapping[str, str]) -> str:
    """Seven hex digits for a candidate, from its files' paths and hashes."""
    return hashlib.sha256(canonical(dict(files)).encode()).hexdigest()[:7]


def _result_row(attempt: Attempt) -> tuple[str, ...]:
    assert attempt.finished is not None
    value, memory_bytes = attempt.finished.value, _peak_memory_bytes(attempt)
    statuses = {Verdict.KEPT: "keep", Verdict.DISCARDED: "discard"}
    return (
        candidate_id(attempt.started.files),
        _NOT_MEASURED if value is None else f"{value:.6f}",
        _NOT_MEASURED if memory_bytes is None else f"{memory_bytes / 2**30:.1f}",
        statuses.get(attempt.finished.verdict, "crash"),
        _description(attempt),
    )


def _description(attempt: Attempt) -> str:
    """One line that neither a TSV parser nor a spreadsheet takes for anything but text."""
    assert attempt.finished is not None
    text = one_line(attempt.started.hypothesis, 200).replace('"', "'") or "(no hypothesis)"
    if _is_self_reported(attempt):
        text += " [self-reported]"
    if attempt.finished.verdict in (Verdict.FAILED, Verdict.INVALID):
        text = f"{text} [{attempt.finished.verdict.value}: {one_line(attempt.finished.reason, 60)}]"
    return f"'{text}" if text[0] in "=+-@" else text


def _is_self_reported(attempt: Attempt) -> bool:
    return any(score.source == "reported" for score in attempt.scores)


def _peak_memory_bytes(attempt: Attempt) -> int | None:
    peaks = [r.result.peak_memory_bytes for r in attempt.runs if r.result.box == "train"]
    return max((peak for peak in peaks if peak is not None), default=None)


@dataclass(frozen=True)
class _Page:
    """One attempt as the report shows it; lines are visible and bounded, not yet escaped."""

    attempt: Attempt
    mark: str
    value: float | None
    is_self_reported: bool
    gain: float | None
    gain_in_noise: float | None
    arithmetic: str
    diff: list[str]
    chain: list[str]
    """The diff again, shorter, for the chain of kept changes."""
    logs: list[tuple[str, list[str]]]
    curve: charts.LossCurve | None
    runs_left_out: int
    scores_left_out: int


@dataclass(frozen=True)
class _Shown:
    """One attempt in both forms, and what the tables above it tell of it."""

    said: tuple[object, ...]
    """How much was on record when it was rendered; for more it is rendered again."""
    page: _Page
    html: Markup
    markdown: Markup


class Report:
    """A session's report; an attempt is rendered again only when the record says more of it.

    So writing it after every attempt costs what is new, not what the whole night holds.
    """

    def __init__(self, get_blob: GetBlob, *, is_live: bool = False) -> None:
        self._get_blob = get_blob
        self._is_live = is_live
        self._shown: dict[int, _Shown] = {}

    def write(self, directory: Path, history: History, entries: Sequence[Entry]) -> ReportPaths:
        """Write report.html, report.md, results.tsv and progress.png, each whole or not at all."""
        paths = ReportPaths(
            html=directory / REPORT_NAME,
            markdown=directory / MARKDOWN_NAME,
            results=directory / RESULTS_NAME,
            picture=directory / PICTURE_NAME,
        )
        noise = noise_of(history) or 0.0
        png = charts.progress_png(history, direction_of(history), label_of(history), noise)
        replace_file(paths.results, results_tsv(history).encode())
        replace_file(paths.html, self.html(history, entries).encode())
        replace_file(paths.markdown, self.markdown(history, entries).encode())
        replace_file(paths.picture, png)
        return paths

    def html(self, history: History, entries: Sequence[Entry]) -> str:
        """The whole report as one HTML text that asks nothing of any network."""
        return _whole_page(
            self.parts(history, entries), self.attempts(history), summary_of(history, entries)
        )

    def markdown(self, history: History, entries: Sequence[Entry]) -> str:
        """The same facts as Markdown; hostile text renders as nothing but itself."""
        shown = self._up_to_date(history)
        contents = _contents(history, entries, [piece.page for piece in shown])
        text = _template("report.md").render(attempts=[s.markdown for s in shown], **contents)
        return text.strip() + "\n"

    def parts(self, history: History, entries: Sequence[Entry]) -> dict[str, str]:
        """Everything but the attempts, as HTML by the name of its place on the page."""
        pages = [piece.page for piece in self._up_to_date(history)]
        direction, noise = direction_of(history), noise_of(history) or 0.0
        contents = _contents(history, entries, pages) | {
            "is_live": self._is_live,
            "marks": {shown.mark for shown in pages},
            "figures": [
                charts.progress_chart(history, direction, noise, frame)
                for frame in (charts.WIDE, charts.NARROW)
            ],
        }
        return {name: _template(f"{name}.html").render(**contents) for name in _PARTS}

    def attempts(self, history: History) -> dict[int, str]:
        """Each attempt as HTML, by its number."""
        return {s.page.attempt.number: s.html for s in self._up_to_date(history)}

    def _up_to_date(self, history: History) -> list[_Shown]:
        count, kept = len(history.attempts), 1 + history.count(Verdict.KEPT)
        text_bytes = _share(_TEXT_BYTES_PER_REPORT, count, _LEAST_TEXT_BYTES, _MOST_TEXT_BYTES)
        chain_bytes = _share(_CHAIN_BYTES_PER_REPORT, kept, 0, _MOST_CHAIN_BYTES)
        for attempt in history.attempts:
            bytes_of_chain = chain_bytes if attempt.kept else 0
            said = (
                *(len(attempt.runs), len(attempt.scores), attempt.open),
                *(text_bytes, bytes_of_chain),
            )
            known = self._shown.get(attempt.number)
            if known is None or known.said != said:
                shown = _page(attempt, self._get_blob, text_bytes, bytes_of_chain)
                self._shown[attempt.number] = _rendered(shown, said)
        return [self._shown[attempt.number] for attempt in history.attempts]


def live_page(
    parts: Mapping[str, str],
    attempts: Mapping[int, str],
    numbers: Summary,
    *,
    version: int,
    now: datetime,
) -> str:
    """The report as a page that asks its server for what came after `version`."""
    return _whole_page(parts, attempts, numbers, version=version, now=now)


def now_part(now: Activity, problem: str) -> str:
    """What the session is at, or what is wrong with its record, for the live page."""
    loss = charts.loss_curve([list(now.curve)])
    return _template("now.html").render(now=now, problem=problem, loss=loss)


def page_policy(*, is_live: bool) -> str:
    """Only our very style and our very scripts; nothing from anywhere, nothing injected."""
    own = " ".join(map(_source, _scripts(is_live=is_live)))
    asking = "connect-src 'self'; " if is_live else ""
    return (
        f"default-src 'none'; style-src {_source(_asset('report.css'))}; script-src {own}; "
        f"{asking}base-uri 'none'; form-action 'none'"
    )


def render_html(entries: Sequence[Entry], get_blob: GetBlob) -> str:
    """The whole report as one HTML text that asks nothing of any network."""
    return Report(get_blob).html(fold(entries), entries)


def render_markdown(entries: Sequence[Entry], get_blob: GetBlob) -> str:
    """The same facts as Markdown; hostile text renders as nothing but itself."""
    return Report(get_blob).markdown(fold(entries), entries)


def _contents(history: History, entries: Sequence[Entry], pages: Sequence[_Page]) -> dict[str, Any]:
    """What both forms of the report tell."""
    repeated = repeats(history)
    checked = reviews(entries)
    review = ablation(checked[-1], history) if checked else None
    return {
        "review": review,
        "survival": survival(history, review),
        "meaning": MEANING,
        "decision": decision(entries),
        "summary": summary_of(history, entries),
        "pages": pages,
        "time": time_spent(history, entries),
        "repeats": repeated[:_MAX_REPEATS],
        "repeats_left_out": max(0, len(repeated) - _MAX_REPEATS),
        "models": spend_by_model(entries)[:_MAX_ROWS],
        "outcomes": spend_by_outcome(history),
        "machine": machine_state(history),
        "facts": _facts(history.session),
    }


def _share(total_bytes: int, count: int, least_bytes: int, most_bytes: int) -> int:
    """What one of `count` texts may take: a bound that halves, so that it seldom changes."""
    share = most_bytes
    while share > least_bytes and share * count > total_bytes:
        share //= 2
    return max(share, least_bytes)


def _rendered(shown: _Page, said: tuple[object, ...]) -> _Shown:
    html = _template("attempt.html").render(page=shown)
    markdown = _template("attempt.md").render(page=shown)
    return _Shown(
        said=said,
        page=replace(shown, diff=[], logs=[], curve=None),
        html=Markup(html),  # noqa: S704 - rendered with autoescape
        markdown=Markup(markdown),  # noqa: S704 - every value in it was escaped
    )


def _page(attempt: Attempt, get_blob: GetBlob, limit_bytes: int, chain_bytes: int) -> _Page:
    """One attempt; half of the text goes to its diff and half to its logs."""
    arithmetic = attempt.finished.arithmetic if attempt.finished else None
    return _Page(
        attempt=attempt,
        mark=charts.mark_of(attempt),
        value=value_of(attempt),
        is_self_reported=_is_self_reported(attempt),
        gain=arithmetic.gain if arithmetic else None,
        gain_in_noise=arithmetic.gain / arithmetic.noise
        if arithmetic and arithmetic.noise
        else None,
        arithmetic=_in_words(arithmetic) if arithmetic else "",
        diff=_diff_lines(attempt, get_blob, limit_bytes // 2),
        chain=_diff_lines(attempt, get_blob, chain_bytes) if attempt.kept else [],
        logs=list(_logs(attempt, get_blob, limit_bytes // 2)),
        curve=charts.loss_curve(_curves(attempt, get_blob)),
        runs_left_out=max(0, len(attempt.runs) - _MAX_ROWS),
        scores_left_out=max(0, len(attempt.scores) - _MAX_ROWS),
    )


def _in_words(numbers: Arithmetic) -> str:
    """A verdict's arithmetic as a sentence that can be checked by hand."""
    direction = "better" if numbers.gain >= 0 else "worse"
    return (
        f"{_mean(numbers.candidate_mean, numbers.candidate_values)} against "
        f"{_mean(numbers.best_mean, numbers.best_values)} of the best so far: "
        f"{abs(numbers.gain):.4f} {direction}{_in_noise(numbers)}. "
        f"To be kept it had to be better by more than {numbers.required_gain:.4f}: "
        f"noise {numbers.noise:.4f} with {numbers.degrees_of_freedom} degrees of freedom, "
        f"at {numbers.confidence:.0%} confidence."
    )


def _in_noise(numbers: Arithmetic) -> str:
    return f", {abs(numbers.gain) / numbers.noise:.1f} \u00d7 noise" if numbers.noise else ""


def _mean(mean: float, values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{mean:.4f}"
    return f"{mean:.4f} (mean of {', '.join(f'{value:.4f}' for value in values[:_MAX_ROWS])})"


def _curves(attempt: Attempt, get_blob: GetBlob) -> Iterator[Curve]:
    """What the attempt's trainings said of their loss; a lost or damaged curve is left out."""
    for run in attempt.runs:
        if run.curve is not None:
            with suppress(LedgerError, ValueError):
                yield unpacked(get_blob(run.curve))


def _diff_lines(attempt: Attempt, get_blob: GetBlob, limit_bytes: int) -> list[str]:
    if attempt.started.diff is None:
        return []
    try:
        text = get_blob(attempt.started.diff).decode(errors="replace")
    except LedgerError as error:
        return [f"(the diff cannot be shown: {one_line(str(error), 200)})"]
    whole = visible(text[: limit_bytes + 1]).rstrip("\n").split("\n")
    return _ends(whole, limit_bytes, 0, is_cut=len(text) > limit_bytes + 1)


def _whole_log(run: RunFinished, get_blob: GetBlob) -> Log:
    """The log from its blob; where that is lost or damaged, the excerpt."""
    try:
        return unpacked_log(get_blob(run.log))
    except (LedgerError, ValueError):
        return run.result.log


def _logs(attempt: Attempt, get_blob: GetBlob, limit_bytes: int) -> Iterator[tuple[str, list[str]]]:
    """The logs that explain an attempt: of runs that went wrong, or of the first training."""
    wrong = [run for run in attempt.telling_runs if run.result.outcome is not Outcome.OK]
    trained = [run for run in attempt.runs if run.result.box == "train"]
    chosen = wrong[-2:] or trained[:1]
    for run in chosen:
        lines = _log_lines(_whole_log(run, get_blob), limit_bytes // len(chosen))
        if lines:
            yield f"{run.result.box} box, seed {run.seed}", lines


def _log_lines(log: Log, limit_bytes: int) -> list[str]:
    head, tail = visible(log.head[:limit_bytes]), visible(log.tail[-limit_bytes:])
    cut = len(log.head) > limit_bytes or len(log.tail) > limit_bytes
    if log.omitted_bytes:
        gap = [f"⋯ {log.omitted_bytes:,} bytes that the box did not keep ⋯"]
        lines = [*head.split("\n"), *gap, *tail.split("\n")]
    else:
        lines = (head + ("\n" if cut else "") + tail).split("\n")
    while lines and not lines[-1]:
        lines.pop()
    return _ends(lines, limit_bytes // 4, limit_bytes - limit_bytes // 4, is_cut=cut)


def _ends(lines: list[str], head_bytes: int, tail_bytes: int, *, is_cut: bool) -> list[str]:
    """First and last lines within so many bytes of HTML, with the gap named."""
    head = list(_within(lines, head_bytes))
    tail = list(_within(reversed(lines[len(head) :]), tail_bytes))[::-1]
    if len(head) + len(tail) == len(lines) and not is_cut:
        return head + tail
    return [*head, "⋯ more of this is in the session's record ⋯", *tail]


def _within(lines: Iterable[str], limit_bytes: int) -> Iterator[str]:
    left = limit_bytes
    for line in lines:
        shown = line if len(line) <= _MAX_LINE_CHARS else line[:_MAX_LINE_CHARS] + " ⋯"
        left -= len(escape(shown).encode()) + 12
        if left < 0:
            return
        yield shown


def _facts(session: SessionStarted | None) -> list[tuple[str, str]]:
    """What an auditor asks for first, flat."""
    if session is None:
        return []
    known: dict[str, Any] = {
        "nightlab": session.nightlab_version,
        "program.md": session.program,
        "seeds": list(session.seeds),
        "image": session.image,
        "engine": session.engine,
        "machine": session.machine,
        **({"calibration": _briefly(session.calibration)} if session.calibration else {}),
        "data": session.data,
        "settings": session.settings,
        "files": session.files,
        "fixed files": session.fixed_files,
    }
    return [(one_line(k, 80), one_line(v, 200)) for k, v in _flat(known, "")][:120]


def _briefly(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """A calibration without what stands elsewhere in the facts."""
    told = ("measured_at", "rates", "at_budgets", "proposals")
    return {name: calibration[name] for name in told if name in calibration}


def _told(evidence: Mapping[str, Any]) -> str:
    """Named facts in one line, their numbers short; what did not happen is not told."""
    found = ((n, fact) for n, fact in _flat(evidence, "") if fact not in ("null", "false", "[]"))
    facts = (f"{_SIGNS.sub(' ', name)} {_short(fact)}" for name, fact in found)
    return one_line(" · ".join(islice(facts, _MAX_FACTS)), _MAX_LINE_CHARS)


def _short(fact: str) -> str:
    return f"{float(fact):.4g}" if _FRACTION.fullmatch(fact) else fact


def _flat(value: object, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name} · {key}" if name else str(key))
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _whole_page(
    parts: Mapping[str, str],
    attempts: Mapping[int, str],
    numbers: Summary,
    *,
    version: int | None = None,
    now: datetime | None = None,
) -> str:
    is_live = version is not None
    return _template("report.html").render(
        style=_asset("report.css"),
        scripts=_scripts(is_live=is_live),
        policy=page_policy(is_live=is_live),
        version=version,
        now_seconds=now.timestamp() if now else None,
        summary=numbers,
        parts={name: Markup(text) for name, text in parts.items()},  # noqa: S704 - ours, escaped
        attempts=[Markup(text) for text in attempts.values()],  # noqa: S704 - ours, escaped
    )


def _scripts(*, is_live: bool) -> list[str]:
    return [_asset(name) for name in ("report.js", "live.js")[: 2 if is_live else 1]]


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


@cache
def _template(name: str) -> Template:
    is_markdown = name.endswith(".md")
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=not is_markdown,  # noqa: S701 - Markdown has an escaping of its own
        finalize=_markdown if is_markdown else None,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "line": one_line,
        "told": _told,
        "fenced": lambda lines: Markup(fenced("\n".join(lines), _MOST_TEXT_BYTES)),  # noqa: S704
    } | {name: _trusted(shown) for name, shown in _NUMBERS.items()}
    environment.globals["max_rows"] = _MAX_ROWS
    return environment.get_template(name)


def _markdown(value: object) -> object:
    """Every value in the Markdown is escaped, but for what our own filters made of numbers."""
    is_ours = isinstance(value, Markup | int)
    return value if is_ours else for_markdown(str(value), _MARKDOWN_CHARS)


def _trusted(shown: Callable[[Any], str]) -> Callable[[Any], Markup]:
    return lambda number: Markup(shown(number))  # noqa: S704 - made of a number alone


def _signed(number: float) -> str:
    return f"{number:+.4f}".replace("-", "\u2212")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours and not minutes:
        return f"{hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _size(count_bytes: int) -> str:
    if count_bytes < 1024:
        return f"{count_bytes} B"
    power = min(3, int(math.log(count_bytes, 1024)))
    return f"{count_bytes / 1024**power:.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"


_NUMBERS: dict[str, Callable[[Any], str]] = {
    "value": lambda number: f"{number:.4f}",
    "signed": _signed,
    "times": lambda number: f"{abs(number):.1f}" if abs(number) < _MANY else f"over {_MANY}",
    "share": lambda number: f"{number:.0%}",
    "cores": lambda number: f"{number:.2f}",
    "count": lambda number: f"{number:,}",
    "usd": lambda number: f"${number:.2f}",
    "mills": lambda number: f"${number:.3f}",
    "duration": _duration,
    "size": _size,
}
