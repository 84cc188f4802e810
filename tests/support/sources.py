"""The repository's own modules, found on the disk."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
HOSTILE = ("tests/sandbox/box/cases/", "tests/workspace/cheats/")
"""Programs that run in boxes; some are no Python on purpose."""


def python_files(*folders: str) -> list[Path]:
    """The repository's own modules in these folders."""
    files = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    links = ("agent/template/",)  # to the workspace and others, which are counted where they lie
    return sorted(path for path in files if not name_of(path).startswith(HOSTILE + links))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()
