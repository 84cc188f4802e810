"""Nobody is kept from a report: axe-core finds nothing, everything open, at any width or scheme."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import browser as browsers
from tests.support import histories
from tests.support.browser import Browser
from tests.support.reports import render_html

WORDS = "Depth pays before width here.\n" + "A long line that has to scroll or to wrap. " * 20
CHECK = """axe.run({ exclude: [['[data-alike]']] }, { resultTypes: ['violations'] })
  .then((found) => JSON.stringify(%s))"""
OPEN = """(() => {
  const rows = [...document.querySelectorAll('.attempt')], step = rows.length > 100 ? 30 : 1;
  const shut = new Set(rows.filter((_, place) => place % step));
  for (const row of shut) row.dataset.alike = '';
  for (const one of document.querySelectorAll('details')) {
    one.open = !shut.has(one.closest('.attempt'));
  }
})()"""
SHOWN = """[...document.querySelectorAll('pre.diff:not(.coloured)')]
  .every((pre) => !pre.offsetHeight)"""
TOLD = "found.violations.map((one) => [one.id, one.nodes.map((node) => node.html)])"


@pytest.fixture(scope="module")
def axe() -> str:
    files = importlib.metadata.files("axe-core-python") or []
    (script,) = (file for file in files if file.name == "axe.min.js")
    return Path(str(script.locate())).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser(chromium: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(chromium, tmp_path_factory.mktemp("profile")) as made:
        yield made


@pytest.fixture(scope="module", params=[6, 300])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = histories.night(request.param, words=WORDS, log_lines=12)
    path = tmp_path_factory.mktemp("night") / "report.html"
    path.write_text(render_html(made.entries, made.get_blob), "utf-8")
    return path


def violations(browser: Browser, axe: str) -> list[tuple[str, list[str]]]:
    browser.run(f"{axe}; true")
    found: list[tuple[str, list[str]]] = json.loads(browser.run(CHECK % TOLD))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("is_dark", [False, True])
def test_axe_finds_nothing_with_every_row_open(
    browser: Browser,
    axe: str,
    page: Path,
    width: int,
    is_dark: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(browsers, "PATIENCE_SECONDS", 240.0)  # it looks at thousands of places
    browser.new_page()
    browser.resize(width, 900, is_phone=width < 500)
    browser.look(is_dark=is_dark)
    browser.open(page.as_uri())
    # Of three hundred every thirtieth is open and looked at: the others are made by its template.
    browser.run(OPEN)
    browser.wait_for(SHOWN)
    assert [] == violations(browser, axe)


@pytest.mark.slow
def test_axe_finds_what_is_wrong_with_a_page(browser: Browser, axe: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text("<html><p style='color: #bbb'>pale</p><input></html>", "utf-8")
    browser.new_page()
    browser.open(path.as_uri())
    assert {"color-contrast", "label"} <= {name for name, _ in violations(browser, axe)}
