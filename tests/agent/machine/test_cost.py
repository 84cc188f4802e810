"""What a score takes is said before a night, and refused where it cannot fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.machine.cost import cost_of_data, score_cost
from agent.settings import Settings
from sandbox.contract.errors import UsageError
from tests.support.histories import IN_FORCE

MEBIBYTE = 2**20


def with_data(folder: Path, tokens: int, **data: int) -> tuple[Settings, Path]:
    splits = {"train": {"tokens": 10**9}, "val": {"tokens": tokens}, "holdout": {"tokens": 9}}
    (folder / "manifest.json").write_text(json.dumps({"splits": splits}))
    assert IN_FORCE.data is not None
    return IN_FORCE.model_copy(update={"data": IN_FORCE.data.model_copy(update=data)}), folder


def test_the_shipped_task_takes_what_was_measured() -> None:
    cost = score_cost(774, 256, 1024, checks=1)
    assert (774 + 580) * 256 * 1024 * 4 == cost.logits_bytes
    assert 4 < cost.seconds < 6
    assert cost.memory_bytes < 256 * MEBIBYTE


def test_memory_is_bounded_by_one_row_where_a_batch_is_larger() -> None:
    assert score_cost(1024, 256, 65_535, checks=0).memory_bytes < 500 * MEBIBYTE
    assert score_cost(1024, 2048, 65_535, checks=0).memory_bytes > 2048 * MEBIBYTE


def test_each_check_box_costs_its_rows() -> None:
    none, one, four = (score_cost(1024, 256, 1024, checks=n).seconds for n in (0, 1, 4))
    assert pytest.approx(4 * (one - none)) == four - none


def test_what_fits_is_said(tmp_path: Path) -> None:
    cost = cost_of_data(*with_data(tmp_path, 200_000))
    assert cost is not None
    assert "GB of logits" in cost.words


@pytest.mark.parametrize(
    ("tokens", "data", "words", "hint"),
    [
        (200_000, {"vocab_size": 65_535, "context": 2048}, "memory under [scoring]", "vocab_size"),
        (50_000_000, {}, "memory under [scoring]", "rows"),
        (25_000_000, {}, "wall_seconds under [scoring]", "rows"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_names_of_the_settings(
    tmp_path: Path, tokens: int, data: dict[str, int], words: str, hint: str
) -> None:
    with pytest.raises(UsageError) as refusal:
        cost_of_data(*with_data(tmp_path, tokens, **data))
    assert words in refusal.value.message
    assert hint in refusal.value.hint


def test_data_that_is_no_text_has_no_such_cost(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"splits": {"val": {"images": 5}}}))
    assert cost_of_data(IN_FORCE, tmp_path) is None
