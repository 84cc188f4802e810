"""Tries every wall for real on this user's engine.

Most attempts run inside a box (`probes`), the rest press one to its end (`stress`). What held and
what gave way is told apart from what was never tried: silence is no wall.
"""

import json
import re
import secrets
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

from pydantic import ValidationError

from sandbox.box.proof import PLAIN_DEVICES
from sandbox.box.supervisor import HIDDEN_PATHS, counters_of_parts
from sandbox.check.probes import PROBES
from sandbox.check.stress import BEGAN, STRESS_TESTS, StressTest, program_text
from sandbox.contract.errors import LimitNotEnforced, SandboxError
from sandbox.contract.gpu import GpuMemory, GpuSource
from sandbox.contract.record import Record
from sandbox.contract.run import Executor, Limits, Mount, RunSpec
from sandbox.engine.versions import Component
from sandbox.gpu.leases import GpuRow

Status = Literal["held", "gave way", "not tried"]

FAMILIES = (
    *("network", "files", "processes", "memory", "time"),
    *("devices", "identity", "secrets", "record"),
)
MEBIBYTE = 2**20
MODPROBE_ENDS = [6, 14]
"""The first Linux that loads no module for a file that somebody executes."""
LOCKS_WORDS = (
    "boxes can lock (`flock`) what they only read, and who locks it here meanwhile, a dataset "
    "cache, SQLite or git, may wait: give the night a copy where that matters"
)
CANARY_VARIABLE = "NIGHTLAB_CHECK_CANARY"
ENVIRONMENT = {"NIGHTLAB_SEED": "7", "HOME": "/tmp", "USER": "nightlab"}  # noqa: S108 - in the box
CANDIDATE = "pass\n"
SEEN_CHARACTERS = 300
GPU_BYTES = 2**30
"""What the check asks a GPU's memory to be bounded to; its program uses none."""
CHECK_LIMITS = Limits(
    wall_seconds=20,
    memory_bytes=64 * MEBIBYTE,
    cpus=1,
    pids=48,
    tmp_bytes=8 * MEBIBYTE,
    shm_bytes=4 * MEBIBYTE,
    output_bytes=4 * MEBIBYTE,
    output_files=8,
    open_files=128,
    log_bytes=2**18,
    loopback=False,
)


class WallCheck(Record):
    """One attempt and what came of it."""

    family: str
    tried: str
    status: Status
    seen: str


class CheckResult(Record):
    """Everything that one check found."""

    walls: tuple[WallCheck, ...]
    components: tuple[Component, ...]
    notes: tuple[str, ...]
    """What of this machine no wall changes; see `machine_notes`."""
    gpus: tuple[GpuRow, ...]
    """Those of the profile's kind on this machine."""
    seconds: float

    @property
    def gave_way(self) -> bool:
        """Tell whether a wall is down, or was never tried."""
        return any(wall.status != "held" for wall in self.walls)


def machine_notes(
    cgroup_version: str, core_pattern: str, release: str, modprobe: str
) -> tuple[str, ...]:
    """Return, in sentences, what of this machine no wall changes.

    Args:
        cgroup_version: 1 or 2, as the engine says it.
        core_pattern: what becomes of core dumps, as the kernel has it.
        release: the kernel's.
        modprobe: the program by which it loads modules; empty for none.
    """
    notes = [f"in folders of [data], {LOCKS_WORDS}"]
    if cgroup_version == "1":
        notes.append(
            "with loopback = true under [limits], what a training sends itself and does not read "
            "lies in memory that version 1 of `cgroups` counts for nobody, up to the machine's "
            "`net.ipv4.tcp_mem`; version 2 counts it"
        )
    if core_pattern.startswith("|"):
        notes.append(
            f"a crash starts `{core_pattern[1:].split(' ')[0][:60]}` as root here; one in a box "
            "does not, as long as its limit on core dumps holds"
        )
    numbers = [int(number) for number in re.findall(r"\d+", release)[:2]]
    if modprobe and numbers < MODPROBE_ENDS:
        notes.append(
            f"Linux {release[:60]} starts `{modprobe[:60]}` as root, outside the box, when a box "
            "executes a file of no known form; no filter stops that, Linux 6.14 or "
            "`sysctl kernel.modprobe=''` does"
        )
    return tuple(notes)


class _ProbeAnswer(Record):
    """One line of a box's probes."""

    family: str
    tried: str
    error: str | None
    gave_way: tuple[str, ...]

    def judge(self) -> WallCheck:
        status: Status = "held" if not self.gave_way else "gave way"
        seen = self.error or ", ".join(self.gave_way)
        return _wall(self.family, self.tried, "not tried" if self.error else status, seen)


class Place(NamedTuple):
    """What the attempts are pointed at."""

    image: str
    workspace: Path
    canary_file: Path
    canary: str


def try_walls(
    executor: Executor, image: str, root: Path, environ: MutableMapping[str, str], source: GpuSource
) -> tuple[WallCheck, ...]:
    """Make every attempt on boxes of this executor and say what came of each.

    Args:
        executor: what runs boxes.
        image: id of the image to use.
        root: a directory that the engine can mount from; nothing stays in it.
        environ: this process's own environment, where a canary is planted meanwhile.
        source: where a run gets its GPUs from.

    Raises:
        SandboxError: the engine failed.
    """
    with lay_out(image, root, environ) as place:
        walls = [f for family in FAMILIES for f in try_family(executor, place, family)]
        walls += [try_stress_test(executor, place, test) for test in STRESS_TESTS]
        walls += [try_users(executor, place), *try_gpus(executor, place, source)]
        walls.append(_canary_is_whole(place))
    return tuple(sorted(walls, key=lambda wall: FAMILIES.index(wall.family)))


@contextmanager
def lay_out(image: str, root: Path, environ: MutableMapping[str, str]) -> Iterator[Place]:
    """Lay out a candidate, a ledger that no box may find, and a secret in our environment."""
    canary = secrets.token_hex(16)
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="check-", dir=root) as name:
        place = Place(image, Path(name) / "workspace", Path(name) / "ledger.jsonl", canary)
        place.workspace.mkdir()
        (place.workspace / "train.py").write_text(CANDIDATE)
        (place.workspace / "train.py").chmod(0o666)  # only the mount shall stand in the way
        place.workspace.chmod(0o777)
        place.canary_file.write_text(canary)
        place.canary_file.chmod(0o666)
        Path(name).chmod(0o755)
        # In our own environment, from where an engine or a hook might hand it on.
        environ[CANARY_VARIABLE] = canary
        try:
            yield place
        finally:
            environ.pop(CANARY_VARIABLE, None)


def _spec(place: Place, name: str, argv: tuple[str, ...], limits: Limits) -> RunSpec:
    return RunSpec(
        run_id=f"check-{name}",
        session="check",
        box="train",
        image=place.image,
        argv=argv,
        working_directory="/",
        environment=ENVIRONMENT,
        mounts=(Mount(source=place.workspace, target="/workspace"),),
        gpus=(),
        limits=limits,
    )


def try_family(executor: Executor, place: Place, family: str) -> list[WallCheck]:
    """Make one family's attempts in one box."""
    source = resources.files("sandbox.check").joinpath("probes.py").read_text(encoding="utf-8")
    # Without network sockets no route would be tried.
    limits = CHECK_LIMITS.model_copy(update={"loopback": family == "network"})
    context = limits.model_dump() | {
        "family": family,
        "workspace": "/workspace",
        "variables": sorted(ENVIRONMENT),
        "plain_devices": sorted(PLAIN_DEVICES),
        "hidden_paths": [*HIDDEN_PATHS, *counters_of_parts()],
        "canary": place.canary,
        "canary_file": str(place.canary_file),
    }
    # By the command line: a mount more would be a wall less to try.
    argv = ("python3", "-I", "-S", "-c", source, json.dumps(context))
    try:
        result = executor.run(_spec(place, family, argv, limits))
    except LimitNotEnforced as refusal:
        return [_wall(f, t, "gave way", refusal.message) for f, t in PROBES if f == family]
    silent = "no answer came from inside"
    walls = {t: _wall(f, t, "not tried", silent) for f, t in PROBES if f == family}
    for line in result.log.head.splitlines():
        with suppress(ValidationError):  # anything else in the log is passed over
            wall = _ProbeAnswer.model_validate_json(line).judge()
            walls |= {wall.tried: wall} if wall.tried in walls else {}
    return list(walls.values())


def _wall(family: str, tried: str, status: Status, seen: str) -> WallCheck:
    return WallCheck(family=family, tried=tried, status=status, seen=seen[:SEEN_CHARACTERS])


def try_stress_test(executor: Executor, place: Place, test: StressTest) -> WallCheck:
    """Press one box to its end and judge by what the host saw."""
    limits = CHECK_LIMITS.model_copy(update=test.limits)
    text = program_text(test, limits.memory_bytes, limits.pids)
    spec = _spec(place, "stress", ("python3", "-I", "-S", "-c", text), limits)
    try:
        with TemporaryDirectory(dir=place.workspace.parent) as output:
            result = executor.run(spec, output_dir=Path(output))
    except LimitNotEnforced as refusal:
        return _wall(test.family, test.tried, "gave way", refusal.message)
    seen = f"the box ended {result.outcome} in {result.wall_seconds:.1f} s"
    if not result.log.head.startswith(BEGAN):
        return _wall(test.family, test.tried, "not tried", seen)
    return _wall(test.family, test.tried, "held" if test.held(result) else "gave way", seen)


def try_users(executor: Executor, place: Place) -> WallCheck:
    """Look whether two boxes have two users, by what PID 1 of each proved of itself."""
    family, tried = "identity", "the user of the box before, and so its quotas and counters"
    try:
        results = [executor.run(_spec(place, "user", ("true",), CHECK_LIMITS)) for _ in range(2)]
    except LimitNotEnforced as refusal:
        return _wall(family, tried, "gave way", refusal.message)
    proofs = [result.evidence.get("container", {}).get("proved", {}) for result in results]
    users = [user for proof in proofs for user in set(proof.get("uids", (0,)))]
    status: Status = "held" if len(set(users)) == len(results) else "gave way"
    return _wall(family, tried, status, "users " + ", ".join(map(str, users)))


def try_gpus(executor: Executor, place: Place, source: GpuSource) -> list[WallCheck]:
    """Look what a box with a GPU sees, and by what its memory can be bounded; nothing without."""
    if source.devices == "none":
        return []
    family, tried = "devices", "a GPU beyond the leased one"
    try:
        with source.lease("nightlab check") as granted:
            spec = _spec(place, "gpu", ("true",), CHECK_LIMITS).model_dump()
            bound = GpuMemory(bytes=GPU_BYTES, at_least="none")
            given = {"devices": source.devices, "gpus": granted, "gpu_memory": bound}
            result = executor.run(RunSpec.model_validate(spec | given))
    except LimitNotEnforced as refusal:
        return [_wall(family, tried, "gave way", refusal.message)]
    except SandboxError as error:
        return [_wall(family, tried, "not tried", f"{error.message}; {error.hint}")]
    bounds = {use.memory_bound for use in result.gpu}
    words = f"{', '.join(result.gpus)}; its memory can be bounded by: {', '.join(sorted(bounds))}"
    return [_wall(family, tried, "held", words)]


def _canary_is_whole(place: Place) -> WallCheck:
    """Judge, after everything was tried, what no box may have changed."""
    alone = [path.name for path in place.workspace.iterdir()] == ["train.py"]
    whole = place.canary_file.read_text() == place.canary
    held = alone and whole and (place.workspace / "train.py").read_text() == CANDIDATE
    status: Status = "held" if held else "gave way"
    seen = "" if held else "changed on the host"
    return _wall("record", "change ledger or candidate on the host", status, seen)
