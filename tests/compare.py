"""Compares researchers on one workload and draws the picture.

`make compare` runs it: random sampling as the floor, tpe, and a scripted stand-in for a language
model that turns one knob at a time through the real tools and the real wire. A picture and a table
come out, and the sessions stay for a look inside. Nothing here says what a real model would reach.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from agent.history import fold
from agent.ledger import read_ledger
from tests.messages_server import MessagesServer, tinker

RESEARCHERS = ("random", "tpe", "scripted")
COLOURS = {"random": "#8a8f98", "tpe": "#1f6feb", "scripted": "#d97706"}


@dataclass(frozen=True)
class Plan:
    """What is compared."""

    program: Path
    runs: Path
    seeds: tuple[int, ...]
    attempts: int
    budget_seconds: float | None


def main(arguments: Sequence[str]) -> None:
    """Run every session that is not there yet, then draw."""
    plan = _plan(arguments)
    plan.runs.mkdir(parents=True, exist_ok=True)
    curves: dict[str, list[list[float]]] = {name: [] for name in RESEARCHERS}
    for seed, name in itertools.product(plan.seeds, RESEARCHERS):
        directory = plan.runs / f"{name}-{seed}"
        if not (directory / "ledger.jsonl").is_file():
            run_session(plan, name, seed)
        curves[name].append(best_so_far(directory, plan.attempts))
    (plan.runs / "compare.md").write_text(table(curves), encoding="utf-8")
    draw(curves, plan.runs / "compare.png")
    sys.stdout.write(table(curves))


def run_session(plan: Plan, name: str, seed: int) -> None:
    """One session of one researcher; its output goes to ours."""
    with (
        MessagesServer(itertools.repeat(tinker), endless=True, tolerant=True)
        if name == "scripted"
        else nullcontext() as server
    ):
        wire = {"ANTHROPIC_API_KEY": "none", "ANTHROPIC_BASE_URL": server.url} if server else {}
        subprocess.run(
            [
                *(sys.executable, "-P", "-m", "agent.cli", "run"),
                *("--program", str(plan.program), "--runs", str(plan.runs)),
                *("--researcher", "claude" if name == "scripted" else name),
                *("--session", f"{name}-{seed}", "--seed", str(seed)),
                *("--attempts", str(plan.attempts)),
                *(("--budget-seconds", str(plan.budget_seconds)) if plan.budget_seconds else ()),
            ],
            env=os.environ | wire,
            check=True,
        )


def best_so_far(directory: Path, attempts: int) -> list[float]:
    """The kept score after the baseline and after each attempt."""
    history = fold(read_ledger(directory))
    baseline = history.baseline
    assert baseline is not None
    assert baseline.finished is not None
    assert baseline.finished.value is not None
    best = [baseline.finished.value]
    for attempt in history.completed[:attempts]:
        value = attempt.finished.value if attempt.finished and attempt.kept else None
        best.append(best[-1] if value is None else value)
    return best + [best[-1]] * (attempts + 1 - len(best))


def table(curves: dict[str, list[list[float]]]) -> str:
    """The last best of every researcher, in Markdown."""
    rows = [
        "| researcher | sessions | mean of the best | lowest | highest |",
        "|---|---|---|---|---|",
    ]
    for name, runs in curves.items():
        last = [run[-1] for run in runs]
        numbers = f"{fmean(last):.4f} | {min(last):.4f} | {max(last):.4f}"
        rows.append(f"| {name} | {len(last)} | {numbers} |")
    return "\n".join(rows) + "\n"


def draw(curves: dict[str, list[list[float]]], path: Path) -> None:
    """Best so far by attempt: the mean over seeds, and a band from the lowest to the highest."""
    with mpl.rc_context({"font.size": 10, "svg.hashsalt": "nightlab"}):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, runs in curves.items():
            by_attempt = list(zip(*runs, strict=True))
            steps = range(len(by_attempt))
            means = [fmean(values) for values in by_attempt]
            lows, highs = map(min, by_attempt), map(max, by_attempt)
            axes.fill_between(
                steps, list(lows), list(highs), step="post", alpha=0.15, color=COLOURS[name]
            )
            axes.step(steps, means, where="post", color=COLOURS[name], label=name)
        axes.set(xlabel="attempt", ylabel="best so far")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
        figure.savefig(path, dpi=150)


def _plan(arguments: Sequence[str]) -> Plan:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", type=Path, default=Path("program.md"))
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--attempts", type=int, default=15)
    parser.add_argument("--budget-seconds", type=float)
    options = parser.parse_args(arguments)
    return Plan(
        options.program,
        options.runs,
        tuple(options.seeds),
        options.attempts,
        options.budget_seconds,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
