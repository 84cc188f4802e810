"""What docs/ledger.md and the schema say of the ledger is what is written."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest

from agent.record.chain import LEDGER_NAME, canonical
from agent.record.events import (
    SCHEMA_VERSION,
    Entry,
    Event,
)
from tests.support import histories
from tests.support.sessions import sampled, talked

DOCS = Path(__file__).parents[3] / "docs"
PAGE, SCHEMA = DOCS / "ledger.md", DOCS / "ledger.schema.json"
OPEN = "<!-- events: made by tests/agent/record/test_schema.py --update-golden -->\n"
CLOSE = "<!-- /events -->"


def schema() -> dict[str, Any]:
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"A line of nightlab's ledger, version {SCHEMA_VERSION}",
        **{k: v for k, v in Entry.model_json_schema(by_alias=False).items() if k != "title"},
    }


def events() -> Iterator[str]:
    yield "| event | what it says |\n|---|---|\n"
    for event in get_args(get_args(Event)[0]):
        words = inspect.cleandoc(event.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        yield f"| `{event.model_fields['type'].default}` | {words} |\n"


def test_the_schema_is_the_one_of_the_code(pytestconfig: pytest.Config) -> None:
    made = json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"
    if pytestconfig.getoption("--update-golden"):
        SCHEMA.write_text(made, encoding="utf-8")
    assert made == SCHEMA.read_text(encoding="utf-8")


def test_every_event_is_in_the_documentation(pytestconfig: pytest.Config) -> None:
    before, rest = PAGE.read_text(encoding="utf-8").split(OPEN)
    shown, after = rest.split(CLOSE)
    made = "".join(events())
    if pytestconfig.getoption("--update-golden"):
        PAGE.write_text(before + OPEN + made + CLOSE + after, encoding="utf-8")
        shown = made
    assert made == shown


def test_every_event_says_what_it_is() -> None:
    for event in get_args(get_args(Event)[0]):
        assert event.__doc__, event
        assert event.__doc__ != Entry.__doc__


def test_real_ledgers_fit_the_schema(tmp_path: Path) -> None:
    for name, make in (("night", sampled), ("talk", talked)):
        (tmp_path / name).mkdir()
        lines = (make(tmp_path / name).directory / LEDGER_NAME).read_text(encoding="utf-8")
        fit(lines.splitlines())
    fit([canonical(e.model_dump(mode="json")) for e in histories.night(12).entries])


def test_what_is_no_event_does_not_fit() -> None:
    line = histories.night(1).entries[0].model_dump(mode="json")
    line["event"]["surprise"] = 1
    with pytest.raises(jsonschema.ValidationError):
        fit([canonical(line)])


def fit(lines: list[str]) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    for line in lines:
        validator.validate(json.loads(line))
