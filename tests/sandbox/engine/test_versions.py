"""Versions that a box rests on: read from where each part tells its own."""

from __future__ import annotations

from pathlib import Path

from sandbox.engine.versions import nvidia_components, version_in


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
    assert "550.144.03" == version_in(line)
    assert "unknown" == version_in("")
