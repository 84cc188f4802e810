"""Unpacks what a candidate's files carry beside code.

A literal can hold a text in many forms. Those that the standard library undoes in one call are
undone here, one in the other, within bounds that count bytes and no seconds: the audit does it
again, and must come to the same. What a program computes (a cipher, packed bits) is not undone.
"""

import ast
import base64
import binascii
import bz2
import hashlib
import io
import lzma
import re
import tokenize
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

MAX_DEPTH = 4
MAX_PIECE_BYTES = 4 * 2**20
MAX_UNPACKED_BYTES = 16 * 2**20
"""Of all files together: a few kilobytes can unpack to terabytes."""
LEAST_BYTES = 64
"""Shorter pieces hold too little to be worth the work."""
MAX_STARTS = 32
LZMA_BYTES = 2**31
"""What one stream may make its decoder reserve: more than any needs, and only what is written to
is taken."""
LITERAL_TOKENS = {"STRING", "NUMBER", "COMMENT", "FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END"}

_NUMBER = re.compile(rb"0[xX][0-9a-fA-F]+|[0-9]+")
_MAGIC = re.compile(
    rb"\xfd7zXZ\x00|\x1f\x8b\x08|BZh[1-9]1AY&SY|\x78[\x01\x5e\x9c\xda]|\x5d\x00\x00", re.DOTALL
)
"""How compressed data begins: it may stand behind something else."""


class Piece(NamedTuple):
    """Something that a file carries."""

    file: str
    encodings: tuple[str, ...]
    """What was undone to get it, outermost first; empty for what stands there as it is."""
    content: bytes


class _Stream(Protocol):
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class Unpacking:
    """All pieces of some files, outermost first.

    Args:
        files: content by path.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = files
        self._left_bytes = MAX_UNPACKED_BYTES
        self._seen: set[bytes] = set()
        self.is_whole = True
        """Whether there was not more than the bounds allow to look at."""

    def pieces(self) -> Iterator[Piece]:
        """Each piece once."""
        queue = deque(
            Piece(name, (), content)
            for name, whole in sorted(self._files.items())
            for content in (whole, *(_literals(whole) if name.endswith(".py") else ()))
        )
        while queue:
            piece = queue.popleft()
            if self._is_known(piece.content):
                continue
            yield piece
            if len(piece.encodings) < MAX_DEPTH:
                for encoding, content in self._undone(piece.content):
                    encodings = (*piece.encodings, encoding)
                    queue.append(Piece(piece.file, encodings, content))

    def _is_known(self, content: bytes) -> bool:
        digest = hashlib.blake2b(content, digest_size=16).digest()
        is_known = digest in self._seen
        self._seen.add(digest)
        return is_known

    def _undone(self, content: bytes) -> Iterator[tuple[str, bytes]]:
        for encoding, undone in (*_spelled(content), *self._decompressed(content)):
            if len(undone) >= LEAST_BYTES:
                self._left_bytes -= len(undone)
                # What a bound cuts off may be what somebody hides behind a megabyte of nothing.
                self.is_whole &= self._left_bytes > 0 and len(undone) < MAX_PIECE_BYTES
                if self._left_bytes > 0:
                    yield encoding, undone

    def _decompressed(self, content: bytes) -> Iterator[tuple[str, bytes]]:
        found = _MAGIC.finditer(content)
        starts = {0, *(match.start() for match, _ in zip(found, range(MAX_STARTS), strict=False))}
        for start in sorted(starts) if self._left_bytes > 0 else ():
            for encoding, stream in COMPRESSORS.items():
                try:
                    undone = stream().decompress(content[start:], MAX_PIECE_BYTES)
                except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError, MemoryError):
                    continue
                yield encoding, undone


COMPRESSORS: dict[str, Callable[[], _Stream]] = {
    "zlib": lambda: zlib.decompressobj(47),  # or gzip
    "deflate": lambda: zlib.decompressobj(-15),
    "lzma": lambda: lzma.LZMADecompressor(memlimit=LZMA_BYTES),
    "bz2": bz2.BZ2Decompressor,
}


def literal_bytes(files: Mapping[str, bytes]) -> int:
    """Bytes of literals and comments in Python files, and of all other files."""
    return sum(
        sum(len(text) for _, text in _literal_tokens(content))
        if name.endswith(".py")
        else len(content)
        for name, content in files.items()
    )


def numbers_in(text: bytes) -> list[int]:
    """The whole numbers that stand in a text, in its order."""
    if not text.isascii():
        return []
    # A number longer than any token's is none; int() takes time that grows with the square.
    return [int(n, 0) if n[:2].lower() == b"0x" else int(n) for n in _NUMBER.findall(text)
            if len(n) <= 12]  # fmt: skip


def _literals(source: bytes) -> Iterator[bytes]:
    """What a Python file's literals say: each alone, those of a statement together, all of them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    dense: list[bytes] = []
    for statement in ast.walk(tree):
        if isinstance(statement, ast.stmt) and not hasattr(statement, "body"):
            constants = [node for node in ast.walk(statement) if isinstance(node, ast.Constant)]
            constants.sort(key=lambda node: (node.lineno, node.col_offset))
            texts = [text for node in constants for text in _bytes_of(node.value)]
            values = [n.value for n in constants if type(n.value) is int and n.value >= 0]
            # Python writes no decimals of a number that took thousands of hexadecimal digits.
            numbers = [(b"%d" if n.bit_length() < 10_000 else b"%x") % n for n in values]
            dense += [text for text in texts if not re.search(rb"\s", text)]
            yield from (text for text in texts if len(text) >= LEAST_BYTES)
            yield b"".join(texts)
            yield b" ".join(numbers)
    yield b"".join(dense)
    comments = (text.lstrip(b"#") for kind, text in _literal_tokens(source) if kind == "COMMENT")
    yield b"\n".join(comments)


def _bytes_of(value: object) -> Iterator[bytes]:
    """A text's bytes; of one with signs beyond ASCII also those that escapes spell."""
    if isinstance(value, bytes):
        yield value
    if isinstance(value, str):
        if not value.isascii() and max(value) <= "\xff":
            yield value.encode("latin-1")
        else:
            yield value.encode("utf-8", "surrogatepass")


def _literal_tokens(source: bytes) -> Iterator[tuple[str, bytes]]:
    """Literals and comments of a Python file with their kinds; what does not parse is one."""
    try:
        found = [
            (tokenize.tok_name[token.type], token.string.encode("utf-8", "surrogatepass"))
            for token in tokenize.tokenize(io.BytesIO(source).readline)
        ]
    except (tokenize.TokenError, SyntaxError, ValueError):
        found = [("STRING", source)]
    return ((kind, text) for kind, text in found if kind in LITERAL_TOKENS)


def _spelled(text: bytes) -> Iterator[tuple[str, bytes]]:
    """What a text spells in letters or numbers."""
    if not text.isascii():
        return
    for run in _runs_of_bytes(numbers_in(text)):
        yield "numbers", run
    squeezed = b"".join(text.split())
    for encoding, (alphabet, decode) in SPELLINGS.items():
        for run in alphabet.findall(squeezed):
            try:
                yield encoding, decode(run)
            except (ValueError, binascii.Error):
                continue


def _runs_of_bytes(numbers: Iterable[int]) -> Iterator[bytes]:
    """Runs of numbers that are bytes."""
    run = bytearray()
    for number in (*numbers, 256):
        if number < 256:
            run.append(number)
        else:
            if len(run) >= LEAST_BYTES:
                yield bytes(run)
            run.clear()


def _base64(run: bytes) -> bytes:
    whole = run.translate(bytes.maketrans(b"-_", b"+/"))[: len(run) - (len(run) % 4 == 1)]
    return base64.b64decode(whole + b"=" * (-len(whole) % 4))


def _base32(run: bytes) -> bytes:
    return base64.b32decode(run + b"=" * (-len(run) % 8))


SPELLINGS: dict[str, tuple[re.Pattern[bytes], Callable[[bytes], bytes]]] = {
    "hex": (re.compile(rb"(?:[0-9a-fA-F]{2}){64,}"), binascii.unhexlify),
    "base32": (re.compile(rb"[A-Z2-7]{64,}"), _base32),
    "base64": (re.compile(rb"[A-Za-z0-9+/_-]{64,}"), _base64),
    "base85": (re.compile(rb"[0-9A-Za-z!#$%&()*+;<=>?@^_`{|}~-]{64,}"), base64.b85decode),
    "ascii85": (re.compile(rb"[!-uyz]{64,}"), base64.a85decode),
}
