"""Why a run failed, and what would change that.

What the host saw decides. A program's own words only name what is likely, and the last of them
that says anything known counts: what is above it was survived.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from signal import Signals

from agent.text import one_line
from sandbox.contract.run import Outcome, RunResult

LAST_LINES = 60
LINE_CHARACTERS = 400
"""From the end of a log, and of each of its lines: so much is looked through."""
DATA_THERE = "[[data]] with from and at shows a folder or file of yours"
LACKS = (
    "the image has no {0}",
    'its package\'s name in a file named under [hardware]: requirements = "requirements.txt"; then '
    "nightlab setup",
)
WRITES = (
    "it writes where nothing can be written: {0}",
    "write into its own directory, ~ or $NIGHTLAB_OUTPUT; what shall come back: keep",
)
LOOKS = (
    "it looks for {0}, which is not there",
    f"what git ignores or leave_out names is not copied: {DATA_THERE}",
)
_BY_REASON = {
    "over_budget": (
        "it took longer than its budget",
        "allow more seconds under [budget], or let `nightlab calibrate` propose them",
    ),
    "no_checkpoint": (
        "it left no checkpoint",
        "write the model into $NIGHTLAB_OUTPUT before the training ends",
    ),
    "not_reported": (
        "its score was not there",
        "print it as [goal] has it, or name there how it is printed: pattern, or file and key",
    ),
    "report_lost": (
        "its score may be in the part of the log that was not kept",
        "print it last, print less, or raise log under [limits]",
    ),
}
"""What helps where no box went wrong, by the verdict's reason."""
_SIGNALS = {
    Signals.SIGSEGV: "a library that fits the image, or one thread: it is native code that failed",
    Signals.SIGILL: "an image built for this processor: base_image under [hardware]",
    Signals.SIGABRT: "what the log says above: native code gave up by itself",
}
_PLACES = {"/tmp": "tmp", "/dev/shm": "shm", "/out": "output"}  # noqa: S108 - a box's own
_WORDS = (
    (
        r"No module named '?([\w.]{1,100})|Cannot find module '([^']{1,200})'"
        r"|there is no package called .([\w.]{1,100})",
        *LACKS,
    ),
    (
        r"(lib[\w.+-]{1,100}\.so[\w.]{0,20}): cannot open shared object.{0,60}"
        r"|_execute_child[\s\S]{0,600}?No such file or directory: '([^']{1,200})'"
        r"|([\w./+-]{1,100}): (?:command )?not found|No working (C\+\+ compiler)"
        r"|Failed to find (C compiler)|cannot start the program: [^']{0,80}'([^']{1,200})'"
        r"|^(\S{1,200}) cannot be started: .{0,200}",
        LACKS[0],
        "an image that has it: base_image under [hardware]",
    ),
    (
        r"(?:(\S{1,200}?)['\u2019]?: )?Read-only file system(?:: '([^']{1,200})')?",
        *WRITES,
    ),
    (
        r"name resolution|Name or service not known|[Nn]etwork is unreachable|getaddrinfo"
        r"|URLError|Max retries exceeded|[Cc]ould(?:n't| not) (?:connect|resolve)"
        r"|Failed to establish a new connection|LocalEntryNotFoundError",
        "it asked the network, and a box has none",
        f"download once here; then {DATA_THERE}",
    ),
    (
        r"No such file or directory: '([^']{1,200})'|can't open file '([^']{1,200})'"
        r"|(\S{1,200}?)['\u2019]?: No such file or directory"
        r"|cannot open file '([^']{1,200})'|([^\s']{1,200}) (?:not found|does not exist)\.?$",
        *LOOKS,
    ),
    (
        r"Permission denied(?:: '([^']{1,200})')?",
        "it may not use {0}",
        "data: `chmod -R a+rX` the folder here; to write: its own directory or $NIGHTLAB_OUTPUT",
    ),
    (
        r"No space left on device|\[Errno 28\]",
        "a place was full",
        "raise tmp, shm or output under [limits]",
    ),
    (
        r"out of shared memory|[Uu]nexpected bus error|killed by signal: Bus error",
        "/dev/shm was full",  # noqa: S108 - a box's own
        "raise shm under [limits], or load data with fewer workers",
    ),
    (
        r"can't start new thread|Resource temporarily unavailable|libgomp: Thread creation failed",
        "it asked for more processes and threads than it may have",
        "raise pids under [limits], or use fewer workers",
    ),
    (r"Too many open files", "it opened too many files", "raise open_files under [limits]"),
    (
        r"^(?:numpy\S{0,50}|Memory)Error|DefaultCPUAllocator|std::bad_alloc",
        "it could not have the memory that it asked for",
        "raise memory under [limits], or make model or batch smaller",
    ),
    (
        r"Torch not compiled with CUDA|Found no NVIDIA driver|No CUDA GPUs are available"
        r"|no kernel image is available",
        "it wants a GPU that the box has not, or that the image's torch cannot use",
        "profile under [hardware]; for a CPU a flag in command, as --device=cpu",
    ),
    (
        r"error: (?:unrecognized arguments|the following arguments are required|argument ).{0,80}",
        "it does not take the flags of its command",
        "mend command under [workspace]",
    ),
)
"""What programs say, what that means, what helps; of two that end alike the first counts."""


@dataclass(frozen=True)
class Cause:
    """Why something failed, as far as can be told."""

    what: str
    cure: str
    is_seen: bool
    """By the host; else it is what the program's own words say."""

    @property
    def words(self) -> str:
        return self.what if self.is_seen else f"likely: {self.what}"

    @property
    def sentence(self) -> str:
        return f"{self.words}; what helps: {self.cure}"


def cause_of(reason: str, runs: Sequence[RunResult]) -> Cause | None:
    """Why an attempt with that reason failed: its last box that went wrong tells, if one did."""
    wrong = [run for run in runs if run.outcome not in (Outcome.OK, Outcome.STOPPED)]
    if wrong:
        return cause_of_run(wrong[-1])
    return Cause(*_BY_REASON[reason], is_seen=True) if reason in _BY_REASON else None


def cause_of_run(run: RunResult) -> Cause | None:
    """Why a box did not come to a good end; None where nothing known was seen or said."""
    table, size = "[limits]" if run.box == "train" else "[scoring]", run.limits.memory_bytes
    smaller = "make model or batch smaller"
    match run.outcome:
        case Outcome.OK | Outcome.STOPPED | Outcome.INTERRUPTED:
            return None
        case Outcome.TIMED_OUT:
            last = next((f"its last line was `{line}`" for line in _last_lines(run)), "it was mute")
            more = (
                "seconds under [budget]" if run.box == "train" else "wall_seconds under [scoring]"
            )
            what = f"it was ended after {run.limits.wall_seconds:g} s; {last}"
            return Cause(what, f"allow more {more}, or let it do less", is_seen=True)
        case Outcome.OUT_OF_MEMORY:
            cure = f"raise memory under {table}, or {smaller}; /tmp and /dev/shm count as memory"
            return Cause(f"it needed more memory than {size / 2**20:,.0f} MiB", cure, is_seen=True)
        case Outcome.OUT_OF_GPU_MEMORY:
            cure = f"{smaller}, or let `nightlab calibrate` propose a batch"
            return Cause("it needed more memory of a GPU than it may have", cure, is_seen=True)
        case Outcome.DISK_FULL:
            return _full(run)
    refused = run.evidence.get("pids_refused")
    if run.signal in _SIGNALS:
        what = f"its own code crashed ({Signals(run.signal).name})"
        return Cause(what, _SIGNALS[Signals(run.signal)], is_seen=True)
    if refused:
        what = f"processes or threads beyond {run.limits.pids} were refused {refused} times"
        return Cause(what, "raise pids under [limits], or use fewer workers", is_seen=True)
    return _said(run)


def _full(run: RunResult) -> Cause:
    """Which place was full, by what PID 1 saw taken of each."""
    seen = (run.evidence.get("report") or {}).get("fullest") or {}
    limits = {p: int(getattr(run.limits, f"{name}_bytes")) for p, name in _PLACES.items()}
    taken = {place: seen.get(place, {}).get("bytes", 0) / limits[place] for place in _PLACES}
    named = run.evidence.get("still_full") or run.evidence.get("full") or ()
    place = max([p for p in named if p in _PLACES] or _PLACES, key=lambda p: taken[p])
    if place == "/out" and taken[place] < 0.5 and seen:
        what = f"{place} was full: more than {run.limits.output_files} files"
        return Cause(what, "raise output_files under [limits], or write fewer", is_seen=True)
    cure = f"raise {_PLACES[place]} under [limits], and memory with it"
    return Cause(f"{place} was full ({limits[place] / 2**20:,.0f} MiB)", cure, is_seen=True)


def _said(run: RunResult) -> Cause | None:
    """What the program's last words name."""
    text = "\n".join(reversed(_last_lines(run)))
    found = [
        (match.end(), -number, match)
        for number, (pattern, _, _) in enumerate(_WORDS)
        for match in re.finditer(pattern, text, re.MULTILINE)
    ]
    if not found:
        return None
    _, number, match = max(found, key=lambda one: one[:2])
    _, what, cure = _WORDS[-number]
    named = next((group for group in match.groups() if group), "some place")
    return Cause(what.format(one_line(named, 100)), cure, is_seen=False)


def _last_lines(run: RunResult) -> list[str]:
    """The last lines of a log that say anything, the last first."""
    lines = f"{run.log.head}\n{run.log.tail}"[-65536:].splitlines()
    told = [one_line(line, LINE_CHARACTERS) for line in lines if line.strip()]
    return told[: -LAST_LINES - 1 : -1]
