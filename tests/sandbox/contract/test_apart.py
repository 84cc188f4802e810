"""Boxes of one score that would meet in a file or a user are refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from sandbox.contract.apart import Apart
from sandbox.contract.errors import SandboxError
from sandbox.contract.run import RunResult
from tests.support.boxes import box_spec


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "files" / "inner").mkdir(parents=True)
    (tmp_path / "files" / "inner" / "train.py").write_text("pass\n")
    return tmp_path / "files"


def test_copies_of_one_folder_are_apart(files: Path, tmp_path: Path) -> None:
    apart = Apart()
    for name in ("model", "check-1"):
        shutil.copytree(files, tmp_path / name)
        apart.begin(box_spec(mounts={tmp_path / name: "/workspace"}))


def test_a_number_that_came_free_and_is_given_again_is_another_file(
    files: Path, tmp_path: Path
) -> None:
    apart = Apart()
    for _ in range(3):
        shutil.copytree(files, tmp_path / "sees")
        apart.begin(box_spec(mounts={tmp_path / "sees": "/workspace"}))
        shutil.rmtree(tmp_path / "sees")


@pytest.mark.parametrize("below", [".", "inner", "inner/train.py"])
def test_a_second_box_on_a_file_or_folder_of_the_first_is_refused(files: Path, below: str) -> None:
    apart = Apart()
    apart.begin(box_spec(mounts={files: "/workspace"}))
    with pytest.raises(SandboxError, match="would see one file"):
        apart.begin(box_spec(mounts={files / below: "/checkpoint"}))


def test_a_file_with_two_names_is_refused(files: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    os.link(files / "inner" / "train.py", tmp_path / "copy" / "train.py")
    with pytest.raises(SandboxError, match=r"see one file: .*train\.py"):
        Apart().begin(box_spec(mounts={tmp_path / "copy": "/workspace"}))


def ended(user: int) -> RunResult:
    evidence: dict[str, Any] = {"evidence": {"container": {"proved": {"uids": [user] * 4}}}}
    return RunResult.model_construct(**evidence)


def test_two_boxes_that_had_one_user_are_refused() -> None:
    apart = Apart()
    apart.end(ended(2_000_000_001))
    apart.end(ended(2_000_000_002))
    with pytest.raises(SandboxError, match=r"one user: \{2000000001\}"):
        apart.end(ended(2_000_000_001))
