"""Finds out what early stopping saves, and what it costs.

`python -m tests.bench.study_stopping [--seeds 1 2] [--minutes M] [--docs]`: the tpe researcher
tries twenty candidates on the shipped workload without early stopping. Then the shipped rule
goes through the stored curves, point by point, as if it had been there: which runs it would have
ended and when, whether it would have ended one that was kept, and what the best would have been. So
the sampler's luck does not enter.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agent.attempt.stopping import Rule, past
from agent.program import load_program
from agent.record.attempts import Attempt
from agent.record.chain import read_blob, read_ledger
from agent.record.curves import unpacked
from agent.record.events import AttemptFinished, EarlyStop, RunFinished
from agent.record.history import History, fold
from agent.report.summary import noise_of
from tests.bench.compare import next_step
from tests.bench.studies import ROOT, interruptible, parser, tell, write_between

ATTEMPTS = 20
SECONDS = 12.0
PROGRAM_CHANGES = {
    'early_stopping = "median"': 'early_stopping = "off"',
    'smoke = "auto"': 'smoke = "off"',
}


@dataclass(frozen=True)
class Replay:
    """One session as it would have been with a rule."""

    seed: int
    trained_seconds: float
    """All first trainings of candidates, to their end."""
    saved_seconds: float
    stopped: tuple[int, ...]
    """Attempts that it would have ended."""
    lost: tuple[int, ...]
    """Those of them that were kept."""
    best: float
    best_with_rule: float
    noise: float


def main() -> None:
    """Bring every session to its end, then replay."""
    made = parser(__doc__ or "")
    made.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    options = made.parse_args()
    replays = []
    for seed in options.seeds:
        directory = options.runs / f"stopping-{seed}"
        bring_to_its_end(directory, seed, options.minutes)
        if next_step(directory) != "done":
            tell(f"{directory} has not come to its end; the same command goes on with it")
            return
        replays.append(replay(directory, seed))
    text = table(replays)
    sys.stdout.write(text)
    if options.docs:
        write_between("study_stopping", text)


def bring_to_its_end(directory: Path, seed: int, minutes: float | None) -> None:
    """Run or resume one session, for so many minutes at most."""
    step = next_step(directory)
    if step == "done":
        return
    program = directory.parent / "stopping.md"
    directory.parent.mkdir(parents=True, exist_ok=True)
    text = (ROOT / "program.md").read_text(encoding="utf-8")
    for old, new in PROGRAM_CHANGES.items():
        assert old in text, old
        text = text.replace(old, new)
    program.write_text(text, encoding="utf-8")
    command = [sys.executable, "-P", "-m", "agent.cli", step, "--runs", str(directory.parent)]
    if step == "resume":
        command.append(directory.name)
    else:
        command += ["--program", str(program), "--session", directory.name, "--seed", str(seed)]
        command += ["--researcher", "tpe", "--attempts", str(ATTEMPTS)]
        command += ["--budget-seconds", f"{SECONDS:g}"]
    running = subprocess.Popen(command, stdout=sys.stderr)
    try:
        running.wait(None if minutes is None else minutes * 60)
    except subprocess.TimeoutExpired:
        running.send_signal(signal.SIGINT)
        running.wait()


def replay(directory: Path, seed: int) -> Replay:
    """Go through a session's attempts with a rule in force."""
    entries = read_ledger(directory)
    settings = fold(entries).in_force
    shipped = load_program(ROOT / "program.md").settings.economy
    settings = settings.model_copy(update={"economy": shipped})

    def get_blob(sha: str) -> bytes:
        return read_blob(directory, sha)

    history = History()
    trained = saved = 0.0
    stopped, lost = [], []
    for entry in entries:
        event = entry.event
        if isinstance(event, AttemptFinished):
            attempt = history.attempt(event.attempt)
            first = first_training(attempt)
            if attempt.started.kind == "candidate" and first is not None:
                trained += first.result.wall_seconds
                seen = past(history, event.attempt, get_blob, settings.budget)
                rule = None if seen is None else Rule(settings, seen)
                stop = None if rule is None else stop_of(first, rule, get_blob)
                if stop is not None:
                    stopped.append(event.attempt)
                    saved += max(0.0, first.result.wall_seconds - stop.share * SECONDS)
                    if event.verdict == "kept":
                        lost.append(event.attempt)
        history.apply(entry)
    kept = [a for a in history.attempts if a.kept and a.finished is not None]
    values = {a.number: a.finished.value for a in kept if a.finished is not None}
    left = [value for number, value in values.items() if number not in lost and value is not None]
    best = values[kept[-1].number]
    assert best is not None
    return Replay(
        seed=seed,
        trained_seconds=trained,
        saved_seconds=saved,
        stopped=tuple(stopped),
        lost=tuple(lost),
        best=best,
        best_with_rule=left[-1],
        noise=noise_of(history) or 0.0,
    )


def first_training(attempt: Attempt) -> RunFinished | None:
    """The training that is watched: at its first seed, and again when it was disturbed."""
    trainings = [run for run in attempt.runs if run.result.box == "train"]
    at_first = [run for run in trainings if run.seed == trainings[0].seed]
    return at_first[-1] if at_first else None


def stop_of(first: RunFinished, rule: Rule, get_blob: Callable[[str], bytes]) -> EarlyStop | None:
    """Why the rule would have ended a training, as early as it could."""
    curve = [] if first.curve is None else unpacked(get_blob(first.curve))
    stops = (rule(curve[: length + 1]) for length in range(len(curve)))
    return next((stop for stop in stops if stop is not None), None)


def table(replays: list[Replay]) -> str:
    """What the rule would have done, in Markdown."""
    lines = [
        f"{ATTEMPTS} attempts of {SECONDS:g} s by tpe without early stopping, "
        "then with the shipped rule.",
        "",
        "| session | stopped | of them kept without it | training saved | best without | "
        "best with | difference in noise |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in replays:
        worse = (one.best_with_rule - one.best) / one.noise if one.noise else 0.0
        lost = ", ".join(f"#{number}" for number in one.lost) or "none"
        lines.append(
            f"| seed {one.seed} | {len(one.stopped)} of {ATTEMPTS} | {lost} | "
            f"{one.saved_seconds:.0f} of {one.trained_seconds:.0f} s "
            f"({one.saved_seconds / one.trained_seconds:.0%}) | {one.best:.4f} | "
            f"{one.best_with_rule:.4f} | {worse:+.1f} |"
        )
    saved, trained = sum(r.saved_seconds for r in replays), sum(r.trained_seconds for r in replays)
    stopped, kept = sum(len(r.stopped) for r in replays), sum(len(r.lost) for r in replays)
    lines.append(
        f"| all | {stopped} of {ATTEMPTS * len(replays)} | {kept or 'none'} | "
        f"{saved:.0f} of {trained:.0f} s ({saved / trained:.0%}) | | | |"
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with interruptible():
        main()
