"""Finds out how often a whole night keeps luck, and how small a gain it finds.

`python -m tests.bench.study_judge [--nights N] [--docs]`: nights are played with the judge's own
functions (`agent/attempt/judge.py`, `agent/record/repeats.py`) on scores that are drawn, so that
what is true is known: no box, no training. A night has one hundred attempts. First come nights in
which nothing is better than the best; then nights in which one attempt in ten is, by so many times
the noise. The rule before stands beside.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from agent.attempt.judge import (
    MIN_SCORES_BESIDE,
    Demands,
    Ruling,
    at_the_door,
    doubt_of_a_test,
    holds_beside,
    judge,
    lacks_scores,
)
from agent.record.repeats import FEWEST, Noise, Spread, pooled_credible
from tests.bench.studies import write_between

ATTEMPTS = 100
RATE = 0.05
MAX_REPEATS = 8
BASELINE_REPEATS = 3
NULL_NIGHTS: dict[str, tuple[dict[str, Any], str]] = {
    "the baseline's noise": ({}, "24.8 %"),
    "twice the baseline's noise": ({"noise": 2.0}, "59 %"),
    "three times": ({"noise": 3.0}, "80 %"),
    "five times": ({"noise": 5.0}, "93 %"),
    "three times, and worse by the noise": ({"noise": 3.0, "worse": 1.0}, "68 %"),
    "each with a pinned seed, the clock moves it by a tenth": ({"pins": True}, ""),
    "each trained twice at a seed, the better score counts": ({"tickets": 2}, ""),
    "the machine gets better by three times the noise at half": (
        {"shift": 3.0, "shift_at": 50},
        "",
    ),
    "the machine gets worse by as much": ({"shift": -3.0, "shift_at": 50}, ""),
    "two researchers at once": ({"researchers": 2}, ""),
}
"""What is true of every candidate, none of which is better; and the nights that kept one before."""
GAINS = {
    1.0: (2, 1.04, 0, 1.03),
    1.5: (5, 1.05, 1, 1.03),
    2.0: (11, 1.06, 2, 1.03),
    3.0: (41, 1.09, 12, 1.05),
    4.0: (72, 1.11, 32, 1.07),
    6.0: (97, 1.10, 70, 1.08),
}
"""By noise: per cent kept and trainings an attempt before this rule, at 95 % for each attempt; and
at 98.75 %, with which 5 % of nights keep something where all noise is equal. Simulated in the same
way: three looks at most, the first run counts, one is enough, nobody asks for the own spread."""
SHARE_OF_GAINS = 0.1
Draw = Callable[[], float]


@dataclass
class Files:
    """What is trained: its mean, its noise, and how it scores."""

    mean: float
    noise: float
    pinned: float | None = None
    """The luck of its own seed, where it pins one."""
    tickets: int = 1
    """How often it is trained at each seed, the best score counting."""


@dataclass
class World:
    """What is true in a night, and what the night does not know."""

    chance: random.Random
    noise: float = 1.0
    """Of candidates, in that of the baseline."""
    worse: float = 0.0
    gain: float = 0.0
    """Of one attempt in ten."""
    pins: bool = False
    """Whether every candidate brings a seed of its own; the clock leaves a tenth of the noise."""
    tickets: int = 1
    shift_at: int = ATTEMPTS + 1
    """The attempt from which on everything scores better by `shift`."""
    shift: float = 0.0
    researchers: int = 1
    """Who propose at once: files that were made for a best which is none any more."""
    at: int = 0

    def candidate(self, best: Files) -> tuple[Files, bool]:
        """The next one, and whether it is truly better than the best that it was made for."""
        is_better = bool(self.gain) and self.chance.random() < SHARE_OF_GAINS
        mean = best.mean + (self.gain if is_better else -self.worse)
        pinned = self.chance.gauss(0, 1) if self.pins else None
        return Files(mean, self.noise, pinned, self.tickets), is_better

    def score(self, files: Files) -> float:
        """Of one training now; larger is better."""
        moved = self.shift if self.at >= self.shift_at else 0.0
        if files.pinned is not None:
            return files.mean + files.pinned * files.noise + self.chance.gauss(0, 0.1) + moved
        draws = (self.chance.gauss(files.mean, files.noise) for _ in range(files.tickets))
        return max(draws) + moved


@dataclass
class Night:
    """What a night knows, and what it used."""

    world: World
    best: Files = field(default_factory=lambda: Files(0.0, 1.0))
    scores: list[float] = field(default_factory=list)
    """Of the best, as far as they count."""
    trusted: list[Spread] = field(default_factory=list)
    others: list[Spread] = field(default_factory=list)
    is_baseline_best: bool = True
    trainings: int = 0
    tests: int = 0
    false_keeps: int = 0
    true_keeps: int = 0
    gains: int = 0

    def train(self, files: Files) -> float:
        self.trainings += 1
        return self.world.score(files)

    def noise(self) -> Noise:
        mine = [Spread.of(self.scores)] if len(self.scores) > 1 else []
        trusted = [*self.trusted, *(mine if self.is_baseline_best else [])]
        found = pooled_credible(trusted, self.others + ([] if self.is_baseline_best else mine))
        assert found is not None
        return found

    def drop(self, own: list[float]) -> None:
        """A candidate was tested in vain: what its scores say of noise stays."""
        if len(own) >= FEWEST:
            self.others.append(Spread.of(own))

    def advance(self, files: Files, scores: list[float]) -> None:
        (self.trusted if self.is_baseline_best else self.others).append(Spread.of(self.scores))
        self.best, self.scores, self.is_baseline_best = files, scores, False


Rule = Callable[[Night, Files], "list[float] | None"]
"""Measures and judges a candidate: its scores that count where it is kept."""


def shipped(night: Night, files: Files) -> list[float] | None:
    """As `agent/attempt/decide.py` goes on: the door, fresh scores on both sides, side by side."""
    terms = Demands("maximize", RATE, doubt_of_a_test(RATE, night.tests), MAX_REPEATS)
    first = night.train(files)
    if at_the_door(first, night.scores, night.noise(), terms).ruling is not Ruling.REPEAT:
        return None
    night.tests += 1
    own: list[float] = []
    beside: list[float] = []
    while True:
        own.append(night.train(files))
        while lacks_scores(len(night.scores), len(own)):
            beside.append(night.train(night.best))
            night.scores.append(beside[-1])
        judgement = judge(own, night.scores, night.noise(), terms, [first])
        while judgement.ruling is Ruling.KEEP and len(beside) < MIN_SCORES_BESIDE:
            beside.append(night.train(night.best))
            night.scores.append(beside[-1])
            judgement = judge(own, night.scores, night.noise(), terms, [first])
        is_kept = judgement.ruling is Ruling.KEEP
        if is_kept and holds_beside(own, beside, night.noise(), "maximize"):
            return own
        if is_kept or judgement.ruling is Ruling.DISCARD:
            night.drop(own)
            return None


def play(world: World, rule: Rule, attempts: int = ATTEMPTS) -> Night:
    """One night."""
    night = Night(world)
    night.scores = [night.train(night.best) for _ in range(BASELINE_REPEATS)]
    waiting: list[tuple[Files, bool]] = []
    for number in range(attempts):
        world.at = number
        while len(waiting) < world.researchers:
            waiting.append(world.candidate(night.best))
        files, is_better = waiting.pop(0)
        night.gains += is_better
        scores = rule(night, files)
        if scores is not None:
            is_true = files.mean > night.best.mean
            night.true_keeps += is_true
            night.false_keeps += not is_true
            night.advance(files, scores)
    return night


def nights(count: int, **world: Any) -> list[Night]:
    """So many, each with a luck of its own."""
    return [play(World(random.Random(f"{world} {n}"), **world), shipped) for n in range(count)]


def table(count: int) -> str:
    """Both tables in Markdown."""
    lines = [
        f"{count} nights a row (a quarter in the second table) of {ATTEMPTS} attempts; a rate of "
        f"{RATE:.0%} is configured. Nothing is better than the best, and candidates have:",
        "",
        "| every candidate | nights that keep one | before | trainings an attempt |",
        "|---|---|---|---|",
    ]
    for words, (world, then) in NULL_NIGHTS.items():
        played = nights(count, **world)
        rate = sum(night.false_keeps > 0 for night in played) / count
        used = fmean(night.trainings for night in played) / ATTEMPTS
        lines.append(f"| {words} | {rate:.1%} | {then} | {used:.2f} |")
    lines += [
        "",
        f"One attempt in {1 / SHARE_OF_GAINS:.0f} is better than the best by so many times the "
        "noise; the others are as good. *Before* is the rule of one run at 95 % an attempt, which "
        "keeps luck in a quarter of nights; *at equal rate* the same rule, so strict that it does "
        "so in 5 % of them.",
        "",
        "| better by | kept | before | before, at equal rate | trainings an attempt | before | "
        "gain found by 100 trainings | before, at equal rate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for gain, (before, used_before, strict, used_strict) in GAINS.items():
        played = nights(count // 4, gain=gain)
        kept = sum(n.true_keeps for n in played) / sum(n.gains for n in played)
        used = fmean(night.trainings for night in played) / ATTEMPTS
        found = [
            100 * SHARE_OF_GAINS * gain * k / u
            for k, u in ((kept, used), (strict / 100, used_strict))
        ]
        lines.append(
            f"| {gain:g} | {kept:.0%} | {before} % | {strict} % | {used:.2f} | {used_before:.2f} | "
            f"{found[0]:.1f} | {found[1]:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Play, and tell."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--nights", type=int, default=1000, help="a row")
    options.add_argument("--docs", action="store_true", help="write it into docs/benchmarks.md")
    given = options.parse_args()
    text = table(given.nights)
    sys.stdout.write(text)
    if given.docs:
        write_between("study_judge", text)


if __name__ == "__main__":
    main()
