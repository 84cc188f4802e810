"""Finds a local Docker engine, or starts nightlab's own.

Four places are asked, in this order: `DOCKER_HOST`, the current docker context, the default socket,
nightlab's own socket. An engine that the user named is used or refused, never passed over. Only a
Docker Engine behind a Unix socket of this machine will do: snapshots are bind mounts and the link
to PID 1 is a Unix socket, and Podman's Docker API drops GPU requests without a word.

nightlab's own engine is a plain dockerd without network rules, whose socket, data and pid file lie
under the state directory. No other engine is ever configured, started or stopped here.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import docker
from docker.context import ContextAPI
from docker.errors import DockerException
from requests.exceptions import RequestException

from sandbox.contract.errors import EngineUnavailable, SandboxError
from sandbox.contract.record import Record

Say = Callable[[str], None]

DEFAULT_SOCKET = Path("/var/run/docker.sock")
OLDEST_API = (1, 41)
"""Docker Engine 20.10; what is older cannot keep a cgroup private."""
ANSWER_SECONDS = 10
CALL_SECONDS = 60
START_SECONDS = 90
STOP_SECONDS = 60
PACKAGES_SECONDS = 900
LONGEST_SOCKET_PATH = 100
"""The kernel takes 107 bytes, containerd 104."""
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
POLL_SECONDS = 0.2
SAY_EVERY_SECONDS = 10
FAILED_CALLS = (DockerException, RequestException, OSError)


class Engine(Record):
    """A container engine that answered, and what of it matters to a box."""

    base_url: str
    engine_id: str
    version: str
    api_version: str
    owned: bool
    """Started by nightlab, so that nightlab may stop it."""
    rootless: bool
    cgroup_version: Literal["1", "2"]
    cgroup_driver: str
    storage_driver: str
    machine: str


class Places(NamedTuple):
    """Where nightlab's own engine keeps what it needs."""

    root: Path
    socket: Path
    exec_root: Path

    @property
    def data(self) -> Path:
        """Images and containers."""
        return self.root / "data"

    @property
    def pid_file(self) -> Path:
        """Written by dockerd."""
        return self.root / "dockerd.pid"

    @property
    def containerd(self) -> Path:
        """Where dockerd keeps its own containerd's pid file and settings."""
        return self.exec_root / "containerd"

    @property
    def configuration(self) -> Path:
        """Empty on purpose; everything is said by flags."""
        return self.root / "daemon.json"

    @property
    def log(self) -> Path:
        """Everything dockerd says."""
        return self.root / "dockerd.log"

    @property
    def url(self) -> str:
        """The socket as docker clients name it."""
        return f"unix://{self.socket}"


def find_engine(
    state_dir: Path, *, environ: Mapping[str, str], default_socket: Path = DEFAULT_SOCKET
) -> Engine:
    """The engine to use.

    Raises:
        EngineUnavailable: none answers, or the one that answers cannot be used; with the reason.
    """
    own = own_places(state_dir).url
    named = _named_address(environ)
    if named is not None:
        return _describe(named, owned=named == own)
    refusals = []
    for address in (f"unix://{default_socket}", own):
        try:
            return _describe(address, owned=address == own)
        except EngineUnavailable as refusal:
            refusals.append(refusal.message)
    raise EngineUnavailable(
        f"there is no container engine to use: {'; '.join(refusals)}",
        "start Docker, or set DOCKER_HOST, or run `nightlab setup` as root on Debian or Ubuntu",
    )


def connect(engine: Engine, *, timeout_seconds: int = CALL_SECONDS) -> docker.DockerClient:
    """A client of `engine` for one thread, with its API version pinned; the caller closes it."""
    return docker.DockerClient(
        base_url=engine.base_url, version=engine.api_version, timeout=timeout_seconds
    )


def install_and_start(state_dir: Path, *, environ: Mapping[str, str], say: Say) -> Engine:
    """Install what is missing and start nightlab's own engine, where that is allowed.

    Installing the package may itself start the machine's engine; then that one is used. Where the
    user named an engine, nothing is started in its stead.

    Raises:
        EngineUnavailable: not root, or no Debian or Ubuntu, or dockerd does not come up.
        SandboxError: the packages could not be installed.
    """
    if _named_address(environ) is not None:
        return find_engine(state_dir, environ=environ)
    obstacle = why_not_installable(os.geteuid(), os_release())
    if obstacle is not None:
        raise EngineUnavailable(
            f"no container engine answers, and nightlab cannot start one: {obstacle}",
            "install Docker Engine 20.10 or later and start it, or set DOCKER_HOST to one",
        )
    places = own_places(state_dir)
    places.root.mkdir(parents=True, exist_ok=True, mode=0o700)
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
    dockerd = _running(places.pid_file, _dockerd_marks(places))
    was_running = dockerd is not None and _end(dockerd, _dockerd_marks(places))
    was_running = _end_containerd(places) or was_running
    _unmount(places.data)
    if places.socket.parent != places.root:
        shutil.rmtree(places.socket.parent, ignore_errors=True)
    return was_running


def own_places(state_dir: Path) -> Places:
    """Where nightlab's own engine lives; its sockets move to /run where the path is too long."""
    root = state_dir.absolute() / "engine"
    longest = root / "exec" / "containerd" / "containerd.sock.ttrpc"
    if len(os.fsencode(longest)) <= LONGEST_SOCKET_PATH:
        return Places(root, root / "docker.sock", root / "exec")
    short = Path("/run") / f"nightlab-{hashlib.sha256(os.fsencode(root)).hexdigest()[:12]}"
    return Places(root, short / "docker.sock", short / "exec")


def os_release() -> dict[str, str]:
    """What the distribution says of itself; empty where it says nothing."""
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {}


def why_not_installable(effective_uid: int, release: Mapping[str, str]) -> str | None:
    """Why nightlab may not install packages and start dockerd here; None where it may."""
    if effective_uid != 0:
        return "only root can"
    family = {release.get("ID", ""), *release.get("ID_LIKE", "").split()}
    if not family & {"debian", "ubuntu"}:
        return f"it knows Debian and Ubuntu only, and this is {release.get('NAME', '?')}"
    return None


def install_packages(
    package_of_program: Mapping[str, str], *, environ: Mapping[str, str], say: Say
) -> bool:
    """Install with apt what is missing of the programs; say whether anything was missing.

    Args:
        package_of_program: the package to install for each program that is not found.

    Raises:
        SandboxError: apt failed; with the end of what it said.
    """
    path = search_path(environ)
    missing = [
        package
        for program, package in package_of_program.items()
        if shutil.which(program, path=path) is None
    ]
    if not missing:
        return False
    say(f"Installing {' and '.join(missing)} with apt; this changes the machine.")
    apt_environ = {**environ, "PATH": path, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
        run_program(["apt-get", *arguments], environ=apt_environ, seconds=PACKAGES_SECONDS)
    return True


def run_program(argv: Sequence[str], *, environ: Mapping[str, str], seconds: int) -> str:
    """Run a host program of ours and return what it printed.

    Raises:
        SandboxError: it failed or took too long; with the end of what it said.
    """
    try:
        done = subprocess.run(
            argv,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SandboxError(f"`{' '.join(argv[:2])}` failed: {error}") from error
    if done.returncode != 0:
        said = last_lines((done.stdout + done.stderr).decode(errors="replace"))
        raise SandboxError(
            f"`{' '.join(argv[:2])}` ended with {done.returncode}", f"it said:\n{said}"
        )
    return done.stdout.decode(errors="replace")


def last_lines(text: str, count: int = 15) -> str:
    """The end of a tool's output, bounded, without control characters."""
    printable = re.sub(r"[^\n\t -~\u00a0-\uffff]", "", text[-8000:])
    return "\n".join(printable.strip().splitlines()[-count:])


def search_path(environ: Mapping[str, str]) -> str:
    """Where programs are looked for: the user's PATH, then the directories of root's."""
    return f"{environ.get('PATH', '')}:{SYSTEM_PATH}".lstrip(":")


def _named_address(environ: Mapping[str, str]) -> str | None:
    """The engine the user named by DOCKER_HOST or a docker context; None for the default."""
    if environ.get("DOCKER_HOST"):
        return environ["DOCKER_HOST"]
    try:
        context = ContextAPI.get_context(environ.get("DOCKER_CONTEXT"))
    except (DockerException, OSError, ValueError, KeyError) as error:
        raise EngineUnavailable(
            f"the current docker context cannot be read: {error}",
            "repair it with `docker context`, or set DOCKER_HOST",
        ) from error
    if context is None:
        raise EngineUnavailable(
            "the current docker context does not exist",
            "choose one with `docker context use`, or set DOCKER_HOST",
        )
    return None if context.Name == "default" else str(context.Host)


def _describe(address: str, *, owned: bool) -> Engine:
    """Ask the engine at `address` what it is; refuse one that cannot hold a box."""
    _refuse_unreachable(address)
    try:
        with closing(docker.DockerClient(address, version="auto", timeout=ANSWER_SECONDS)) as api:
            version = api.version()
            _refuse_unusable(address, version)
            return _engine(address, owned, version, api.info())
    except FAILED_CALLS as error:
        raise EngineUnavailable(
            f"the engine at {address} does not answer: {last_lines(str(error), 1)}",
            "start it, or set DOCKER_HOST to one that runs",
        ) from error
    except (KeyError, ValueError) as error:
        raise EngineUnavailable(
            f"what answers at {address} is no Docker Engine: {last_lines(str(error), 1)}",
            "set DOCKER_HOST to the socket of a Docker Engine",
        ) from error


def _refuse_unreachable(address: str) -> None:
    if not address.startswith("unix://"):
        raise EngineUnavailable(
            f"the engine at {address} is not on this machine: "
            "snapshots are bind mounts and the link into a box is a Unix socket",
            "unset DOCKER_HOST, or set it to the unix:// socket of a local Docker Engine",
        )
    path = address.removeprefix("unix://")
    if not Path(path).exists():
        raise EngineUnavailable(f"nothing listens at {path}", "start Docker, or set DOCKER_HOST")
    if not os.access(path, os.W_OK):
        raise EngineUnavailable(
            f"this user may not use the engine at {path}",
            "run as root, or join the group that owns the socket (`usermod -aG docker $USER`)",
        )


def _refuse_unusable(address: str, version: Mapping[str, Any]) -> None:
    names = [str(component.get("Name", "")) for component in version.get("Components") or []]
    if any("podman" in name.lower() for name in names):
        raise EngineUnavailable(
            f"the engine at {address} is Podman, whose Docker API drops GPU requests silently",
            "set DOCKER_HOST to the socket of a Docker Engine",
        )
    if tuple(int(part) for part in str(version["ApiVersion"]).split(".")) < OLDEST_API:
        raise EngineUnavailable(
            f"the engine at {address} is Docker {version['Version']}, which is too old",
            "install Docker Engine 20.10 or later",
        )


def _engine(
    address: str, owned: bool, version: Mapping[str, Any], facts: Mapping[str, Any]
) -> Engine:
    if facts["OperatingSystem"] == "Docker Desktop":
        raise EngineUnavailable(
            f"the engine at {address} is Docker Desktop, which runs boxes in a machine of its own",
            "set DOCKER_HOST to the socket of a Docker Engine on this machine",
        )
    return Engine(
        base_url=address,
        engine_id=facts["ID"],
        version=version["Version"],
        api_version=version["ApiVersion"],
        owned=owned,
        rootless="name=rootless" in facts["SecurityOptions"],
        cgroup_version=facts.get("CgroupVersion", "1"),
        cgroup_driver=facts["CgroupDriver"],
        storage_driver=facts["Driver"],
        machine=facts["Architecture"],
    )


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """One nightlab at a time; the kernel frees the lock of one that dies."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


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
    began = said = time.monotonic()
    while (now := time.monotonic()) - began < START_SECONDS:
        with suppress(EngineUnavailable):
            return _describe(places.url, owned=True)
        if now - said >= SAY_EVERY_SECONDS:
            said = now
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
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        # Looked at again behind the descriptor: from here on the number cannot change hands.
        if not _bears(pid, marks):
            return False
        signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        if not _is_readable(descriptor, STOP_SECONDS):
            raise SandboxError(
                f"{marks[0]} (process {pid}) did not end in {STOP_SECONDS} s",
                f"look at it with `ps -p {pid}` and end it yourself",
            )
    finally:
        os.close(descriptor)
    _reap(pid)
    return True


def _ended_within(pid: int, seconds: float) -> bool:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return _is_readable(descriptor, seconds)
    finally:
        os.close(descriptor)


def _is_readable(descriptor: int, seconds: float) -> bool:
    """Whether the process behind a pidfd ended in time."""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(seconds * 1000))


def _reap(pid: int) -> None:
    """Forget a child that ended; another's child is no business of ours."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
