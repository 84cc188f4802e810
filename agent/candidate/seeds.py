"""Finds whether a program heeds the seed given to it.

One that pins its own scores the same luck each time: what its repeats show is the clock's noise
alone, and any other number of its own looks like a gain.
"""

import re
from collections.abc import Mapping, Sequence

GIVEN = b"NIGHTLAB_SEED"
"""The environment variable that tells a training its seed."""
# A model writes what is searched, and `re` cannot be interrupted: each repeat has a bound.
_NUMBER = rb"[-+]?(?:0x[0-9a-f_]{1,40}|\d[\d_]{0,40})(?![\w.])"
_CALL = rb"\w{0,40}seeds?(?:_all|_everything|_torch|_rngs?)?"
"""What seeds by its name, as manual_seed_all; seed_points does not."""
_SETTING = rb"(?!(?:n|num|max)_)\w{0,40}seed|random_state"
_BLANKS = rb"\s{0,40}"
PINNED = re.compile(
    rb"(\b(?:%b|PRNGKey|default_rng|RandomState)%b\(%b" % (_CALL, _BLANKS, _BLANKS)
    + rb"|\b(?:%b)[\"']?%b[:=]%b(?:\w{1,40}%b=%b)?" % (_SETTING, *[_BLANKS] * 4)
    + rb"|--[\w-]{0,40}seed[\"'][^\n)]{0,200}?\bdefault%b=%b)" % (_BLANKS, _BLANKS)
    + _NUMBER,
    re.IGNORECASE,
)
"""A call, a setting or an option that gives a number for a seed."""
_REMARK = re.compile(rb"\s*(?:#.*)?")
_SEEDS = re.compile(
    rb"\s*(?:\w+\.){0,9}%b\(%b[\w.]{0,80}%b\)\s*(?:#.*)?" % (_CALL, _BLANKS, _BLANKS),
    re.IGNORECASE,
)
"""A line that seeds and does nothing else."""


def pins_its_seed(files: Mapping[str, bytes], command: Sequence[str] = ()) -> bool:
    """Whether files set a seed of their own, and neither they nor a command take the given one."""
    texts = list(files.values())
    is_given = any("{seed}" in word for word in command) or any(GIVEN in text for text in texts)
    return not is_given and any(PINNED.search(text) for text in texts)


def is_only_a_seed(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> bool:
    """Whether files differ in nothing but the numbers that they give for seeds: another draw."""
    if before.keys() != after.keys():
        return False
    pairs = [(_code(text), _code(after[name])) for name, text in before.items()]
    is_equal = all(_without_seeds(old) == _without_seeds(new) for old, new in pairs)
    return is_equal and any(old != new for old, new in pairs)


def _code(text: bytes) -> list[bytes]:
    """Its lines but for empty ones and remarks."""
    return [line for line in text.splitlines() if not _REMARK.fullmatch(line)]


def _without_seeds(lines: Sequence[bytes]) -> list[bytes]:
    """The same with one number for every seed, and without the lines that only seed."""
    return [PINNED.sub(rb"\g<1>0", line) for line in lines if not _SEEDS.fullmatch(line)]
