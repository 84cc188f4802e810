"""SECURITY.md names nothing that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "SECURITY.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| threat")
]


def test_every_test_and_module_named_exists() -> None:
    named = set(re.findall(r"`([\w/]+\.(?:py|json))`", PAGE))
    there = [
        f"/{path.relative_to(ROOT)}"
        for folder in ("tests", "sandbox", "workspace")
        for path in (ROOT / folder).rglob("*.*")
    ]
    assert {"test_executor.py", "causes.py"} <= named
    assert set() == {name for name in named if not any(p.endswith(f"/{name}") for p in there)}


def test_every_case_named_exists() -> None:
    named = set(re.findall(r"`case (\w+)`", PAGE))
    there = {path.name for path in (ROOT / "tests" / "sandbox" / "box" / "cases").iterdir()}
    assert len(named) > 30
    assert set() == named - there


def test_every_threat_is_stopped_and_tested_or_said_not_to_be() -> None:
    assert len(ROWS) >= 40
    for row in ROWS:
        threat, stopped, tested = row
        shown = re.search(r"`((?:\w+/)*test_\w+\.py|case \w+)`|by construction", tested)
        assert shown or "**not" in stopped, threat


def test_no_threat_stands_there_twice() -> None:
    assert len({row[0] for row in ROWS}) == len(ROWS)
