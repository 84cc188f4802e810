"""Noise of one score, from every repeat there is.

See docs/decisions/0003.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Self

from agent.record.attempts import Attempt

FIVE_DIGITS = 5e-6
"""What scores differ by that are equal to five digits."""


@dataclass(frozen=True)
class Noise:
    """Standard deviation of one score and how well it is known."""

    sigma: float
    degrees_of_freedom: int


@dataclass(frozen=True)
class Spread:
    """What one group of repeats says of noise."""

    squares: float
    """Sum of squares about the group's own mean."""
    degrees_of_freedom: int
    are_moved: bool
    """Whether the seed makes any difference to these files' scores."""

    @classmethod
    def of(cls, scores: Sequence[float]) -> Self:
        """The spread of one group; a single score says nothing."""
        mean = fmean(scores)
        squares = math.fsum((score - mean) ** 2 for score in scores)
        return cls(squares, len(scores) - 1, are_moved(scores))


@dataclass
class Repeats:
    """The spread of every attempt that was scored more than once; kept up to date by events."""

    _spreads: dict[int, Spread] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self._spreads)

    @property
    def spreads(self) -> tuple[Spread, ...]:
        return tuple(self._spreads.values())

    def update(self, attempt: Attempt) -> None:
        """Take an attempt's scores into account as they are now."""
        self._spreads.pop(attempt.number, None)
        scores = list(attempt.values().values())
        # What a refused attempt says of noise is no better than what it says of itself.
        if len(scores) > 1 and attempt.dethroned is None:
            self._spreads[attempt.number] = Spread.of(scores)

    def noise(self) -> Noise | None:
        """Noise of one score from all repeats; None where nothing was repeated."""
        return pooled(self._spreads.values()) if self._spreads else None

    def noise_beside(self, number: int, baseline: int | None) -> Noise | None:
        """What noise an attempt is judged by: groups of repeats that it could not make small.

        A file that pins its seed has equal scores whatever the host's seeds are. So an attempt's
        own repeats do not count for it, and nobody's do, the baseline aside, that are all equal.
        """
        groups = [
            spread
            for n, spread in self._spreads.items()
            if n != number and (n == baseline or spread.are_moved)
        ]
        return pooled(groups) if groups else None


def pooled(spreads: Iterable[Spread]) -> Noise:
    """Noise of one score from groups of repeats, each group about its own mean.

    Raises:
        ValueError: no group has two scores; nothing can be said about noise.
    """
    groups = list(spreads)
    degrees = sum(group.degrees_of_freedom for group in groups)
    if degrees < 1:
        raise ValueError("noise needs at least one repeated measurement")
    return Noise(math.sqrt(math.fsum(group.squares for group in groups) / degrees), degrees)


def pooled_noise(groups: Iterable[Sequence[float]]) -> Noise:
    """The same from the scores themselves, one group for each set of equal files.

    Raises:
        ValueError: no group has two scores.
    """
    return pooled(Spread.of(group) for group in groups if group)


def are_moved(scores: Sequence[float]) -> bool:
    """Whether a seed makes any difference to a file's scores: not to one that pins its own."""
    return max(scores) - min(scores) >= FIVE_DIGITS
