"""Reads which packages a person's files ask for."""

import re
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from pydantic import Field

from sandbox.contract.errors import UsageError
from sandbox.contract.reading import MAX_SCRIPT_BYTES, read_named
from sandbox.contract.record import Record

LOCK = "packages.lock"
"""Name of the file beside program.md that says what the image was given."""
OWN = re.compile(r"^(-e|--editable)?[\s=]*\.(\[[^]]*\])?$")
"""The person's own project, which runs from where it lies and is not installed."""
NESTED = re.compile(r"^(-r|--requirement|-c|--constraint)[\s=]*(\S+)$")
INDEXES = re.compile(
    r"^(-i|--index-url|--extra-index-url|-f|--find-links|--trusted-host)[\s=]+(\S+)$"
    r"|^(--no-index|--pre)$"
)
"""Options of pip's that a file may have: where wheels come from. None by which one is built."""
HASH = re.compile(r"\s--hash[=\s]sha256:([0-9a-f]{64})")


class Asked(Record):
    """What a person asks an image for besides torch, and what was found for it before."""

    file: str = ""
    """Name of the file that asks for packages; empty for none."""
    options: tuple[str, ...] = ()
    requirements: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()
    hashes: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """What a package's wheel may be, by its name, where the file says it."""
    lock: str = ""
    """Content of `packages.lock`; empty where nothing was resolved yet."""

    def __bool__(self) -> bool:
        return bool(self.file)

    def wish(self) -> str:
        """All that was asked for, whatever was found for it."""
        return self.model_dump_json(exclude={"lock"})


def read_asked(place: Path, name: str) -> Asked:
    """What a file of a person's asks for.

    Args:
        place: the directory of program.md.
        name: of the file, from there; empty for none.

    Raises:
        UsageError: it cannot be read, or asks for something that is no wheel.
    """
    if not name:
        return Asked()
    lock = place / LOCK
    parts: dict[str, list[str]] = {"options": [], "requirements": [], "constraints": []}
    hashes: dict[str, tuple[str, ...]] = {}
    for kind, line in _lines(place / name, "requirements", ()):
        if found := tuple(HASH.findall(line)):
            line = HASH.sub("", line).strip()
            hashes[canonicalize_name(re.split(r"[^\w.-]", line)[0])] = found
        parts[kind].append(line)
    return Asked(
        file=name,
        options=tuple(parts["options"]),
        requirements=tuple(parts["requirements"]),
        constraints=tuple(parts["constraints"]),
        hashes=hashes,
        lock=_text(lock) if lock.is_file() else "",
    )


def _lines(path: Path, kind: str, above: tuple[Path, ...]) -> Iterator[tuple[str, str]]:
    """What a file of pip's form and those it names say, each with the kind of the line."""
    if path in above:
        return
    for line in re.sub(r"\\\r?\n", " ", _text(path)).splitlines():
        line = re.sub(r"(^|\s)#.*$", "", line).strip()
        if not line or OWN.match(line):
            continue
        if nested := NESTED.match(line):
            inner = kind if nested[1].startswith(("-r", "--r")) else "constraints"
            yield from _lines(path.parent / nested[2], inner, (*above, path))
        elif option := INDEXES.match(line):
            local = path.parent / option[2] if option[2] else None
            yield "options", f"{option[1]} {local.absolute()}" if local and local.exists() else line
        else:
            yield kind, _plain(line, path)


def _plain(line: str, path: Path) -> str:
    """A line that names a package or a wheel, and asks for nothing to be built.

    Raises:
        UsageError: a source tree, an archive of one, or an option that only builds have.
    """
    bare = HASH.sub("", line)
    try:
        requirement = Requirement(bare)
    except InvalidRequirement:
        local = (path.parent / bare).absolute()
        if bare.endswith(".whl"):
            return str(local) if local.is_file() else line
    else:
        if not requirement.url or requirement.url.partition("#")[0].endswith(".whl"):
            return line
    raise UsageError(
        f"{path.name}: `{line[:120]}` is no package by name and no wheel; nothing is built on "
        "this machine from somebody's source",
        "name a released version, as in `package==1.2`, or a wheel of it",
    )


def _text(path: Path) -> str:
    try:
        return read_named(path, MAX_SCRIPT_BYTES).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UsageError(
            f"{path} is not there", "name another under [hardware] requirements, or leave it out"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}", "save it as UTF-8 text") from error
