"""Three-way merge of texts and of candidates, without git.

git would run the hooks and filters of whatever repository it is called in.
"""

import ast
import warnings
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher

Files = Mapping[str, bytes]


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
    if theirs in (base, ours):
        return ours
    if ours == base:
        return theirs
    if base is None or ours is None or theirs is None:
        raise Conflict(f"{name}, which one side changed and the other made or removed")
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


def _merge_chunk(base: Sequence[str], ours: Sequence[str], theirs: Sequence[str]) -> list[str]:
    if theirs in (base, ours):
        return list(ours)
    if ours == base:
        return list(theirs)
    if len(base) == len(ours) == len(theirs):
        # Neighbouring lines, such as a table of constants, changed on one side each.
        return [_merge_line(b, o, t) for b, o, t in zip(base, ours, theirs, strict=True)]
    raise Conflict(f"around the line {_first(base, ours)!r}")


def _merge_line(base: str, ours: str, theirs: str) -> str:
    if theirs in (base, ours):
        return ours
    if ours == base:
        return theirs
    raise Conflict(f"the line {base.strip()[:80]!r}")


def _first(base: Sequence[str], ours: Sequence[str]) -> str:
    return next(iter([*base, *ours]), "").strip()[:80]


def _parses(content: bytes) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
