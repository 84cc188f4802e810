"""Of what the operating system refuses, only what is about room is told as such."""

from __future__ import annotations

import errno
import os

import pytest

from sandbox.contract.errors import MAKE_ROOM, MAKE_SPACE, SandboxError, host_faults


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_takes_no_more_is_named(number: int) -> None:
    with pytest.raises(SandboxError, match="the disk refused: ") as refusal, host_faults():
        raise OSError(number, os.strerror(number))
    assert MAKE_ROOM == refusal.value.hint


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EAGAIN, errno.EMFILE])
def test_a_machine_that_has_nothing_left_is_named(number: int) -> None:
    with pytest.raises(SandboxError, match="the machine refused: ") as refusal, host_faults():
        raise OSError(number, os.strerror(number))
    assert MAKE_SPACE == refusal.value.hint


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ECONNRESET, errno.ENOENT, errno.EACCES])
def test_what_is_not_about_room_is_not_blamed_on_the_machine(number: int) -> None:
    with pytest.raises(OSError, match=os.strerror(number)) as passed, host_faults():
        raise OSError(number, os.strerror(number))
    assert number == passed.value.errno


def test_a_caller_whose_own_pipe_broke_learns_of_it() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(BrokenPipeError), host_faults():
        os.write(writing, b"x")
    os.close(writing)
