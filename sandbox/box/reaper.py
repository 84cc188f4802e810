"""Removes what dead sessions left on the engine.

A container belongs to the process that started it. Its label names that process so that it cannot
be mistaken: process id, start time, pid namespace, boot. Ownership is a matter of liveness, never
of names, so sessions side by side leave one another alone.
"""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import docker
import docker.errors
import requests

from sandbox.box.hardening import LABEL_DEADLINE, LABEL_GPUS, LABEL_OWNER, LABEL_RUN
from sandbox.contract.errors import ContainerUnkillable
from sandbox.contract.log import log
from sandbox.engine.find import must_answer

OWNER_FILE = "owner"
RUN_NAME = re.compile(r"[0-9a-f]{16}")
GONE_OR_GOING = (404, 409)
"""What an engine answers who wants a container removed that is gone, or that another removes."""
LIFT_SECONDS = 1.0
"""Nothing waits longer for it: where the engine is that slow, death comes without it."""


def process_owner(pid: int | None = None) -> str:
    """Return the mark of a living process: id, start time, pid namespace and boot id."""
    pid = os.getpid() if pid is None else pid
    namespace = str(Path("/proc/self/ns/pid").readlink())
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{pid} {_start_time(pid)} {namespace} {boot}"


def _start_time(pid: int) -> str | None:
    """Return the clock tick at which a process started; empty when it is not alive.

    None when it lives and /proc does not show it: with `hidepid` nobody sees another user's.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None if _exists(pid) else ""
    fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
    return "" if fields[0] in ("Z", "X") else fields[19]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def is_alive(owner: str) -> bool | None:
    """Tell whether the process of this mark lives; None when it cannot be told from here."""
    words = owner.split(" ")
    if len(words) != 4 or not words[0].isdigit():
        return None
    pid, start_time, namespace, boot = words
    # After a boot the same number is another process; in another namespace it means nothing here.
    if boot != Path("/proc/sys/kernel/random/boot_id").read_text().strip():
        return False
    if namespace != str(Path("/proc/self/ns/pid").readlink()):
        return None
    seen = _start_time(int(pid))
    return None if seen is None else seen == start_time


def is_abandoned(labels: Mapping[str, str], now_monotonic_seconds: float) -> bool:
    """Tell whether a container of ours belongs to nobody any more.

    Where the owner's life cannot be told (another pid namespace on the same engine), the run's own
    deadline decides.
    """
    if LABEL_RUN not in labels:
        return False
    alive = is_alive(labels.get(LABEL_OWNER, ""))
    return _is_late(labels, now_monotonic_seconds) if alive is None else not alive


def _is_late(labels: Mapping[str, str], now_monotonic_seconds: float) -> bool:
    deadline = labels.get(LABEL_DEADLINE, "")
    return deadline.isdigit() and now_monotonic_seconds > int(deadline)


def sweep(client: docker.APIClient) -> list[str]:
    """Kill and remove the containers of dead sessions; return their ids.

    Raises:
        EngineUnavailable: the engine does not answer.
        ContainerUnkillable: one would not go; every other one is removed.
    """
    removed, stuck = [], []
    with must_answer("the engine did not answer a sweep"):
        for container in client.containers(all=True, filters={"label": LABEL_RUN}):
            if not is_abandoned(container["Labels"] or {}, time.monotonic()):
                continue
            lift_cpu_limit(client, container["Id"])
            # One that will not go must not keep the others.
            try:
                client.remove_container(container["Id"], force=True, v=True)
                removed.append(container["Id"])
            except (docker.errors.APIError, requests.ReadTimeout) as error:
                if getattr(error, "status_code", None) not in GONE_OR_GOING:
                    stuck.append(f"{container['Id'][:12]} ({error})")
    if removed:
        log.info("sweep_removed", containers=[each[:12] for each in removed])
    if stuck:
        raise ContainerUnkillable(
            f"what a dead session left cannot be removed: {', '.join(stuck)}"[:1000],
            "look at it with `docker inspect`; a restart of the engine or the machine ends it",
        )
    return removed


def living_gpus(client: docker.APIClient) -> list[str]:
    """Return the GPUs that containers have which live, or may yet be started.

    What dead sessions left is swept first, so that it does not count.

    Raises:
        EngineUnavailable: the engine does not answer.
    """
    with contextlib.suppress(ContainerUnkillable):  # it is among the living, with its GPUs
        sweep(client)
    with must_answer("the engine did not say who has GPUs"):
        found = client.containers(all=True, filters={"label": LABEL_GPUS})
    return [
        gpu
        for container in found
        if may_use_gpus(container["State"], container["Labels"] or {}, time.monotonic())
        for gpu in (container["Labels"] or {}).get(LABEL_GPUS, "").split(",")
    ]


def may_use_gpus(state: str, labels: Mapping[str, str], now_monotonic_seconds: float) -> bool:
    """Tell whether a program of a container runs on its GPUs, or may yet be started there.

    Nobody starts one any more that was not started until its run's deadline, whoever lives.
    """
    # A controller may stand between create and start, however long.
    if state == "created":
        return not _is_late(labels, now_monotonic_seconds)
    return state not in ("exited", "dead", "removing")


def lift_cpu_limit(client: docker.APIClient, container: str) -> None:
    """Give a container that must die every CPU, if the engine does so at once; see `CpuQuota`."""
    # Not by the SDK's own call, which would wait as long as for any other.
    url = f"{client.base_url}/v{client.api_version}/containers/{container}/update"
    with contextlib.suppress(requests.RequestException):
        client.post(url, json={"NanoCpus": (os.cpu_count() or 1) * 10**9}, timeout=LIFT_SECONDS)


def sweep_run_directories(run_root: Path) -> list[Path]:
    """Remove the run directories of dead sessions; return them."""
    removed = []
    for directory in sorted(run_root.iterdir()) if run_root.is_dir() else []:
        with contextlib.suppress(OSError):
            if _is_left(directory):
                shutil.rmtree(directory)
                removed.append(directory)
    if removed:
        log.info("sweep_removed", directories=[each.name for each in removed])
    return removed


def _is_left(directory: Path) -> bool:
    """Tell whether a run directory is of a dead session.

    One that was killed before it wrote whose it is has died at the latest with the last boot.
    """
    mark = directory / OWNER_FILE
    owner = mark.read_text(errors="replace") if mark.exists() else ""
    if owner:
        return is_alive(owner) is False
    booted_at = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return bool(RUN_NAME.fullmatch(directory.name)) and directory.stat().st_mtime < booted_at
