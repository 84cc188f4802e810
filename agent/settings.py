"""The settings of program.md, each value checked.

One class a table, in the order in which program.md has them; `Settings` at the end holds them all.
Errors show an example: the default, or what stands beside the setting. Whatever bounds something
has no default: a limit that is missing is an error and not infinity.
"""

import json
import re
from itertools import permutations
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from agent.text import labelled
from sandbox.contract.errors import NightlabError
from sandbox.contract.gpu import GpuMemory, MemoryBound
from sandbox.contract.record import Record
from sandbox.contract.run import Limits

Direction = Literal["minimize", "maximize"]
Source = Literal["scored", "reported"]
"""Where a score comes from: boxes that the candidate cannot reach, or its own word."""

FIXED_FILES = ("prepare.py", "evaluate.py")
"""Files of a workspace that decide the score; the agent may read them and never write them."""

RESERVED_PLACES = frozenset(
    [
        "nightlab",
        "out",
        "tmp",
        "dev",
        "proc",
        "sys",
        "etc",
        "workspace",
        "data",
        "evaluate",
        "checkpoint",
    ]
)
"""At the root of a box; no folder of the person's is shown there."""

MAX_CHECKS = 8
"""How many check boxes a score may have."""

SIZE_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
SIZE_PATTERN = re.compile(r"^([0-9]{1,15})\s*([kmg]?)b?$", re.IGNORECASE)


def parse_size(value: object) -> object:
    """Bytes of a size such as "512m" or "8g"; a whole number counts bytes.

    Raises:
        ValueError: a text that is no size.
    """
    if not isinstance(value, str):
        return value
    match = SIZE_PATTERN.match(value.strip())
    if match is None:
        raise ValueError("not a size: a whole number and k, m or g")
    return int(match[1]) * SIZE_UNITS[match[2].lower()]


Size = Annotated[int, BeforeValidator(parse_size)]
Duration = Annotated[float, Field(gt=0, le=366 * 86_400)]
GpuName = Annotated[str, Field(pattern=r"^[0-9A-Za-z:.-]{1,64}$")]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_.-]{0,63}$")]
Metric = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_./@-]{0,63}$")]


class ProgramError(NightlabError):
    """program.md, or a flag that overrides it, says something nightlab cannot use."""

    usual_hint = "nightlab init puts a program.md to compare with into an empty directory"


class Section(Record):
    """One table of the settings; values are taken as they are written, never converted."""

    # Strict, or `hours = true` would be one hour. By both names: program.md says `memory = "4g"`,
    # the record and the code say `memory_bytes`.
    model_config = ConfigDict(strict=True, validate_by_name=True, validate_by_alias=True)


class Goal(Section):
    """What the night is after."""

    metric: Metric = "val_bpb"
    direction: Direction = "minimize"
    source: Source = "scored"
    """`scored`: by evaluate.py in boxes of its own; `reported`: its own word (decision 0009)."""
    pattern: Annotated[str, Field(min_length=1, max_length=500)] | None = Field(
        None, examples=[r"val loss ([\d.]+)"]
    )
    """Read from the log; its first group is the number. None for a line `metric: number`."""
    file: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None, examples=["metrics.json"]
    )
    """Read from this file that a training writes, instead of its log."""
    key: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None, examples=["eval/acc"]
    )
    """In that file; None for the metric's name."""
    take: Literal["last", "best"] = "last"
    """Which of several counts: the last, or the best that the training ever had."""

    @field_validator("pattern")
    @classmethod
    def _has_a_group(cls, pattern: str | None) -> str | None:
        try:
            groups = 1 if pattern is None else re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        if not groups:
            raise ValueError("has no group: put round brackets around the number")
        return pattern

    @field_validator("file")
    @classmethod
    def _file_that_is_read(cls, file: str | None) -> str | None:
        if file is not None and not _is_plain(file):
            raise ValueError("is no plain relative path, as the program's own directory has it")
        if file is not None and not file.endswith((".json", ".jsonl", ".ndjson", ".csv", ".tsv")):
            raise ValueError("is none of .json, .jsonl, .ndjson, .csv, .tsv")
        return file

    @model_validator(mode="after")
    def _read_in_one_way(self) -> Self:
        given = [name for name in ("pattern", "file", "key") if getattr(self, name) is not None]
        if self.take == "best":
            given.append("take")
        if given and not self.is_reported:
            raise ValueError(f'has {given[0]}, which only source = "reported" reads')
        if "pattern" in given and "file" in given:
            raise ValueError("has both a pattern and a file; the metric is read from one")
        if "key" in given and "file" not in given:
            raise ValueError("has a key and no file that it stands in")
        return self

    @property
    def expected(self) -> str:
        """What must be there for a score, in words."""
        if self.file is not None:
            return f"`{self.key or self.metric}` in the file {self.file}"
        if self.pattern is not None:
            return f"a match of the pattern `{self.pattern}`"
        return f"a line `{self.metric}: number`"

    @property
    def is_reported(self) -> bool:
        return self.source == "reported"

    @property
    def label(self) -> str:
        """The metric, and whose word it is where nobody checked it."""
        return labelled(self.metric, is_self_reported=self.is_reported)


class ProgressSettings(Section):
    """How far a training is, where it does not say so in JSON."""

    pattern: Annotated[str, Field(min_length=1, max_length=500)] | None = Field(
        None, examples=[r"step (?P<step>\d+).*loss (?P<loss>[\d.]+)"]
    )
    """Matched in each line of the log; named groups loss, and maybe step and tokens."""

    @field_validator("pattern")
    @classmethod
    def _has_a_loss(cls, pattern: str | None) -> str | None:
        try:
            names = {"loss"} if pattern is None else set(re.compile(pattern).groupindex)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        if "loss" not in names or not names <= {"loss", "step", "tokens"}:
            raise ValueError("needs a group (?P<loss>…), and may have (?P<step>…), (?P<tokens>…)")
        return pattern


class WorkspaceSettings(Section):
    """Which files an experiment is made of, what trains, what the agent may write."""

    path: Annotated[str, Field(max_length=1024)] = "workspace"
    """Beside program.md; "." for the directory in which it lies."""
    # Not strict where a tuple is kept: toml and JSON have lists only.
    command: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[^\x00]+$", max_length=4096)], ...],
        Field(min_length=1, max_length=64, strict=False),
    ] = ("python3", "train.py")
    editable: Annotated[tuple[str, ...], Field(min_length=1, max_length=32, strict=False)] = Field(
        ("train.py",), examples=[["train.py", "src/*.py"]]
    )
    keep: Annotated[tuple[str, ...], Field(max_length=32, strict=False)] = Field(
        (), examples=[["out/*.pt"]]
    )
    """What of a reporting program's own directory comes back; what is in its output always does."""
    leave_out: Annotated[tuple[str, ...], Field(max_length=64, strict=False)] = Field(
        (), examples=[["docs", "assets/*.mp4"]]
    )
    """Folders and files that no session copies, beside what git ignores."""
    max_files: Annotated[int, Field(ge=1, le=200_000)] = 5000
    """Of all that a session copies; the editable ones are 500 at most."""
    max_bytes: Annotated[Size, Field(ge=2**20, le=2**34)] = Field(
        256 * 2**20, alias="max_size", examples=["1g"]
    )
    """Of the same; the editable ones hold 16 MiB at most."""

    @field_validator("keep", "leave_out")
    @classmethod
    def _plain_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        if not all(map(_is_plain, patterns)):
            raise ValueError("holds a path that is not plain and relative")
        return patterns

    @field_validator("path")
    @classmethod
    def _plain_and_relative(cls, path: str) -> str:
        if path != "." and not _is_plain(path):
            raise ValueError('is neither a plain relative path nor "."')
        return path

    @field_validator("editable")
    @classmethod
    def _inside_and_not_fixed(cls, editable: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in editable:
            if not _is_plain(pattern):
                raise ValueError("holds a path that is not plain and relative")
            if pattern in FIXED_FILES:
                raise ValueError(f"holds {pattern}, which decides the score and stays fixed")
            if any("**" in part and part != "**" for part in pattern.split("/")):
                raise ValueError("holds '**' inside a name; it stands for folders: src/**/*.py")
        return editable


def _is_plain(path: str) -> bool:
    return "\0" not in path and all(p and not p.startswith(".") for p in path.split("/"))


class Budget(Section):
    """What one training may use (decision 0002)."""

    kind: Literal["wall", "tokens", "fence", "cut"] = Field(examples=["wall"])
    """`fence`: the program ends by itself, and time only ends one that does not. `cut`: time ends
    it, and what it said of itself until then counts."""
    seconds: Duration = Field(examples=[300])
    """Wall budget; with a tokens budget the time the tokens must fit into."""
    tokens: Annotated[int, Field(gt=0)] | None = Field(None, examples=[2_000_000])
    grace_seconds: Duration = Field(examples=[60])
    """Added to `seconds` it gives the hard limit at which a run is killed."""

    @model_validator(mode="after")
    def _tokens_belong_to_a_tokens_budget(self) -> Self:
        if self.kind == "tokens" and self.tokens is None:
            raise ValueError('has kind = "tokens" but no tokens; add a line like tokens = 2000000')
        if self.kind != "tokens" and self.tokens is not None:
            raise ValueError(
                f'has tokens but kind = "{self.kind}"; remove tokens, or write kind = "tokens"'
            )
        return self


class BoxLimits(Section):
    """What bounds a train box; every one must be given."""

    memory_bytes: Annotated[Size, Field(ge=16 * 2**20)] = Field(alias="memory", examples=["4g"])
    cpus: Annotated[float, Field(gt=0, le=4096)] = Field(examples=[2])
    pids: Annotated[int, Field(ge=4, le=2**20)] = Field(examples=[256])
    tmp_bytes: Annotated[Size, Field(ge=2**20)] = Field(alias="tmp", examples=["1g"])
    shm_bytes: Annotated[Size, Field(ge=2**20)] = Field(alias="shm", examples=["512m"])
    output_bytes: Annotated[Size, Field(ge=2**12)] = Field(alias="output", examples=["512m"])
    output_files: Annotated[int, Field(ge=1, le=1000)] = Field(examples=[64])
    open_files: Annotated[int, Field(ge=64, le=2**20)] = Field(examples=[1024])
    log_bytes: Annotated[Size, Field(ge=2**12, le=2**22)] = Field(alias="log", examples=["256k"])
    loopback: bool = False
    """Whether processes of one training may speak over network sockets, as torchrun's do."""


class Scoring(Section):
    """What bounds the model boxes and the scorer box."""

    wall_seconds: Duration = Field(examples=[300])
    memory_bytes: Annotated[Size, Field(ge=16 * 2**20)] = Field(alias="memory", examples=["2g"])
    model_boxes: Annotated[int, Field(ge=1, le=2)] = Field(1, examples=[2])
    """1 for a scorer that speaks to one, 2 for one that compares several (decision 0015)."""


class SessionLimits(Section):
    """What ends a night: whichever comes first."""

    attempts: Annotated[int, Field(ge=1, le=100_000)] = Field(examples=[100])
    hours: Annotated[float, Field(gt=0, le=24 * 366)] = Field(examples=[10.0])
    usd: Annotated[float, Field(gt=0)] | None = Field(None, examples=[20.0])
    """Money for the language model; none for no limit."""
    tokens: Annotated[int, Field(gt=0)] | None = Field(None, examples=[20_000_000])
    """Tokens of the language model, in and out; none for no limit."""
    calls: Annotated[int, Field(ge=1)] | None = Field(None, examples=[1000])
    """Calls of the language model; none for no limit."""
    until: Annotated[str, Field(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$")] | None = Field(
        None, examples=["07:30"]
    )
    """Local time; the next time that it comes, the night ends."""
    max_failures_in_a_row: Annotated[int, Field(ge=1)] = Field(examples=[10])
    max_refused_scores: Annotated[int, Field(ge=1)] = 3
    """Of one researcher, for what no honest model does: then its part of the night is over."""
    max_discards_in_a_row: Annotated[int, Field(ge=1)] | None = Field(None, examples=[40])
    """Attempts of which none was kept; none for no limit."""


class NoiseSettings(Section):
    """How sure the judge must be (decision 0022)."""

    baseline_repeats: Annotated[int, Field(ge=2, le=100)] = 3
    false_keep_rate_per_night: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    # Fewer than three say too little of a candidate's own spread; see `judge.MIN_SCORES`.
    max_repeats: Annotated[int, Field(ge=3, le=100)] = 8
    smallest_gain: Annotated[float, Field(gt=0)] | None = Field(None, examples=[0.005])
    """What a gain must be worth, however sure it is; all there is where noise is not known."""
    check_best_every: Annotated[int, Field(ge=0, le=100_000)] = 25
    """Attempts after which the best is measured again (decision 0010); 0 for never."""


class DisturbanceSettings(Section):
    """When the rest of the machine spoils a run (decision 0017)."""

    max_other_cores: Annotated[float, Field(ge=0)] = 0.06
    """Beside those that a run leaves free; or half of it more than beside the baseline."""
    min_speed: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Share of the speed that the machine had beside the baseline's runs."""
    max_repeats: Annotated[int, Field(ge=0, le=100)] = 2


class Economy(Section):
    """How the night saves time on runs that cannot win (decision 0012)."""

    smoke: Literal["off", "auto", "always"] = "auto"
    smoke_seconds: Duration = 5.0
    """Budget of a smoke run; after twice as much it is ended."""
    max_smokes: Annotated[int, Field(ge=0, le=100)] = 3
    """How many the researcher may ask for between two attempts."""
    early_stopping: Literal["off", "median"] = "median"
    stop_after: Annotated[float, Field(ge=0.1, lt=1)] = 0.33
    """Share of the budget before which no run is stopped."""


class ResearcherSettings(Section):
    """Who proposes the next candidate."""

    name: Literal["auto", "claude", "tpe", "random"] = "auto"
    provider: Literal["anthropic", "bedrock", "vertex"] = "anthropic"
    model: Annotated[str, Field(min_length=1, max_length=128)] = "claude-sonnet-5-5"
    then: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=128)], ...],
        Field(max_length=8, strict=False),
    ] = Field(("tpe",), examples=[["claude-opus-5-5", "tpe"]])
    """Who goes on when one cannot: models' ids, `tpe`, `random`; nobody where this is empty."""
    max_output_tokens: Annotated[int, Field(ge=1024, le=128_000)] = 32_000
    max_conversation_tokens: Annotated[int, Field(ge=16_000)] = 120_000
    thinking: Literal["auto", "off"] = "auto"
    """Off asks neither for thinking nor for an effort."""
    effort: Literal["low", "medium", "high", "xhigh", "max"] = "high"
    read_seconds: Annotated[float, Field(ge=0.1, le=3600)] = 120.0
    """Silence after which a call is given up: a server of one's own may read for minutes."""
    price_usd_per_million: Annotated[
        tuple[Annotated[float, Field(ge=0)], ...], Field(max_length=4, strict=False)
    ] = Field((), examples=[[2.0, 10.0]])
    """Input and output, maybe a read from and a write to the cache; empty for the public list's."""

    @field_validator("price_usd_per_million")
    @classmethod
    def _two_or_four(cls, price: tuple[float, ...]) -> tuple[float, ...]:
        if len(price) not in (0, 2, 4):
            raise ValueError("input and output, or these, a cache read and a cache write")
        return price


class Hardware(Section):
    """Where the boxes run."""

    profile: Name = "cpu"
    base_image: Annotated[str, Field(max_length=300, pattern=r"^\S*$")] = Field(
        "", examples=["team/base:7"]
    )
    gpus: Annotated[tuple[GpuName, ...], Field(max_length=64, strict=False)] = Field(
        (), examples=[["0", "2"]]
    )
    """Those that runs may have, by index or id; none for all of the profile's kind."""
    requirements: Annotated[str, Field(max_length=300, pattern=r"^[^\x00]*$")] = Field(
        "", examples=["requirements.txt"]
    )
    """A file beside program.md that names packages for the image; empty for torch alone."""
    gpus_per_run: Annotated[int, Field(ge=1, le=64)] = 1
    gpu_memory_bytes: Annotated[Size, Field(ge=2**20)] | None = Field(
        None, alias="gpu_memory", examples=["20g"]
    )
    """What a run may use of each of its GPUs; none for all."""
    gpu_memory_at_least: MemoryBound = "watchdog"

    def gpu_memory(self, allocator_variable: str) -> GpuMemory | None:
        """The bound as runs are asked for it; none for no bound.

        Args:
            allocator_variable: see `GpuMemory`.
        """
        if self.gpu_memory_bytes is None:
            return None
        return GpuMemory(
            bytes=self.gpu_memory_bytes,
            at_least=self.gpu_memory_at_least,
            allocator_variable=allocator_variable,
        )


class DataFolder(Record):
    """A folder or file of the person's that trainings see where they look for it."""

    model_config = ConfigDict(strict=True, validate_by_name=True, validate_by_alias=True)

    source: Annotated[str, Field(pattern=r"^[^\x00]+$", max_length=4096, alias="from")]
    at: Annotated[str, Field(pattern=r"^[^\x00:]*$", max_length=1024)] = ""
    """In the program's own directory, below "~/" or from "/"; without it only `$NIGHTLAB_DATA`."""

    @property
    def path(self) -> Path:
        """Where it lies on this machine."""
        return Path(self.source).expanduser().absolute()

    @field_validator("at")
    @classmethod
    def _without_leaving(cls, at: str) -> str:
        if ".." in at.split("/"):
            raise ValueError('has "..": name the place itself')
        parts = [part for part in at.split("/") if part not in ("", ".")]
        if at.startswith("/") and (not parts or parts[0] in RESERVED_PLACES):
            raise ValueError(
                f"is in the box's own /{parts[0] if parts else ''}: take another place"
            )
        if parts == ["~"]:
            raise ValueError('is the box\'s whole home: name a place below it, as "~/.cache/x"')
        return "/" * at.startswith("/") + "/".join(parts) or at[:1]

    @property
    def place(self) -> PurePosixPath:
        """Where a program finds it, in one form for all: its own directory lies in its home."""
        return PurePosixPath(
            self.at if self.at.startswith(("/", "~/")) else f"~/workspace/{self.at}"
        )


class DataSettings(Section):
    """What is learned from."""

    folders: Annotated[tuple[DataFolder, ...], Field(max_length=32, strict=False)] = Field(
        (), examples=[[{"from": "~/sets/mnist", "at": "data"}]]
    )
    """Of a program that reports its own score; each may have a table [[data]] of its own."""
    source: Annotated[str, Field(pattern=r"^([a-z][a-z0-9_-]*|(folder|url|generated):.+)$")] = (
        "shakespeare"
    )
    vocab_size: Annotated[int, Field(ge=256, le=65_536)] = 1024
    context: Annotated[int, Field(ge=8, le=65_536)] = 256
    rows: Annotated[int, Field(ge=4, le=1_000_000)] = 1024
    """Of val and of holdout at most."""

    @field_validator("folders")
    @classmethod
    def _side_by_side(cls, folders: tuple[DataFolder, ...]) -> tuple[DataFolder, ...]:
        for one, other in permutations(folders, 2):
            if one.path == other.path:
                raise ValueError(f"shows {one.source} twice: name it once")
            if one.at and other.at and other.place.is_relative_to(one.place):
                raise ValueError(
                    f'shows one folder at "{other.at}" and another at "{one.at}": none may lie in '
                    "another, so put both into one folder, or take places side by side"
                )
        return folders


class RecordSettings(Section):
    """Where the ledger's head is written down a second time."""

    anchor: Annotated[str, Field(pattern=r"^(/|~/)[^\x00]+$", max_length=4096)] | None = Field(
        None, examples=["~/nightlab-heads.jsonl"]
    )
    """None for no second place."""


class Settings(Section):
    """The toml block of program.md, checked."""

    goal: Goal = Goal()
    progress: ProgressSettings = ProgressSettings()
    workspace: WorkspaceSettings = WorkspaceSettings()
    budget: Budget
    limits: BoxLimits
    scoring: Scoring | None = Field(None, validate_default=True)
    """None where the program reports its own score: then there are no boxes that score."""
    session: SessionLimits
    noise: NoiseSettings = NoiseSettings()
    disturbance: DisturbanceSettings = DisturbanceSettings()
    economy: Economy = Economy()
    researcher: ResearcherSettings = ResearcherSettings()
    hardware: Hardware = Hardware()
    data: DataSettings | None = Field(None, validate_default=True)
    """None where the program reports its own score and brings what it needs."""
    record: RecordSettings = RecordSettings()

    # Validators of a field and not of the whole, so that an error names the section's own line.
    @field_validator("scoring")
    @classmethod
    def _scored_by_boxes(cls, scoring: Scoring | None, info: ValidationInfo) -> Scoring | None:
        goal = info.data.get("goal", Goal())
        if scoring is None and not goal.is_reported:
            raise PydanticCustomError("missing", "field required")
        if scoring is not None and goal.is_reported:
            raise ValueError('bounds boxes that source = "reported" does not have; remove it')
        return scoring

    @field_validator("budget")
    @classmethod
    def _cut_by_itself_scored(cls, budget: Budget, info: ValidationInfo) -> Budget:
        if budget.kind == "cut" and not info.data.get("goal", Goal()).is_reported:
            raise ValueError('has kind = "cut", which is for source = "reported" under [goal]')
        return budget

    @field_validator("data", mode="before")
    @classmethod
    def _several(cls, data: object) -> object:
        return {"folders": data} if isinstance(data, list) else data

    @field_validator("data")
    @classmethod
    def _prepared_or_shown(
        cls, data: DataSettings | None, info: ValidationInfo
    ) -> DataSettings | None:
        if not info.data.get("goal", Goal()).is_reported:
            if data is not None and data.folders:
                raise ValueError(
                    'names folders, which only source = "reported" under [goal] shows to a '
                    'program; what is scored has [data] with source = "folder:PATH"'
                )
            return data or DataSettings()
        if data is not None and not data.folders and not data.source.startswith("folder:"):
            raise ValueError(
                'with source = "reported" is [[data]] with from = "PATH" and at = "PLACE", has '
                'source = "folder:PATH", or is left out'
            )
        return data

    @property
    def folders(self) -> tuple[DataFolder, ...]:
        """What a program that reports its own score sees of the person's data."""
        if self.data is None or not self.goal.is_reported:
            return ()
        return self.data.folders or (DataFolder(source=self.data.source.removeprefix("folder:")),)

    def train_limits(self, *, is_smoke: bool = False) -> Limits:
        """Limits of a train box: the budget and its grace; a smoke run is ended in twice its time.

        A smoke run's script may ignore its budget, and has passed all the same.
        """
        economy, budget = self.economy, self.budget
        wall = 2 * economy.smoke_seconds if is_smoke else budget.seconds + budget.grace_seconds
        return Limits(wall_seconds=wall, **self.limits.model_dump())

    def smoke_budget(self) -> Budget:
        """What a smoke run may use: its seconds, or its part of the tokens."""
        seconds = self.economy.smoke_seconds
        part = min(1.0, seconds / self.budget.seconds)
        tokens = None if self.budget.tokens is None else max(1, int(part * self.budget.tokens))
        return self.budget.model_copy(update={"seconds": seconds, "tokens": tokens})

    def scorer_limits(self) -> Limits:
        """Limits of a scorer box: it has the time of all model boxes that it may ask in turn."""
        limits, boxes = self.scoring_limits(), 1 + MAX_CHECKS if self.model_boxes > 1 else 1
        return limits.model_copy(update={"wall_seconds": boxes * limits.wall_seconds})

    def scoring_limits(self) -> Limits:
        """Limits of a model box; a reported score has none."""
        assert self.scoring is not None
        bounds = self.scoring.model_dump(exclude={"model_boxes"})
        return Limits(**{**self.limits.model_dump(), **bounds, "loopback": False})

    @property
    def model_boxes(self) -> int:
        """How many model boxes a score stands on; a reported one stands on none."""
        return self.scoring.model_boxes if self.scoring else 0

    def with_overrides(
        self,
        *,
        attempts: int | None = None,
        hours: float | None = None,
        usd: float | None = None,
        budget_seconds: float | None = None,
        researcher: str | None = None,
        model: str | None = None,
        price: tuple[float, ...] | None = None,
        max_output_tokens: int | None = None,
        max_conversation_tokens: int | None = None,
        base_image: str | None = None,
        gpus: str | None = None,
    ) -> Self:
        """These settings with what flags say instead; a flag that was not given is None.

        Another model has the public list's price, unless `price` says one.

        Raises:
            ProgramError: a flag's value is out of range; the message names the flag.
        """
        if price is None and model not in (None, self.researcher.model):
            price = ()
        flags = {
            ("session", "attempts"): ("--attempts", attempts),
            ("session", "hours"): ("--hours", hours),
            ("session", "usd"): ("--usd", usd),
            ("budget", "seconds"): ("--budget-seconds", budget_seconds),
            ("researcher", "name"): ("--researcher", researcher),
            ("researcher", "model"): ("--model", model),
            ("researcher", "price_usd_per_million"): ("--price", price),
            ("researcher", "max_output_tokens"): ("--max-output-tokens", max_output_tokens),
            ("researcher", "max_conversation_tokens"): (
                "--max-conversation-tokens",
                max_conversation_tokens,
            ),
            ("hardware", "base_image"): ("--base-image", base_image),
            ("hardware", "gpus"): ("--gpus", None if gpus is None else tuple(gpus.split(","))),
        }
        # Validated again as a whole: a copy with single fields replaced would be checked nowhere.
        tables = self.model_dump()
        for (section, key), (_, value) in flags.items():
            if value is not None:
                tables[section][key] = value
        try:
            return type(self).model_validate(tables)
        except ValidationError as error:
            detail = error.errors()[0]
            flag, value = flags[str(detail["loc"][0]), str(detail["loc"][1])]
            message = f"{flag} {value}: {reason_refused(detail)}"
            raise ProgramError(message, "see the command's --help") from None


def changed(before: Settings, now: Settings) -> list[str]:
    """Each setting that is another one now, with both values."""
    tables, tables_now = before.model_dump(mode="json"), now.model_dump(mode="json")
    return [
        f"{key} {json.dumps(value)} in place of {json.dumps((tables[section] or {}).get(key))}"
        for section, values in tables_now.items()
        for key, value in (values or {}).items()
        if value != (tables[section] or {}).get(key)
    ]


def reason_refused(detail: ErrorDetails) -> str:
    """Why pydantic refused a value, as the end of a sentence that names it."""
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    return detail["msg"][:1].lower() + detail["msg"][1:]
