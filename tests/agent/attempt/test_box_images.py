"""Which image each box of a trial runs on."""

from __future__ import annotations

import pytest

from agent.attempt.boxes import image_of
from sandbox.contract.run import Box

COPIES = {"model": "sha256:1", "check": "sha256:2"}


@pytest.mark.parametrize(
    ("box", "run_id", "image"),
    [
        ("train", "night-3-7-1", "sha256:0"),
        ("scorer", "night-3-7-2-scorer", "sha256:0"),
        ("model", "night-3-7-2-model", "sha256:1"),
        ("model", "night-smoke-2", "sha256:1"),
        ("model", "night-3-7-2-check-1", "sha256:2"),
        ("model", "night-3-7-2-check-12", "sha256:2"),
        ("train", "night-check-1", "sha256:0"),
    ],
)
def test_boxes_that_see_rows_have_files_of_their_own_by_what_they_are_for(
    box: Box, run_id: str, image: str
) -> None:
    assert image == image_of(box, run_id, "sha256:0", COPIES)
