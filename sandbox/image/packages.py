"""Gives an image a person's packages: resolved, locked, installed offline.

pip resolves on the host for the image's Python, so that a site's own settings of pip hold. What the
image has already takes part as empty wheels of the same versions; wheels alone are taken, since to
look at a source is to run it.
"""

import re
import tempfile
import time
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import docker
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version
from pydantic import ValidationError

from sandbox.contract.errors import SandboxError
from sandbox.contract.record import Record
from sandbox.engine.host import Say, last_lines
from sandbox.image.check import ask_python
from sandbox.image.requirements import LOCK, OF_TORCH, Asked, name_of
from sandbox.image.wheels import (
    HOW_TO_GET_CPU_TORCH,
    NEWEST_GLIBC_MINOR,
    Pip,
    Target,
    file_sha256,
)
from sandbox.image.workshop import TAG_DIGITS, key_of

QUESTION = """
import importlib.metadata, json
found = {}
for one in importlib.metadata.distributions():
    if one.metadata["Name"]:
        package = {"version": one.version, "needs": one.requires or []}
        found.setdefault(one.metadata["Name"], package)
print(json.dumps({"packages": found}))
"""
EXTRA = re.compile(r"""\bextra\s*==\s*["']([^"']+)""")
BUILT_AGAINST_TORCH = ("torchvision", "torchaudio")


class PackagesUnfit(SandboxError):
    """A person's packages cannot be had for the image, or not beside its torch."""


class Distribution(Record):
    """One package in an image."""

    version: str
    needs: tuple[str, ...]


class Held(Record):
    """What an image has already."""

    packages: dict[str, Distribution]

    @property
    def versions(self) -> dict[str, str]:
        """Versions by pip's names; one that pip cannot read counts as absent."""
        found: dict[str, str] = {}
        for name, package in self.packages.items():
            try:
                found[canonicalize_name(name)] = str(Version(package.version))
            except InvalidVersion:
                continue
        return found


def held_by(client: docker.DockerClient, image_id: str) -> Held:
    """Ask an image's Python for its packages.

    Raises:
        PackagesUnfit: it does not say.
    """
    printed = ask_python(client, image_id, QUESTION, {})
    try:
        return Held.model_validate_json(printed.strip().rpartition("\n")[2])
    except ValidationError as error:
        raise PackagesUnfit(
            f"the image does not say which packages it has: {last_lines(printed, 2)}",
            "name another with --base-image",
        ) from error


def fetch_packages(asked: Asked, held: Held, pip: Pip, into: Path) -> str:
    """Fetch what a person asked for, as locked or else resolved anew; the lock.

    Raises:
        PackagesUnfit: something has no wheel, or the parts do not go together.
    """
    began = time.monotonic()
    head = _head(asked, held, pip.target)
    if head in asked.lock:
        _fetch_locked(asked, pip, into)
        lock = asked.lock
    else:
        if asked.lock:
            pip.say(f"{LOCK} was made for another {asked.file}, Python or torch: made anew.")
        _resolve(asked, held, pip, into)
        lock = _locked(head, asked, into)
    wheels = list(into.glob("*.whl"))
    size = sum(path.stat().st_size for path in wheels) / 1e6
    took = time.monotonic() - began
    pip.say(f"{asked.file}: {len(wheels)} packages, {size:,.1f} MB, {took:.0f} s.")
    return lock


def require_one_build(client: docker.DockerClient, image_id: str, lock: str) -> None:
    """Import what is built against one build of torch, since versions alone do not tell.

    Raises:
        PackagesUnfit: it was built for another one.
    """
    for name in BUILT_AGAINST_TORCH:
        if f"\n{name}==" in lock:
            printed = ask_python(client, image_id, f"import {name}; print('fine')", {})
            if not printed.endswith("fine\n"):
                raise PackagesUnfit(
                    f"{name} was built for another torch than the image's: "
                    f"{last_lines(printed, 1)[:200]}",
                    f"{HOW_TO_GET_CPU_TORCH}; delete {LOCK}",
                )


def is_locked(asked: Asked) -> bool:
    """Whether the lock is one of what is asked for now, on whatever Python."""
    return _wish(asked) in asked.lock


def _wish(asked: Asked) -> str:
    return f"asked {key_of(asked.wish())[:TAG_DIGITS]}\n"


def _head(asked: Asked, held: Held, target: Target) -> str:
    return f"# for {target.tag}, torch {held.versions.get('torch')}, {_wish(asked)}"


def _locked(head: str, asked: Asked, wheels: Path) -> str:
    """The lock of a folder of wheels.

    Raises:
        PackagesUnfit: a wheel is not one of those that the person's file knows.
    """
    lines = []
    for path in sorted(wheels.glob("*.whl")):
        name, version, _, _ = parse_wheel_filename(path.name)
        sha256 = file_sha256(path)
        if sha256 not in asked.hashes.get(name, (sha256,)):
            raise PackagesUnfit(
                f"{asked.file} knows other files of {name} than {path.name}",
                "take its hashes anew, or leave them out: nightlab locks its own",
            )
        lines.append(f"{name}=={version} --hash=sha256:{sha256}\n")
    about = f"# Made by `nightlab setup` from {asked.file}; delete it to have newer versions.\n"
    return f"{about}{head}{''.join(lines)}"


def _fetch_locked(asked: Asked, pip: Pip, into: Path) -> None:
    pip.say(f"Fetching the packages of {LOCK} with pip ({pip.target.tag}).")
    with tempfile.TemporaryDirectory(prefix="resolve-", dir=into.parent) as folder:
        locked = _written(Path(folder) / "locked.txt", (*asked.options, asked.lock))
        complaint = pip.download(into, "--no-deps", "--require-hashes", "-r", locked)
    if complaint is not None:
        raise PackagesUnfit(
            f"pip cannot fetch what {LOCK} names",
            f"delete {LOCK} and run `nightlab setup` again, for what there is today; pip said:\n"
            f"{last_lines(complaint)}",
        )


def _resolve(asked: Asked, held: Held, pip: Pip, into: Path) -> None:
    """Let pip choose: what the image has stays as it is, unless pip finds it in the way."""
    pip.say(f"Resolving {asked.file} with pip ({pip.target.tag}).")
    versions = held.versions
    lines = [
        one for one in asked.requirements if not _is_torchs(one, versions, asked.file, pip.say)
    ]
    bounds = [
        one for one in asked.constraints if not _is_torchs(one, versions, asked.file, pip.say)
    ]
    with tempfile.TemporaryDirectory(prefix="resolve-", dir=into.parent) as folder:
        stubs = Path(folder)
        _write_stubs(held, pip.target, stubs)
        # An image without pip gets one: it is what installs the others.
        wanted = _written(stubs / "wanted.txt", (*asked.options, *lines, "pip", "torch"))
        arguments = ["-r", wanted, "-c", str(stubs / "bounds.txt"), "--find-links", str(stubs)]
        if pip.torch_index:  # for what is built against one torch alone
            arguments += ["--extra-index-url", pip.torch_index]
        bounded = {name_of(one) for one in bounds}
        pins = {name: version for name, version in versions.items() if name not in bounded}
        blamed = {""}
        while blamed:
            kept = (f"{name}=={version}" for name, version in pins.items())
            _written(stubs / "bounds.txt", (*kept, *bounds))
            complaint = pip.download(into, *arguments)
            named = re.findall(r"\(constraint\) ([\w.-]+)==", complaint or "")
            blamed = (set(named) & pins.keys()) - {"torch", "pip"}
            pins = {name: version for name, version in pins.items() if name not in blamed}
    if complaint is not None:
        raise _explained(complaint, asked, versions["torch"], pip.target)
    for path in into.glob("*.whl"):
        name, version, _, _ = parse_wheel_filename(path.name)
        if versions.get(name) == str(version):
            path.unlink()


def _is_torchs(line: str, versions: Mapping[str, str], file: str, say: Say) -> bool:
    """Whether the image's torch decides a line; a file that wants another torch is told so."""
    try:
        requirement = Requirement(line)
    except InvalidRequirement:  # the address of a wheel
        return False
    name = canonicalize_name(requirement.name)
    torch = versions["torch"]
    if name == "torch" and not requirement.specifier.contains(torch, prereleases=True):
        say(
            f"{file} asks for {line}; the image's torch {torch} takes its place. If the program "
            "needs that one: base_image under [hardware], an image that has it"
        )
    return name not in BUILT_AGAINST_TORCH and bool(OF_TORCH.match(name))


def _write_stubs(held: Held, target: Target, folder: Path) -> None:
    """An empty wheel for each package of the image, which pip prefers to every real one of it."""
    tag = f"cp{target.python.replace('.', '')}"
    versions = held.versions
    for name, package in held.packages.items():
        if (version := versions.get(canonicalize_name(name))) is None:
            continue
        stem = f"{canonicalize_name(name).replace('-', '_')}-{version}"
        # Of one version the last build counts, for the newest system.
        file = f"{stem}-999999-{tag}-{tag}-manylinux_2_{NEWEST_GLIBC_MINOR}_{target.machine}.whl"
        extras = sorted({extra for need in package.needs for extra in EXTRA.findall(need)})
        head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        head += [f"Provides-Extra: {extra}" for extra in extras]
        needs = (f"Requires-Dist: {need}" for need in package.needs)
        with zipfile.ZipFile(folder / file, "w") as wheel:
            wheel.writestr(f"{stem}.dist-info/METADATA", "\n".join((*head, *needs, "")))
            wheel.writestr(f"{stem}.dist-info/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}-none-any\n")
            wheel.writestr(f"{stem}.dist-info/RECORD", "")


def _written(path: Path, lines: Iterable[str]) -> str:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def _explained(complaint: str, asked: Asked, torch: str, target: Target) -> PackagesUnfit:
    """What pip's complaint comes to, and what to do."""
    said = f"pip said:\n{last_lines(complaint)}"
    if "Retrying (" in complaint or "Could not fetch URL" in complaint:
        hint = "see whether `pip download` works here: its settings are the ones that count"
        return PackagesUnfit("pip does not reach its index", f"{hint}; {said}")
    if "ResolutionImpossible" in complaint:
        causes = re.findall(r"^    (.+ depends on .+)$", complaint, re.MULTILINE)
        of_torch = [cause for cause in causes if re.search(r"depends on torch\b", cause)]
        if of_torch:
            return PackagesUnfit(
                f"{asked.file}: {of_torch[0]}, and the image has torch {torch}",
                f"ask for another version of it in {asked.file}, or name an image with that torch: "
                "base_image under [hardware]",
            )
        what = "; ".join(causes[:3]) or "see below"
        hint = f"loosen one of the lines in {asked.file}"
        return PackagesUnfit(f"{asked.file} contradicts itself: {what}", f"{hint}; {said}")
    if absent := re.findall(r"No matching distribution found for (\S+)", complaint):
        there = re.findall(r"from versions: ([^)]+)\)", complaint)[-1:] or ["none"]
        newest = ", ".join(there[0].split(", ")[-5:])
        return PackagesUnfit(
            f"{asked.file}: pip finds no wheel of {absent[-1][:80]} for Python {target.python} on "
            f"{target.machine}; with a wheel there is: {newest[:200]}",
            f"ask for another version in {asked.file}, or leave the package out; what comes as "
            "source alone: build its wheel, and name the folder in that file: --find-links FOLDER",
        )
    return PackagesUnfit(f"pip could not resolve {asked.file}", said)
