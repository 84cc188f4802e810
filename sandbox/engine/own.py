"""Starts and stops nightlab's own Docker engine.

A plain dockerd without network rules, whose socket, data and pid file lie under the state
directory. No other engine is ever configured, started or stopped here.
"""

import hashlib
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from sandbox.contract.errors import EngineUnavailable, SandboxError
from sandbox.engine.find import CALL_SECONDS, Engine, describe_engine, find_engine, named_address
from sandbox.engine.host import (
    SYSTEM_PATH,
    Places,
    Say,
    exclusive,
    install_packages,
    is_readable,
    last_lines,
    os_release,
    own_places,
    run_program,
    search_path,
    why_not_installable,
)

START_SECONDS = 90
STOP_SECONDS = 60
POLL_SECONDS = 0.2
SAY_EVERY_SECONDS = 10


def install_and_start(state_dir: Path, *, environ: Mapping[str, str], say: Say) -> Engine:
    """Install what is missing and start nightlab's own engine, where that is allowed.

    Installing the package may itself start the machine's engine; then that one is used. Where the
    user named an engine, nothing is started in its stead.

    Raises:
        EngineUnavailable: not root, or no Debian or Ubuntu, or dockerd does not come up.
        SandboxError: the packages could not be installed.
    """
    if named_address(environ) is not None:
        return find_engine(state_dir, environ=environ)
    obstacle = why_not_installable(os.geteuid(), os_release())
    if obstacle is not None:
        raise EngineUnavailable(
            f"no container engine answers, and nightlab cannot start one: {obstacle}",
            "install Docker Engine 20.10 or later and start it, or set DOCKER_HOST to one",
        )
    places = own_places(state_dir)
    places.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Two set-ups at once must not start two engines on one data directory.
    with exclusive(places.root / "lock"):
        if install_packages({"dockerd": "docker.io"}, environ=environ, say=say):
            with suppress(EngineUnavailable):
                return find_engine(state_dir, environ=environ)
        return _start(places, environ, say)


def stop_own_engine(state_dir: Path) -> bool:
    """End nightlab's own engine and nothing else; say whether there was one to end.

    Raises:
        SandboxError: it does not end.
    """
    places = own_places(state_dir)
    # dockerd first: it would start a containerd that is gone anew.
    dockerd = _running(places.pid_file, _dockerd_marks(places))
    was_running = dockerd is not None and _end(dockerd, _dockerd_marks(places))
    was_running = _end_containerd(places) or was_running
    _unmount(places.data)
    if places.socket.parent != places.root:
        shutil.rmtree(places.socket.parent, ignore_errors=True)
    return was_running


def _start(places: Places, environ: Mapping[str, str], say: Say) -> Engine:
    """Bring dockerd up, unless it is already coming up."""
    pid = _running(places.pid_file, _dockerd_marks(places))
    if pid is None:
        _clear_leftovers(places)
        say(f"Starting nightlab's own Docker engine (its log: {places.log}).")
        pid = _spawn(places, environ)
    engine = _await_answer(places, pid, say)
    if engine.storage_driver == "vfs":
        say("This engine copies whole images (storage driver vfs): boxes will start slowly.")
    return engine


def _clear_leftovers(places: Places) -> None:
    """Remove what a crashed dockerd left; a pid in there may belong to someone else by now.

    dockerd itself takes any living process with containerd's old pid for its containerd, waits for
    it in vain and gives up.
    """
    _end_containerd(places)
    for leftover in (places.pid_file, places.socket, places.containerd / "containerd.pid"):
        leftover.unlink(missing_ok=True)


def _end_containerd(places: Places) -> bool:
    """End the containerd of our dockerd; it is usually gone with it, unless dockerd was killed."""
    marks = ["containerd", str(places.containerd / "containerd.toml")]
    pid = _running(places.containerd / "containerd.pid", marks)
    return pid is not None and _end(pid, marks)


def _unmount(data: Path) -> None:
    """Undo the mount of the data root on itself, which a dockerd started after a crash forgets."""
    mounted = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    if str(data) in mounted:
        run_program(["umount", str(data)], environ={"PATH": SYSTEM_PATH}, seconds=CALL_SECONDS)


def _dockerd_arguments(places: Places) -> list[str]:
    namespace = f"nightlab-{hashlib.sha256(os.fsencode(places.root)).hexdigest()[:12]}"
    return [
        "dockerd",
        # Not the machine's configuration, which is made for the machine's engine.
        f"--config-file={places.configuration}",
        f"--host={places.url}",
        f"--data-root={places.data}",
        f"--exec-root={places.exec_root}",
        f"--pidfile={places.pid_file}",
        # No box has a network, so the machine's own rules stay untouched.
        "--bridge=none",
        "--iptables=false",
        "--ip6tables=false",
        "--ip-forward=false",
        # A containerd that runs already is shared; names in it must not be.
        f"--containerd-namespace={namespace}",
        f"--containerd-plugins-namespace={namespace}-plugins",
    ]


def _dockerd_marks(places: Places) -> list[str]:
    """What tells our dockerd from every other process: its name and its data root."""
    return ["dockerd", f"--data-root={places.data}"]


def _spawn(places: Places, environ: Mapping[str, str]) -> int:
    """Start dockerd in a session of its own, so that it outlives this command."""
    path = search_path(environ)
    program = shutil.which("dockerd", path=path)
    if program is None:
        raise EngineUnavailable("dockerd is not installed", "install Docker Engine")
    for directory in {places.root, places.socket.parent}:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    # dockerd does not start on a configuration that is named and not there.
    places.configuration.write_text("{}\n")
    # Never the whole environment: keys have no business in a daemon.
    passed = {
        name: value
        for name, value in environ.items()
        if name.lower().endswith("_proxy") or name.startswith("SSL_CERT_")
    }
    to_log = os.O_CREAT | os.O_WRONLY | os.O_APPEND
    return os.posix_spawn(
        program,
        _dockerd_arguments(places),
        {**passed, "PATH": path, "HOME": "/root"},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(places.log), to_log, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )


def _await_answer(places: Places, pid: int, say: Say) -> Engine:
    began = last_note = time.monotonic()
    while (now := time.monotonic()) - began < START_SECONDS:
        with suppress(EngineUnavailable):
            return describe_engine(places.url, owned=True)
        if now - last_note >= SAY_EVERY_SECONDS:
            last_note = now
            say("Still waiting for the engine to answer.")
        if _ended_within(pid, POLL_SECONDS):
            break
    log = places.log.read_text(errors="replace") if places.log.exists() else ""
    raise EngineUnavailable(
        "nightlab's own Docker engine did not come up",
        f"its log is {places.log}; the end of it:\n{last_lines(log)}\n"
        "where this machine cannot run dockerd, set DOCKER_HOST to an engine that runs",
    )


def _running(pid_file: Path, marks: Sequence[str]) -> int | None:
    """The process a pid file names, if it lives and is the one the marks describe."""
    try:
        pid = int(pid_file.read_text())
    except (OSError, ValueError):
        return None
    return pid if _bears(pid, marks) else None


def _bears(pid: int, marks: Sequence[str]) -> bool:
    """Whether process `pid` runs the program marks[0] with the argument marks[1]."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    name, argument = (os.fsencode(mark) for mark in marks)
    return command[0].rpartition(b"/")[2] == name and argument in command[1:]


def _end(pid: int, marks: Sequence[str]) -> bool:
    """Ask a process to end and wait for it; False where it is not, or no longer, the one meant."""
    with _held(pid) as process:
        # Looked at again behind the descriptor: from here on the number cannot change hands.
        if process is None or not _bears(pid, marks):
            return False
        signal.pidfd_send_signal(process, signal.SIGTERM)
        if not is_readable(process, STOP_SECONDS):
            raise SandboxError(
                f"{marks[0]} (process {pid}) did not end in {STOP_SECONDS} s",
                f"look at it with `ps -p {pid}` and end it yourself",
            )
    with suppress(ChildProcessError):  # another's child is no business of ours
        os.waitpid(pid, os.WNOHANG)
    return True


def _ended_within(pid: int, seconds: float) -> bool:
    with _held(pid) as process:
        return process is None or is_readable(process, seconds)


@contextmanager
def _held(pid: int) -> Iterator[int | None]:
    """Give a descriptor of a process; None where there is no such process."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)
