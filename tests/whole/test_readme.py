"""README and architecture show the house as it is: its folders, then every module."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.settings import Goal, WorkspaceSettings

ROOT = Path(__file__).parents[2]
README, ARCHITECTURE = ROOT / "README.md", ROOT / "docs" / "architecture.md"
OPEN = "<!-- {name}: made by tests/whole/test_readme.py --update-golden -->\n"
CLOSE = "<!-- /{name} -->"
MOST_LINES = 200
WORDS_OF_A_LINE = 10
LINES_A_MINUTE, MINUTES_OFF = 30, 2
PRODUCT = ("agent", "sandbox")
OTHERS = {
    "workspace/": "What an experiment is made of: train.py, prepare.py, evaluate.py.",
    "tests/": "Claims about all of it.",
    "  agent/ sandbox/": "Mirror the two trees; hostile programs lie in cases/.",
    "  workspace/": "The same; ways to cheat lie in cheats/.",
    "  whole/": "Whole nights, crashes, the wheel, this page.",
    "  bench/": "Benchmarks and studies; run by hand.",
    "  support/": "Servers, stand-ins and tasks that tests share.",
    "docs/": "By what you want to do; decisions/ says why.",
    "program.md": "The person's file: prose and settings.",
    "Dockerfile.train": "The box: a base image, torch, a user who is nobody.",
}


def first_line(module: Path) -> str:
    return (ast.get_docstring(ast.parse(module.read_text())) or "").splitlines()[0]


def rooms(package: Path) -> list[Path]:
    return sorted(path.parent for path in package.glob("*/__init__.py"))


def modules(package: Path) -> list[Path]:
    return sorted(path for path in package.glob("*.py") if path.name != "__init__.py")


def folders() -> Iterator[str]:
    """The tree of the README: folders first, then what lies beside them."""
    for name in PRODUCT:
        package = ROOT / name
        yield f"{name + '/':<20}{first_line(package / '__init__.py')}"
        for room in rooms(package):
            yield f"  {room.name + '/':<18}{first_line(room / '__init__.py')}"
        for module in modules(package):
            yield f"  {module.name:<18}{first_line(module)}"
    for name, words in OTHERS.items():
        yield f"{name:<20}{words}"


def every_module() -> Iterator[str]:
    """The list at the end of the architecture page: room by room, module by module."""
    packages = [ROOT / name for name in PRODUCT]
    for place in [p for package in packages for p in (package, *rooms(package))]:
        yield f"{place.relative_to(ROOT)}/"
        for module in modules(place):
            yield f"  {module.name:<20}{first_line(module)}"
    yield "workspace/"
    for module in modules(ROOT / "workspace"):
        yield f"  {module.name:<20}{first_line(module)}"


@pytest.mark.parametrize(
    ("page", "name", "lines"),
    [(README, "tree", list(folders())), (ARCHITECTURE, "modules", list(every_module()))],
    ids=["readme", "architecture"],
)
def test_a_page_shows_what_is_there(
    pytestconfig: pytest.Config, page: Path, name: str, lines: list[str]
) -> None:
    opening, closing = OPEN.format(name=name), CLOSE.format(name=name)
    block = "```\n" + "\n".join(line.rstrip() for line in lines) + "\n```\n"
    before, rest = page.read_text().split(opening)
    shown, after = rest.split(closing)
    if pytestconfig.getoption("--update-golden"):
        page.write_text(before + opening + block + closing + after)
        shown = block

    assert block == shown


def test_the_readme_stays_short() -> None:
    assert len(README.read_text().splitlines()) <= MOST_LINES


def test_the_readme_s_settings_for_a_repository_are_settings() -> None:
    section = README.read_text().split("\n## A repository of your own\n")[1]
    tables = tomllib.loads(section.split("```toml\n")[1].split("```")[0])

    assert {"goal", "workspace"} == set(tables)
    assert Goal.model_validate(tables["goal"]).is_reported
    assert "." == WorkspaceSettings.model_validate(tables["workspace"]).path


def test_the_main_path_takes_the_time_that_the_page_says() -> None:
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", ARCHITECTURE.read_text(), re.MULTILINE)
    takes = {name: len((ROOT / name).read_text().splitlines()) / LINES_A_MINUTE for name, _ in rows}

    assert 7 == len(rows)
    assert {} == {
        name: round(takes[name])
        for name, minutes in rows
        if abs(takes[name] - int(minutes)) > MINUTES_OFF
    }


def test_every_room_has_its_paragraph() -> None:
    page = ARCHITECTURE.read_text()
    names = {str(room.relative_to(ROOT)) for f in PRODUCT for room in rooms(ROOT / f)}

    assert names == set(re.findall(r"^\*\*`(\w+/\w+)/`\*\*", page, re.MULTILINE))


@pytest.mark.parametrize(
    "module",
    [p for f in PRODUCT for p in sorted((ROOT / f).rglob("*.py"))],
    ids=lambda path: f"{path.parent.name}.{path.stem}",
)
def test_a_module_says_in_ten_words_what_it_is_for(module: Path) -> None:
    line = first_line(module)

    assert line.endswith((".", ":"))
    assert len(line.split()) <= WORDS_OF_A_LINE
