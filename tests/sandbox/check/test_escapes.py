"""Installed versions against the known ways out of a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox.check.escapes import (
    Component,
    driver_version,
    is_fixed,
    known_escapes,
    nvidia_components,
    version_rows,
)

NAMES = ("runc", "engine", "kernel", "cgroup", "nvidia-container-toolkit", "nvidia-driver")


def standing(escape: str, name: str, version: str, package: str = "") -> str:
    """Return how a version stands to one known way out."""
    rows = version_rows((Component(name=name, version=version, package=package),))
    (row,) = (row for row in rows if row.escape.startswith(escape))
    return row.standing


@pytest.mark.parametrize(
    ("escape", "name", "bad", "good"),
    [
        ("CVE-2025-31133", "runc", "1.1.15", "1.2.8"),
        ("CVE-2025-31133", "runc", "1.3.2", "1.3.3"),
        ("CVE-2025-31133", "runc", "1.2.7", "1.4.0"),
        ("CVE-2026-41579", "runc", "1.3.5", "1.3.6"),
        ("CVE-2026-41579", "runc", "1.4.2", "1.5.0"),
        ("CVE-2022-0847", "kernel", "5.10.101", "5.10.102"),
        ("CVE-2022-0847", "kernel", "5.16.10", "5.15.25"),
        ("CVE-2022-0847", "kernel", "5.8.1", "5.4.200"),
        ("CVE-2022-0847", "kernel", "5.14.0", "6.18.44"),
        ("CVE-2024-0132", "nvidia-container-toolkit", "1.16.1", "1.16.2"),
        ("CVE-2024-0135", "nvidia-container-toolkit", "1.17.2", "1.17.3"),
        ("CVE-2025-23359", "nvidia-container-toolkit", "1.17.3", "1.17.4"),
        ("CVE-2025-23266", "nvidia-container-toolkit", "1.17.7", "1.18.0"),
    ],
)
def test_a_version_before_the_fix_is_not_ok_and_one_after_it_is(
    escape: str, name: str, bad: str, good: str
) -> None:
    assert "ok" != standing(escape, name, bad)
    assert "ok" == standing(escape, name, good)


def test_what_needs_only_a_process_gives_way_and_what_needs_an_image_warns() -> None:
    assert "gave way" == standing("CVE-2022-0847", "kernel", "5.14.0")
    assert "warning" == standing("CVE-2025-31133", "runc", "1.1.15")


def test_a_distribution_s_number_is_never_a_verdict() -> None:
    assert "warning" == standing("CVE-2022-0847", "kernel", "5.15.0-91-generic")


@pytest.mark.parametrize("name", ["nvidia-container-toolkit", "nvidia-driver"])
def test_where_no_fix_is_on_record_the_version_is_a_warning(name: str) -> None:
    rows = version_rows((Component(name=name, version="999.0", package=""),))
    assert ["warning"] == [row.standing for row in rows if row.standing != "ok"]


@pytest.mark.parametrize("version", ["", "unknown"])
def test_a_version_that_cannot_be_read_is_not_ok(version: str) -> None:
    assert not is_fixed(version, ("1.0",))
    assert "ok" != standing("CVE-2022-0847", "kernel", version)


@pytest.mark.parametrize("name", NAMES)
def test_every_part_that_a_box_rests_on_has_its_known_ways_out(name: str) -> None:
    assert name in {escape.component for escape in known_escapes()}


def test_cgroup_version_1_is_named_and_avoided() -> None:
    rows = version_rows((Component(name="cgroup", version="version 1, cgroupfs", package=""),))
    assert ["ok"] == [row.standing for row in rows]
    assert "a box has neither" in rows[0].words


def test_the_installed_toolkit_s_version_is_asked_of_itself(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-ctk"
    program.write_text("#!/bin/sh\necho NVIDIA Container Toolkit CLI version 1.17.4\n")
    program.chmod(0o755)
    parts = {part.name: part.version for part in nvidia_components({"PATH": str(tmp_path)})}
    assert "1.17.4" == parts["nvidia-container-toolkit"]


def test_without_a_toolkit_there_is_no_row_for_one() -> None:
    parts = {part.name for part in nvidia_components({"PATH": "/nowhere"})}
    assert "nvidia-container-toolkit" not in parts


def test_the_driver_s_version_is_read_from_its_own_line() -> None:
    line = (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.144.03  Mon Dec 30 17:44:08 UTC 2024"
    )
    assert "550.144.03" == driver_version(line)
    assert "unknown" == driver_version("")
