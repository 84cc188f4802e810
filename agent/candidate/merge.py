"""Three-way merge of texts and of candidates, without git.

git would run the hooks and filters of whatever repository it is called in.
"""

import ast
import warnings
from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import TypeVar

Files = Mapping[str, bytes]
T = TypeVar("T")


class Conflict(Exception):
    """Both sides changed the same place, which the message names: only a person can decide."""


def merge_files(base: Files, ours: Files, theirs: Files) -> dict[str, bytes]:
    """`ours` with what leads from `base` to `theirs` done to it.

    Raises:
        Conflict: both sides changed the same place; the message names the file.
    """
    merged: dict[str, bytes] = {}
    for name in sorted(base.keys() | ours.keys() | theirs.keys()):
        content = _merge_file(name, base.get(name), ours.get(name), theirs.get(name))
        if content is not None:
            merged[name] = content
    return merged


def merge_texts(base: str, ours: str, theirs: str) -> str:
    """The same for one text, line by line.

    Raises:
        Conflict: both sides changed the same lines.
    """
    return "".join(_merge_lines(lines_of(base), lines_of(ours), lines_of(theirs)))


def lines_of(text: str) -> list[str]:
    """Lines with their ends, split at line feeds alone, as patches are."""
    pieces = text.split("\n")
    ended = [piece + "\n" for piece in pieces[:-1]]
    return [*ended, pieces[-1]] if pieces[-1] else ended


def first_broken_file(files: Files) -> str | None:
    """The first Python file that does not parse, if there is one."""
    for name, content in sorted(files.items()):
        if name.endswith(".py") and not _parses(content):
            return name
    return None


def _merge_file(
    name: str, base: bytes | None, ours: bytes | None, theirs: bytes | None
) -> bytes | None:
    """The merged content; none when the file is not there afterwards."""
    if base is None or ours is None or theirs is None or base in (ours, theirs):
        place = f"{name}, which one side changed and the other made or removed"
        return _side_that_changed(base, ours, theirs, place)
    try:
        return merge_texts(_text(base), _text(ours), _text(theirs)).encode(errors="surrogateescape")
    except Conflict as conflict:
        raise Conflict(f"{name}, {conflict}") from None


def _text(content: bytes) -> str:
    return content.decode(errors="surrogateescape")


def _merge_lines(base: list[str], ours: list[str], theirs: list[str]) -> list[str]:
    """Lines that both sides left alone hold the text together; between them one side decides."""
    in_ours, in_theirs = _kept_lines(base, ours), _kept_lines(base, theirs)
    anchors = [i for i in range(len(base)) if i in in_ours and i in in_theirs]
    merged: list[str] = []
    b = o = t = 0
    for anchor in anchors:
        next_o, next_t = in_ours[anchor], in_theirs[anchor]
        merged += _merge_chunk(base[b:anchor], ours[o:next_o], theirs[t:next_t])
        merged.append(base[anchor])
        b, o, t = anchor + 1, next_o + 1, next_t + 1
    return merged + _merge_chunk(base[b:], ours[o:], theirs[t:])


def _kept_lines(base: list[str], side: list[str]) -> dict[int, int]:
    """Where each line of `base` that the side kept stands there."""
    # Without the heuristic that takes frequent lines of a long text for junk, blank ones first.
    blocks = SequenceMatcher(None, base, side, autojunk=False).get_matching_blocks()
    return {block.a + i: block.b + i for block in blocks for i in range(block.size)}


def _merge_chunk(base: list[str], ours: list[str], theirs: list[str]) -> list[str]:
    if len(base) == len(ours) == len(theirs):
        # Neighbouring lines, such as a table of constants, changed on one side each.
        return [
            _side_that_changed(b, o, t, f"the line {b.strip()[:80]!r}")
            for b, o, t in zip(base, ours, theirs, strict=True)
        ]
    first = next(iter([*base, *ours]), "").strip()[:80]
    return _side_that_changed(base, ours, theirs, f"around the line {first!r}")


def _side_that_changed(base: T, ours: T, theirs: T, place: str) -> T:
    """What one side made of `base`, where the other left it alone or did the same.

    Raises:
        Conflict: each made something else of it.
    """
    if theirs in (base, ours):
        return ours
    if ours == base:
        return theirs
    raise Conflict(place)


def _parses(content: bytes) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
