"""This machine: its packages, its programs, nightlab's folders on it."""

import fcntl
import hashlib
import os
import platform
import re
import select
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sandbox.contract.errors import SandboxError

Say = Callable[[str], None]
"""Is told what goes on, a sentence at a time, by whatever may take minutes."""
PACKAGES_SECONDS = 900
LONGEST_SOCKET_PATH = 100
"""The kernel takes 107 bytes, containerd 104."""
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Places(NamedTuple):
    """Where nightlab's own engine keeps what it needs."""

    root: Path
    socket: Path
    exec_root: Path
    data: Path
    """Images and containers."""
    pid_file: Path
    configuration: Path
    """Empty on purpose: everything is said by flags."""
    log: Path
    containerd: Path
    """Where dockerd keeps its own containerd's pid file and settings."""

    @property
    def url(self) -> str:
        """The socket as docker clients name it."""
        return f"unix://{self.socket}"


def own_places(state_dir: Path) -> Places:
    """Where nightlab's own engine lives; its sockets move to /run where the path is too long."""
    root = short = state_dir.absolute() / "engine"
    longest = root / "exec" / "containerd" / "containerd.sock.ttrpc"
    if len(os.fsencode(longest)) > LONGEST_SOCKET_PATH:
        short = Path("/run") / f"nightlab-{hashlib.sha256(os.fsencode(root)).hexdigest()[:12]}"
    return Places(
        root=root,
        socket=short / "docker.sock",
        exec_root=short / "exec",
        data=root / "data",
        pid_file=root / "dockerd.pid",
        configuration=root / "daemon.json",
        log=root / "dockerd.log",
        containerd=short / "exec" / "containerd",
    )


def os_release() -> dict[str, str]:
    """What the distribution says of itself; empty where it says nothing."""
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {}


def why_not_installable(effective_uid: int, release: Mapping[str, str]) -> str | None:
    """Why nightlab may not install packages and start dockerd here; None where it may."""
    # Nothing is ever installed by sudo: a night must not ask for a password.
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
        output = last_lines((done.stdout + done.stderr).decode(errors="replace"))
        raise SandboxError(
            f"`{' '.join(argv[:2])}` ended with {done.returncode}", f"it said:\n{output}"
        )
    return done.stdout.decode(errors="replace")


def last_lines(text: str, count: int = 15) -> str:
    """The end of a tool's output, bounded, without control characters.

    It ends up in a hint on somebody's terminal, and a registry or a mirror may have written it.
    """
    printable = re.sub(r"[^\n\t -~\u00a0-\uffff]", "", text[-8000:])
    return "\n".join(printable.strip().splitlines()[-count:])


def search_path(environ: Mapping[str, str]) -> str:
    """Where programs are looked for: the user's PATH, then the directories of root's."""
    return f"{environ.get('PATH', '')}:{SYSTEM_PATH}".lstrip(":")


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """One nightlab at a time; the kernel frees the lock of one that dies."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_readable(descriptor: int, seconds: float) -> bool:
    """Whether a file descriptor can be read in time; one of a process, whether that has ended."""
    poller = select.poll()  # select.select fails above file descriptor 1023
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(seconds * 1000))
