"""The metric as people print it: patterns, files, the best of several; bounded in time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from agent.record.reported import (
    MAX_FILE_BYTES,
    MISSING,
    NOT_A_NUMBER,
    NOT_FINITE,
    TOO_SLOW,
    UNCERTAIN,
    likely_scores,
    lines_of,
    read_reported,
    reported_file,
)
from agent.settings import Goal
from sandbox.contract.run import Log

NANO = "step 0: train loss 4.2, val loss 4.3\nstep 250: train loss 1.9, val loss 2.05\nsaving\n"
LIGHTNING = (
    "\rEpoch 0: 100%|####| 9/9 [00:01, v_num=0, val/acc=0.91]\n"
    "\rEpoch 1:  50%|##  | 5/9 [00:01, v_num=0, val/acc=0.91]\x1b[A"
    "\rEpoch 1: 100%|####| 9/9 [00:02, v_num=0, val/acc=0.955]\x1b[2K\n"
)
MNIST = "\nTest set: Average loss: 0.0461, Accuracy: 9847/10000 (98%)\n"


def read(text: str, omitted: int = 0, **goal: Any) -> object:
    log = Log(head="", tail=text, omitted_bytes=omitted)
    said = read_reported(log, Goal(metric="m", source="reported", **goal))
    return said.reason if said.value is None else said.value


@pytest.mark.parametrize(
    ("text", "pattern", "expected"),
    [
        (NANO, r"val loss ([\d.]+)", 2.05),
        (LIGHTNING, r"val/acc=([\d.]+)", 0.955),  # a bar that was wiped out was shown all the same
        (MNIST, r"Accuracy: \d+/\d+ \((\d+)%\)", 98.0),
        (MNIST, r"Average loss: ([\d.]+)", 0.0461),
        ("\x1b[32macc\x1b[0m = \x1b[1m0.5\x1b[0m", r"acc = (\S+)", 0.5),
        ("| eval_loss | 0.25 |\n", r"eval_loss\s*\|\s*(\S+)", 0.25),
        ("{'eval_loss': 0.31, 'epoch': 2.0}\n", r"'eval_loss': ([\d.e-]+)", 0.31),
        ("speedup 1.23x\n", r"speedup ([\d.]+)x", 1.23),
        ("tokens/s 1,234,567\n", r"tokens/s ([\d,]+)", 1234567.0),
        ("loss 0,123\n", r"loss (\S+)", NOT_A_NUMBER),  # a comma of decimals, not of thousands
        ("acc 0.5\nacc nan\n", r"acc (\S+)", NOT_FINITE),
        ("acc 0.5\nacc -\n", r"acc (\S+)", NOT_A_NUMBER),
        ("loss 1\n", r"acc (\S+)", MISSING),
        ("acc 1\n", r"acc( \d)?( \d)?", 1.0),
    ],
)
def test_a_pattern_matches_anywhere_and_its_last_match_counts(
    text: str, pattern: str, expected: object
) -> None:
    assert expected == read(text, pattern=pattern)


def test_a_pattern_counts_what_was_kept_of_the_logs_end_for_certain() -> None:
    assert read("acc 1\nacc 2\n", omitted=5, pattern=r"acc (\d)") == 2.0
    assert read("acc 1\nend\n", omitted=5, pattern=r"acc (\d)") == UNCERTAIN


def test_the_best_of_several_is_chosen_by_the_direction_and_only_of_a_whole_log() -> None:
    text = "acc 0.3\nacc 0.9\nacc 0.5\n"

    best: dict[str, Any] = {"pattern": r"acc ([\w.]+)", "take": "best"}
    assert read(text, direction="maximize", **best) == 0.9
    assert read(text, direction="minimize", **best) == 0.3
    assert read(text, direction="maximize", omitted=9, **best) == UNCERTAIN
    assert read(text + "acc nan\n", direction="maximize", **best) == NOT_FINITE


def test_a_pattern_that_takes_for_ever_is_ended_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.record.reported.MATCH_SECONDS", 1)
    began = time.monotonic()

    assert read("a" * 60 + "!\n", pattern=r"(a+)+$") == TOO_SLOW

    assert time.monotonic() - began < 30


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "key", "expected"),
    [
        ("m.json", '{"eval": {"acc": 0.5}}', "eval/acc", 0.5),
        ("m.json", '{"eval/acc": 0.7, "eval": {"acc": 0.5}}', "eval/acc", 0.7),
        ("m.json", '[{"acc": 1}, {"acc": 2}, {"loss": 3}]', "acc", 2.0),
        ("m.json", '{"acc": NaN}', "acc", NOT_FINITE),
        ("m.json", '{"acc": true}', "acc", NOT_A_NUMBER),
        ("m.json", '{"acc": [1]}', "acc", NOT_A_NUMBER),
        ("m.json", '{"loss": 1}', "acc", MISSING),
        ("m.json", "{", "acc", NOT_A_NUMBER),
        ("m.json", "[" * 100_000, "acc", NOT_A_NUMBER),
        ("m.json", "7", "acc", MISSING),
        ("m.jsonl", '{"acc": 1}\n\n{"loss": 3}\n{"acc": 2}', "acc", 2.0),
        ("m.csv", "epoch,acc\n1,0.3\n2,0.4\n3,\n", "acc", 0.4),
        ("m.tsv", "epoch\tacc\n1\t0.3\n", "acc", 0.3),
        ("m.csv", "\ufeffacc\n1\n", "acc", 1.0),
        ("m.json", None, "acc", MISSING),
    ],
)
def test_a_file_says_it_under_a_key(
    tmp_path: Path, name: str, content: str | None, key: str, expected: object
) -> None:
    goal = Goal(metric="m", source="reported", file=name, key=key)
    if content is not None:
        (tmp_path / name).write_text(content)

    said = read_reported(
        Log(head="", tail="", omitted_bytes=0), goal, reported_file(tmp_path, goal)
    )

    assert expected == (said.reason if said.value is None else said.value)


def test_a_file_of_any_size_is_not_read(tmp_path: Path) -> None:
    goal = Goal(metric="m", source="reported", file="m.json")
    (tmp_path / "m.json").write_bytes(b" " * MAX_FILE_BYTES + b'{"m": 1}')

    assert reported_file(tmp_path, goal) is None


# --- settings, and what is proposed --------------------------------------------------------------


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        ({"pattern": "acc"}, "has no group"),
        ({"pattern": "(acc"}, "no regular expression"),
        ({"pattern": "(a)", "file": "m.json"}, "both a pattern and a file"),
        ({"key": "a"}, "no file that it stands in"),
        ({"file": "../m.json"}, "no plain relative path"),
        ({"file": "m.txt"}, "none of .json"),
        ({"pattern": "(a)", "source": "scored"}, 'only source = "reported" reads'),
    ],
)
def test_a_goal_that_cannot_be_read_is_refused(goal: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Goal(**{"source": "reported", **goal})


@pytest.mark.parametrize("text", [NANO, MNIST, LIGHTNING.replace("\x1b[2K", ""), "RMSE    12.5\n"])
def test_each_pattern_that_is_proposed_reads_its_own_line(text: str) -> None:
    found = likely_scores(lines_of(Log(head=text, tail="", omitted_bytes=0)))

    assert found
    assert [read(text, pattern=one.pattern) for one in found] == [float(one.value) for one in found]


def test_what_looks_like_a_score_is_named_where_none_was_found() -> None:
    log = Log(head=NANO, tail="", omitted_bytes=0)
    said = read_reported(log, Goal(metric="accuracy", source="reported"))

    assert said.reason == MISSING
    assert r"pattern = 'val\s*loss" in said.explanation
