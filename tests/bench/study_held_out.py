"""Finds out how often honest text holds blocks of held-out text by chance.

`python -m tests.bench.study_held_out DATA [--docs]`, with DATA as `nightlab setup` prepares it:
each work of the train split is left out of it once, an index is made of the rest, and the work is
searched as if a researcher had written it down whole. It is another work by the same author, so
whatever is found is chance.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from agent.attempt.decide import LEAST_BLOCKS
from agent.candidate.held_out import BLOCK, LETTERS, _vocabulary, index_of, read_literals
from tests.bench.studies import write_between


def main() -> None:
    """Leave each work out once, then tell."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("data", type=Path)
    options.add_argument("--docs", action="store_true", help="write docs/benchmarks.md as well")
    chosen = options.parse_args()
    text = table(chosen.data)
    sys.stdout.write(text)
    if chosen.docs:
        write_between("study_held_out", text)


def table(data: Path) -> str:
    """Blocks found by how many works they are in."""
    tokens = np.fromfile(data / "train" / "tokens.bin", "<u2")
    starts = json.loads((data / "train" / "meta.json").read_text())["documents"]
    spelled = _vocabulary(data)
    found: Counter[int] = Counter()
    letters = 0
    for begin, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        rest = np.concatenate([tokens[:begin], tokens[end:]])
        text = b"".join(spelled[t] for t in tokens[begin:end] if t < len(spelled))
        letters += sum(chr(byte).isalnum() for byte in text)
        read = read_literals(0, {"work.txt": text}, index_without(data, rest))
        found[sum(one.blocks for one in read.held_out)] += 1
    lines = ["| blocks found | works |", "|---|---|"]
    lines += [f"| {blocks} | {works} |" for blocks, works in sorted(found.items())]
    lines += [
        "",
        f"{len(starts)} works, {letters} letters, blocks of {BLOCK[LETTERS]} letters; "
        f"{LEAST_BLOCKS} blocks are refused.",
    ]
    return "\n".join(lines) + "\n"


def index_without(data: Path, rest: np.ndarray) -> bytes:
    """The index of a data directory whose train split is `rest`."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for split in ("val", "holdout"):
            shutil.copytree(data / split, root / split)
        shutil.copy(data / "tokenizer.json", root)
        (root / "train").mkdir()
        rest.tofile(root / "train" / "tokens.bin")
        return index_of(root)


if __name__ == "__main__":
    main()
