"""Types a first evening and morning, and writes docs/first-night.md from what is printed.

By hand: `python -m tests.bench.first_night`, five minutes on two cores. Whoever changes what a
command prints runs this again and looks at the difference, so the page cannot drift.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "first-night.md"
TASK = ROOT / "tests" / "support" / "toy"
NAME = "first"
HEAD = """# A first night

An evening, a night of minutes and a morning, typed in a copy of the toy task of the tests, whose
trainings take a second.
`python -m tests.bench.first_night` ran these commands and pasted what they printed, on a machine
that others used as well: your noise will be smaller, and a night of yours longer.
"""
STEPS: tuple[tuple[str, str], ...] = (
    (
        "## In the evening\n\nA directory with a `program.md` and a `workspace/`; `nightlab init` "
        "makes one of the shipped task. Set up once:",
        "nightlab setup",
    ),
    (
        "## In the night\n\nThe plan first, then a line for each attempt: its score, what it "
        "gained over the best, and what it had to gain.",
        f"nightlab run --researcher tpe --attempts 6 --session {NAME} --seed 5",
    ),
    ("## In the morning\n\nWhat there is, and what is left to do:", "nightlab list"),
    ("", f"nightlab report {NAME}"),
    (
        "![The picture of the night](first-night.png)\n\nOne attempt from near "
        "(`--diff`, `--log` and `--messages` show one part alone):",
        f"nightlab show {NAME} 1 --diff",
    ),
    ("Nobody changed the record since:", f"nightlab audit {NAME}"),
    (
        "Is the gain real, at fresh seeds, and which change is worth what?",
        f"nightlab review {NAME}",
    ),
    (
        "Take it (or `nightlab reject`); your git name and the reason are recorded:",
        f"nightlab approve {NAME} --reason 'holds at fresh seeds'",
    ),
)


def main() -> None:
    """Run every step and write the page with its picture."""
    with tempfile.TemporaryDirectory(prefix="first-night-") as root:
        place = Path(root, "toy")
        shutil.copytree(TASK, place, ignore=shutil.ignore_patterns("__pycache__"))
        (place.parent / "gitconfig").write_text("[user]\nname = Ada\nemail = ada@example.org\n")
        pieces = [HEAD]
        for text, command in STEPS:
            printed = _typed(command, place).replace(str(place), "~/toy")
            printed = printed.replace(str(Path.home()), "~").rstrip()
            pieces.append(f"{text}\n\n```\n$ {command}\n{printed}\n```\n".lstrip("\n"))
        shutil.copyfile(place / "runs" / NAME / "progress.png", PAGE.with_suffix(".png"))
    PAGE.write_text("\n".join(pieces), encoding="utf-8")


def _typed(command: str, place: Path) -> str:
    words = f'"{sys.executable}" -P -m agent.cli{command.removeprefix("nightlab")}'
    environ = os.environ | {
        "GIT_CONFIG_GLOBAL": str(place.parent / "gitconfig"),
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "150",
    }
    done = subprocess.run(
        ["bash", "-c", words],
        cwd=place,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


if __name__ == "__main__":
    main()
