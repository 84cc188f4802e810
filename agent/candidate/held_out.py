"""Finds held-out text in a candidate's files, by hashes.

The index holds a hash of each block of val and holdout that train lacks, and lies on record: with
it the audit searches again, and nobody reads a text out of it. Letters are compared without case,
blanks and signs, so that cutting and quoting a text changes nothing. docs/score.md says how often
honest files meet a block, and what is not found; docs/decisions/0025 why it is so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.candidate.literals import Piece, Unpacking, literal_bytes, numbers_in
from agent.record.events import HeldOutText, LiteralsRead

if TYPE_CHECKING:
    # Takes a tenth of a second to import, which a command that only asks for help has no use for.
    from numpy.typing import NDArray

    Values = NDArray[Any]

LETTERS, TOKENS, BYTES = "letters", "token ids", "bytes"
BLOCK = {LETTERS: 32, TOKENS: 16, BYTES: 32}
"""How many of each make a block; 16 tokens of the shipped vocabulary are some 40 letters."""
MAX_BLOCKS = 2**18
"""Of a larger split those with the smallest hashes: a share of it that nobody can choose."""
MAX_TRAIN_VALUES = 2**28
"""So much of train is looked through for what it shares with the others: a minute or two."""
CHUNK = 2**20
OTHERS = ("meta.json",)
"""Files of a split that say nothing of its text."""
_NO_LETTERS = bytes(b for b in range(128) if not chr(b).isalnum())
_LOWER = bytes.maketrans(bytes(range(65, 91)), bytes(range(97, 123)))


def index_of(data_dir: Path) -> bytes:
    """Hashes of all blocks of val and holdout that train lacks, sorted, 8 bytes each."""
    import numpy as np

    spelled = _vocabulary(data_dir)
    found: list[Values] = []
    for split in ("val", "holdout"):
        for kind, values in _streams(data_dir / split, spelled):
            # Those that lie end to end are enough: a long run holds some of them as a whole.
            found += [hashes[:: BLOCK[kind]] for hashes in _hashes(values, kind)]
    blocks = _Blocks(np.unique(np.concatenate([*found, np.zeros(0, np.uint64)]))[:MAX_BLOCKS])
    left, shared = MAX_TRAIN_VALUES, set[int]()
    for kind, values in _streams(data_dir / "train", spelled):
        shared |= blocks.among(values[:left], kind)
        left = max(0, left - len(values))
    own = np.setdiff1d(blocks.hashes, np.array(sorted(shared), np.uint64))
    return own.astype("<u8").tobytes()


def read_literals(attempt: int, files: Mapping[str, bytes], index: bytes | None) -> LiteralsRead:
    """What an attempt's editable files carry, held against an index."""
    unpacking = Unpacking(files)
    known, found = set[int](), dict[tuple[str, str], int]()
    if index:
        import numpy as np

        blocks = _Blocks(np.frombuffer(index, "<u8").astype(np.uint64))
        for piece in unpacking.pieces():
            for kind, values in _readings(piece):
                # Each block counts once, where it is found first: literals overlap their files.
                here = blocks.among(values, kind) - known
                known |= here
                encoding = ", then ".join((*piece.encodings, *([kind] * (kind != LETTERS))))
                key = piece.file, encoding or "plain text"
                found[key] = found.get(key, 0) + len(here)
    return LiteralsRead(
        attempt=attempt,
        literal_bytes=literal_bytes(files),
        is_read_whole=unpacking.is_whole,
        held_out=tuple(
            HeldOutText(file=file, encoding=encoding, blocks=count)
            for (file, encoding), count in sorted(found.items())
            if count
        ),
    )


def _vocabulary(data_dir: Path) -> list[bytes]:
    """The bytes of each token of a byte-level BPE; empty where there is no such tokeniser."""
    try:
        vocab = json.loads((data_dir / "tokenizer.json").read_bytes())["model"]["vocab"]
        names = sorted((int(token), str(name)) for name, token in vocab.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    letters = _byte_of_letter()
    return [bytes(letters.get(letter, 32) for letter in name) for _, name in names]


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): b for n, b in enumerate(others)}


def _streams(split: Path, spelled: list[bytes]) -> Iterator[tuple[str, Values]]:
    """What a split's files say: tokens and their text, or bytes where the form is a person's."""
    import numpy as np

    for path in sorted(p for p in split.rglob("*") if p.is_file() and p.name not in OTHERS):
        if path.name == "tokens.bin":
            tokens = np.fromfile(path, "<u2")
            yield TOKENS, tokens
            for start in range(0, len(tokens) if spelled else 0, CHUNK):
                part = tokens[start : start + CHUNK].tolist()
                text = b"".join(spelled[t] if t < len(spelled) else b"\n" for t in part)
                yield LETTERS, _letters(text)
        else:
            content = path.read_bytes()
            yield BYTES, np.frombuffer(content, np.uint8)
            yield LETTERS, _letters(content)


def _letters(text: bytes) -> Values:
    import numpy as np

    return np.frombuffer(text.translate(_LOWER, _NO_LETTERS), np.uint8)


def _readings(piece: Piece) -> Iterator[tuple[str, Values]]:
    """How a piece can be read: as text, as bytes, as numbers in text, as an array of numbers."""
    import numpy as np

    content = piece.content
    yield LETTERS, _letters(content)
    yield BYTES, np.frombuffer(content, np.uint8)
    numbers = [number for number in numbers_in(content) if number < 2**16]
    yield TOKENS, np.array(numbers, np.uint16)
    for form, width in (("<u2", 2), (">u2", 2), ("<u4", 4), (">u4", 4)):
        for start in range(width):
            size = (len(content) - start) // width
            if size >= BLOCK[TOKENS]:
                yield TOKENS, np.frombuffer(content, form, size, start)


class _Blocks:
    """Blocks by their sorted hashes."""

    def __init__(self, hashes: Values) -> None:
        import numpy as np

        self.hashes = hashes
        # Most runs are no block, and a table of the hashes' low bits says so fast.
        self._low_bits = np.uint64(2**22 - 1)
        self._is_likely = np.zeros(2**22, np.bool_)
        self._is_likely[hashes & self._low_bits] = True

    def among(self, values: Values, kind: str) -> set[int]:
        """Hashes of the blocks that stand somewhere in the values."""
        import numpy as np

        found = set[int]()
        for hashes in _hashes(values, kind):
            likely = hashes[self._is_likely[hashes & self._low_bits]]
            if len(likely):
                places = np.searchsorted(self.hashes, likely) % len(self.hashes)
                found.update(likely[self.hashes[places] == likely].tolist())
        return found


def _hashes(values: Values, kind: str) -> Iterator[Values]:
    """A hash of each run of a block's length, wherever it begins, chunk after chunk.

    A polynomial over 2^64, from sums of the values times rising powers; then bits are mixed, since
    the lowest ones of such a sum depend on the lowest ones of the values alone.
    """
    import numpy as np

    length, salt = BLOCK[kind], np.uint64(list(BLOCK).index(kind))
    powers, inverse = _powers()
    for start in range(0, max(0, len(values) - length + 1), CHUNK):
        part = values[start : start + CHUNK + length - 1].astype(np.uint64) + np.uint64(1)
        sums = np.zeros(len(part) + 1, np.uint64)
        np.cumsum(part * powers[: len(part)], out=sums[1:])
        hashes = (sums[length:] - sums[:-length]) * inverse[: len(part) - length + 1] + salt
        hashes = (hashes ^ (hashes >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
        yield hashes ^ (hashes >> np.uint64(29))


@cache
def _powers() -> tuple[Values, Values]:
    """Powers of an odd number and of its inverse, modulo 2^64."""
    import numpy as np

    size, base = CHUNK + max(BLOCK.values()), 0x9E3779B97F4A7C15
    powers = [np.full(size, number, np.uint64) for number in (base, pow(base, -1, 2**64))]
    for row in powers:
        row[0] = 1
        np.cumprod(row, out=row)
    return powers[0], powers[1]
