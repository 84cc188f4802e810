"""What the layout of the repository promises, counted.

A bound below is lowered whenever the code allows it; raising one takes a decision record.
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests.support.sources import ROOT, name_of, python_files

PRODUCT = ("agent", "sandbox", "workspace")
PRODUCT_LINES = 36_500
HOURS_PATH = (
    "sandbox/contract/run.py",
    "sandbox/box/hardening.py",
    "sandbox/box/executor.py",
    "agent/night/loop.py",
    "agent/attempt/experiment.py",
    "agent/attempt/judge.py",
    "agent/record/ledger.py",
)
"""What a newcomer reads in an hour."""
HOURS_PATH_LINES = 1_910
MODULES_OF_A_FOLDER = 12
LINES_OF_A_CLASS = 250
LINES_OF_A_FUNCTION = 60
SHIPPED = ("supervisor.py", "probes.py", "evaluate.py", "train.py", "prepare.py")
"""Each is sent into a box, or to a person, as one file, and cannot import its words from us."""


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def defined(*kinds: type[ast.stmt]) -> Iterator[tuple[Path, str, int]]:
    """Each class or function of the product: where it is, its name and its lines."""
    for path in python_files(*PRODUCT):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kinds):
                assert isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                yield path, node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def test_the_product_is_no_longer_than_it_was_bound_to_be() -> None:
    assert sum(lines_of(path) for path in python_files(*PRODUCT)) <= PRODUCT_LINES


def test_the_main_path_is_read_in_an_hour() -> None:
    assert sum(lines_of(ROOT / name) for name in HOURS_PATH) <= HOURS_PATH_LINES


def test_no_folder_holds_more_modules_than_one_sees_at_a_glance() -> None:
    modules = [path for path in python_files(*PRODUCT) if path.name != "__init__.py"]
    folders = Counter(name_of(path.parent) for path in modules)
    assert [] == [folder for folder, count in folders.items() if count > MODULES_OF_A_FOLDER]


def test_no_class_is_a_long_room() -> None:
    classes = defined(ast.ClassDef)
    assert [] == [(name, lines) for _, name, lines in classes if lines > LINES_OF_A_CLASS]


def test_no_function_is_longer_than_a_screen() -> None:
    functions = defined(ast.FunctionDef, ast.AsyncFunctionDef)
    assert [] == [(name, lines) for _, name, lines in functions if lines > LINES_OF_A_FUNCTION]


def test_no_class_s_name_stands_twice() -> None:
    places = defaultdict(list)
    for path, name, _ in defined(ast.ClassDef):
        if path.name not in SHIPPED:
            places[name].append(name_of(path))
    assert {} == {name: where for name, where in places.items() if len(where) > 1}
