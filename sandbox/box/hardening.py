"""The walls: one run's limits turned into container settings.

`container_settings` is pure and denies by default; a golden file shows all of it. Nothing is
widened by a flag: what a box may do beyond this is named in its `RunSpec`. What the engine made of
it is read back: what it recorded here, what holds inside in `proof`.
"""

import errno
import json
import math
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from sandbox.box.supervisor import HIDDEN_PATHS
from sandbox.contract.errors import SandboxError
from sandbox.contract.record import Record
from sandbox.contract.run import Limits, RunSpec
from sandbox.gpu.request import NO_GPUS, GpuRequest, device_settings, visible_devices

Settings = dict[str, Any]

USER = 65534
"""What an image names as its user. No box runs as it: each has its own, see `users`."""
LINK_DIRECTORY = "/nightlab"
SUPERVISOR = f"{LINK_DIRECTORY}/supervisor.py"
RESERVED_TARGETS = (LINK_DIRECTORY, "/out", "/tmp", "/dev", "/proc", "/sys", "/etc")  # noqa: S108
TMP_INODES = 65536
OUTPUT_DIRECTORIES = 32
"""Inodes of the output's file system beyond its files, for directories."""
LOG_OPTIONS = {"max-size": "64k", "max-file": "1", "compress": "false"}
"""The last one since an engine adds its own `log-opts`, and one file cannot be compressed."""
LABEL_RUN = "nightlab.run"
LABEL_SESSION = "nightlab.session"
LABEL_OWNER = "nightlab.owner"
LABEL_DEADLINE = "nightlab.monotonic-deadline"
LABEL_BOX = "nightlab.box"
LABEL_USER = "nightlab.user"
LABEL_GPUS = "nightlab.gpus"
"""Ids of the GPUs that a container has, parted by commas: while it lives they are taken."""


class Lease(Record):
    """What ties a container to the process that started it."""

    run_directory: Path
    owner: str
    """Process id, its start time, its pid namespace and the boot id; see `reaper`."""
    deadline_monotonic_seconds: int
    """When no container of this run may exist any more, whoever owned it: on the clock that stands
    still while the machine sleeps, as every deadline of a run does."""
    user: int
    """Of this box alone; see `users`."""
    counters: tuple[str, ...] = ()
    """What this machine has beyond `HIDDEN_PATHS` that counts for all of it."""
    gpus: GpuRequest = NO_GPUS
    """The GPUs of the run, as its engine is asked for them."""


@cache
def seccomp_profile(has_loopback: bool) -> str:
    """Return our own system call filter as the engine takes it.

    Without loopback no network socket is made, as on a machine that has no such protocol. With
    cgroup version 1 what it holds is charged to nobody, and its packets are counted for the whole
    machine, where no mask hides them: boxes of a score, which never have it, could leave each other
    numbers there.
    """
    text = resources.files("sandbox.box").joinpath("seccomp.json").read_text()
    profile = json.loads(text)
    for rule in profile["syscalls"]:
        if "reaches lo only" in rule["comment"] and not has_loopback:
            rule |= {"action": "SCMP_ACT_ERRNO", "errnoRet": errno.EAFNOSUPPORT}
    return json.dumps(profile, separators=(",", ":"))


def file_size_limit(limits: Limits) -> int:
    """Return a bound above every file system's own, so that those say "no space left"."""
    return max(limits.tmp_bytes, limits.shm_bytes, limits.output_bytes) + 4096


def rlimits(limits: Limits) -> dict[str, int]:
    """Return the bounds of each process.

    A core dump is bounded to one byte, which the kernel never writes and knows as "start nothing":
    at none it still starts the host's handler, as root, where `core_pattern` is a pipe. The last
    two are named lest an engine's `default-ulimits` give a box a better priority than others'.
    """
    bounds = {"core": 1, "fsize": file_size_limit(limits), "nofile": limits.open_files}
    return bounds | {"nice": 0, "rtprio": 0}


def least_rlimits(limits: Limits) -> dict[str, int]:
    """Return what an engine's `default-ulimits` must leave: its bound is no fault of a program."""
    cpu_seconds = math.ceil(limits.wall_seconds * limits.cpus)
    return {"cpu": cpu_seconds, "data": limits.memory_bytes, "nproc": limits.pids}


def output_inodes(limits: Limits) -> int:
    """Return how many files and directories the output may hold, its root included."""
    return limits.output_files + OUTPUT_DIRECTORIES


def container_settings(spec: RunSpec, lease: Lease) -> Settings:
    """Return the body of the engine's create call for one run.

    Raises:
        SandboxError: a mount of the run would cover a wall, or its GPUs are not those leased.
    """
    _refuse_covering_mounts(spec)
    _refuse_other_gpus(spec, lease)
    return {
        "Image": spec.image,
        "Entrypoint": ["python3", "-I", "-S", SUPERVISOR],  # the image's own is never run
        "Cmd": [],
        "Healthcheck": {"Test": ["NONE"]},  # a stopped probe freezes the engine's calls
        "User": f"{lease.user}:{lease.user}",
        "WorkingDir": "/",
        # PID 1's; the program's own travels over the link.
        "Env": [f"NVIDIA_VISIBLE_DEVICES={visible_devices(lease.gpus)}", "LD_PRELOAD="],
        "Hostname": "localhost",  # the only name that resolves in here; gloo asks for its own
        "Labels": _labels(spec, lease),
        "NetworkDisabled": True,  # keeps the host's resolv.conf out too, and saves 0.2 s a run
        "StopSignal": "SIGKILL",
        "HostConfig": _host_settings(spec, lease),
    }


def _host_settings(spec: RunSpec, lease: Lease) -> Settings:
    """Return the walls themselves, one a line."""
    limits = spec.limits
    filter_text = seccomp_profile(limits.loopback and spec.box == "train")
    return {
        "NetworkMode": "none",
        "CapAdd": [],
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges", f"seccomp={filter_text}"],
        "Privileged": False,
        "ReadonlyRootfs": True,
        "MaskedPaths": [*HIDDEN_PATHS, *lease.counters],
        "IpcMode": "private",
        "PidMode": "",  # empty is a namespace of its own; Docker knows no word for it
        "UTSMode": "",  # the same
        "CgroupnsMode": "private",
        **device_settings(lease.gpus),
        "Memory": limits.memory_bytes,
        "MemorySwap": limits.memory_bytes,  # memory and swap together: no swap
        "OomKillDisable": False,
        "NanoCpus": round(limits.cpus * 1e9),
        "PidsLimit": limits.pids,
        "Ulimits": [{"Name": n, "Soft": b, "Hard": b} for n, b in rlimits(limits).items()],
        "ShmSize": limits.shm_bytes,
        "Tmpfs": _writable_places(limits, lease.user),
        "Mounts": _read_only_mounts(spec, lease),
        "LogConfig": {"Type": "json-file", "Config": LOG_OPTIONS},
        "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0},
        "AutoRemove": False,  # it races with everything that asks how the run ended
        "Init": False,  # PID 1 is ours
        "PublishAllPorts": False,
    }


def _labels(spec: RunSpec, lease: Lease) -> dict[str, str]:
    return {
        LABEL_RUN: spec.run_id,
        LABEL_SESSION: spec.session,
        LABEL_OWNER: lease.owner,
        LABEL_DEADLINE: str(lease.deadline_monotonic_seconds),
        LABEL_BOX: spec.box,
        LABEL_USER: str(lease.user),
        **({LABEL_GPUS: ",".join(spec.gpus)} if spec.gpus else {}),
    }


def _writable_places(limits: Limits, user: int) -> dict[str, str]:
    """Return the only places that can be written, each bounded in bytes and files."""
    return {
        "/tmp": f"rw,exec,nosuid,nodev,size={limits.tmp_bytes},nr_inodes={TMP_INODES},mode=1777",  # noqa: S108 - compilers' caches must be executable
        "/out": f"rw,noexec,nosuid,nodev,size={limits.output_bytes},"
        f"nr_inodes={output_inodes(limits)},mode=0700,uid={user},gid={user}",
    }


def _read_only_mounts(spec: RunSpec, lease: Lease) -> list[Settings]:
    places = [
        (lease.run_directory, LINK_DIRECTORY),
        (lease.run_directory / "hosts", "/etc/hosts"),  # without a network the engine makes none
        *((mount.source, mount.target) for mount in spec.mounts),
    ]
    # What is mounted below a bind's source stays out, since it would be writable.
    options = {"Propagation": "private", "NonRecursive": True}
    bind = {"Type": "bind", "ReadOnly": True, "BindOptions": options}
    return [bind | {"Source": str(source), "Target": target} for source, target in places]


def _refuse_covering_mounts(spec: RunSpec) -> None:
    targets = [mount.target.rstrip("/") for mount in spec.mounts]
    for target in targets:
        if target == "" or any(is_within(target, place) for place in RESERVED_TARGETS):
            raise SandboxError(f"a mount may not cover {target or '/'}", "choose another target")
    if len(set(targets)) != len(targets):
        raise SandboxError("two mounts share one target", "give each its own")


def _refuse_other_gpus(spec: RunSpec, lease: Lease) -> None:
    if (spec.devices, set(spec.gpus)) != (lease.gpus.devices, {g.id for g in lease.gpus.gpus}):
        raise SandboxError(f"run {spec.run_id} asks for other GPUs than it was leased")


def is_within(target: str, place: str) -> bool:
    """Tell whether a path in the box is a place or below it."""
    return target == place or target.startswith(place + "/")


def engine_differences(asked: Settings, recorded: Settings) -> list[str]:
    """Return the settings that the engine recorded otherwise than asked, by name."""
    walls: Settings = asked["HostConfig"]
    seen: Settings = recorded["HostConfig"]
    wrong = [name for name, value in walls.items() if not _same(value, seen.get(name))]
    # An engine adds its `default-ulimits`; what they come to is read back inside.
    if "Ulimits" in wrong and _among(walls["Ulimits"], seen.get("Ulimits") or []):
        wrong.remove("Ulimits")
    config = recorded["Config"]
    wrong += [n for n in ("User", "Entrypoint", "Labels") if not _holds(asked[n], config.get(n))]
    wrong += ["Env"] if not set(asked["Env"]) <= set(config.get("Env") or ()) else []
    wrong += ["Healthcheck"] if config.get("Healthcheck") != asked["Healthcheck"] else []
    wrong += ["Volumes"] if config.get("Volumes") else []
    return sorted(wrong)


def _same(asked: object, recorded: object) -> bool:
    """Compare as the engine stores: nothing for empty, lists in any order, fields added."""
    if not asked and not recorded:
        return True
    if isinstance(asked, list) and isinstance(recorded, list):
        return len(asked) == len(recorded) and _among(asked, recorded)
    return _holds(asked, recorded)


def _among(asked: list[Any], recorded: list[Any]) -> bool:
    return all(any(_same(one, other) for other in recorded) for one in asked)


def _holds(asked: object, recorded: object) -> bool:
    """Tell whether everything asked is recorded; the engine may add fields of its own."""
    if isinstance(asked, dict) and isinstance(recorded, dict):
        return all(_same(value, recorded.get(name)) for name, value in asked.items())
    return asked == recorded
