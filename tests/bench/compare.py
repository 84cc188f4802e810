"""Compares researchers on one workload, and draws the picture.

`make compare` runs it: `random` is the floor, `tpe` the researcher without a key, and `scripted`
stands in for a language model: no model at all, but a patient hand (`tinker`) that goes through the
file knob by knob, a step down, a step up, following what was kept, through the real tools and the
real wire. It shows what the way through tools and judge can carry, and nothing about what a real
model would reach.

A run that was cut off goes on where it was: sessions that ended are kept, one that did not is
resumed. The sessions stay for a look inside.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from agent.program import load_program
from agent.record.chain import read_ledger
from agent.record.events import Verdict
from agent.record.history import History, fold, gain
from agent.report.summary import noise_of, split_gain
from agent.settings import Direction, Settings
from tests.support.messages_server import MessagesServer, tinker

RESEARCHERS = ("random", "tpe", "scripted")
COLOURS = {"random": "#8a8f98", "tpe": "#1f6feb", "scripted": "#d97706"}
BEGIN, END = "<!-- compare: written by `make compare` -->", "<!-- /compare -->"
LAST_STEP = 0.5
"""Width of what the last attempt gets in the picture."""

Step = Literal["run", "resume", "done"]


@dataclass(frozen=True)
class Plan:
    """What is compared."""

    program: Path
    runs: Path
    docs: Path
    seeds: tuple[int, ...]
    attempts: int
    budget_seconds: float | None

    @property
    def settings(self) -> Settings:
        """The settings of every session, but for who researches."""
        program = load_program(self.program)
        return program.settings.with_overrides(
            attempts=self.attempts, budget_seconds=self.budget_seconds
        )

    def directory(self, name: str, seed: int) -> Path:
        return self.runs / f"{name}-{seed}"


@dataclass(frozen=True)
class Result:
    """What one session came to."""

    researcher: str
    seed: int
    baseline: float
    best: float
    curve: tuple[float, ...]
    """The kept score after the baseline and after each attempt."""
    holdout_gain: float | None
    noise: float | None
    kept: int
    discarded: int
    failed: int
    invalid: int
    ended: str
    hours: float
    machine: str


def main(arguments: Sequence[str]) -> None:
    """Bring every session to its end, then draw and tell."""
    options = _parser().parse_args(arguments)
    plan = Plan(
        options.program,
        options.runs,
        options.docs,
        tuple(options.seeds),
        options.attempts,
        options.budget_seconds,
    )
    results = compare(plan, bring_further)
    (plan.runs / "compare.json").write_text(as_json(results), encoding="utf-8")
    direction = plan.settings.goal.direction
    draw(results, plan.settings, plan.docs / "compare.png")
    write_between(plan.docs / "benchmarks.md", table(results, direction, plan.settings))
    sys.stdout.write(as_json(results) if options.json else table(results, direction, plan.settings))


def compare(plan: Plan, further: Callable[[Plan, str, int, Step], None]) -> list[Result]:
    """Results of every researcher at every seed, seed by seed.

    Raises:
        SystemExit: a session did not end, or was made with other settings or on another image.
    """
    plan.runs.mkdir(parents=True, exist_ok=True)
    pairs = list(itertools.product(plan.seeds, RESEARCHERS))
    results = []
    for number, (seed, name) in enumerate(pairs, start=1):
        directory = plan.directory(name, seed)
        step = next_step(directory)
        tell(f"{number}/{len(pairs)}  {name}, seed {seed}: {step}")
        if step != "done":
            further(plan, name, seed, step)
        if next_step(directory) != "done":
            sys.exit(f"{directory} did not come to its end; the same command goes on with it")
        refuse_other_settings(directory, plan.settings)
        refuse_other_image(directory, plan.directory(RESEARCHERS[0], plan.seeds[0]))
        results.append(result_of(directory, name, seed, plan.attempts))
    return results


def next_step(directory: Path) -> Step:
    """What a session still needs; one that has not even its first entry is thrown away."""
    if not (directory / "ledger.jsonl").is_file():
        return "run"
    history = fold(read_ledger(directory))
    if history.session is None:
        shutil.rmtree(directory)
        return "run"
    return "resume" if history.ended is None else "done"


def bring_further(plan: Plan, name: str, seed: int, step: Step) -> None:
    """Run or resume one session; its output goes to our error output."""
    session = f"{name}-{seed}"
    command = [sys.executable, "-P", "-m", "agent.cli", step, "--runs", str(plan.runs)]
    if step == "resume":
        command.append(session)
    else:
        command += ["--program", str(plan.program), "--session", session, "--seed", str(seed)]
        command += ["--researcher", "claude" if name == "scripted" else name]
        command += ["--attempts", str(plan.attempts)]
        command += ["--budget-seconds", str(plan.settings.budget.seconds)]
    answers = itertools.repeat(tinker)
    with MessagesServer(answers, endless=True) if name == "scripted" else nullcontext() as server:
        wire = {"ANTHROPIC_API_KEY": "none", "ANTHROPIC_BASE_URL": server.url} if server else {}
        # How a session ended stands in its ledger; an exit code says less.
        subprocess.run(command, env=os.environ | wire, stdout=sys.stderr, check=False)


def refuse_other_settings(directory: Path, settings: Settings) -> None:
    """Stop if a session that lies there is not one of this comparison."""
    session = fold(read_ledger(directory)).session
    assert session is not None
    wanted, recorded = settings.model_dump(), session.settings.model_dump()
    differing = [
        section
        for section in wanted
        if section != "researcher" and wanted[section] != recorded[section]
    ]
    if differing:
        what = ", ".join(f"[{section}]" for section in differing)
        sys.exit(f"{directory} was made with another {what}; remove it or give other --runs")


def refuse_other_image(directory: Path, first: Path) -> None:
    """Stop if a session ran on another image: its scores would not be about its researcher."""
    here, there = (fold(read_ledger(place)).session for place in (directory, first))
    assert here is not None
    assert there is not None
    if here.image.get("image_id") != there.image.get("image_id"):
        sys.exit(
            f"{directory} ran on another image than {first}; remove it, or give other --runs and "
            "an image that stays"
        )


def result_of(directory: Path, name: str, seed: int, attempts: int) -> Result:
    """The numbers of a session that has ended.

    Raises:
        SystemExit: it has no measured baseline.
    """
    history = fold(read_ledger(directory))
    curve = best_so_far(history, attempts)
    assert history.ended is not None
    assert history.session is not None
    machine = history.session.machine
    return Result(
        researcher=name,
        seed=seed,
        baseline=curve[0],
        best=curve[-1],
        curve=curve,
        holdout_gain=holdout.gain if (holdout := split_gain(history, "holdout")) else None,
        noise=noise_of(history),
        kept=history.count(Verdict.KEPT),
        discarded=history.count(Verdict.DISCARDED),
        failed=history.count(Verdict.FAILED),
        invalid=history.count(Verdict.INVALID),
        ended=history.ended.reason.value,
        hours=history.time.active_seconds / 3600,
        machine=f"{machine.get('cpu') or 'unknown CPU'}, {machine.get('cores')} cores",
    )


def best_so_far(history: History, attempts: int) -> tuple[float, ...]:
    """The kept score after the baseline and after each attempt; level after the session's end.

    Raises:
        SystemExit: the baseline was not measured.
    """
    baseline = history.baseline
    if baseline is None or baseline.finished is None or baseline.finished.value is None:
        ended = history.ended
        sys.exit(f"the baseline was not measured: {ended.explanation if ended else 'not ended'}")
    best = [baseline.finished.value]
    for attempt in history.completed[:attempts]:
        value = attempt.finished.value if attempt.finished and attempt.kept else None
        best.append(best[-1] if value is None else value)
    return (*best, *[best[-1]] * (attempts + 1 - len(best)))


def table(results: Sequence[Result], direction: Direction, settings: Settings) -> str:
    """What the researchers came to, in Markdown."""
    seeds = len({result.seed for result in results})
    better = "lower" if direction == "minimize" else "higher"
    noise = median(result.noise or 0.0 for result in results)
    rows = [
        f"{settings.session.attempts} attempts of {settings.budget.seconds:g} s, "
        f"{seeds} seed{'' if seeds == 1 else 's'}; "
        f"{settings.goal.metric}, {better} is better; noise of one score {noise:.4f} (median); "
        f"{results[0].machine}.",
        "",
        "| researcher | best: median (lowest to highest) | gain on val | gain on holdout | kept | "
        "failed or invalid | ended |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in RESEARCHERS:
        mine = [result for result in results if result.researcher == name]
        gains = [gain(direction, result.best, result.baseline) for result in mine]
        kept = [result.holdout_gain or 0.0 for result in mine]
        last = [result.best for result in mine]
        rows.append(
            f"| {name} | {median(last):.4f} ({min(last):.4f} to {max(last):.4f}) | "
            f"{median(gains):.4f} | {median(kept):.4f} | {sum(r.kept for r in mine)} | "
            f"{sum(r.failed + r.invalid for r in mine)} | {_endings(mine)} |"
        )
    return "\n".join(rows) + "\n"


def _endings(results: Sequence[Result]) -> str:
    return ", ".join(sorted({result.ended for result in results}))


def as_json(results: Sequence[Result]) -> str:
    """Every session's numbers, for scripts."""
    sessions: list[dict[str, Any]] = [asdict(result) for result in results]
    return json.dumps({"sessions": sessions}, indent=1, allow_nan=False) + "\n"


def draw(results: Sequence[Result], settings: Settings, path: Path) -> None:
    """Best so far by attempt: each session thin, the median thick, a band over the seeds."""
    better = "lower" if settings.goal.direction == "minimize" else "higher"
    with mpl.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        axes = figure.subplots()
        for name in RESEARCHERS:
            curves = [result.curve for result in results if result.researcher == name]
            _draw_researcher(axes, name, curves)
        axes.set(xlabel="attempt", ylabel=f"best {settings.goal.metric} so far ({better} = better)")
        axes.set_xlim(0, settings.session.attempts + LAST_STEP)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", alpha=0.25)
        axes.legend(frameon=False, title="median and band over seeds", title_fontsize=9)
        # Without the drawing library's version the same sessions give the same bytes.
        figure.savefig(path, dpi=150, metadata={"Software": None})


def _draw_researcher(axes: Any, name: str, curves: Sequence[Sequence[float]]) -> None:
    by_attempt = list(zip(*[(*curve, curve[-1]) for curve in curves], strict=True))
    steps = [*range(len(by_attempt) - 1), len(by_attempt) - 2 + LAST_STEP]
    lows, highs = [min(values) for values in by_attempt], [max(values) for values in by_attempt]
    colour = COLOURS[name]
    axes.fill_between(steps, lows, highs, step="post", alpha=0.13, color=colour, linewidth=0)
    for curve in curves:
        axes.step(steps, (*curve, curve[-1]), where="post", color=colour, alpha=0.35, linewidth=0.8)
    medians = [median(values) for values in by_attempt]
    axes.step(steps, medians, where="post", color=colour, linewidth=2.2, label=name)


def write_between(path: Path, text: str) -> None:
    """Put `text` between the markers of a Markdown file, in place of what was there.

    Raises:
        SystemExit: the file has no such place.
    """
    content = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        sys.exit(f"{path} has no lines {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


def tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare researchers on one workload.")
    parser.add_argument("--program", type=Path, default=Path("program.md"))
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"))
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="gets picture and table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--attempts", type=int, default=15)
    parser.add_argument("--budget-seconds", type=float)
    parser.add_argument("--json", action="store_true", help="the numbers instead of the table")
    return parser


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where it was")
