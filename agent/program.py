"""Reads program.md: prose for the agent, settings for nightlab."""

import difflib
import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from agent.settings import ProgramError, Settings, reason_refused
from sandbox.contract.reading import MAX_TEXT_BYTES, read_named

FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*?)[ \t]*$")
TOML_HEADER = re.compile(r"^\s*\[{1,2}([^\[\]]+)\]{1,2}\s*(?:#.*)?$")
TOML_KEY = re.compile(r"^\s*([A-Za-z0-9_.\"' -]+?)\s*=")
TOML_PLACE = re.compile(r"\s*\(at (?:line (\d+), column \d+|end of document)\)$")


@dataclass(frozen=True)
class Program:
    """What a person asks for: words for the agent, settings for nightlab, the file itself."""

    prose: str
    settings: Settings
    source: bytes


@dataclass(frozen=True)
class Fence:
    """A fenced block: the indices of its two fences, and the language it names."""

    opens: int
    closes: int
    language: str


@dataclass(frozen=True)
class Block:
    """The toml block, and the line of program.md on which its first line stands."""

    text: str
    first_line: int


def load_program(path: Path) -> Program:
    """The program that `path` holds.

    Raises:
        ProgramError: the file is missing, or a setting is; the message names file and line.
    """
    beside = path.with_name("nightlab.md")
    try:
        source = read_named(path)
    except OSError as error:
        if path.name == "program.md" and beside.is_file():
            return load_program(beside)
        hint = "`nightlab init` puts one here to start from; --program names another"
        raise ProgramError(f"{path}: {error.strerror or 'cannot be read'}", hint) from None
    # Somebody's prose of that name is not ours: `nightlab init` puts settings beside it.
    if (
        path.name == "program.md"
        and beside.is_file()
        and not has_settings(source.decode("utf-8", "replace"))
    ):
        return load_program(beside)
    return parse_program(source, path.name)


def has_settings(text: str) -> bool:
    """Whether a text has a toml block, and so is a program and not prose alone."""
    return any(fence.language == "toml" for fence in _fences(text.splitlines()))


def parse_program(source: bytes, name: str) -> Program:
    """The program in `source`; `name` is what errors call the file.

    Raises:
        ProgramError: as `load_program`.
    """
    if len(source) > MAX_TEXT_BYTES:
        raise ProgramError(f"{name}: larger than 256 KiB", "keep to a few pages of prose")
    try:
        text = source.decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        line = source[: error.start].count(b"\n") + 1
        raise ProgramError(f"{name}:{line}: not UTF-8", "save the file as UTF-8") from None
    prose, block = _split(text, name)
    return Program(prose, _settings(block, name), source)


def _split(text: str, name: str) -> tuple[str, Block]:
    """Prose and the one toml block; other fenced blocks belong to the prose."""
    lines = text.splitlines()
    fences = [fence for fence in _fences(lines) if fence.language == "toml"]
    block = _only_block(lines, fences, name)
    prose = lines[: fences[0].opens] + lines[fences[0].closes + 1 :]
    return "\n".join(prose).strip() + "\n", block


def _fences(lines: list[str]) -> list[Fence]:
    """Every fenced block, as CommonMark closes them; one without an end reaches past the text."""
    found: list[Fence] = []
    mark, opens, language = "", 0, ""
    for index, line in enumerate(lines):
        match = FENCE.match(line)
        if match is None:
            continue
        if not mark:
            mark, opens, language = match[1], index, match[2].lower().partition(" ")[0]
        elif match[1].startswith(mark) and not match[2]:
            found.append(Fence(opens, index, language))
            mark = ""
    if mark:
        found.append(Fence(opens, len(lines), language))
    return found


def _only_block(lines: list[str], fences: list[Fence], name: str) -> Block:
    if not fences:
        hint = "`nightlab init` looks at this directory and writes settings into nightlab.md"
        raise ProgramError(f"{name}: holds no toml block", hint)
    if len(fences) > 1:
        hint = "put every setting into the first block"
        raise ProgramError(f"{name}:{fences[1].opens + 1}: a second toml block", hint)
    fence = fences[0]
    if fence.closes == len(lines):
        place = f"{name}:{fence.opens + 1}"
        raise ProgramError(f"{place}: the toml block has no end", "close it with a line ```")
    return Block("\n".join(lines[fence.opens + 1 : fence.closes]), fence.opens + 2)


def _settings(block: Block, name: str) -> Settings:
    try:
        tables = tomllib.loads(block.text)
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(error, block, name) from None
    try:
        return Settings.model_validate(tables)
    except ValidationError as error:
        lines = _key_lines(block)
        # All at once and not the first alone: a person mends them in one go.
        found = [_setting_error(detail, lines, name, block) for detail in error.errors()[:10]]
        raise ProgramError(
            "\n".join(message for message, _ in found),
            "\n".join(dict.fromkeys(hint for _, hint in found if hint)),
        ) from None


def _syntax_error(error: tomllib.TOMLDecodeError, block: Block, name: str) -> ProgramError:
    text = str(error)
    place = TOML_PLACE.search(text)
    inside = int(place[1]) if place and place[1] else len(block.text.splitlines())
    line = block.first_line + max(inside, 1) - 1
    message = f"{name}:{line}: not toml: {TOML_PLACE.sub('', text)}"
    return ProgramError(message, 'write name = value; texts stand in "quotes"')


def _key_lines(block: Block) -> dict[tuple[str, ...], int]:
    """Line of program.md on which each section and each key stands."""
    # tomllib keeps no places, and an error without its line sends a person searching.
    lines: dict[tuple[str, ...], int] = {}
    section: tuple[str, ...] = ()
    for number, line in enumerate(block.text.splitlines(), start=block.first_line):
        if header := TOML_HEADER.match(line):
            section = _dotted(header[1])
            lines.setdefault(section, number)
        elif key := TOML_KEY.match(line):
            lines.setdefault(section + _dotted(key[1]), number)
    return lines


def _dotted(key: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in key.split("."))


def _setting_error(
    detail: ErrorDetails, lines: dict[tuple[str, ...], int], name: str, block: Block
) -> tuple[str, str]:
    place = tuple(str(part) for part in detail["loc"][:2])
    line = lines.get(place) or lines.get(place[:1]) or block.first_line
    called = f"[{place[0]}]" + "".join(f" {key}" for key in place[1:])
    if detail["type"] == "extra_forbidden":
        problem, hint = "is not a setting", _nearest(place)
    elif detail["type"] == "missing":
        problem, hint = "is missing", _example(place)
    elif len(place) == 1:
        problem, hint = reason_refused(detail), ""
    else:
        given = json.dumps(detail["input"], default=str)[:80]
        problem, hint = f"= {given}: {reason_refused(detail)}", _example(place)
    return f"{name}:{line}: {called} {problem}", hint


def section_type(section: str) -> type[BaseModel]:
    """The model of a section, also of one that may be left out."""
    annotation = Settings.model_fields[section].annotation
    found = next(kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type))
    assert issubclass(found, BaseModel)
    return found


def _section_fields(section: str) -> dict[str, Any]:
    """Fields of a section by the name that stands in program.md."""
    annotation = section_type(section)
    return {field.alias or key: field for key, field in annotation.model_fields.items()}


def _nearest(place: tuple[str, ...]) -> str:
    known = list(Settings.model_fields) if len(place) == 1 else list(_section_fields(place[0]))
    close = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.4)
    if close:
        return f"did you mean {close[0]}?"
    return f"known here: {', '.join(known)}"


def _example(place: tuple[str, ...]) -> str:
    if place[0] not in Settings.model_fields:
        return ""
    fields = _section_fields(place[0])
    if len(place) == 1:
        missing = ", ".join(key for key, field in fields.items() if field.is_required())
        return f"[{place[0]}] needs {missing}" if missing else ""
    if (field := fields.get(place[1])) is None:
        return ""
    example = json.dumps(field.examples[0] if field.examples else field.default)
    return f"write for example {place[1]} = {example} under [{place[0]}]"
