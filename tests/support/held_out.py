"""Splits of text that nobody has seen, and what a cheat would take of them."""

from __future__ import annotations

import base64
import json
import lzma
import random
from pathlib import Path

import numpy as np

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def prose(seed: int, words: int) -> bytes:
    """Text that nobody has seen, with sentences and lines."""
    chance = random.Random(seed)
    lines = []
    for _ in range(words // 8):
        line = ["".join(chance.choices(LETTERS, k=chance.randint(2, 9))) for _ in range(8)]
        lines.append(" ".join(line).capitalize() + chance.choice([".", ",", "!"]))
    return "\n".join(lines).encode()


TRAIN, VAL, HOLDOUT = prose(1, 6000), prose(2, 3000), prose(3, 3000)
TAKEN = VAL[2000:6000]


def write_split(folder: Path, text: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.frombuffer(text, np.uint8).astype("<u2").tofile(folder / "tokens.bin")
    (folder / "meta.json").write_text("{}")


def write_data(root: Path) -> Path:
    """A prepared directory as prepare.py makes it, one token a byte."""
    # A sentence that train has as well is no secret.
    write_split(root / "train", TRAIN + VAL[:1000])
    write_split(root / "val", VAL)
    write_split(root / "holdout", HOLDOUT)
    names = {chr(n) if 0x21 <= n < 0x7F else chr(0x100 + n): n for n in range(0x7F)}
    names["\u0120"], names["\u010a"] = names.pop(chr(0x120)), names.pop(chr(0x10A))
    (root / "tokenizer.json").write_text(json.dumps({"model": {"vocab": names}}))
    return root


PACKED = base64.b85encode(lzma.compress(TAKEN))
