"""Swaps the base image under one program, and compares what is left on record.

`make swap` runs it: one short session on each of three images, from the same program.md, workspace
and seed. Nothing is changed but the base image, and the profile where the base brings its own
torch. What must be alike is compared (the schema of every ledger, the events' types and fields, the
report's headings, the audit's silence); what may differ (versions, scores, seconds) is told.

The three: the image of the shipped profile; the same profile on another distribution release with
a Python of its own; an image of somebody's own, with another Python, another torch and packages
that nightlab knows nothing of. The second and third are made here from Debian's packages.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
from pydantic import TypeAdapter

from agent.machine.setup import TEMPLATE
from agent.record.chain import read_ledger
from agent.record.events import Entry
from agent.record.history import fold
from sandbox.engine.find import connect, find_engine
from sandbox.image.debian import archive_sources, transport_settings
from sandbox.machine import state_directory

SUITE = "trixie"
NAME = "nightlab-swap"
BEGIN, END = "<!-- swap: written by `make swap` -->", "<!-- /swap -->"
DOCS = Path(__file__).parents[2] / "docs" / "hardware.md"
SEED = 1
PYTHON_LIBRARIES = "libbz2-1.0,libffi8,libgomp1,liblzma5,libsqlite3-0,libssl3t64,zlib1g"
SLIM = 'rm -rf "$1"/usr/share/info "$1"/usr/share/locale "$1"/usr/share/man'


@dataclass(frozen=True)
class Swap:
    """One image to run the program on."""

    name: str
    base_image: str
    profile: str


@dataclass(frozen=True)
class Seen:
    """What one session left."""

    name: str
    image: Mapping[str, Any]
    shape: Mapping[str, Any]
    """What must be alike."""
    baseline: float
    attempts: int


def main(arguments: Sequence[str]) -> None:
    """Make the bases, run the sessions, compare, and write the table into docs/hardware.md."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--attempts", type=int, default=1)
    options = parser.parse_args(arguments)
    own = f"{NAME}:own-python"
    theirs = f"{NAME}:own-torch"
    client_engine = find_engine(state_directory(os.environ), environ=os.environ)
    with closing(connect(client_engine)) as client:
        _need(client, own, PYTHON_LIBRARIES, _python_into_place())
        _need(client, theirs, "python3-torch,python3-numpy,python3-yaml", [])
    swaps = [Swap("shipped", "", "cpu"), Swap("own Python", own, "cpu")]
    swaps.append(Swap("own torch", theirs, "own-torch"))
    with tempfile.TemporaryDirectory(prefix="swap-") as folder:
        program = _program(Path(folder) / "program", options.tokens)
        seen = [
            session_on(
                swap,
                Path(folder) / swap.name.replace(" ", "-"),
                program,
                options.attempts,
            )
            for swap in swaps
        ]
    sys.stdout.write(table(seen))
    if differences := unlike(seen):
        sys.exit("\n".join(differences))
    _write_between(table(seen))


def unlike(seen: Sequence[Seen]) -> list[str]:
    """What of a session is not as in the first one."""
    first = seen[0]
    return [
        f"{other.name}: {part} is not as on {first.name}: "
        f"{_without(other.shape[part], first.shape[part])} / "
        f"{_without(first.shape[part], other.shape[part])}"
        for other in seen[1:]
        for part in first.shape
        if other.shape[part] != first.shape[part]
    ]


def _without(one: Any, other: Any) -> Any:
    """Of a list what the other one has not; of anything else all."""
    return [entry for entry in one if entry not in other] if isinstance(one, list) else one


def shape_of(directory: Path) -> dict[str, Any]:
    """What must be the same on every image: the record's and the report's form."""
    entries = read_ledger(directory)
    schema = TypeAdapter(Entry)
    lines = (directory / "ledger.jsonl").read_text().splitlines()
    fields: dict[str, set[str]] = {}
    for line in lines:
        schema.validate_json(line)
        event = json.loads(line)["event"]
        if "calibration" in event:
            event["calibration"] = None  # of this machine on one image, if it was ever measured
        kind = f"{event['type']} {event.get('box', event.get('result', {}).get('box', ''))}".strip()
        fields.setdefault(kind, set()).update(_paths(event))
    report = (directory / "report.html").read_text()
    headings = re.findall(r"<h2[^>]*>\s*([^<]+?)\s*<", report)
    return {
        "events": sorted(fields),
        "fields": sorted(f"{kind}: {path}" for kind, paths in fields.items() for path in paths),
        # The first screen's headings tell numbers: they are the scores' doing, and may differ.
        "headings": [title for title in headings if not re.search(r"\d|need", title)],
        "results": (directory / "results.tsv").read_text().splitlines()[0],
        "settings": {
            name: value for name, value in _settings(entries).items() if name != "hardware"
        },
    }


def _paths(value: object, at: str = "", depth: int = 2) -> Iterator[str]:
    """The names of a record's fields, two levels deep: below that stands free evidence."""
    if isinstance(value, dict) and depth:
        for name, inner in value.items():
            yield f"{at}{name}"
            yield from _paths(inner, f"{at}{name}.", depth - 1)


def _settings(entries: Sequence[Entry]) -> dict[str, Any]:
    session = fold(entries).session
    assert session is not None
    return dict(session.settings)


def table(seen: Sequence[Seen]) -> str:
    """What each session ran on, and what it came to."""
    rows = [
        "| image | base | Python | torch | content | baseline `val_bpb` | attempts |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in seen:
        image = one.image
        rows.append(
            f"| {one.name} (`{image['profile']}`) | {image['base']['source']} "
            f"`{image['base']['digest'][7:19]}` | {image['python']} | {image['torch']} "
            f"| `{image['content_key'][:12]}` | {one.baseline:.4f} | {one.attempts} |"
        )
    shape = seen[0].shape
    alike = (
        f"\nAlike in all: {len(shape['events'])} kinds of events with {len(shape['fields'])} "
        "named fields, every "
        f"setting but `[hardware]`, {len(shape['headings'])} headings of the report; `nightlab "
        "audit` finds no difference in any.\n"
    )
    return "\n".join(rows) + "\n" + ("" if unlike(seen) else alike)


def _program(place: Path, tokens: int) -> Path:
    """The shipped program with a budget in tokens, so that a busy machine tells nothing else."""
    shutil.copytree(TEMPLATE / "workspace", place / "workspace")
    text = (TEMPLATE / "program.md").read_text()
    for old, new in (
        ('kind = "wall" ', f'kind = "tokens"\ntokens = {tokens} '),
        ("baseline_repeats = 3", "baseline_repeats = 2"),
        ("max_other_cores = 0.06", "max_other_cores = 64.0"),
        ('early_stopping = "median"', 'early_stopping = "off"'),  # where one stops, another may not
    ):
        assert old in text
        text = text.replace(old, new)
    (place / "program.md").write_text(text)
    return place


def session_on(swap: Swap, place: Path, source: Path, attempts: int) -> Seen:
    """One session of the program in `source` on that image.

    Args:
        place: where everything of it goes; made anew.
        source: holds program.md and workspace/.
    """
    shutil.copytree(source / "workspace", place / "workspace")
    hardware = f'[hardware]\nprofile = "{swap.profile}"\nbase_image = "{swap.base_image}"\n'
    text = re.sub(r"\[hardware\]\n(?:.+\n)*", "", (source / "program.md").read_text())
    before, fence, after = text.rpartition("```")
    (place / "program.md").write_text(f"{before}\n{hardware}{fence}{after}")
    program = ["--program", str(place / "program.md")]
    _nightlab("setup", *program)
    runs = ["--runs", str(place / "runs")]
    short = ["--attempts", str(attempts)]
    name = ["--session", "swap", "--seed", str(SEED), "--researcher", "tpe"]
    _nightlab("run", *program, *runs, *name, *short)
    _nightlab("audit", "swap", *runs)
    directory = place / "runs" / "swap"
    history = fold(read_ledger(directory))
    assert history.session is not None
    assert history.baseline is not None
    assert history.baseline.finished is not None
    assert history.baseline.finished.value is not None
    return Seen(
        swap.name,
        history.session.image,
        shape_of(directory),
        history.baseline.finished.value,
        len(history.attempts) - 1,
    )


def _nightlab(*arguments: str) -> None:
    command = [sys.executable, "-P", "-m", "agent.cli", *arguments]
    subprocess.run(command, stdout=sys.stderr, check=True)


def _need(client: docker.DockerClient, tag: str, packages: str, hooks: Sequence[str]) -> None:
    """Make a base of Debian's packages unless it is there."""
    if client.images.list(name=tag):
        return
    environ = dict(os.environ)
    sources = [
        re.sub(r"(\S+) main$", f"{SUITE} main", line)
        for line in archive_sources(_host_suite(), "debian", environ)
        if not re.search(r"(security|updates) main$", line)
    ]
    with tempfile.TemporaryDirectory(prefix="swap-base-") as folder:
        archive = Path(folder) / "base.tar"
        command = ["mmdebstrap", "--variant=minbase", f"--include={packages}"]
        command += [f"--customize-hook={hook}" for hook in (*hooks, SLIM)]
        command += [f"--aptopt={setting}" for setting in transport_settings(environ)]
        subprocess.run([*command, SUITE, str(archive), *sources[:1]], check=True)
        name, _, version = tag.partition(":")
        client.api.timeout = 1800
        client.api.import_image_from_file(str(archive), repository=name, tag=version)


def _host_suite() -> str:
    release = Path("/etc/os-release").read_text()
    (suite,) = re.findall(r"^VERSION_CODENAME=(\S+)$", release, flags=re.MULTILINE)
    return str(suite)


def _python_into_place() -> list[str]:
    """Hooks that copy the Python which runs this into the base: built from source, like many."""
    home = Path(sys.base_prefix)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    library = f"lib/python{version}"
    leave_out = "--exclude=test --exclude=site-packages --exclude=__pycache__ --exclude=*.a"
    copy = f'tar -C "{home}" {leave_out} -cf - bin/python{version} {library}'
    libraries = f'for f in "{home}"/lib/libpython*.so*'
    shared = f'{libraries}; do [ ! -e "$f" ] || cp -P "$f" "$1/usr/local/lib/"; done'
    link = f'ln -s python{version} "$1/usr/local/bin/python3" && chroot "$1" ldconfig'
    return [f'{copy} | tar -C "$1/usr/local" -xf -', shared, link]


def _write_between(text: str) -> None:
    """Put a table where docs/hardware.md keeps it."""
    page = DOCS.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
