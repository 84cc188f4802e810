"""What goes wrong on our side, never on the program's."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from pydantic import ValidationError

MAKE_ROOM = "make room on the disk, then go on with `nightlab resume`; nothing recorded is lost"
"""The hint for a disk that is full."""
MAKE_SPACE = "end what else runs on this machine, or raise its limits, then go on"
"""The hint for a machine that has no memory, process or file left to give."""
LOCAL_DISK = "keep the project, and NIGHTLAB_HOME, on a local disk (ext4, xfs, btrfs)"
"""The hint for a file system that lacks what every other one has."""
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system says that knows no locks."""
DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What the kernel says of a disk that is full, over quota, read-only or broken."""
MACHINE_REFUSES = (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE)


class NightlabError(Exception):
    """An error that a person is told in a sentence, with what to do next.

    Args:
        message: what is wrong, and where.
        hint: what the user can do next; the class's own where it is left out.
    """

    usual_hint: ClassVar[str]

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.usual_hint


class UsageError(NightlabError):
    """A person asked for something that cannot be done as asked."""

    usual_hint = "see the command's --help"


class SandboxError(NightlabError):
    """nightlab or the engine failed; never the fault of the program that ran."""

    usual_hint = "`nightlab check` tries this machine's boxes; `nightlab resume` goes on"


class EngineUnavailable(SandboxError):
    """No container engine answers, or it stopped answering."""

    usual_hint = "see whether `docker info` answers, then go on with `nightlab resume`"


class ImageMissing(SandboxError):
    """The image is not on this engine."""


class LimitNotEnforced(SandboxError):
    """The engine dropped a wall or a limit; the run was refused before the program started."""


class ContainerUnkillable(SandboxError):
    """A container would not die; its devices must not be used again before someone looks."""


class BoxLost(SandboxError):
    """A box ended and nobody says how its program did: killed from outside, or PID 1 is gone.

    As a rule that is none of the program's doing; a program that brings it about each time is.
    """


class GpuFault(SandboxError):
    """A GPU failed under a run and is out of use now; the run says nothing about its program."""


@contextmanager
def host_faults() -> Iterator[None]:
    """Turn what the host has no room for into a SandboxError: our fault, never the program's.

    Any other OSError is not about room, a pipe without a reader or a missing folder, and passes.
    """
    try:
        yield
    except OSError as error:
        if error.errno in DISK_REFUSES:
            raise SandboxError(f"the disk refused: {error.strerror}", MAKE_ROOM) from error
        if error.errno in MACHINE_REFUSES:
            raise SandboxError(f"the machine refused: {error.strerror}", MAKE_SPACE) from error
        raise


def first_problem(error: ValidationError) -> str:
    """The first field that a record refused, and why."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
