"""Attempts, smoke runs and trials, as the record tells them."""

from dataclasses import dataclass, field
from typing import NamedTuple

from agent.causes import Cause, cause_of
from agent.record.events import (
    ATTEMPT,
    AttemptFinished,
    AttemptInterrupted,
    AttemptStarted,
    Dethroned,
    LiteralsRead,
    RunFinished,
    Scored,
    SmokeFinished,
    SmokeStarted,
    Split,
    Verdict,
)
from sandbox.contract.run import Outcome

DISTURBED = "disturbed"
"""Why a candidate has no score whose trainings others held back: that says nothing of its files."""

HELD_OUT_TEXT = "holds_held_out_text"
NO_HONEST_MODELS = frozenset({"looks_ahead", "answers_change", HELD_OUT_TEXT})
"""Reasons that an honest model gives in less than one score of 10,000 (docs/score.md). Each try to
cheat may pass by luck, so tries are what is bounded: a crash can be anybody's."""

DETHRONED = "dethroned"
"""What an attempt is called that was kept until a later score of it was refused."""


class TrialKey(NamedTuple):
    """What names a trial: what it is for, whose files it trains, at which seed."""

    purpose: str
    attempt: int
    seed: int


@dataclass
class TrialRecord:
    """Everything on record about one training with its scoring, at one seed."""

    runs: list[RunFinished] = field(default_factory=list)
    """Boxes that ended, in order; several trainings where others disturbed them."""
    scores: dict[Split, Scored] = field(default_factory=dict)
    """Of the last training."""
    boxes_of_score: list[RunFinished] = field(default_factory=list)
    """Boxes since the training or the last score: what the next score stands on."""

    @property
    def training(self) -> RunFinished | None:
        """The last training: the one that counts."""
        return next((run for run in reversed(self.runs) if run.result.box == "train"), None)

    def value(self, split: Split) -> float | None:
        """The valid score on a split, if there is one."""
        score = self.scores.get(split)
        return None if score is None else score.value

    def add_run(self, run: RunFinished) -> None:
        self.runs.append(run)
        if run.result.box == "train":  # whatever was measured before counts no more
            self.scores, self.boxes_of_score = {}, []
        else:
            self.boxes_of_score.append(run)

    def add_score(self, score: Scored) -> None:
        self.scores[score.split] = score
        self.boxes_of_score = []


@dataclass
class Refusals:
    """Scores of attempts' own files that were refused, whatever they were for.

    A resume and an interruption forget trials; what was refused in them they do not forget.
    """

    _scores: dict[tuple[TrialKey, Split], Scored] = field(default_factory=dict)

    def note(self, key: TrialKey, score: Scored, *, is_baseline: bool) -> None:
        """Take a score into account; the newest one of a trial and split counts, as it does there.

        A review also scores files that parts were taken out of: those are no attempt's own. And a
        person's own files lose nothing by a box that failed, only by what no honest model does.
        """
        variant = key.purpose.partition(" ")[2] if key.purpose.startswith("review-") else ""
        is_own = variant in ("", "baseline", "best") or variant.startswith("after-")
        self._scores.pop((key, score.split), None)
        is_refused = score.value is None and score.reason != DISTURBED
        if is_own and is_refused and (not is_baseline or score.reason in NO_HONEST_MODELS):
            self._scores[key, score.split] = score

    def of(self, number: int) -> Scored | None:
        """The first refused score of an attempt, if there is one."""
        return next((s for (key, _), s in self._scores.items() if key.attempt == number), None)


@dataclass
class Smoke:
    """One smoke run with everything that was recorded about it."""

    started: SmokeStarted
    runs: list[RunFinished] = field(default_factory=list)
    finished: SmokeFinished | None = None
    """None while it goes on, and when it was cut off."""

    def reason(self, *, answered: bool, is_reported: bool) -> str | None:
        """What its boxes showed to be wrong, as a verdict's reason.

        A training that ignores its budget is ended, which is no failure. A model box that said a
        word had loaded the checkpoint; that nobody then asked it anything may well end it badly.
        A program that reports its own score leaves no checkpoint.
        """
        for run in self.runs:
            outcome = run.result.outcome
            if run.result.box == "model":
                return None if outcome is Outcome.OK or answered else f"model_box_{outcome.value}"
            if outcome is Outcome.TIMED_OUT:
                return None
            if outcome is not Outcome.OK:
                return outcome.value
            if not run.result.output and not is_reported:
                return "no_checkpoint"
        return None


@dataclass
class Attempt:
    """One attempt with everything that was recorded about it."""

    started: AttemptStarted
    started_at: str
    runs: list[RunFinished] = field(default_factory=list)
    scores: list[Scored] = field(default_factory=list)
    """All that count: not those that an interrupted attempt asked of another one."""
    smoke: Smoke | None = None
    """The smoke run that came before its first training."""
    literals: LiteralsRead | None = None
    """What its files carry beside code; None where an attempt is no researcher's."""
    finished: AttemptFinished | None = None
    interrupted: AttemptInterrupted | None = None
    dethroned: Dethroned | None = None
    """How it stopped being the best, where a later score of it was refused."""
    beside: list[TrialKey] = field(default_factory=list)
    """Trials of the best that it asked for: a test measures both sides."""
    provisional: set[int] = field(default_factory=set)
    """Seeds of a baseline whose score stands on a training beside other work, until it is taken
    again on a quiet machine."""
    remeasured: dict[int, float] = field(default_factory=dict)
    """Scores on val from after the machine changed: they count instead of all before them."""
    counted_from: int = 0
    """How many scores there were when it was noticed that the machine had changed."""
    curves_from: int = 0
    """How many runs there were at that time: the curves of those are another machine's."""
    cost_usd: float = 0.0
    """What the model calls since the attempt before cost."""

    @property
    def number(self) -> int:
        return self.started.attempt

    @property
    def open(self) -> bool:
        return self.finished is None and self.interrupted is None

    @property
    def was_kept(self) -> bool:
        return self.finished is not None and self.finished.verdict is Verdict.KEPT

    @property
    def kept(self) -> bool:
        """Whether it was kept, and still stands."""
        return self.was_kept and self.dethroned is None

    @property
    def standing(self) -> str:
        """What became of it, in a word: its verdict, or what came after or instead of one."""
        if self.dethroned is not None:
            return DETHRONED
        if self.finished is not None:
            return self.finished.verdict.value
        return "running" if self.interrupted is None else "interrupted"

    @property
    def is_judged(self) -> bool:
        """Whether it has a verdict that its files are the reason for."""
        return self.finished is not None and not self.is_disturbed

    @property
    def is_disturbed(self) -> bool:
        """Whether others kept it from being judged."""
        return self.finished is not None and self.finished.reason == DISTURBED

    @property
    def was_stopped(self) -> bool:
        """Whether its only run was ended early, so that nobody knows its score."""
        return self.finished is not None and self.finished.early_stop is not None

    @property
    def telling_runs(self) -> list[RunFinished]:
        """Its runs; of one that failed in its smoke run those, since there are no others."""
        return self.runs or (self.smoke.runs if self.smoke else [])

    @property
    def cause(self) -> Cause | None:
        """Why it failed, as far as its runs tell; None for one that did not."""
        if self.finished is None or self.finished.verdict not in (Verdict.FAILED, Verdict.INVALID):
            return None
        return cause_of(self.finished.reason, [run.result for run in self.telling_runs])

    @property
    def trainings(self) -> list[RunFinished]:
        """Its trainings that ended, those among them that others disturbed."""
        return [run for run in self.runs if run.result.box == "train"]

    def values(self, split: Split = "val") -> dict[int, float]:
        """Valid scores by seed that count; none of an attempt that was interrupted.

        A candidate's first score chose it for a test: once there are others it counts no more. Of a
        baseline count those of a quiet machine, or those beside others, never both: a mixture says
        how much others cost, which would hide every gain of the night or make one up.
        """
        if self.interrupted is not None:
            return {}
        begin, known = (self.counted_from, self.remeasured) if split == "val" else (0, {})
        is_baseline = self.started.kind == "baseline"
        # The newest score of a seed counts, also where it takes back an older one's value; of a
        # person's own files only by what no honest model does.
        found = {
            s.seed: s.value
            for s in self.scores[begin:]
            if s.split == split
            and (s.value is not None or not is_baseline or s.reason in NO_HONEST_MODELS)
        }
        newest: dict[int, float | None] = {**known, **found}
        counted = {seed: value for seed, value in newest.items() if value is not None}
        if is_baseline and split == "val":
            return self._of_one_machine(counted)
        if not is_baseline and len(counted) > 1:
            counted.pop(self.started.seeds[0], None)
        return counted

    def _of_one_machine(self, scores: dict[int, float]) -> dict[int, float]:
        quiet = {seed: value for seed, value in scores.items() if seed not in self.provisional}
        beside = {seed: value for seed, value in scores.items() if seed in self.provisional}
        return next((group for group in (quiet, beside) if len(group) > 1), scores)

    @property
    def tested(self) -> dict[int, Scored]:
        """The scores at its fresh seeds, the newest of each: a candidate's second look and more."""
        fresh = self.started.seeds[1:] if self.started.kind == "candidate" else ()
        return {s.seed: s for s in self.scores if s.split == "val" and s.seed in fresh}

    @property
    def confirmation(self) -> str:
        """What a kept candidate went through, in words."""
        checks = sum(score.checks for score in self.tested.values())
        return f"confirmed: {len(self.tested)} seeds" + (f", {checks} checks" if checks else "")

    def key(self, seed: int) -> TrialKey:
        """The name of its own trial at a seed."""
        return TrialKey(ATTEMPT, self.number, seed)
