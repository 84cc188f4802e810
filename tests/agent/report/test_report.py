"""The report says what the ledger says, shows hostile text as text, and asks no network."""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import io
import json
import math
import random
import re
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from rich.console import Console

from agent.candidate.diffs import unified_diff
from agent.record.chain import FIRST_PREVIOUS, LedgerError
from agent.record.curves import curve_of
from agent.record.events import (
    ATTEMPT,
    Arithmetic,
    AttemptFinished,
    AttemptInterrupted,
    AttemptStarted,
    Dethroned,
    Noticed,
    RetryWaited,
    SessionEnded,
    SessionResumed,
    StopReason,
    Verdict,
)
from agent.record.ledger import Ledger
from agent.report import charts
from agent.report import tables as findings
from agent.report.activity import RunNotes
from agent.report.attempt_page import messages_of, spoken
from agent.report.console import JsonConsole, NightConsole, attempt_line, closing_lines
from agent.report.overview.influence import Measured, influence
from agent.report.overview.lineage import lineage, rates
from agent.report.plan import outlook, plan, run_in_words
from agent.report.report import (
    MARKDOWN_NAME,
    PICTURE_NAME,
    REPORT_NAME,
    RESULTS_NAME,
    Report,
    candidate_id,
    results_tsv,
    write_report,
)
from agent.report.summary import Summary, needed, summary, value_of, way_on
from agent.report.tui import show
from agent.researcher.answers import run_answer
from agent.text import in_words, one_line
from sandbox.contract.run import Box, Log, Outcome
from tests.support import histories
from tests.support.browser import Browser
from tests.support.reports import render_html, render_markdown

NIGHT = histories.night(48)
HOSTILE = histories.night(40, hostile=True)


class Page(HTMLParser):
    """What a browser would make of a report: tags, attributes, texts, whole scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.texts: list[str] = []
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in self.raw:
            self.raw[self._inside].append(data)
        else:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render_html(NIGHT.entries, NIGHT.get_blob))


@pytest.fixture(scope="module")
def hostile_page() -> Page:
    return Page(render_html(HOSTILE.entries, HOSTILE.get_blob))


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def kinds(numbers: Summary) -> dict[str, tuple[int, ...]]:
    return {item.kind: item.attempts for item in numbers.attention}


# The summary


def test_the_summary_counts_every_attempt_once() -> None:
    numbers = summary(NIGHT.entries)
    judged = numbers.kept + numbers.discarded + numbers.failed + numbers.invalid
    assert judged == numbers.attempts
    assert numbers.attempts + numbers.interrupted == 48
    assert (numbers.head, numbers.events) == (NIGHT.head, len(NIGHT.entries))


def test_the_gain_is_told_in_units_of_the_noise_of_one_score() -> None:
    numbers = summary(NIGHT.entries)
    assert numbers.baseline is not None
    assert numbers.best is not None
    assert numbers.noise is not None
    assert numbers.gain == pytest.approx(numbers.baseline - numbers.best)
    assert numbers.gain_in_noise == pytest.approx((numbers.baseline - numbers.best) / numbers.noise)
    assert numbers.noise == pytest.approx(histories.NOISE, rel=0.5)


def test_a_baseline_that_was_interrupted_first_is_no_winner_at_the_close() -> None:
    made = histories.Night()
    histories.start(made)
    begin(made, 0, "baseline")
    made.add(AttemptInterrupted(is_box_lost=False, attempt=0, reason="stopped by the person"))
    begin(made, 1, "baseline")
    for seed, value in ((1, 2.3), (2, 2.4)):
        made.add(histories.scored(1, seed, value))
    made.add(finished(1, Verdict.KEPT, 2.35))
    made.add(SessionEnded(reason=StopReason.ATTEMPTS, explanation=""))
    told = closing_lines(summary(made.entries), Path("runs/night"))
    assert "no attempt was better than the baseline beyond noise" in told
    assert not [line for line in told if line.startswith("best ")]


def test_a_metric_to_maximise_gains_upwards() -> None:
    made = histories.Night()
    changed = {"metric": "accuracy", "direction": "maximize"}
    goal = histories.IN_FORCE.goal.model_copy(update=changed)
    histories.start(made, settings=histories.IN_FORCE.model_copy(update={"goal": goal}))
    histories.baseline(made, random.Random(1), value=0.5)
    finish(made, 1, Verdict.KEPT, 0.75)
    numbers = summary(made.entries)
    assert numbers.gain == pytest.approx(0.25, abs=0.02)
    # A notebook looks for the least.
    assert ["-0.750000"] == [min((row["val_bpb"] for row in rows_of(made)), key=float)]
    chart = charts.progress_chart(made.history, charts.WIDE)
    assert chart is not None
    places = {dot.number: dot.y for dot in chart.dots}
    assert places[1] < places[0]


def test_what_survived_on_holdout_is_told_once_both_are_scored() -> None:
    made = histories.Night()
    histories.start(made)
    before = histories.baseline(made, random.Random(1))
    finish(made, 1, Verdict.KEPT, before - 0.2)
    assert summary(made.entries).survived is None
    for number, value in ((0, 2.5), (1, 2.35)):
        score = histories.scored(number, 1, value).model_copy(update={"split": "holdout"})
        made.add(score)
    numbers = summary(made.entries)
    assert numbers.holdout_gain == pytest.approx(0.15)
    assert numbers.survived == pytest.approx(0.75)
    text = " ".join(Page(render_html(made.entries, made.get_blob)).text.split())
    assert "0.1500 better on the holdout" in text
    assert "75% of the gain came back" in text


def test_one_share_survived_and_the_winners_luck_is_no_part_of_it() -> None:
    made = histories.Night()
    histories.start(made)
    before = histories.baseline(made, random.Random(1))
    finish(made, 1, Verdict.KEPT, before - 0.3)
    made.add(histories.scored(1, 2, before - 0.1))  # a close call with it, after its verdict
    for number, value in ((0, 2.5), (1, 2.44)):
        made.add(histories.scored(number, 1, value).model_copy(update={"split": "holdout"}))
    numbers, survival = summary(made.entries), findings.survival(made.history, None)
    assert 0.06 / 0.2 == pytest.approx(numbers.survived)
    assert [0.2, 0.06] == pytest.approx([row.gain for row in survival])
    assert numbers.gain == pytest.approx(0.3)
    texts = [item.text for item in numbers.attention]
    assert "Only 30% of the gain came back on the holdout." in texts


def test_what_needs_the_person_is_listed_with_its_attempts() -> None:
    found = kinds(summary(NIGHT.entries))
    assert found["invalid"] == (7, 18, 29, 40)
    assert found["disturbed"] == (3,)
    assert found["interrupted"] == (21, 32, 43)
    assert {"refusals", "unpriced", "nudge"} < set(found)
    assert "not_ended" not in found


def test_a_session_without_an_end_says_how_to_go_on() -> None:
    made = histories.night(2, ended=False)
    (item,) = summary(made.entries).attention
    assert item.kind == "not_ended"
    assert "nightlab resume mar7-evening" in item.text


def test_an_end_that_was_not_planned_is_named() -> None:
    made = histories.night(2, ended=False)
    made.add(SessionEnded(reason=StopReason.API_OUTAGE, explanation="No answer for six hours."))
    (item,) = summary(made.entries).attention
    assert item.text == "It ended early (the model's service was down): No answer for six hours."


def test_a_night_where_all_went_well_needs_nobody() -> None:
    assert summary(histories.night(2).entries).attention == ()


def test_an_empty_ledger_has_a_summary() -> None:
    numbers = summary([])
    assert (numbers.best, numbers.gain, numbers.head) == (None, None, FIRST_PREVIOUS)


def test_little_on_holdout_and_a_long_plateau_need_the_person() -> None:
    made = histories.Night()
    histories.start(made)
    before = histories.baseline(made, random.Random(1))
    finish(made, 1, Verdict.KEPT, before - 0.2)
    for number, value in ((0, 2.5), (1, 2.44)):
        made.add(histories.scored(number, 1, value).model_copy(update={"split": "holdout"}))
    for number in range(2, 22):
        finish(made, number, Verdict.DISCARDED, before)
    texts = [item.text for item in summary(made.entries).attention]
    assert "Only 30% of the gain came back on the holdout." in texts
    assert "None of the last 20 attempts was kept: a plateau." in texts


def test_the_limits_told_are_those_of_the_last_resume() -> None:
    made = histories.night(2)
    more = histories.IN_FORCE.with_overrides(attempts=250)
    made.add(
        SessionResumed(
            nightlab_version="0.1.0",
            settings=more,
            interrupted_attempts=(),
            removed_containers=(),
            engine={},
            machine={},
        )
    )
    assert 250 == summary(made.entries).attempts_limit


# results.tsv


def rows_of(made: histories.Night) -> list[dict[str, str]]:
    """Read as notebooks read it: tab-separated, with a parser that knows quotes."""
    return list(csv.DictReader(io.StringIO(results_tsv(made.history)), delimiter="\t"))


def test_a_reason_is_told_in_words_and_never_as_a_code(page: Page) -> None:
    shown = " ".join(page.text.split())
    assert "looks ahead" in shown
    assert "out of memory" in shown
    made = histories.night(12)
    lines = [attempt_line(a, made.history, histories.IN_FORCE) for a in made.history.attempts]
    for text in (shown, *lines, render_markdown(made.entries, made.get_blob)):
        rest = text.partition("What this ran on")[0]
        assert not re.search(r"not_causal|out_of_memory|not_better|out\\\\_of", rest)
    assert "some new code" == in_words("some_new_code")


def test_a_need_that_is_wide_for_few_scores_says_so() -> None:
    attempt = next(a for a in NIGHT.history.candidates if a.finished and a.finished.arithmetic)
    assert attempt.finished is not None
    assert attempt.finished.arithmetic is not None
    wide = {"candidate_values": (2.1, 2.4), "own_noise": 0.21, "required_gain": 1.6015}
    numbers = attempt.finished.arithmetic.model_copy(update=wide)
    assert "1.6015 (large: only 2 scores, which lie apart)" == needed(numbers)
    assert "0.0080" == needed(attempt.finished.arithmetic)


def test_the_glossary_of_the_page_is_that_of_the_manual(page: Page) -> None:
    manual = read(Path(__file__).parents[3] / "docs" / "glossary.md")
    words = re.findall(r"(?m)^\| (.+?) \| (.+?) \|$", manual)[1:]
    template = read(Path(charts.__file__).parent / "templates" / "glossary.html")
    found = re.findall(r"<dt>(.+?)</dt><dd>(.+?)</dd>", template)
    assert words == [(html.unescape(word), html.unescape(meaning)) for word, meaning in found]
    assert {"val", "holdout", "noise", "head", "smoke run", "disturbed"} <= {w for w, _ in words}
    assert words[0][1] in page.text


def test_results_tsv_is_the_table_that_people_know(golden: Callable[[str, str], None]) -> None:
    golden("results.tsv", results_tsv(histories.night(12).history))


def test_results_tsv_has_a_row_for_each_verdict_and_no_other() -> None:
    statuses = [row["status"] for row in rows_of(NIGHT)]
    numbers = summary(NIGHT.entries)
    assert statuses.count("keep") == 1 + numbers.kept
    assert statuses.count("discard") == numbers.discarded
    assert statuses.count("crash") == numbers.failed + numbers.invalid
    assert len(statuses) == 1 + numbers.attempts


def test_an_attempt_without_a_score_never_reads_as_a_number() -> None:
    for row in rows_of(NIGHT):
        assert (row["status"] == "crash") == math.isnan(float(row["val_bpb"]))


def test_hostile_hypotheses_stay_in_their_cell() -> None:
    rows = rows_of(HOSTILE)
    assert len(rows) == 1 + summary(HOSTILE.entries).attempts
    for row in rows:
        assert set(row) == {"commit", "val_bpb", "memory_gb", "status", "description"}
        assert re.fullmatch(r"[0-9a-f]{7}", row["commit"])
        assert row["description"][0] not in "=+-@"
        assert not {c for c in row["description"] if unicodedata.category(c) in ("Cc", "Cf")}


def test_the_commit_names_the_content_whatever_the_order_of_files() -> None:
    one, other = "1" * 64, "2" * 64
    assert candidate_id({"a": one, "b": other}) == candidate_id({"b": other, "a": one})
    assert candidate_id({"a": one}) != candidate_id({"a": other})


# The page


def test_the_first_screen_tells_what_the_night_was_worth(page: Page) -> None:
    numbers = summary(NIGHT.entries)
    words = " ".join(page.text.split())
    assert f"Best val_bpb {numbers.best:.4f}" in words
    assert f"than the baseline's {numbers.baseline:.4f}" in words
    assert f"{numbers.gain_in_noise:.1f} times the noise" in words
    assert f"head hash {NIGHT.head}" in words
    assert f"nightlab audit mar7-evening --head {NIGHT.head[:12]}" in words
    assert "4 scores were refused as invalid. #7 #18 #29 #40" in words


def test_every_attempt_is_there_with_idea_diff_log_and_numbers(page: Page) -> None:
    text = page.text
    places = {value for tag, name, value in page.attributes if (tag, name) == ("details", "id")}
    shown = {place for place in places if place.startswith("a")}
    assert shown == {f"a{attempt.number}" for attempt in NIGHT.history.attempts}
    for attempt in NIGHT.history.attempts:
        assert attempt.started.hypothesis in text
        if attempt.started.diff is not None:
            assert f"+DEPTH = {attempt.number}  # blocks" in text
    assert "KeyError: 4" in text
    assert "To be kept it had to be better by more than 0.0080" in text


def test_every_dot_of_the_chart_leads_to_its_attempt(page: Page) -> None:
    links = [value for tag, name, value in page.attributes if (tag, name) == ("a", "data-n")]
    numbers = [str(attempt.number) for attempt in NIGHT.history.attempts]
    assert sorted(links) == sorted(numbers * 2)  # one chart for wide screens, one for phones


def test_hostile_text_adds_no_tag_and_no_script(page: Page, hostile_page: Page) -> None:
    assert set(hostile_page.tags) <= set(page.tags)
    assert hostile_page.tags.count("h1") == 1
    assert hostile_page.raw == page.raw
    assert len(hostile_page.raw["script"]) == 3
    assert not [name for _, name, _ in hostile_page.attributes if name.startswith("on")]


def test_hostile_text_is_shown_as_it_was_written(hostile_page: Page) -> None:
    for shown in (
        "</script><script>document.title='executed'</script>",
        "{{ 7*7 }}{% for x in range(9) %}{{ config }}{% endfor %}{# gone #}",
        "⟨U+001B⟩[31mred",
        "gain⟨U+202E⟩%05",
        "[click](javascript:document.title='executed')",
    ):
        assert shown in hostile_page.text


def test_no_invisible_or_steering_character_reaches_the_page() -> None:
    text = html.unescape(render_html(HOSTILE.entries, HOSTILE.get_blob))
    found = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert found <= {"\n", "\t"}


def test_the_page_asks_nothing_of_any_network(hostile_page: Page) -> None:
    links = [v for _, name, v in hostile_page.attributes if name in ("href", "src", "xlink:href")]
    assert links
    assert all(link.startswith("#") for link in links)
    loading = {"link", "img", "iframe", "object", "embed", "form", "base", "image", "video"}
    assert not loading & set(hostile_page.tags)
    assert not re.search(r"url\(|@import", hostile_page.raw["style"][0])
    assert not re.search(r"fetch|XMLHttp|innerHTML|eval", "".join(hostile_page.raw["script"]))


def test_the_policy_allows_this_style_and_this_script_and_nothing_else(page: Page) -> None:
    (policy,) = [v for _, name, v in page.attributes if name == "content" and "-src" in v]
    expected = ["default-src 'none'"]
    for kind in ("style", "script"):
        digests = (hashlib.sha256(text.encode()).digest() for text in page.raw[kind])
        sources = (f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
        expected.append(f"{kind}-src {' '.join(sources)}")
    assert policy.split("; ") == [*expected, "base-uri 'none'", "form-action 'none'"]
    assert not [name for _, name, _ in page.attributes if name == "style"]


def young_sessions() -> dict[str, histories.Night]:
    empty, begun, measuring, measured = (histories.Night() for _ in range(4))
    for made in (begun, measuring, measured):
        histories.start(made)
    begin(measuring, 0, "baseline")
    histories.boxes(measuring, attempt=0, seed=1)
    histories.baseline(measured, random.Random(0))
    return {"empty": empty, "begun": begun, "measuring": measuring, "measured": measured}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("empty", "A session that has not begun"),
        ("begun", "The baseline is still being measured."),
        ("measuring", "At work."),
        ("measured", "No attempt has been judged yet."),
    ],
)
def test_a_young_session_has_a_report(tmp_path: Path, name: str, says: str) -> None:
    made = young_sessions()[name]
    write_report(tmp_path, made.entries, made.get_blob)
    assert says in read(tmp_path / REPORT_NAME)


def test_a_session_whose_baseline_failed_has_a_report(tmp_path: Path) -> None:
    made = histories.Night()
    histories.start(made)
    begin(made, 0, "baseline")
    result = histories.run_result("a0", "train", log="no\n", outcome=Outcome.TIMED_OUT)
    made.add(histories.run_finished(0, 1, result, put_blob=made.put_blob))
    made.add(finished(0, Verdict.FAILED, None))
    made.add(SessionEnded(reason=StopReason.BASELINE_FAILED, explanation="It timed out."))
    write_report(tmp_path, made.entries, made.get_blob)
    assert "The baseline failed:" in read(tmp_path / REPORT_NAME)
    assert read(tmp_path / RESULTS_NAME).splitlines()[1].split("\t")[3] == "crash"


CRASH = """step 0 loss 6.1
Traceback (most recent call last):
  File "/workspace/train.py", line 3, in <module>
    main()
KeyError: 'no such knob \x1b[31m'
"""


def crashed_baseline(
    outcome: Outcome = Outcome.FAILED, reason: str = "failed", box: Box = "train", log: str = CRASH
) -> histories.Night:
    made = histories.Night()
    histories.start(made)
    begin(made, 0, "baseline")
    result = histories.run_result("a0", box, log=log, outcome=outcome)
    made.add(histories.run_finished(0, 1, result, disturbed=True, put_blob=made.put_blob))
    end = finished(0, Verdict.FAILED, None)
    made.add(end.model_copy(update={"reason": reason, "explanation": f"the training {reason}"}))
    made.add(SessionEnded(reason=StopReason.BASELINE_FAILED, explanation=f"training {reason}"))
    return made


def test_the_likely_cause_and_its_cure_stand_wherever_a_failure_does(tmp_path: Path) -> None:
    made = crashed_baseline(log="ModuleNotFoundError: No module named 'lightning'\n")
    made.write(tmp_path / "night")
    write_report(tmp_path, made.entries, made.get_blob)
    written = io.StringIO()
    show(tmp_path / "night", Console(file=written, width=400), lambda: histories.EVENING)
    closing = "\n".join(closing_lines(summary(made.entries), tmp_path))
    page = " ".join(Page(read(tmp_path / REPORT_NAME)).text.split())
    answer = run_answer(made.history.attempts[0], made.history, repeated=False)
    for text in (closing, written.getvalue(), page, answer):
        assert "likely: the image has no lightning" in text
        assert "under [hardware]: requirements = " in text.replace("\\", "")


def test_a_crash_of_the_baseline_is_shown_with_its_last_words_and_the_way_on(
    tmp_path: Path,
) -> None:
    made = crashed_baseline()
    made.write(tmp_path / "night")
    write_report(tmp_path, made.entries, made.get_blob)
    written = io.StringIO()
    show(tmp_path / "night", Console(file=written, width=200), lambda: histories.EVENING)
    told = "\n".join(closing_lines(summary(made.entries), tmp_path))
    page = " ".join(Page(read(tmp_path / REPORT_NAME)).text.split())
    for text in (told, written.getvalue(), page, read(tmp_path / MARKDOWN_NAME)):
        assert "KeyError: 'no such knob" in text
        assert "mend the files" in text
        assert "nightlab run" in text
        assert "still being measured" not in text
        assert "\x1b" not in text
    for text in (told, page):
        assert "disturbed by other work" not in text
    assert "0 failed" not in told
    assert "no attempt was better" not in told


@pytest.mark.parametrize(
    ("reason", "box", "outcome", "remedy"),
    [
        ("over_budget", "train", Outcome.OK, "nightlab calibrate"),
        ("timed_out", "train", Outcome.TIMED_OUT, "seconds under [budget]"),
        ("model_box_timed_out", "model", Outcome.TIMED_OUT, "wall_seconds under [scoring]"),
        ("out_of_memory", "train", Outcome.OUT_OF_MEMORY, "memory under [limits]"),
        ("out_of_gpu_memory", "train", Outcome.OUT_OF_GPU_MEMORY, "batch smaller"),
        ("no_checkpoint", "train", Outcome.OK, "$NIGHTLAB_OUTPUT"),
        ("failed", "train", Outcome.FAILED, "mend the files"),
    ],
)
def test_each_failure_of_a_baseline_has_its_remedy(
    reason: str, box: Box, outcome: Outcome, remedy: str
) -> None:
    assert remedy in way_on(summary(crashed_baseline(outcome, reason, box).entries))


def test_a_session_without_a_baseline_is_over_or_measures_it() -> None:
    made = histories.Night()
    histories.start(made)
    begin(made, 0, "baseline")
    assert "still being measured" in render_html(made.entries, made.get_blob)
    made.add(AttemptInterrupted(is_box_lost=False, attempt=0, reason="stopped by the person"))
    made.add(SessionEnded(reason=StopReason.STOPPED, explanation=""))
    for text in (
        render_html(made.entries, made.get_blob),
        render_markdown(made.entries, made.get_blob),
    ):
        assert "still being measured" not in text
        assert "ended before one was measured" in text


def test_every_judged_attempt_says_what_it_needed(page: Page) -> None:
    judged = [a for a in NIGHT.history.candidates if a.finished and a.finished.arithmetic]
    assert judged
    words = page.text
    for attempt in judged:
        assert attempt.finished is not None
        assert attempt.finished.arithmetic is not None
        needed = f"needs {attempt.finished.arithmetic.required_gain:.4f}"
        assert needed in words
        assert needed in attempt_line(attempt, NIGHT.history, histories.IN_FORCE)
    assert len(judged) == len(charts.needed_scores(NIGHT.history))


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_what_had_to_be_passed_lies_on_the_better_side_of_the_best(direction: str) -> None:
    made = histories.Night()
    goal = histories.IN_FORCE.goal.model_copy(update={"direction": direction})
    histories.start(made, settings=histories.IN_FORCE.model_copy(update={"goal": goal}))
    best = histories.baseline(made, random.Random(1))
    numbers = Arithmetic(
        candidate_mean=best,
        candidate_values=(best,),
        against=0,
        best_mean=best,
        best_values=(best,),
        gain=0.0,
        noise=0.01,
        degrees_of_freedom=2,
        own_noise=None,
        required_gain=0.1,
        false_keep_rate_per_night=0.05,
        doubt_of_a_look=0.01,
    )
    begin(made, 1, "candidate")
    made.add(finished(1, Verdict.DISCARDED, best).model_copy(update={"arithmetic": numbers}))
    ((number, passed),) = charts.needed_scores(made.history)
    assert 1 == number
    assert passed == pytest.approx(best + (0.1 if direction == "maximize" else -0.1))


@pytest.mark.parametrize("attempts", range(2, 9))
def test_what_had_to_be_passed_is_drawn_within_the_picture(attempts: int) -> None:
    chart = charts.progress_chart(histories.night(attempts).history, charts.WIDE)
    assert chart is not None
    dashes = re.findall(r"M([\d.]+) [\d.]+H([\d.]+)", chart.needed)
    assert dashes
    assert all(float(left) >= charts.WIDE.left for left, _ in dashes)
    assert all(float(right) <= charts.WIDE.width - charts.WIDE.right for _, right in dashes)


def test_who_has_no_score_stands_on_a_rail_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an axis where lower is better they would look like the best of the night."""
    drawn: list[tuple[bool, str]] = []

    def scatter(axes: Axes, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
        is_rail = [label.get_text() for label in axes.get_yticklabels()] == ["no score"]
        drawn.extend((is_rail, f"{number:g}") for number in x)

    monkeypatch.setattr(Axes, "scatter", scatter)
    charts.progress_png(NIGHT.history)
    bare = {str(a.number) for a in NIGHT.history.attempts if value_of(a) is None}
    assert bare
    assert bare == {number for is_rail, number in drawn if is_rail}
    assert not bare & {number for is_rail, number in drawn if not is_rail}


def test_the_picture_is_titled_with_session_gain_and_holdout() -> None:
    made = histories.Night()
    histories.start(made)
    before = histories.baseline(made, random.Random(1))
    finish(made, 1, Verdict.KEPT, before - 0.2)
    for number, value in ((0, 2.5), (1, 2.35)):
        made.add(histories.scored(number, 1, value).model_copy(update={"split": "holdout"}))
    title = charts.title_of(made.history)
    assert title.startswith("mar7-evening: 1 attempts, 1 kept, gain +0.2")
    assert title.endswith("on holdout +0.1500")


def test_an_interrupted_attempt_has_a_line_an_event_and_a_filter(
    tmp_path: Path, page: Page
) -> None:
    attempt = next(a for a in NIGHT.history.attempts if a.interrupted)
    lines: list[str] = []
    JsonConsole(RunNotes(tmp_path, lambda: 0.0), lines.append).attempt_finished(attempt)
    written = io.StringIO()
    console = Console(file=written, width=200)
    notes = RunNotes(tmp_path, lambda: 0.0)
    NightConsole(notes, console, histories.IN_FORCE, lambda: NIGHT.history).attempt_finished(
        attempt
    )
    (event,) = map(json.loads, lines)
    assert ("attempt_interrupted", attempt.number) == (event["event"], event["attempt"])
    assert attempt.interrupted is not None
    assert f"#{attempt.number}" in written.getvalue()
    assert f"interrupted {attempt.interrupted.reason}" in written.getvalue()
    shown = [value for _, name, value in page.attributes if name == "data-show"]
    assert "interrupted" in shown
    assert "3 interrupted" in "\n".join(closing_lines(summary(NIGHT.entries), tmp_path))


@pytest.mark.parametrize("made", [NIGHT, HOSTILE, histories.night(6, ended=False)])
def test_every_second_of_a_session_is_in_one_row(made: histories.Night) -> None:
    rows = findings.time_spent(made.entries)
    assert sum(seconds for _, seconds in rows) == pytest.approx(made.history.time.active_seconds)
    assert ["training", "scoring"] == [name for name, _ in rows[:2]]
    assert len(rows) == len(dict(rows))


def test_each_wait_has_a_row_of_its_own() -> None:
    made = histories.Night()
    histories.start(made)
    begin(made, 0, "baseline")
    result = histories.run_result("a0", "train", log="")
    made.add(histories.run_started(0, 1, result), 1.0)
    made.add(histories.run_finished(0, 1, result, disturbed=True, put_blob=made.put_blob), 10.0)
    made.add(histories.run_started(0, 1, result), 116.0)  # it was waited for quiet
    made.add(Noticed(kind="gpu_awaited", explanation="waiting for a GPU"), 2.0)
    made.add(histories.run_finished(0, 1, result, put_blob=made.put_blob), 10.0)
    made.add(Noticed(kind="engine_away", explanation="waiting for the engine"), 1.0)
    made.add(Noticed(kind="engine_back", explanation="it is back"), 60.0)
    made.add(RetryWaited(conversation=1, error="overloaded", wait_seconds=30.0), 0.0)
    made.add(Noticed(kind="other", explanation="it went on"), 30.0)
    rows = dict(findings.time_spent(made.entries))
    assert 116.0 == pytest.approx(rows["waiting for a quiet machine"])
    assert 60.0 == pytest.approx(rows["waiting for the engine"])
    assert 30.0 == pytest.approx(rows["waiting for the service"])
    assert sum(rows.values()) == pytest.approx(made.history.time.active_seconds)


def test_a_night_of_the_sampler_counts_no_money_and_no_calls() -> None:
    made = histories.Night()
    histories.start(made, researcher="tpe")
    histories.baseline(made, random.Random(1))
    made.add(SessionEnded(reason=StopReason.STOPPED, explanation=""))
    told = "\n".join(closing_lines(summary(made.entries), Path("runs/night")))
    page = " ".join(Page(render_html(made.entries, made.get_blob)).text.split())
    for text in (told, page, render_markdown(made.entries, made.get_blob)):
        assert "$0" not in text
        assert "model calls" not in text
    assert "at least $2.59" in " ".join(
        Page(render_html(NIGHT.entries, NIGHT.get_blob)).text.split()
    )


def test_a_night_begins_with_its_plan_and_goes_on_with_what_it_measured() -> None:
    made = histories.Night()
    histories.start(made)
    lines = list(plan(made.history, histories.EVENING))
    assert ["goal", "task", "limits", "plan"] == [line.split()[0] for line in lines]
    assert "val_bpb, lower is better" in lines[0]
    assert "100 attempts, 10 h, $20.00" in lines[2]
    assert "baseline 3 x 300 s, at least 15 min 00 s; then at most 100 attempts until" in lines[3]
    assert "" == outlook(made.history, histories.EVENING)
    histories.baseline(made, random.Random(1))
    assert "at least" not in list(plan(made.history, histories.EVENING))[3]
    told = outlook(made.history, histories.EVENING)
    assert "a training with its score took 5 min 10 s: at most 100 attempts until" in told
    few = histories.Night()
    settings = histories.IN_FORCE.with_overrides(hours=1.0)
    histories.start(few, settings=settings, researcher="tpe")
    assert "$" not in list(plan(few.history, histories.EVENING))[2]
    assert "then at most 9 attempts until" in list(plan(few.history, histories.EVENING))[3]


def test_a_run_says_which_of_how_many_it_is(tmp_path: Path) -> None:
    made = histories.Night()
    histories.start(made)
    begin(made, 0, "baseline")
    assert "run 2 of 4" == run_in_words(made.history, 0, 1)
    assert "" == run_in_words(made.history, 0, 99)
    written = io.StringIO()
    notes = RunNotes(tmp_path, lambda: 0.0)
    console = NightConsole(
        notes, Console(file=written, width=200), histories.IN_FORCE, lambda: made.history
    )
    result = histories.run_result("a0-s1-train", "train", log="")
    console.run_started(histories.run_started(0, 1, result), 300.0)
    console.waiting("waiting for the container engine")
    began, waited = written.getvalue().splitlines()
    assert re.fullmatch(r" +\d\d:\d\d baseline training, run 2 of 4", began)
    assert re.fullmatch(r" +\d\d:\d\d waiting for the container engine", waited)
    begin(made, 1, "candidate")
    assert "run 2 of at most 4" == run_in_words(made.history, 1, 1)


def test_the_files_are_written_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    for _ in range(2):
        write_report(tmp_path, HOSTILE.entries, HOSTILE.get_blob)
    written = {REPORT_NAME, MARKDOWN_NAME, RESULTS_NAME, PICTURE_NAME}
    assert written == {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / PICTURE_NAME).read_bytes().startswith(b"\x89PNG\r\n")
    assert read(tmp_path / RESULTS_NAME) == results_tsv(HOSTILE.history)


def test_a_report_is_written_from_a_real_session_directory(tmp_path: Path) -> None:
    NIGHT.write(tmp_path)
    with Ledger.open(tmp_path) as ledger:
        write_report(tmp_path, ledger.entries, ledger.get_blob)
    assert read(tmp_path / REPORT_NAME) == render_html(NIGHT.entries, NIGHT.get_blob)


def test_a_lost_diff_is_named_and_the_rest_is_still_told() -> None:
    def lost(sha: str) -> bytes:
        raise LedgerError(f"blob {sha} is damaged")

    text = Page(render_html(NIGHT.entries, lost)).text
    assert "(the diff cannot be shown: blob" in text
    assert histories.IDEAS[1] in text


def test_what_the_researcher_said_thought_and_did_stands_with_its_attempt() -> None:
    made = histories.night(3, words="try <b>depth</b> \u202e next")
    told = Page(render_html(made.entries, made.get_blob))
    places = [value for _, name, value in told.attributes if name == "id"]
    assert ["w1", "w2", "w3"] == [place for place in places if re.fullmatch(r"w\d", place)]
    for who in ("researcher", "researcher thinks", "researcher calls run", "told"):
        assert 3 == [text.strip() for text in told.texts].count(who)
    for how in ("said: ", "thought: ", "hypothesis = ", "answered: "):
        assert 3 == told.text.count(f"{how}try <b>depth</b> ⟨U+202E⟩ next")
    silent = histories.night(3)
    assert "What the researcher said" not in render_html(silent.entries, silent.get_blob)


def test_words_are_of_the_attempt_that_they_led_to_and_the_latest_find_room() -> None:
    made = histories.Night()
    histories.start(made)
    histories.baseline(made, random.Random(1))
    for number in (1, 2):
        for turn in range(9):
            histories.speak(made, f"number {number} turn {turn} " + "x" * 400)
        begin(made, number, "candidate")
        made.add(finished(number, Verdict.DISCARDED, 2.5))
    begin(made, 3, "candidate")
    messages = messages_of(made.entries)
    assert {0: 0, 1: 18, 2: 18, 3: 0} == {n: len(said) for n, said in messages.items()}
    for limit, turns in ((10**6, 9), (6000, 3)):
        shown = spoken(messages[2], made.get_blob, limit)
        text = "\n".join(line for one in shown for line in one.lines)
        assert "number 1" not in text
        assert "number 2 turn 8" in text
        assert turns >= text.count("thought: ") >= 1
        assert limit > len(text)
    damaged = spoken(["f" * 64], lambda _sha: b"[1", 1000)
    assert ["(a message cannot be shown: JSONDecodeError)"] == damaged[0].lines


def test_three_hundred_attempts_with_endless_hostile_words_and_logs_stay_under_two_megabytes() -> (
    None
):
    made = histories.night(300, hostile=True, log_lines=1, words='<&"\x1b\u202e\n' * 4000)
    flood = Log(head='<&"\x1b\u202e' * 4000, tail="</script>\n" * 4000, omitted_bytes=10**9)
    for attempt in made.history.candidates:
        result = histories.run_result(f"flood-{attempt.number}", "train", log="")
        result = result.model_copy(update={"log": flood, "outcome": Outcome.FAILED})
        for _ in range(15):
            made.add(histories.run_finished(attempt.number, 1, result, put_blob=made.put_blob))
    begun = time.process_time()
    size = len(render_html(made.entries, made.get_blob).encode())
    seconds = time.process_time() - begun
    assert size < 2_000_000
    assert seconds < 20


def test_three_hundred_attempts_are_rendered_in_three_seconds_of_work() -> None:
    made = histories.night(300, log_lines=300)
    begun = time.process_time()
    size = len(render_html(made.entries, made.get_blob).encode())
    assert time.process_time() - begun < 3
    assert size < 2_000_000


def test_kept_changes_are_a_chain_of_diffs_with_what_each_gained(page: Page) -> None:
    places = {value for tag, name, value in page.attributes if (tag, name) == ("details", "id")}
    kept = [a.number for a in NIGHT.history.candidates if a.kept]
    assert kept
    assert {f"k{number}" for number in kept} == {place for place in places if place[0] == "k"}
    for number in kept:
        assert page.text.count(f"+DEPTH = {number}  # blocks") == 2


def test_time_money_repeats_and_machine_add_up() -> None:
    history = NIGHT.history
    models = findings.spend_by_model(NIGHT.entries)
    assert sum(row.calls for row in models) == history.spend.calls
    assert sum(row.usd for row in models) == pytest.approx(history.spend.usd)
    assert sum(row.usage.output_tokens for row in models) == history.spend.output_tokens
    outcomes = findings.spend_by_outcome(history)
    assert sum(count for _, count, _ in outcomes) == len(history.candidates)
    assert sum(usd for _, _, usd in outcomes) == pytest.approx(history.spend.usd)
    assert findings.repeats(history)[0].attempt == 0
    # Two scores of a candidate are shown, but say too little of noise to be pooled.
    assert len(findings.repeats(history)) >= len(history.repeats.spreads)
    state = dict(findings.machine_state(history))
    assert state["trainings disturbed"] == "1 of 54"


def test_the_way_from_baseline_to_best_names_parents_ranks_and_tries() -> None:
    made = real_files()
    finish(made, 4, Verdict.KEPT, 1.5)
    begin(made, 5, "candidate", parent=4)
    found = lineage(made.history)
    assert [0, 1, 4] == [one.attempt for one in found]
    assert [1, 2, 0] == [one.tries for one in found]
    told = dict(rates(made.history))
    assert "2 of 4, 50%" == told["kept"]
    assert "hours of training" in told["a kept change cost"]
    assert "$" not in told["a kept change cost"]
    assert [] == list(rates(histories.Night().history))


def test_a_kept_attempt_that_fell_later_is_off_the_line() -> None:
    made = real_files()
    refused = {"seed": 1, "split": "val", "reason": "looks_ahead", "explanation": "", "sheet": None}
    made.add(Dethroned(attempt=1, purpose=ATTEMPT, best=0, **refused))
    found = {one.attempt: one.is_on_line for one in lineage(made.history)}
    assert (True, False) == (found[0], found[1])
    assert 'class="aside"' in render_html(made.entries, made.get_blob)


def turned(count: int, *, spread: float) -> list[Measured]:
    """Scores that one knob alone decides, beside one that means nothing and one that stays."""
    chance = random.Random(3)
    places = [(n % 10 / 10, chance.choice(["a", "b"])) for n in range(count)]
    return [
        Measured(
            attempt=n,
            mark="discarded",
            score=2 + spread * place + chance.gauss(0, 0.001),
            knobs={"LR": place, "KIND": kind, "FIXED": 4, "WIDTH": chance.choice([64, 128])},
        )
        for n, (place, kind) in enumerate(places)
    ]


def test_the_knob_that_decides_is_told_first_and_a_fixed_one_not_at_all() -> None:
    found = influence(turned(40, spread=0.5), "minimize", 0.01)
    assert "LR" == found[0].name
    assert found[0].importance > 0.5
    assert {"LR", "KIND", "WIDTH"} == {one.name for one in found}
    assert 40 == len(found[0].dots)
    assert ("0", "0.9") == (found[0].low, found[0].high)


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        (turned(19, spread=0.5), "too few scores"),
        (turned(40, spread=0.01), "no more than noise"),
        ([one.model_copy(update={"knobs": {"LR": 1}}) for one in turned(40, spread=1)], "no turns"),
        ([], "nothing"),
    ],
)
def test_of_knobs_nothing_is_said_where_too_little_is_known(seen: list[Measured], why: str) -> None:
    assert () == influence(seen, "minimize", 0.01), why


# Markdown


def test_the_markdown_tells_the_same_facts(golden: Callable[[str, str], None]) -> None:
    made = histories.night(6)
    golden("report.md", render_markdown(made.entries, made.get_blob))


def test_hostile_text_stays_text_in_markdown(golden: Callable[[str, str], None]) -> None:
    made = histories.night(8, hostile=True, log_lines=2)
    golden("report_hostile.md", render_markdown(made.entries, made.get_blob))


def test_no_mark_up_of_a_model_reaches_the_markdown_outside_a_fence() -> None:
    outside = re.sub(
        r"(?ms)^(`{3,})text$.*?^\1$", "", render_markdown(HOSTILE.entries, HOSTILE.get_blob)
    )
    assert not re.search(r"(?<!\\)<", outside)
    assert not re.search(r"(?<!\\)\]\(", outside)
    found = {c for c in outside if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert found <= {"\n"}


# Scale


def test_four_times_the_attempts_cost_no_more_than_their_share_and_little_memory(
    tmp_path: Path,
) -> None:
    small, large = (histories.night(count, log_lines=120) for count in (125, 500))
    for made, directory in ((small, tmp_path / "small"), (large, tmp_path / "large")):
        made.write(directory)
    one, other = (measured_report(tmp_path / name) for name in ("small", "large"))
    # Bounds that a busy machine keeps too, and that quadratic work would not: it costs 16 times.
    assert other["seconds"] < 8 * one["seconds"]
    assert other["memory_bytes"] < 300 * 2**20
    assert (tmp_path / "large" / "report.html").stat().st_size < 5_000_000


def test_after_an_attempt_only_that_attempt_is_read_and_rendered(tmp_path: Path) -> None:
    made = histories.night(30)
    asked: list[str] = []

    def get_blob(sha: str) -> bytes:
        asked.append(sha)
        return made.get_blob(sha)

    report = Report(get_blob)
    report.write(tmp_path, made.history, made.entries)
    for attempt in range(31, 41):
        asked.clear()
        finish(made, attempt, Verdict.DISCARDED, 2.4 + attempt / 1000)
        for box_seed in (1, 2):
            histories.boxes(made, attempt=attempt, seed=box_seed)
        report.write(tmp_path, made.history, made.entries)
        assert len(asked) <= 4
    assert read(tmp_path / REPORT_NAME) == render_html(made.entries, made.get_blob)
    assert read(tmp_path / MARKDOWN_NAME) == render_markdown(made.entries, made.get_blob)


MEASURE = """
import json, re, sys, time
from pathlib import Path
from agent.record.chain import read_blob, read_ledger
from agent.report.report import write_report
directory = Path(sys.argv[1])
entries = read_ledger(directory)
begun = time.process_time()
write_report(directory, entries, lambda sha: read_blob(directory, sha))
seconds = time.process_time() - begun
# Not ru_maxrss: that one survives exec and would tell the parent's memory.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"seconds": seconds, "memory_bytes": peak}))
"""


def measured_report(directory: Path) -> dict[str, float]:
    """Work and memory of one report in a process of its own."""
    command = [sys.executable, "-c", MEASURE, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


# Charts


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_axis_ticks_are_few_round_and_in_range(low: float, span: float) -> None:
    ticks = charts.axis_ticks(low, low + span)
    assert 1 <= len(ticks) <= 11
    slack = 1e-9 * (abs(low) + span)
    assert all(low - slack <= value <= low + span + slack for value, _ in ticks)


def test_a_loss_curve_is_drawn_from_what_was_stored() -> None:
    curve = charts.loss_curve([curve_of(histories.progress_log(1, 2000))])
    assert curve is not None
    (line,) = curve.lines
    assert len(line.split()) <= charts.MAX_CURVE_POINTS + 1
    assert curve.last_seconds == pytest.approx(300, abs=1)
    over = charts.loss_curve(
        [curve_of(histories.progress_log(1, 9))], [{"seconds": 900, "loss": 9}] * 2
    )
    assert over is not None
    assert (900, 9, 1) == (over.last_seconds, over.high, len(over.lines))
    assert "300,2 300,2" == over.beside


def test_a_damaged_curve_is_left_out_and_the_rest_is_told() -> None:
    made = histories.night(3)
    sha = next(run.curve for run in made.history.attempts[1].runs if run.curve)
    made.blobs[sha] = b"{"
    assert histories.IDEAS[1] in render_html(made.entries, made.get_blob)


def test_an_attempt_better_than_the_best_by_less_than_the_noise_is_on_the_chart() -> None:
    made = histories.night(12)
    assert made.history.best is not None
    finish(made, 13, Verdict.DISCARDED, made.history.best.values()[1] - 0.05)
    chart = charts.progress_chart(made.history, charts.WIDE)
    assert chart is not None
    assert not next(dot for dot in chart.dots if dot.number == 13).is_off_scale


def test_a_wild_attempt_is_drawn_at_the_edge_and_flattens_nothing() -> None:
    made = histories.night(12)
    finish(made, 13, Verdict.DISCARDED, 80.0)
    chart = charts.progress_chart(made.history, charts.WIDE)
    assert chart is not None
    wild = next(dot for dot in chart.dots if dot.number == 13)
    assert wild.is_off_scale
    assert wild.y == charts.WIDE.top
    assert max(float(tick.label) for tick in chart.y_ticks) < 3


def begin(made: histories.Night, number: int, kind: str, **changes: Any) -> None:
    made.add(
        AttemptStarted(
            attempt=number,
            kind="baseline" if kind == "baseline" else "candidate",
            hypothesis="an idea",
            researcher="tpe",
            files={},
            diff=None,
            parent=None,
            seeds=(0, 1, 2, 3),
        ).model_copy(update=changes)
    )


def finished(number: int, verdict: Verdict, value: float | None) -> AttemptFinished:
    return AttemptFinished(
        attempt=number,
        verdict=verdict,
        reason="test",
        explanation="",
        value=value,
        arithmetic=None,
        seconds=1.0,
    )


def finish(made: histories.Night, number: int, verdict: Verdict, value: float) -> None:
    begin(made, number, "candidate")
    made.add(histories.scored(number, 1, value))
    made.add(finished(number, verdict, value))


# In a browser


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("session")
    write_report(directory, HOSTILE.entries, HOSTILE.get_blob)
    return directory / REPORT_NAME


@pytest.fixture(scope="module")
def started(chromium: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(chromium, tmp_path_factory.mktemp("profile")) as made:
        yield made


@pytest.fixture
def browser(started: Browser) -> Browser:
    started.new_page()
    return started


@pytest.mark.slow
def test_the_report_opens_in_a_browser_runs_only_its_own_script_and_asks_nothing(
    browser: Browser, written: Path
) -> None:
    browser.open(f"{written.as_uri()}#a7")
    assert "mar7-evening · nightlab" == browser.run("document.title")
    assert ["a7"] == browser.run("[...document.querySelectorAll('.attempt[open]')].map(a => a.id)")
    assert [] == browser.console
    assert [written.as_uri()] == [address.split("#")[0] for address in browser.requests]


@pytest.mark.slow
def test_a_script_planted_past_the_escaping_is_stopped_by_the_policy(
    browser: Browser, tmp_path: Path, written: Path
) -> None:
    planted = tmp_path / "planted.html"
    evil = (
        "</main><script>document.title='executed'</script>"
        "<img src='http://127.0.0.1:9/x'><style>body { display: none }</style>"
    )
    planted.write_text(written.read_text(encoding="utf-8").replace("</main>", evil, 1), "utf-8")
    browser.open(planted.as_uri())
    assert "mar7-evening · nightlab" == browser.run("document.title")
    assert "block" == browser.run("getComputedStyle(document.body).display")
    assert 3 == sum("Content Security Policy" in line for line in browser.console)


@pytest.mark.slow
def test_hovering_tells_clicking_opens_and_filtering_hides(browser: Browser, written: Path) -> None:
    browser.open(written.as_uri())
    browser.hover('.wide a.dot[data-n="6"]')
    browser.wait_for("!document.getElementById('tip').hidden")
    said = " ".join(browser.run("document.getElementById('tip').textContent").split())
    assert said.startswith(f"#6 kept {value_of(HOSTILE.history.attempt(6)):.4f} +")
    assert visible_idea(6) in said
    browser.click('.wide a.dot[data-n="6"]')
    assert browser.run("document.getElementById('a6').open")
    browser.click('button[data-show="failed"]')
    shown = "[...document.querySelectorAll('.attempt')].filter(row => row.offsetHeight)"
    assert summary(HOSTILE.entries).failed == browser.run(f"{shown}.length")
    assert browser.run(f"{shown}.every(row => row.classList.contains('failed'))")
    assert [] == browser.console


@pytest.mark.slow
def test_attempts_can_be_looked_for_and_ordered(browser: Browser, written: Path) -> None:
    browser.open(written.as_uri())
    shown = "[...document.querySelectorAll('.attempt')].filter(row => row.offsetHeight)"
    everyone = browser.run(f"{shown}.length")
    look = "const s = document.getElementById('search'); s.value = '{}';"
    told = "s.dispatchEvent(new Event('input', {bubbles: true}))"
    browser.run(f"(() => {{ {look.format('KeyError dog')} {told} }})()")
    assert 0 == browser.run(f"{shown}.length")
    browser.run(f"(() => {{ {look.format('keyerror')} {told} }})()")
    found = browser.run(f"{shown}.length")
    assert 0 < found < everyone
    assert f"{found} found" == browser.run("document.getElementById('found').textContent")
    link = "document.querySelector('a[data-n=\"6\"]')"
    browser.run(f"{link}.dispatchEvent(new MouseEvent('click', {{bubbles: true}}))")
    assert everyone == browser.run(f"{shown}.length")
    pick = "const o = document.getElementById('order'); o.value = 'score';"
    browser.run(f"(() => {{ {pick} o.dispatchEvent(new Event('change', {{bubbles: true}})) }})()")
    all_rows = "[...document.querySelectorAll('.attempt')]"
    numbers = browser.run(f"{all_rows}.map(row => row.dataset.number).join()")
    values = [value_of(HOSTILE.history.attempt(int(number))) for number in numbers.split(",")]
    known = [value for value in values if value is not None]
    assert values == [*sorted(known), *[None] * (len(values) - len(known))]
    assert [] == browser.console


def real_files() -> histories.Night:
    """A baseline and three attempts with files, changes and knobs that belong together."""
    made = histories.Night()
    text = "".join(f"line_{n} = {n}\n" for n in range(40))
    first = {"train.py": f"DEPTH = 4\n{text}# end".encode(), "other.py": b"-- no comment\n"}
    second = {**first, "train.py": first["train.py"].replace(b"DEPTH = 4", b"DEPTH = 6")}
    third = {"train.py": second["train.py"].replace(b"line_30", b"x") + b"\n", "new.py": b"W = 1\n"}
    fourth = {**second, "other.py": b"++ now <b>bold</b>\n"}
    histories.start(made)
    histories.baseline(made, random.Random(1))
    for number, files, parent in ((1, second, 0), (2, third, 1), (3, fourth, 1)):
        before = first if parent == 0 else second
        begin(
            made,
            number,
            "candidate",
            parent=parent,
            files=hashes(made, files),
            diff=made.put_blob(unified_diff(before, files)),
        )
        histories.boxes(made, attempt=number, seed=1)
        made.add(finished(number, Verdict.KEPT if number == 1 else Verdict.DISCARDED, 2.0 + number))
    start = made.history.attempts[0].started
    start.files.update(hashes(made, first))
    return made


PICK = """(() => {
  const one = document.getElementById('compare-%s');
  one.value = %s;
  one.dispatchEvent(new Event('change', { bubbles: true }));
})()"""


def hashes(made: histories.Night, files: dict[str, bytes]) -> dict[str, str]:
    return {name: made.put_blob(body) for name, body in files.items()}


@pytest.mark.slow
def test_two_attempts_are_compared_by_numbers_knobs_curves_and_the_change_between_them(
    browser: Browser, tmp_path: Path
) -> None:
    made = real_files()
    page = Report(made.get_blob).html(made.history, made.entries)
    (tmp_path / "report.html").write_text(page, "utf-8")
    browser.open((tmp_path / "report.html").as_uri())
    browser.run("document.getElementById('a2').open = true")
    browser.click('#a2 button[data-compare="2"]')
    told = browser.run("document.getElementById('compared').innerText")
    assert "From #1 to #2" in told
    assert "-line_30 = 30\n+x = 30\n" in told
    assert "DEPTH" not in told.partition("From #1")[0]
    for first, second in ((0, 3), (2, 3), (3, 0), (2, 1)):
        for place, number in (("a", first), ("b", second)):
            browser.run(PICK % (place, number))
        shown = browser.run("document.querySelector('#compared pre').textContent")
        files = [made.history.attempt(n).started.files for n in (first, second)]
        whole = unified_diff(*({n: made.get_blob(s) for n, s in one.items()} for one in files))
        marked = [line for line in whole.decode().splitlines() if line[:1] in "+-"]
        expected = [line for line in marked if not line.startswith(("+++ b/", "--- a/"))]
        # Whether the last line of a file ends is not told in the page.
        expected = [line for line in expected if line[1:] != "# end"]
        assert sorted(expected) == sorted(
            line for line in shown.split("\n") if line[:1] in ("+", "-")
        )
        knobs = browser.run("document.querySelector('#compared table').innerText")
        assert ("DEPTH" in knobs) == (0 in (first, second))
        lines = 4 if 0 in (first, second) else 2  # the baseline was trained three times
        assert lines == browser.run("document.querySelectorAll('#compared polyline').length")
    assert browser.run("document.querySelectorAll('#a2 .diff .lit').length")
    assert [] == browser.console
    made.blobs[made.history.attempt(1).started.diff or ""] += b" cut" * 40_000
    (tmp_path / "report.html").write_text(
        Report(made.get_blob).html(made.history, made.entries), "utf-8"
    )
    browser.open((tmp_path / "report.html").as_uri())
    browser.run("document.getElementById('a2').open = true")
    browser.click('#a2 button[data-compare="2"]')
    assert "nightlab show NAME 2 --against 1" in browser.run(
        "document.getElementById('compared').innerText"
    )


def visible_idea(number: int) -> str:
    return one_line(HOSTILE.history.attempt(number).started.hypothesis, 300)


@pytest.mark.slow
def test_the_chart_is_one_stop_for_the_keyboard_and_arrows_go_on(
    browser: Browser, written: Path
) -> None:
    browser.open(written.as_uri())
    stops = "[...document.querySelectorAll('.wide a.dot')].filter(dot => dot.tabIndex === 0)"
    assert 1 == browser.run(f"{stops}.length")
    browser.run("document.querySelector('.wide a.dot[data-n=\"5\"]').focus()")
    browser.press("ArrowRight")
    assert "6" == browser.run("document.activeElement.dataset.n")
    assert "#6" in browser.run("document.getElementById('tip').textContent")
    browser.press("End")
    assert "40" == browser.run("document.activeElement.dataset.n")
    browser.press("Escape")
    assert browser.run("document.getElementById('tip').hidden")


@pytest.mark.slow
def test_back_returns_to_the_chart_and_the_contents_lead_to_each_part(
    browser: Browser, written: Path
) -> None:
    browser.open(written.as_uri())
    browser.click('.wide a.dot[data-n="6"]')
    browser.wait_for("location.hash === '#a6'")
    browser.run("history.back()")
    browser.wait_for("location.hash === ''")
    links = browser.run(
        "[...document.querySelectorAll('#contents a')].map((one) => one.getAttribute('href'))"
    )
    assert {"#all", "#chain", "#each"} <= set(links)
    assert browser.run(f"{json.dumps(links)}.every((one) => document.querySelector(one))")
    label = "document.querySelector('.wide a.dot[data-n=\"6\"]').getAttribute('aria-label')"
    assert f"attempt 6, kept, {value_of(HOSTILE.history.attempt(6)):.4f}" == browser.run(label)


@pytest.mark.slow
def test_what_a_finger_has_to_hit_on_a_phone_is_large_enough(
    browser: Browser, written: Path
) -> None:
    browser.resize(390, 800, is_phone=True)
    browser.open(f"{written.as_uri()}#a6")
    small = browser.run(
        "[...document.querySelectorAll('button, summary, select, input, nav a')]"
        ".filter((one) => one.offsetHeight && one.offsetHeight < 44).map((one) => one.outerHTML)"
    )
    assert [] == small


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_wider_than_a_phone_or_a_desk(
    browser: Browser, written: Path, width: int
) -> None:
    browser.resize(width, 800, is_phone=width < 500)
    browser.open(f"{written.as_uri()}#a5")
    assert width >= browser.run("document.documentElement.scrollWidth")


@pytest.mark.slow
def test_the_theme_can_be_chosen_and_paper_is_always_white(
    browser: Browser, written: Path, tmp_path: Path
) -> None:
    page = "getComputedStyle(document.body).backgroundColor"
    browser.open(written.as_uri())
    browser.look(is_dark=True)
    dark = browser.run(page)
    browser.click("#theme")
    light = browser.run(page)
    browser.click("#theme")
    browser.look(media="")
    assert dark == browser.run(page) != light
    browser.look(media="print")
    assert "rgb(255, 255, 255)" == browser.run(page)
    browser.print(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
