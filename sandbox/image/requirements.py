"""Reads which packages a person's files ask for."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
OF_TORCH = re.compile(r"^(torch|torchvision|torchaudio|triton|pytorch-triton.*|nvidia-.*-cu\d+)$")
"""What goes with one build of torch, and so with the image's, whatever another lock says."""
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
    read = READERS.get(Path(name).name, _lines)
    for kind, line in read(place / name):
        if found := tuple(HASH.findall(line)):
            line = HASH.sub("", line).strip()
            hashes[name_of(line)] = (*hashes.get(name_of(line), ()), *found)
        parts[kind].append(line)
    return Asked(
        file=name,
        options=tuple(parts["options"]),
        requirements=tuple(parts["requirements"]),
        constraints=tuple(parts["constraints"]),
        hashes=hashes,
        lock=_text(lock) if lock.is_file() else "",
    )


def name_of(line: str) -> str:
    """The package that a line is about, as pip writes names."""
    return canonicalize_name(re.split(r"[^\w.-]", line)[0])


def _lines(
    path: Path, kind: str = "requirements", above: tuple[Path, ...] = ()
) -> Iterator[tuple[str, str]]:
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


def _of_project(path: Path) -> Iterator[tuple[str, str]]:
    """What a project says that it depends on; its extras and groups stay out."""
    content = _toml(path)
    needs = content.get("project", {}).get("dependencies")
    if needs is None:
        raise UsageError(
            f"{path.name} has no dependencies under [project]",
            "write them into a requirements.txt, and name that",
        )
    sources = content.get("tool", {}).get("uv", {}).get("sources", {})
    for line in needs:
        _refuse_elsewhere(path, name_of(line), sources.get(name_of(line), {}))
        yield "requirements", _plain(line, path)


def _of_uv(path: Path) -> Iterator[tuple[str, str]]:
    """What the project of a uv.lock depends on, bounded by all that is locked, with its hashes."""
    packages = _toml(path).get("package", [])
    own = [one for one in packages if {"virtual", "editable"} & one.get("source", {}).keys()]
    if not own:
        raise UsageError(f"{path.name} is no lock of a project", "name a requirements.txt")
    for one in own[0].get("dependencies", []):
        extras = f"[{','.join(one['extra'])}]" if "extra" in one else ""
        yield "requirements", f"{one['name']}{extras}{_when(one.get('marker'))}"
    for torch in [one for one in packages if one["name"] == "torch"][:1]:
        yield "requirements", f"torch=={torch['version'].partition('+')[0]}"
    for one in packages:
        _refuse_elsewhere(path, one["name"], {} if one in own else one.get("source", {}))
        if one not in own and not OF_TORCH.match(one["name"]):
            files = (*one.get("wheels", []), *([one["sdist"]] if "sdist" in one else []))
            hashes = "".join(f" --hash={file['hash']}" for file in files if "hash" in file)
            forks = " or ".join(f"({fork})" for fork in one.get("resolution-markers", []))
            yield "constraints", f"{one['name']}=={one['version']}{_when(forks)}{hashes}"


def _when(marker: str | None) -> str:
    return f" ; {marker}" if marker else ""


def _refuse_elsewhere(path: Path, name: str, source: Any) -> None:
    """Refuse a package that lies in a repository or a folder: the index has another one, if any."""
    where = source if isinstance(source, dict) else {}
    if not OF_TORCH.match(name) and {"git", "path", "directory", "workspace"} & where.keys():
        raise UsageError(
            f"{path.name}: {name[:80]} comes from a source ({next(iter(where))}), and nothing is "
            "built on this machine from somebody's source",
            "name what the index has in a requirements.txt, and name that file",
        )


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_text(path))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path.name}: {error}", "mend this line of the TOML") from error


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


READERS = {"pyproject.toml": _of_project, "uv.lock": _of_uv}
"""How a file is read that is not in pip's form, by its name."""
