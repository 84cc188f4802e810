"""What a night has before it, in words."""

from collections.abc import Iterator
from datetime import datetime, timedelta

from agent.night.budget import seconds_left
from agent.record.attempts import Attempt
from agent.record.events import SAMPLERS
from agent.record.history import History, label_of
from agent.report.rendering import duration
from agent.text import one_line


def plan(history: History, now: datetime) -> Iterator[str]:
    """Task, limits and the time that they leave, before anything runs."""
    session, settings = history.session, history.in_force
    assert session is not None
    goal, budget, limits = settings.goal, settings.budget, settings.session
    better = "lower" if goal.direction == "minimize" else "higher"
    yield f"goal     {label_of(history)}, {better} is better"
    image = one_line(str(session.image.get("reference") or session.image.get("image_id")), 80)
    data = one_line(str(session.data.get("source", "none")), 80)
    editable = ", ".join(settings.workspace.editable)
    yield f"task     {editable} may change; data {data}; image {image}"
    bounds = [f"{limits.attempts} attempts", f"{limits.hours:g} h"]
    bounds += [f"until {limits.until}"] if limits.until else []
    is_priced = history.researcher not in SAMPLERS
    bounds += [f"${limits.usd:.2f}"] if limits.usd is not None and is_priced else []
    yield f"limits   {', '.join(bounds)}, whichever comes first"
    repeats = 0 if history.baseline else len(session.seeds)
    left = seconds_left(history, limits) - repeats * budget.seconds
    first = f"baseline {repeats} x {budget.seconds:g} s, at least "
    first += f"{duration(repeats * budget.seconds)}; then "
    yield f"plan     {first if repeats else ''}{_attempts(history, left, budget.seconds, now)}"


def outlook(history: History, now: datetime) -> str:
    """How many attempts the time will do for, by what the baseline took."""
    baseline = history.baseline
    if baseline is None or baseline.finished is None or not baseline.values():
        return ""
    each = baseline.finished.seconds / len(baseline.values())
    words = _attempts(history, seconds_left(history, history.in_force.session), each, now)
    return f"a training with its score took {duration(each)}: {words}, fewer where one is tested"


def run_in_words(history: History, attempt: int, seed: int) -> str:
    """Which of an attempt's runs it is, and how many are due, or are at most."""
    found = next((a for a in reversed(history.attempts) if a.number == attempt), None)
    if found is None or seed not in found.started.seeds:
        return ""
    seeds = found.started.seeds
    most = f"{len(seeds)}" if found.started.kind == "baseline" else f"at most {len(seeds)}"
    return f"run {seeds.index(seed) + 1} of {most}"


def name_of(attempt: Attempt) -> str:
    """What an attempt is called where it is at work."""
    is_baseline = attempt.started.kind == "baseline"
    return "the baseline" if is_baseline else f"attempt #{attempt.number}"


def _attempts(history: History, left_seconds: float, each_seconds: float, now: datetime) -> str:
    settings = history.in_force
    allowed = settings.session.attempts - len(history.completed)
    fitting = int(max(0.0, left_seconds) / max(each_seconds, 1e-9))
    end = now.astimezone() + timedelta(seconds=seconds_left(history, settings.session))
    day = "" if end.date() == now.astimezone().date() else f"{end:%a} "
    return f"at most {min(allowed, fitting)} attempts until {day}{end:%H:%M}"
