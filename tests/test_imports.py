"""Who imports whom: the contracts, each seen to break, and tests that stand alone."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.sources import ROOT, name_of, python_files

CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
VIOLATIONS = {
    "agent: a night reads from top to bottom": ("agent/text.py", "import agent.cli.app"),
    "sandbox: a box reads from top to bottom": (
        "sandbox/contract/run.py",
        "import sandbox.machine",
    ),
    "no circle inside a room": ("agent/record/events.py", "import agent.record.ledger"),
    "only machine and cli see more of the sandbox than its contract": (
        "agent/record/ledger.py",
        "import sandbox.engine.find",
    ),
    "sandbox never imports agent": ("sandbox/contract/errors.py", "import agent.text"),
    "agent never speaks to an engine": ("agent/text.py", "import docker"),
    "nothing on the host imports torch": ("agent/text.py", "import torch"),
}
"""For each contract, an import that it forbids and the module that does it."""


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


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources and their contracts, where a test may break them."""
    house = tmp_path_factory.mktemp("house")
    for path in python_files("agent", "sandbox"):
        (house / name_of(path)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, house / name_of(path))
    shutil.copy(ROOT / "pyproject.toml", house)
    return house


def broken_in(house: Path) -> set[str]:
    """The names of the contracts that the sources break."""
    lint = [str(Path(sys.executable).parent / "lint-imports"), "--no-logo"]
    done = subprocess.run(lint, cwd=house, capture_output=True, text=True, check=False)
    states = dict(re.findall(r"^(.+) (KEPT|BROKEN)$", done.stdout, re.MULTILINE))
    assert {contract["name"] for contract in CONTRACTS["contracts"]} == set(states), done.stdout
    return {name for name, state in states.items() if state == "BROKEN"}


def test_the_sources_keep_every_contract(house: Path) -> None:
    assert set() == broken_in(house)


@pytest.mark.parametrize("contract", [contract["name"] for contract in CONTRACTS["contracts"]])
def test_a_contract_breaks_when_it_is_violated(house: Path, contract: str) -> None:
    name, violation = VIOLATIONS[contract]
    module = house / name
    before = module.read_text()
    module.write_text(f"{before}\n{violation}\n")
    try:
        assert contract in broken_in(house)
    finally:
        module.write_text(before)


@pytest.mark.parametrize("package", ["agent", "sandbox"])
def test_a_room_that_no_contract_places_breaks_one(house: Path, package: str) -> None:
    room = house / package / "attic"
    room.mkdir()
    (room / "__init__.py").touch()
    try:
        assert [package] == [contract.split(":")[0] for contract in broken_in(house)]
    finally:
        shutil.rmtree(room)
