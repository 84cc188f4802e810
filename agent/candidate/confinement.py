"""Opens paths beneath a directory, confined by the kernel.

With `openat2(2)` the kernel itself refuses symbolic links, magic links and every way out. Where it
has none, each component is opened on its own, relative to the one before, and links are refused.
"""

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

OPENAT2 = 437  # one number on every architecture Linux runs Python on, Alpha excepted
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RACE_RETRIES = 16  # openat2 answers EAGAIN when the tree changes under it

OpenBeneath = Callable[[int, str, int], int]
"""Opens a path beneath a directory: (the directory's descriptor, path, flags) -> descriptor."""


class _OpenHow(ctypes.Structure):
    _fields_ = [
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    ]


_libc = ctypes.CDLL(None, use_errno=True)


def open_by_kernel(directory: int, path: str, flags: int) -> int:
    """Open `path` beneath `directory` with openat2; see `OpenBeneath`.

    Raises:
        OSError: ELOOP for a link, EXDEV for a way out, ENOSYS where there is no openat2.
    """
    resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    code = errno.EAGAIN
    for _ in range(RACE_RETRIES):
        descriptor: int = _libc.syscall(
            ctypes.c_long(OPENAT2),
            ctypes.c_int(directory),
            ctypes.c_char_p(os.fsencode(path)),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if descriptor >= 0:
            return descriptor
        code = ctypes.get_errno()
        if code not in (errno.EAGAIN, errno.EINTR):
            break
    raise OSError(code, os.strerror(code))


def open_by_walking(directory: int, path: str, flags: int) -> int:
    """Open `path` beneath `directory` one component at a time; see `OpenBeneath`.

    Raises:
        OSError: ELOOP or ENOTDIR for a link.
    """
    *parents, name = path.split("/")
    current = os.dup(directory)
    try:
        for parent in parents:
            step = os.open(parent, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=current)
            os.close(current)
            current = step
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=current)
    finally:
        os.close(current)


def choose_opener(root: Path) -> OpenBeneath:
    """The kernel's own confinement where it answers, the walk where it does not."""
    with closing(os.open(root, os.O_PATH | os.O_DIRECTORY)) as directory:
        try:
            os.close(open_by_kernel(directory, ".", os.O_PATH | os.O_DIRECTORY))
        except OSError as error:
            # Old seccomp profiles answer EPERM to a system call that they do not know.
            if error.errno in (errno.ENOSYS, errno.EPERM):
                return open_by_walking
            raise
    return open_by_kernel


@contextmanager
def closing(descriptor: int) -> Iterator[int]:
    """Closes a descriptor at the end, whatever happens."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)
