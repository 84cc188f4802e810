"""Receiving output: only plain new files under one directory, within bounds."""

from __future__ import annotations

import hashlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.box.files import OutputReceiver, OutputRefused, output_name_parts
from sandbox.contract.errors import SandboxError
from sandbox.contract.run import OutputFile


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[OutputReceiver]:
    receiver = OutputReceiver(tmp_path, max_bytes=100, max_files=2)
    yield receiver
    receiver.close()


def test_a_file_in_pieces_arrives_whole(receiver: OutputReceiver, tmp_path: Path) -> None:
    receiver.begin("model/weights.bin", 6)
    receiver.add(b"abc")
    receiver.add(b"def")
    digest = hashlib.sha256(b"abcdef").hexdigest()
    expected = (OutputFile(name="model/weights.bin", bytes=6, sha256=digest),)
    assert expected == receiver.finish()
    assert b"abcdef" == (tmp_path / "model" / "weights.bin").read_bytes()


def test_an_empty_file_arrives(receiver: OutputReceiver, tmp_path: Path) -> None:
    receiver.begin("empty", 0)
    assert ["empty"] == [file.name for file in receiver.finish()]
    assert b"" == (tmp_path / "empty").read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../x", "/x", "a/../b", "a//b", ".git/config", "a\n", "a\0", "-x", "a b"),
        *("é", "x" * 101, "a/b/c/d/e"),
    ],
)
def test_a_name_that_is_not_plain_is_refused(receiver: OutputReceiver, name: str) -> None:
    with pytest.raises(OutputRefused):
        receiver.begin(name, 1)


@given(st.text(max_size=20))
def test_an_accepted_name_never_leaves_the_directory(name: str) -> None:
    try:
        parts = output_name_parts(name)
    except OutputRefused:
        return
    root = Path("/root/of/output")
    assert root.joinpath(*parts).is_relative_to(root)
    assert not {"", ".", ".."} & set(parts)


@pytest.mark.parametrize("size", [101, -1])
def test_a_file_beyond_the_bytes_is_refused(receiver: OutputReceiver, size: int) -> None:
    with pytest.raises(OutputRefused):
        receiver.begin("big", size)


def test_the_bytes_of_all_files_count_together(receiver: OutputReceiver) -> None:
    receiver.begin("first", 60)
    receiver.add(b"x" * 60)
    with pytest.raises(OutputRefused):
        receiver.begin("second", 41)


def test_one_file_too_many_is_refused(receiver: OutputReceiver) -> None:
    receiver.begin("first", 0)
    receiver.begin("second", 0)
    with pytest.raises(OutputRefused):
        receiver.begin("third", 0)


def test_more_bytes_than_announced_are_refused(receiver: OutputReceiver) -> None:
    receiver.begin("small", 1)
    with pytest.raises(OutputRefused):
        receiver.add(b"xy")


def test_an_incomplete_file_is_no_output(receiver: OutputReceiver) -> None:
    receiver.begin("half", 2)
    receiver.add(b"x")
    with pytest.raises(OutputRefused):
        receiver.finish()


def test_an_existing_file_is_not_replaced(receiver: OutputReceiver) -> None:
    receiver.begin("same", 0)
    with pytest.raises(OutputRefused):
        receiver.begin("same", 0)


def test_a_link_planted_on_the_host_is_not_followed(
    receiver: OutputReceiver, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (tmp_path / "folder").symlink_to(outside)
    (tmp_path / "file").symlink_to(outside / "target")
    for name in ("folder/x", "file"):
        with pytest.raises(OutputRefused):
            receiver.begin(name, 0)
    assert [] == list(outside.iterdir())


def test_output_that_nobody_asked_for_is_refused() -> None:
    with pytest.raises(OutputRefused):
        OutputReceiver(None, max_bytes=1, max_files=1).begin("x", 0)


def test_a_directory_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    with pytest.raises(SandboxError, match="not empty"):
        OutputReceiver(tmp_path, max_bytes=1, max_files=1)


def test_an_output_directory_that_is_not_there_is_our_error(tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match=r"cannot be used: .*none: No such file") as refusal:
        OutputReceiver(tmp_path / "none", max_bytes=1, max_files=1)
    assert "" != refusal.value.hint


def test_a_host_without_file_descriptors_is_not_called_a_bad_name(
    receiver: OutputReceiver,
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            receiver.begin("a", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
