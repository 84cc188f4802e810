"""Finds whether a program heeds the seed given to it.

One that pins its own scores the same luck each time: what its repeats show is the clock's noise
alone, and any other number of its own looks like a gain.
"""

import re
from collections.abc import Mapping, Sequence

GIVEN = b"NIGHTLAB_SEED"
"""The environment variable that tells a training its seed."""
PINNED = re.compile(
    rb"\b(?:\w*seed\w*|PRNGKey|default_rng|RandomState)\s*\(\s*\d"
    rb"|\b(?:\w*seed|random_state)\s*[:=]\s*\d",
    re.IGNORECASE,
)
"""A call or a setting that gives a number for a seed."""


def pins_its_seed(files: Mapping[str, bytes], command: Sequence[str] = ()) -> bool:
    """Whether files set a seed of their own, and neither they nor a command take the given one."""
    texts = list(files.values())
    is_given = any("{seed}" in word for word in command) or any(GIVEN in text for text in texts)
    return not is_given and any(PINNED.search(text) for text in texts)
