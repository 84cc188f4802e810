"""What the README says about the tree and the commands is what is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from agent.cli.app import app

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
OPEN = "<!-- tree: made by tests/whole/test_readme.py --update-golden -->\n"
CLOSE = "<!-- /tree -->"
WORDS_OF_A_LINE = 10
TOP_LEVEL = {
    "program.md": "the person's file: prose and settings",
    "Dockerfile.train": "the box: a base image, torch, a user who is nobody",
    "tests/": "claims about all of it; hostile programs in cases/",
}


def first_line(module: Path) -> str:
    return (ast.get_docstring(ast.parse(module.read_text())) or "").splitlines()[0]


def listing(folder: Path, indent: str = "  ") -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        if path.suffix == ".py" and path.name != "__init__.py":
            yield f"{indent + path.name:<22}{first_line(path)}"
        elif (path / "__init__.py").exists():
            yield f"{indent + path.name + '/':<22}{first_line(path / '__init__.py')}"
            yield from listing(path, indent + "  ")


def tree() -> Iterator[str]:
    for folder in ("agent", "sandbox", "workspace"):
        package = ROOT / folder / "__init__.py"
        summary = first_line(package) if package.exists() else "What an experiment is made of."
        yield f"{folder + '/':<22}{summary}"
        yield from listing(ROOT / folder)
    for name, words in TOP_LEVEL.items():
        yield f"{name:<22}{words}"


def test_the_readme_shows_the_tree_as_it_is(pytestconfig: pytest.Config) -> None:
    block = "```\n" + "\n".join(line.rstrip() for line in tree()) + "\n```\n"
    before, rest = README.read_text().split(OPEN)
    shown, after = rest.split(CLOSE)
    if pytestconfig.getoption("--update-golden"):
        README.write_text(before + OPEN + block + CLOSE + after)
        shown = block

    assert block == shown


@pytest.mark.parametrize(
    "module",
    [p for f in ("agent", "sandbox") for p in sorted((ROOT / f).rglob("*.py"))],
    ids=lambda path: f"{path.parent.name}.{path.stem}",
)
def test_a_module_says_in_ten_words_what_it_is_for(module: Path) -> None:
    line = first_line(module)

    assert line.endswith((".", ":"))
    assert len(line.split()) <= WORDS_OF_A_LINE


def test_every_command_is_in_the_readme() -> None:
    rows = [row for row in README.read_text().splitlines() if row.startswith("| `nightlab ")]
    told = {name for row in rows for name in re.findall(r"`(?:nightlab )?([a-z]+) ", row)}

    assert set(get_command(app).commands) == told  # type: ignore[attr-defined]
