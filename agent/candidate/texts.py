"""How texts are written: encoding, line ends, syntax."""

import ast
import codecs
import io
import json
import re
import sys
import tokenize
import tomllib
import warnings
from collections.abc import Callable
from difflib import SequenceMatcher
from pathlib import PurePosixPath

import yaml

from agent.candidate.merge import lines_of

TEXTS = re.compile(
    r"utf-8(-sig)?|ascii|iso8859-\d+|cp\d+|koi8-\w+|gb\w+|big5\w*|shift_jis\w*|euc_\w+"
)
"""Encodings that a coding line may name: others are no texts, or take long to read."""
OWN_PYTHON = sys.version_info[:2]


class NotParsed(Exception):
    """A file that its reader would refuse.

    Args:
        line: where; 0 where that is not known.
        problem: what is wrong.
    """

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(problem)
        self.line = line
        self.problem = problem


def encoding_of(path: str, content: bytes) -> str:
    """How a file is written: a byte order mark and Python's coding line are honoured.

    Raises:
        ValueError: it names an encoding of its own that is none of texts.
    """
    if content.startswith(codecs.BOM_UTF8):
        return "utf-8-sig"
    if not path.endswith(".py"):
        return "utf-8"
    try:
        name = codecs.lookup(tokenize.detect_encoding(io.BytesIO(content).readline)[0]).name
    except (SyntaxError, LookupError):
        name = "unknown"
    if not TEXTS.fullmatch(name):
        raise ValueError(f"{path} has a coding line that names no encoding of texts")
    return name


def decoded(path: str, content: bytes) -> str:
    """A file's text, line ends as they are.

    Raises:
        ValueError: it is not in its encoding.
    """
    return content.decode(encoding_of(path, content))


def encoded(path: str, text: str, old: bytes | None) -> bytes:
    """A new text of a file in its encoding: that of its coding line, else as it was.

    Raises:
        ValueError: it cannot be written so.
    """
    mark = codecs.BOM_UTF8 if old is not None and old.startswith(codecs.BOM_UTF8) else b""
    # A coding line is plain letters, so that it reads the same in whatever it names.
    return text.encode(encoding_of(path, mark + text.encode("utf-8", "replace")))


def with_ends_of(old: str, new: str) -> str:
    """`new`, in which lines end as in `old`: those that stay as there, new ones as most do."""
    plain = new.replace("\r\n", "\n")
    windows, ends = old.count("\r\n"), old.count("\n")
    end = "\r\n" if 2 * windows > ends else "\n"
    lines = [line.removesuffix("\n") + end * line.endswith("\n") for line in lines_of(plain)]
    if windows not in (0, ends):
        before, after = lines_of(old), lines_of(plain)
        bare = [line.replace("\r\n", "\n") for line in before]
        for match in SequenceMatcher(None, bare, after).get_matching_blocks():
            lines[match.b : match.b + match.size] = before[match.a : match.a + match.size]
    return "".join(lines)


def refuse_broken(path: str, text: str, python: tuple[int, int] = OWN_PYTHON) -> None:
    """Refuse what would cost a box to find out: Python, JSON, TOML or YAML that does not parse.

    Args:
        path: its end tells what it is.
        text: of the file.
        python: whose grammar counts. What a newer one than ours may read is not refused.

    Raises:
        NotParsed: it does not.
    """
    parse = _PARSERS.get(PurePosixPath(path).suffix)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if path.endswith(".py"):
                _parse_python(path, text, python)
            elif parse is not None:
                parse(text)
    except SyntaxError as error:
        raise NotParsed(error.lineno or 1, str(error.msg)) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        said = getattr(error, "problem", None) or "it is no YAML"
        raise NotParsed(mark.line + 1 if mark else 1, said) from None
    except (ValueError, RecursionError, MemoryError, OverflowError) as error:
        found = re.search(r"line (\d+)", str(error)) if parse else None
        said = str(error) if parse and isinstance(error, ValueError) else ""
        raise NotParsed(int(found[1]) if found else 1, said) from None


def _parse_python(path: str, text: str, python: tuple[int, int]) -> None:
    try:
        # Compiled and never run: what a model writes has no business in this process.
        compile(text, path, "exec", dont_inherit=True)
    except SyntaxError:
        if python <= OWN_PYTHON:
            raise
    if python < OWN_PYTHON:
        ast.parse(text, path, feature_version=python)


def _parse_yaml(text: str) -> None:
    """Every event of it: nothing is built, so that no alias grows and no tag makes anything."""
    for _ in yaml.parse(text, Loader=_YAML):
        pass


_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""In C where it comes with the package: in Python, brackets in brackets take minutes."""
_PARSERS: dict[str, Callable[[str], object]] = {
    ".json": json.loads,
    ".toml": tomllib.loads,
    ".yaml": _parse_yaml,
    ".yml": _parse_yaml,
}
