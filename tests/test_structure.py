"""What the layout of the repository promises, counted."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOSTILE = ("tests/sandbox/box/cases/", "tests/workspace/cheats/")
"""Programs that run in boxes; some are no Python on purpose."""


def python_files(*folders: str) -> list[Path]:
    """The repository's own modules in these folders."""
    files = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in files if not name_of(path).startswith(HOSTILE))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_by(path: Path) -> Iterator[str]:
    """The full names of what a module imports, also inside of its functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_of_a_test_module(imported: str) -> bool:
    parts = imported.split(".")
    return parts[0] == "tests" and any(p.startswith("test_") or p == "conftest" for p in parts)


@pytest.mark.parametrize("path", python_files("tests"), ids=name_of)
def test_nothing_imports_from_a_test_module(path: Path) -> None:
    """What tests share lies in tests/support: a test module can be read, moved or dropped alone."""
    assert [] == [name for name in imported_by(path) if is_of_a_test_module(name)]
