"""Every event that a ledger can hold, one model each.

Events are born complete: what is not known when an event is written does not belong in it. Large
bodies (files, diffs, messages) are named here by the SHA-256 of their blob.
"""

from enum import StrEnum
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field

from agent.settings import Settings, Source
from sandbox.contract.record import Record, Sha256
from sandbox.contract.run import Box, RunResult, RunSpec

SCHEMA_VERSION = 2


class Verdict(StrEnum):
    """What became of an attempt."""

    KEPT = "kept"
    DISCARDED = "discarded"
    FAILED = "failed"
    INVALID = "invalid"


class StopReason(StrEnum):
    """Why a session ended."""

    ATTEMPTS = "attempts"
    HOURS = "hours"
    MONEY = "money"
    TOKENS = "tokens"
    CALLS = "calls"
    FAILURES_IN_A_ROW = "failures_in_a_row"
    DISCARDS_IN_A_ROW = "discards_in_a_row"
    REFUSED_SCORES = "refused_scores"
    STOP_TIME = "stop_time"
    STOPPED = "stopped"
    FINISHED = "finished"
    AGENT_IDLE = "agent_idle"
    STUCK = "stuck"
    API_OUTAGE = "api_outage"
    API_REFUSED = "api_refused"
    REFUSED = "refused"
    BASELINE_FAILED = "baseline_failed"
    SANDBOX_FAULT = "sandbox_fault"
    EXHAUSTED = "exhausted"


PLANNED_STOPS = frozenset(
    {
        StopReason.ATTEMPTS,
        StopReason.HOURS,
        StopReason.MONEY,
        StopReason.TOKENS,
        StopReason.CALLS,
        StopReason.FAILURES_IN_A_ROW,
        StopReason.DISCARDS_IN_A_ROW,
        StopReason.STOP_TIME,
        StopReason.STOPPED,
        StopReason.FINISHED,
        StopReason.EXHAUSTED,
    }
)

Method = Literal["tpe", "random"]
SAMPLERS: tuple[Method, ...] = ("tpe", "random")
"""Researchers that know the attempts and no conversation."""
Split = Literal["val", "holdout"]
Purpose = Annotated[
    str, Field(pattern=r"^(attempt|smoke-\d+|drift-\d+( again)?|review-\d+ [\w -]+|replay-\d+)$")
]
"""What a run is for. Those of an `attempt` alone count for its verdict."""
ATTEMPT, SMOKE, DRIFT = "attempt", "smoke-", "drift-"
"""The purpose of an attempt's runs, and how those of a smoke run and of a drift check begin."""
AttemptKind = Literal["baseline", "candidate"]


class MachineState(Record):
    """The machine at one moment; None for what it does not tell."""

    load: Annotated[float, Field(ge=0)]
    """Processes that ran or waited for a core, mean of the last minute."""
    memory_available_bytes: int | None
    cpu_mhz: int | None
    """Mean over the cores."""
    cpu_max_mhz: int | None
    governor: str | None
    temperature_celsius: float | None
    """Of the hottest sensor."""
    throttle_events: int | None
    """How often heat held a core or the whole processor back since the machine was started."""


class Disturbance(Record):
    """What the rest of the machine did while a run went on."""

    other_cores: Annotated[float, Field(ge=0)]
    """Mean number of cores used by anything but the run."""
    limit_cores: Annotated[float, Field(ge=0)]
    """How many they may use beside `idle_cores`: so many, or half of it more than `usual_cores`."""
    disturbed: bool
    idle_cores: Annotated[float, Field(ge=0)]
    """Cores of the machine that the run's limit leaves to others."""
    usual_cores: Annotated[float, Field(ge=0)]
    """What others used beside the baseline's runs; 0 while there are none to compare with."""
    speed: Annotated[float, Field(gt=0)]
    """How fast one core did a fixed piece of work beside the run, in MB hashed a second."""
    usual_speed: Annotated[float, Field(gt=0)] | None
    """The same beside the baseline's runs; None while there are none to compare with."""
    min_speed: Annotated[float, Field(ge=0)]
    """Share of the usual speed below which the run counts as disturbed."""
    before: MachineState
    after: MachineState
    held_back: tuple[str, ...]
    """Why the run had less of the machine than it should have had, such as heat."""

    @property
    def is_beside_others(self) -> bool:
        """Whether others used more than the run left them, whatever they used before, or heat."""
        return bool(self.held_back) or self.other_cores > self.idle_cores + self.limit_cores


class Arithmetic(Record):
    """The numbers a verdict was decided from; values are means of the goal's metric."""

    candidate_mean: float
    candidate_values: tuple[float, ...]
    against: int
    """The attempt that was the best when it was decided."""
    best_mean: float
    best_values: tuple[float, ...]
    gain: float
    """How much better than the best, positive when better, whatever the metric's direction."""
    noise: float
    """Standard deviation of one score, pooled over every repeat of the session."""
    degrees_of_freedom: int
    own_noise: float | None
    """The same of the candidate's scores alone; None where there is one."""
    required_gain: float
    false_keep_rate_per_night: float
    doubt_of_a_look: float
    """How likely a look alone takes luck for a gain, so that all of a night keep to its rate."""

    @property
    def gain_in_noise(self) -> float | None:
        return self.gain / self.noise if self.noise else None


class EarlyStop(Record):
    """Why a training was ended before its time, from what it said of its loss."""

    share: float
    """Share of the budget that it said to have used; all losses are those at this share."""
    loss: float
    """Its loss, as a mean over a part of the budget."""
    expected: float
    """The loss of the best's runs at that share."""
    bound: float
    """The loss up to which it would have gone on."""
    noise: float
    """Standard deviation of a loss there."""
    degrees_of_freedom: int
    compared: int
    """How many earlier runs it was compared with."""


class Usage(Record):
    """Tokens of one model call, as the service counted them."""

    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    estimated: bool = False
    """Whether the service did not count; then the call has no known price."""


class Reserve(Record):
    """The worst that the next step can use."""

    calls: int
    tokens: int
    usd: float | None
    """None where no price is known."""
    usage: Usage | None = None
    """The same tokens by kind; None where nothing is asked."""


class Repository(Record):
    """The person's git repository when the session began, as far as its workspace goes."""

    head: str
    """The commit that it stood at."""
    changed: tuple[str, ...]
    """Files of the workspace that were otherwise than there, were not there, or were gone."""


class SessionStarted(Record):
    """Everything that a session begins with: program, settings, image, engine, machine, files."""

    type: Literal["session_started"] = "session_started"
    schema_version: Literal[2] = 2
    session: str
    nightlab_version: str
    program: Sha256
    settings: Settings
    researcher: str
    image: dict[str, Any]
    engine: dict[str, Any]
    data: dict[str, Any]
    machine: dict[str, Any]
    files: dict[str, Sha256]
    """The baseline's files by path."""
    fixed_files: dict[str, Sha256]
    """The person's own files that score a run, by path."""
    repository: Repository | None
    """None where the workspace lay in no git repository."""
    seeds: tuple[int, ...]
    """The baseline's; the first also serves the first run of each candidate."""
    held_out_index: Sha256 | None = None
    """The index that candidates' files are searched with; none without splits to hold out."""
    calibration: dict[str, Any] | None = None
    """What `nightlab calibrate` found on this machine with this image; none if it was not run."""


class SessionResumed(Record):
    """A session goes on: what broke off, what was swept, the settings from here on."""

    type: Literal["session_resumed"] = "session_resumed"
    nightlab_version: str
    settings: Settings
    """The settings from here on; a resume may allow more attempts, hours or money."""
    interrupted_attempts: tuple[int, ...]
    removed_containers: tuple[str, ...]
    engine: dict[str, Any]
    """What the session goes on with."""
    machine: dict[str, Any]
    researcher: str | None = None
    """Who proposes from here on, where the person said so."""


class AttemptStarted(Record):
    """A candidate is tried: its files, its diff against the best, its hypothesis."""

    type: Literal["attempt_started"] = "attempt_started"
    attempt: int
    kind: AttemptKind
    hypothesis: str
    researcher: str
    files: dict[str, Sha256]
    diff: Sha256 | None
    """Unified diff against the best at that time; none for the baseline."""
    parent: int | None
    """The attempt whose files were the best at that time."""
    seeds: tuple[int, ...]
    """In the order of its runs: the session's first, then fresh ones that nobody was told of; of a
    baseline the session's."""


class HeldOutText(Record):
    """Blocks of val or holdout that a file of a candidate carries, never which."""

    file: str
    encoding: str
    """How it stands there, outermost first: `base85, then lzma`."""
    blocks: Annotated[int, Field(gt=0)]
    """Of 32 letters, or 16 token ids, each counted once in all of an attempt's files."""


class LiteralsRead(Record):
    """What a candidate's files carry beside code, held against text that decides the score."""

    type: Literal["literals_read"] = "literals_read"
    attempt: int
    literal_bytes: Annotated[int, Field(ge=0)]
    """Of literals and comments in Python files that may be changed, and of all others of those."""
    is_read_whole: bool
    """Whether they did not unpack to more than is looked through."""
    held_out: tuple[HeldOutText, ...]


class RunStarted(Record):
    """A box is asked for, with everything that bounds it."""

    type: Literal["run_started"] = "run_started"
    purpose: Purpose
    attempt: int
    seed: int
    spec: RunSpec

    @property
    def run_id(self) -> str:
        return self.spec.run_id

    @property
    def box(self) -> Box:
        return self.spec.box


class RunFinished(Record):
    """What became of a box, as the watchers saw it."""

    type: Literal["run_finished"] = "run_finished"
    purpose: Purpose
    attempt: int
    seed: int
    result: RunResult
    """Its log is an excerpt: the first KB and the last three, what lies between them counted."""
    log: Sha256
    """The log as the box kept it: JSON with head, tail and omitted_bytes."""
    disturbance: Disturbance | None
    """None for boxes that do not train."""
    over_budget_seconds: float
    """Seconds past the budget; 0 when within it."""
    curve: Sha256 | None = None
    """What a training said of its progress, thinned out; None when it said nothing."""
    container: Sha256 | None = None
    """JSON with the settings that the engine was asked for and what PID 1 saw of them; None from
    an executor without an engine."""
    said_tokens: Annotated[int, Field(ge=0)] | None = None
    """Tokens that a training trained on, by its own word; None when it said nothing of them."""
    mfu: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the device's peak arithmetic that a training used, by its own word on tokens and
    operations; none where either is not known."""


class SmokeStarted(Record):
    """A short training, to see whether files run at all before a whole budget is spent on them."""

    type: Literal["smoke_started"] = "smoke_started"
    smoke: int
    attempt: int
    """The attempt that it belongs to, or that would come next."""
    asked_by: Literal["nightlab", "researcher"]
    files: dict[str, Sha256]


class SmokeFinished(Record):
    """Whether files passed their smoke run: exactly one of `passed` and `reason`."""

    type: Literal["smoke_finished"] = "smoke_finished"
    smoke: int
    passed: bool
    reason: str | None
    explanation: str
    answered: bool
    """Whether the model box, with the checkpoint loaded, said a word on its channel."""
    seconds: float


class Scored(Record):
    """A measurement, or the reason why there is none: exactly one of `value` and `reason`."""

    type: Literal["scored"] = "scored"
    purpose: Purpose
    attempt: int
    seed: int
    split: Split
    value: float | None
    reason: str | None
    explanation: str
    details: dict[str, Any]
    checks: Annotated[int, Field(ge=0)]
    """How many check boxes answered beside the one whose answers are the score; see docs/score.md.
    The newest score of a trial and split is the one that counts."""
    source: Source
    """`reported`: what the training itself said, as `agent/record/reported.py` reads it."""
    sheet: Sha256 | None = None
    """What the scorer wrote, byte for byte, or the training into the file of its metric; None when
    it wrote nothing."""


class AttemptFinished(Record):
    """The verdict about an attempt, with its arithmetic."""

    type: Literal["attempt_finished"] = "attempt_finished"
    attempt: int
    verdict: Verdict
    reason: str
    """Short snake_case code."""
    explanation: str
    value: float | None
    """Mean score on val; none unless the attempt was measured."""
    arithmetic: Arithmetic | None
    seconds: float
    early_stop: EarlyStop | None = None
    """Why its training was ended before its time; then, and only then, `stopped_early`."""


class AttemptInterrupted(Record):
    """An attempt that nightlab itself could not finish: killed, stopped or a sandbox fault."""

    type: Literal["attempt_interrupted"] = "attempt_interrupted"
    attempt: int
    is_box_lost: bool
    """Whether a box of its own was lost: files that bring that about each time have failed."""
    reason: str


class Dethroned(Record):
    """A later score of the best was refused: it is the best no more."""

    type: Literal["dethroned"] = "dethroned"
    attempt: int
    """The best until now."""
    purpose: Purpose
    """What the trial was for whose score was refused; with seed and split it names the score."""
    seed: int
    split: Split
    reason: str
    explanation: str
    sheet: Sha256 | None
    """What the scorer wrote of that score, byte for byte; None when it wrote nothing."""
    best: int | None
    """The best from here on: the last kept attempt of which no score was refused. None where not
    even the baseline is left; then the session ends."""


class DriftChecked(Record):
    """The best was measured again at a seed that it has: did the machine change?"""

    type: Literal["drift_checked"] = "drift_checked"
    check: int
    """Number of the look, from 1."""
    attempt: int
    """The best at that time."""
    seed: int
    recorded: float
    """What counted as its score at that seed until now."""
    today: tuple[float, ...]
    """One score, or two where the first was beyond noise; none where it could not be measured."""
    tolerance: float
    """The largest difference that noise explains."""
    changed: bool
    """If so, the mean of today's scores is what later candidates are compared with."""
    problem: str
    """Why there is no result; empty where there is one."""
    explanation: str


class ConversationOpened(Record):
    """A conversation with a researcher begins, from a brief."""

    type: Literal["conversation_opened"] = "conversation_opened"
    conversation: int
    researcher: str
    system: Sha256
    tools: Sha256
    reason: str


class MessageAdded(Record):
    """One message of a conversation, stored byte for byte; the blob is a JSON message object."""

    type: Literal["message_added"] = "message_added"
    conversation: int
    role: Literal["user", "assistant"]
    message: Sha256


class ModelAsked(Record):
    """Written before a call, so that one that a crash cut off is not forgotten on the bill."""

    type: Literal["model_asked"] = "model_asked"
    conversation: int
    model: str
    reserve: Reserve


class ModelCalled(Record):
    """A model answered, or its answer was lost: usage, cost, request and reply by hash."""

    type: Literal["model_called"] = "model_called"
    conversation: int
    model: str
    request_id: str | None
    stop_reason: str
    usage: Usage
    cost_usd: float | None
    seconds: float
    request: Sha256 | None = None
    """See `ledger.request_sha`; None for a lost call."""
    reply: Sha256 | None = None
    """The blob of the reply as a message, also of one that was not made part of the conversation;
    None for a lost call."""

    @classmethod
    def lost(
        cls,
        conversation: int,
        model: str,
        usage: Usage,
        cost_usd: float | None,
        *,
        request_id: str | None = None,
        seconds: float = 0.0,
    ) -> Self:
        """A call whose answer never came, or not whole: charged all the same."""
        return cls(
            conversation=conversation,
            model=model,
            request_id=request_id,
            stop_reason="lost",
            usage=usage,
            cost_usd=cost_usd,
            seconds=seconds,
        )


class RetryWaited(Record):
    """The service failed and is asked again after a pause."""

    type: Literal["retry_waited"] = "retry_waited"
    conversation: int
    error: str
    wait_seconds: float


class ToolCalled(Record):
    """A researcher asks for a tool; written before it is done."""

    type: Literal["tool_called"] = "tool_called"
    call_id: str
    name: str
    input: Sha256


class ToolReturned(Record):
    """What a tool answered."""

    type: Literal["tool_returned"] = "tool_returned"
    call_id: str
    name: str
    is_error: bool
    output: Sha256


class FileChanged(Record):
    """A researcher wrote or removed a file of the workspace; whole contents are blobs."""

    type: Literal["file_changed"] = "file_changed"
    path: str
    before: Sha256 | None
    """None for a new file."""
    after: Sha256 | None
    """None for one that was removed; a rename is a new file and then a removal."""
    diff: Sha256


class Noticed(Record):
    """Something a person should be able to find later: a nudge, a refusal, a change of machine."""

    type: Literal["noticed"] = "noticed"
    kind: str
    explanation: str


class SessionEnded(Record):
    """The session is over, with its reason; a resume may follow."""

    type: Literal["session_ended"] = "session_ended"
    reason: StopReason
    explanation: str


class ReviewStarted(Record):
    """A person begins to check a session: baseline, best and every variant at fresh seeds."""

    type: Literal["review_started"] = "review_started"
    review: int
    nightlab_version: str
    baseline: int
    best: int
    seeds: tuple[int, ...]
    """None of them was used before in this session."""
    heeds_seeds: bool
    """Whether the program draws its luck from them, as far as the night could tell."""


class VariantPlanned(Record):
    """Files that a review measures, or the reason why they cannot be made."""

    type: Literal["variant_planned"] = "variant_planned"
    review: int
    variant: str
    attempt: int
    """The attempt that the variant is about."""
    left_out: tuple[int, ...]
    """The kept attempts whose changes were taken out of the best's files."""
    files: dict[str, Sha256] | None
    problem: str


class VariantMeasured(Record):
    """One seed of a variant: a score on val, or the reason why there is none."""

    type: Literal["variant_measured"] = "variant_measured"
    review: int
    variant: str
    seed: int
    value: float | None
    holdout: float | None
    reason: str | None
    explanation: str


class ReviewFinished(Record):
    """Every variant of a review is measured."""

    type: Literal["review_finished"] = "review_finished"
    review: int


class ReplayedSeed(Record):
    """A score as it was recorded and as it came out again."""

    seed: int
    recorded: float | None
    today: float | None


class ReplayFinished(Record):
    """An attempt was run again from the record, and how its scores compare."""

    type: Literal["replay_finished"] = "replay_finished"
    attempt: int
    recorded_outcome: str
    """`measured`, or the recorded reason of a failure."""
    outcome: str
    scores: tuple[ReplayedSeed, ...]
    noise: float | None
    largest_difference: float | None
    """Between a recorded score and today's at the same seed."""
    agrees: bool
    explanation: str
    is_comparable: bool
    """Whether both outcomes are the program's own doing; if not, it agrees by no means."""


class HumanDecided(Record):
    """A person took the result or turned it down."""

    type: Literal["human_decided"] = "human_decided"
    decision: Literal["approve", "reject"]
    reason: str
    person: str
    email: str
    attempt: int
    """Whose files it is about: the best at that time, or another attempt that still stood."""
    variant: str
    """`best`, or the review's smaller equal model."""
    files: dict[str, Sha256]
    patch: Sha256 | None
    branch: str | None
    commit: str | None
    unmeasured: tuple[str, ...]
    """Files of the branch's workspace that are not those that were measured."""


Event = Annotated[
    SessionStarted
    | SessionResumed
    | AttemptStarted
    | LiteralsRead
    | RunStarted
    | RunFinished
    | SmokeStarted
    | SmokeFinished
    | Scored
    | AttemptFinished
    | AttemptInterrupted
    | Dethroned
    | DriftChecked
    | ConversationOpened
    | MessageAdded
    | ModelAsked
    | ModelCalled
    | RetryWaited
    | ToolCalled
    | ToolReturned
    | FileChanged
    | Noticed
    | SessionEnded
    | ReviewStarted
    | VariantPlanned
    | VariantMeasured
    | ReviewFinished
    | ReplayFinished
    | HumanDecided,
    Field(discriminator="type"),
]

EVENT_TYPES: tuple[str, ...] = tuple(
    kind.model_fields["type"].default for kind in get_args(get_args(Event)[0])
)


class Entry(Record):
    """One line of the ledger: an event in its place in the chain."""

    seq: Annotated[int, Field(ge=0)]
    at: str
    """UTC time of writing, ISO 8601."""
    previous: Sha256
    hash: Sha256
    event: Event
