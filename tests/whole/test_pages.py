"""Every path, command, flag, setting and link that a page names is there."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic.fields import FieldInfo
from typer.main import get_command

from agent.cli.app import app
from agent.cli.night import exit_code
from agent.record.events import StopReason
from agent.settings import Section, Settings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
GONE = re.compile(r"\n### Removed\n.*?(?=\n##|\Z)", re.DOTALL)
"""What the changelog says is gone need not be there."""
SOURCES = ("agent", "sandbox", "tests", "workspace", "docs", ".ci")
PLACEHOLDER = re.compile(r"NNNN|…")
OPEN = "<!-- commands: made by tests/whole/test_pages.py --update-golden -->\n"
CLOSE = "<!-- /commands -->"

ROOT_COMMAND: Any = get_command(app)


def text_of(page: Path) -> str:
    return GONE.sub("", page.read_text())


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^(`{3,})[^\n]*\n.*?^\1$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def code(page: Path) -> list[str]:
    """What a page sets as code: words in backticks, and the lines of its blocks."""
    blocks = re.findall(r"^(`{3,})[^\n]*\n(.*?)^\1$", text_of(page), re.DOTALL | re.MULTILINE)
    lines = [line for _, block in blocks for line in block.splitlines()]
    return [*re.findall(r"`([^`\n]+)`", prose(page)), *lines]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    words = re.sub(r"`|\[|\]|\([^)]*\.md[^)]*\)", "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


@cache
def every_file() -> list[str]:
    """Each file that a page may name, from the top of the repository."""
    files = [*ROOT.glob("*.*"), *(p for top in SOURCES for p in (ROOT / top).rglob("*.*"))]
    return [f"/{path.relative_to(ROOT)}" for path in files]


pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pages
def test_every_path_in_code_exists(page: Path) -> None:
    missing = set()
    for words in code(page):
        for path in re.findall(r"(?<![\w/.~$-])(?:" + "|".join(SOURCES) + r")/[\w./*…-]*", words):
            wanted = path.rstrip(".…")
            if PLACEHOLDER.search(wanted) or wanted.startswith("workspace/train."):
                continue
            if not any(ROOT.glob(wanted.rstrip("/."))):
                missing.add(path)

    assert set() == missing


@pages
def test_every_module_test_and_decision_named_exists(page: Path) -> None:
    there = every_file()
    named = set(re.findall(r"`((?:[\w]+/)*(?:test_\w+|\w+)\.(?:py|sh|toml|lock))`", prose(page)))
    unknown = {name for name in named if not any(path.endswith(f"/{name}") for path in there)}
    decisions = set(re.findall(r"decisions/(\d{4})", text_of(page)))
    known = {path.name[:4] for path in (DOCS / "decisions").glob("*.md")}

    assert set() == unknown - {"ledger.lock", "packages.lock", "uv.lock", "setup.py"}
    assert set() == decisions - known


@pages
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = set()
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
        if not target.exists() or (anchor and anchor not in map(slug, headings)):
            broken.add(link)

    assert set() == broken


@pages
def test_every_make_target_exists(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
    named = {name for words in code(page) for name in re.findall(r"\bmake ([a-z0-9-]+)", words)}

    assert set() == named - targets - {"a", "room"}


@pages
def test_every_module_run_by_python_exists(page: Path) -> None:
    named = {m for words in code(page) for m in re.findall(r"python3? -m ([a-z0-9_.]+)", words)}
    ours = {name for name in named if name.split(".")[0] in SOURCES}

    assert set() == {n for n in ours if not any(ROOT.glob(n.replace(".", "/") + "*"))}


def calls(words: str) -> Iterator[tuple[list[str], list[str]]]:
    """The commands of nightlab that a piece of code calls: words and flags of each."""
    for line in re.findall(r"(?:^|&&|[;|$])\s*nightlab ([a-z][^#|&;`]*)", words):
        argv = line.partition(" -- ")[0].split()
        yield [w for w in argv if not w.startswith("-")], [w for w in argv if w.startswith("--")]


@pages
def test_every_command_and_flag_exists(page: Path) -> None:
    wrong = set()
    for words in code(page):
        for named, flags in calls(words):
            command = ROOT_COMMAND
            while named and hasattr(command, "commands"):
                command = command.commands.get(named.pop(0))
            if command is None:
                wrong.add(words)
                continue
            known = {opt for p in command.params for opt in (*p.opts, *p.secondary_opts)}
            given = {flag.partition("=")[0].rstrip(".,:…)") for flag in flags}
            if given - known - {"--help"}:
                wrong.add(words)

    assert set() == wrong


def settings_page() -> dict[str, dict[str, str]]:
    """For each section the settings that the page names, with what holds without each."""
    found: dict[str, dict[str, str]] = {}
    for part in (DOCS / "settings.md").read_text().split("\n## [")[1:]:
        name, _, body = part.partition("]")
        rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", body, re.MULTILINE)
        found[name] = {key: without.strip("`") for key, without in rows}
    return found


def without_it(field: FieldInfo) -> str:
    """What holds where a setting is left out, in the page's words."""
    if field.is_required():
        return "must stand"
    return "none" if field.default is None else json.dumps(field.default)


def sections() -> dict[str, type[Section]]:
    """Each section of the settings, by its name in program.md."""
    kinds = {kind.__name__: kind for kind in Section.__subclasses__()}
    named = {
        name: re.findall(r"\w+", str(f.annotation)) for name, f in Settings.model_fields.items()
    }
    return {
        name: next(kinds[word] for word in words if word in kinds) for name, words in named.items()
    }


def test_the_settings_page_has_every_setting_and_its_default() -> None:
    expected = {
        name: {field.alias or key: without_it(field) for key, field in kind.model_fields.items()}
        for name, kind in sections().items()
    }

    assert expected == settings_page()


def test_every_setting_has_a_line_in_the_shipped_program() -> None:
    shipped = (ROOT / "program.md").read_text().split("```toml\n")[1].split("```")[0]
    lines: dict[str, set[str]] = {}
    for line in shipped.splitlines():
        if section := re.match(r"\[(\w+)\]", line):
            lines[section[1]] = set()
        elif setting := re.match(r"(?:# )?(\w+) = ", line):
            lines[list(lines)[-1]].add(setting[1])

    assert {name: set(rows) for name, rows in settings_page().items()} == lines


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [one for several in project["optional-dependencies"].values() for one in several]
    names = {re.split(r"[\[>=<~]", one)[0] for one in (*project["dependencies"], *extras)}
    table = (ROOT / "CONTRIBUTING.md").read_text().split("\n## Dependencies")[1]
    told = set(re.findall(r"[\w-]+", " ".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))))

    assert set() == names - told


def described(name: str, command: Any) -> Iterator[str]:
    """One command as the page shows it."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    usage = " ".join(["nightlab", name, *map(shown, arguments)])
    yield f"## {name}\n\n`{usage}`: {' '.join((command.help or '').split())}\n\n"
    for option in options:
        flag = option.opts[0] if option.is_flag else f"{option.opts[0]} …"
        yield f"- `{flag}`: {option.help}\n"
    yield "\n" if options else ""


def shown(argument: Any) -> str:
    """An argument in the line that says how a command is called."""
    word = argument.name.upper()
    if argument.nargs == -1:
        return f"-- {word}…"
    return word if argument.required else f"[{word}]"


def every_command() -> Iterator[str]:
    for name, command in ROOT_COMMAND.commands.items():
        if not hasattr(command, "commands"):
            yield from described(name, command)
            continue
        for below, one in command.commands.items():
            yield from described(f"{name} {below}", one)


def test_the_commands_page_has_every_command_and_flag(pytestconfig: pytest.Config) -> None:
    page = DOCS / "commands.md"
    block = "".join(every_command())
    before, rest = page.read_text().split(OPEN)
    shown, after = rest.split(CLOSE)
    if pytestconfig.getoption("--update-golden"):
        page.write_text(before + OPEN + block + CLOSE + after)
        shown = block

    assert block == shown


def test_every_reason_for_an_ending_is_explained_with_its_exit_code() -> None:
    page = (DOCS / "troubleshooting.md").read_text()
    section = page.split("\n## How a session ends\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?`) \| (\d) \|", section, re.MULTILINE)
    told = {name: int(code) for names, code in rows for name in re.findall(r"`(\w+)`", names)}

    assert {reason.value: exit_code(reason) for reason in StopReason} == told
