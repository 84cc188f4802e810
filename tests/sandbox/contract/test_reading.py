"""What a person names is read within a bound, whatever it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.machine.setup import image_recipe
from agent.program import load_program
from sandbox.contract.errors import UsageError
from sandbox.contract.reading import read_named
from sandbox.image.profiles import known_profiles

SHIPPED = Path(__file__).parents[3] / "program.md"


def test_a_plain_file_is_read_whole_also_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"whole")
    (tmp_path / "link").symlink_to("file")
    assert [b"whole"] * 2 == [read_named(tmp_path / name, 5) for name in ("file", "link")]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["/dev/zero", "/dev/urandom", "/dev/tty", "pipe", "link", "long"])
def test_what_has_no_end_is_refused_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "long").write_bytes(b"123456")
    # A process without a terminal cannot even open one.
    with pytest.raises((UsageError, OSError), match=r"not a plain file|larger than|No such device"):
        read_named(tmp_path / name, 5)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["Dockerfile.train", "profiles.toml"])
def test_nothing_beside_program_md_is_read_without_end(tmp_path: Path, name: str) -> None:
    settings = load_program(SHIPPED).settings
    image_recipe(settings, tmp_path)
    known_profiles(tmp_path)
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(UsageError, match=f"{name}: not a plain file"):
        image_recipe(settings, tmp_path)
