"""How the report is rendered: templates, numbers in words, policy.

Every value is escaped on its way into a page, by jinja's autoescape or by `for_markdown`; what is
marked as safe here is made of numbers or was rendered from our own templates.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from agent.report.summary import Summary
from agent.text import fenced, for_markdown, in_words, one_line

_TEMPLATES = Path(__file__).parent / "templates"
MOST_TEXT_BYTES = 60_000
MAX_LINE_CHARS = 400
MAX_ROWS = 12
_SCRIPTS = ("report.js", "compare.js", "colours.js")
_MARKDOWN_CHARS = 600
_MAX_FACTS = 40
_MANY = 100
"""So many times the noise say nothing that one more would not say, and leave no room."""
_FRACTION = re.compile(r"-?\d+\.\d+(e-?\d+)?")
_SIGNS = re.compile(r"[_·\s]+")


def page_policy(*, is_live: bool) -> str:
    """Only our very style and our very scripts; nothing from anywhere, nothing injected."""
    own = " ".join(map(_source, _scripts(is_live=is_live)))
    asking = "connect-src 'self'; " if is_live else ""
    return (
        f"default-src 'none'; style-src {_source(_asset('report.css'))}; script-src {own}; "
        f"{asking}base-uri 'none'; form-action 'none'"
    )


def _facts_line(evidence: Mapping[str, Any]) -> str:
    """Named facts in one line, their numbers short; what did not happen is left out."""
    found = ((n, fact) for n, fact in flat(evidence, "") if fact not in ("null", "false", "[]"))
    facts = (f"{_SIGNS.sub(' ', name)} {_short(fact)}" for name, fact in found)
    return one_line(" · ".join(islice(facts, _MAX_FACTS)), MAX_LINE_CHARS)


def _short(fact: str) -> str:
    return f"{float(fact):.4g}" if _FRACTION.fullmatch(fact) else fact


def flat(value: object, name: str) -> Iterator[tuple[str, str]]:
    """Names and texts of everything inside a value."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{name} · {key}" if name else str(key))
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def whole_page(
    parts: Mapping[str, str],
    attempts: Mapping[int, str],
    numbers: Summary,
    *,
    version: int | None = None,
    now: datetime | None = None,
) -> str:
    """The page around its parts; with a version, one that asks its server for what came after."""
    is_live = version is not None
    return template("report.html").render(
        style=_asset("report.css"),
        scripts=_scripts(is_live=is_live),
        policy=page_policy(is_live=is_live),
        version=version,
        now_seconds=now.timestamp() if now else None,
        summary=numbers,
        parts={name: Markup(text) for name, text in parts.items()},  # noqa: S704 - ours, escaped
        attempts=[Markup(text) for text in attempts.values()],  # noqa: S704 - ours, escaped
    )


def _scripts(*, is_live: bool) -> list[str]:
    return [_asset(name) for name in (*_SCRIPTS, *(("live.js",) if is_live else ()))]


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


@cache
def template(name: str) -> Template:
    """A template of ours by its file's name."""
    is_markdown = name.endswith(".md")
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=not is_markdown,  # noqa: S701 - Markdown has an escaping of its own
        finalize=_markdown if is_markdown else None,
        undefined=StrictUndefined,  # a name that nobody gives is a fault, not an empty place
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "line": one_line,
        "reason": in_words,
        "json": partial(json.dumps, ensure_ascii=False),
        "facts": _facts_line,
        "fenced": lambda lines: Markup(fenced("\n".join(lines), MOST_TEXT_BYTES)),  # noqa: S704
    } | {name: _trusted(shown) for name, shown in _NUMBERS.items()}
    environment.globals["max_rows"] = MAX_ROWS
    return environment.get_template(name)


def _markdown(value: object) -> object:
    """Every value in the Markdown is escaped, but for what our own filters made of numbers."""
    is_ours = isinstance(value, Markup | int)
    return value if is_ours else for_markdown(str(value), _MARKDOWN_CHARS)


def _trusted(shown: Callable[[Any], str]) -> Callable[[Any], Markup]:
    return lambda number: Markup(shown(number))  # noqa: S704 - made of a number alone


def _signed(number: float) -> str:
    return f"{number:+.4f}".replace("-", "\u2212")


def _times(number: float) -> str:
    """So many times the noise, with its sign where it is below it."""
    sign = "\u2212" if number < 0 else ""
    return sign + (f"{abs(number):.1f}" if abs(number) < _MANY else f">{_MANY}")


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours and not minutes:
        return f"{hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _size(count_bytes: int) -> str:
    if count_bytes < 1024:
        return f"{count_bytes} B"
    power = min(3, int(math.log(count_bytes, 1024)))
    return f"{count_bytes / 1024**power:.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"


_NUMBERS: dict[str, Callable[[Any], str]] = {
    "value": lambda number: f"{number:.4f}",
    "short": lambda number: f"{number:.3g}",
    "signed": _signed,
    "times": _times,
    "share": lambda number: f"{number:.0%}",
    "cores": lambda number: f"{number:.2f}",
    "count": lambda number: f"{number:,}",
    "usd": lambda number: f"${number:.2f}",
    "duration": duration,
    "size": _size,
}
