"""Gives each box a user that no other box has.

The kernel keeps counters and quotas for each user, and every process reads its own: two boxes of
one user can talk, and use up what the other needs. See docs/decisions/0024.
"""

import errno
import itertools
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import docker

from sandbox.box.hardening import LABEL_USER
from sandbox.contract.errors import SandboxError

USERS = range(2_000_000_000, 2_000_065_536)
"""Nobody's: above what systemd gives to containers and below 2^31, where programs miscount."""
MAPPED_USERS = range(20_000, 60_000)
"""For engines that map users: there is no other number in a box, and the host sees another one."""
MAPPING_OPTIONS = ("name=userns", "name=rootless")
# One after the other, so that nobody gets the user of a box that was here before, and from
# anywhere, so that two controllers seldom try the same ones.
_turns = itertools.count(secrets.randbelow(len(USERS)))


def users_of(client: docker.APIClient) -> range:
    """Return the users that boxes of an engine can have."""
    options = client.info().get("SecurityOptions") or ()
    return MAPPED_USERS if any(o.startswith(MAPPING_OPTIONS) for o in options) else USERS


@contextmanager
def held_user(
    client: docker.APIClient, users: Sequence[int], is_left: Callable[[], bool]
) -> Iterator[tuple[int, socket.socket]]:
    """Give a user that nothing else on this machine has, and the lock that keeps it so.

    Whoever may have to outlive this process, to end the box, inherits the lock.

    Args:
        client: of the engine.
        users: to choose from.
        is_left: asked in the end whether the box may still be there. It then keeps its user: here
            as long as this process lives, and afterwards by its label.

    Raises:
        SandboxError: every user is taken.
    """
    user, lock = _take(client, users)
    try:
        yield user, lock
    finally:
        if is_left():
            lock.detach()
        lock.close()


def _take(client: docker.APIClient, users: Sequence[int]) -> tuple[int, socket.socket]:
    for _ in users:
        user = users[next(_turns) % len(users)]
        # The kernel frees a name of this kind with its last holder: no file stays behind.
        lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            lock.bind(f"\0nightlab-user-{user}")
        except OSError as error:
            lock.close()
            if error.errno != errno.EADDRINUSE:
                raise
            continue
        # What a killed controller left has no holder, but is still there.
        if not client.containers(all=True, quiet=True, filters={"label": f"{LABEL_USER}={user}"}):
            return user, lock
        lock.close()
    raise SandboxError(
        f"all {len(users)} users of boxes are taken", "`docker ps -a` shows whose boxes those are"
    )


def seen_from_here(pid: int, user: int) -> int | None:
    """Return a user inside a process's user namespace as this one sees it; None where untold."""
    try:
        lines = Path(f"/proc/{pid}/uid_map").read_text().splitlines()
    except OSError:
        return None
    for inside, outside, count in (map(int, line.split()) for line in lines):
        if inside <= user < inside + count:
            return outside + user - inside
    return None
