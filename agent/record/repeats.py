"""Noise of one score, from every repeat there is.

See docs/decisions/0022.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Self

from agent.record.attempts import Attempt

FIVE_DIGITS = 5e-6
"""What scores differ by that are equal to five digits."""
FEWEST = 3
"""Scores of a candidate that say something of noise: of fewer nobody sees that a seed is pinned."""
PINNED = 0.02
"""How seldom scores of files that heed the seed lie as close together as those that do not."""


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

    @classmethod
    def of(cls, scores: Sequence[float]) -> Self:
        """The spread of one group; a single score says nothing."""
        mean = fmean(scores)
        squares = math.fsum((score - mean) ** 2 for score in scores)
        return cls(squares, len(scores) - 1)


@dataclass
class Repeats:
    """The spread of every attempt that was scored more than once; kept up to date by events."""

    _spreads: dict[int, Spread] = field(default_factory=dict)
    _baseline: int | None = None
    _earlier: list[Spread] = field(default_factory=list)
    """Of scores from before the machine changed: about their own mean they still count."""

    def __bool__(self) -> bool:
        return bool(self._spreads or self._earlier)

    @property
    def spreads(self) -> tuple[Spread, ...]:
        return (*self._earlier, *self._spreads.values())

    def update(self, attempt: Attempt) -> None:
        """Take an attempt's scores into account as they are now."""
        self._spreads.pop(attempt.number, None)
        scores = list(attempt.values().values())
        if attempt.started.kind == "baseline":
            self._baseline = attempt.number
        # What a refused attempt says of noise is no better than what it says of itself.
        is_enough = len(scores) >= (2 if attempt.number == self._baseline else FEWEST)
        if is_enough and attempt.dethroned is None:
            self._spreads[attempt.number] = Spread.of(scores)

    def shift(self, best: Attempt, doubtful: Iterable[int]) -> None:
        """The machine changed: scores of before and after are no repeats of each other.

        Args:
            best: whose scores are about to be replaced; the spread of those that it was kept for
                stays.
            doubtful: attempts that may have scores from both sides of the change.
        """
        for number in (best.number, *doubtful):
            self._spreads.pop(number, None)
        values = best.values()
        own = [values[seed] for seed in best.started.seeds if seed in values]
        if len(own) > 1:
            self._earlier.append(Spread.of(own))

    def noise(self, beside: int | None = None) -> Noise | None:
        """Noise of one score from all repeats; None where nothing was repeated.

        Args:
            beside: an attempt that is judged by it: its own scores do not count, which it could
                have made equal.
        """
        own = [spread for n, spread in self._spreads.items() if n not in (beside, self._baseline)]
        trusted = [*self._earlier, *(s for n, s in self._spreads.items() if n == self._baseline)]
        return pooled_credible(trusted, own)


def pooled_credible(trusted: Sequence[Spread], others: Sequence[Spread]) -> Noise | None:
    """Noise from groups of repeats without those that are too close together to be honest repeats.

    A file that pins its seed has equal scores whatever the host's seeds are, or scores that the
    clock alone moves; in the pool they would make the noise of a whole night look small.
    """
    if not trusted:
        return pooled(others) if others else None
    known = pooled(trusted)
    return pooled([*trusted, *(group for group in others if not is_far_below(group, known))])


def is_far_below(group: Spread, noise: Noise) -> bool:
    """Whether repeats lie closer together than noise lets them, by an F test."""
    # Imported here, since reading a record must not wait for it.
    from scipy.special import fdtri

    if noise.sigma == 0:
        return False
    closest = fdtri(group.degrees_of_freedom, noise.degrees_of_freedom, PINNED)
    return bool(group.squares / group.degrees_of_freedom < closest * noise.sigma**2)


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
