"""A user for every box: what two boxes of one user could do to each other, and cannot any more."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from sandbox import DockerExecutor
from sandbox.box.hardening import LABEL_USER
from sandbox.box.users import MAPPED_USERS, USERS, held_user, seen_from_here, users_of
from sandbox.contract.apart import Apart
from sandbox.contract.errors import SandboxError
from sandbox.contract.run import RunResult
from sandbox.engine.find import Engine, connect
from sandbox.image.image import ImageRecord
from tests.support.boxes import CONTROLLER, boxes_of, in_session, python_spec, wait_until

BUSY = 60
"""What a neighbour waits at most before it gives up."""


class Listing:
    """An engine of which only its containers and its options are asked."""

    def __init__(self, *options: str, held: tuple[int, ...] = ()) -> None:
        self.options, self.held = options, held

    def info(self) -> dict[str, Any]:
        return {"SecurityOptions": list(self.options)}

    def containers(self, filters: dict[str, str], **_: object) -> list[dict[str, str]]:
        return [{"Id": "left"} for user in self.held if filters["label"] == f"{LABEL_USER}={user}"]


# Far from those that boxes get, so that tests beside a night take nothing from it.
FIRST = 1_900_000_000 + 16 * os.getpid()
FREE, KEPT = range(FIRST, FIRST + 3), range(FIRST + 3, FIRST + 4)


def test_an_engine_that_maps_users_gets_numbers_that_it_can_map() -> None:
    plain, rootless, remapped = Listing("name=seccomp"), Listing("name=rootless"), Listing()
    remapped.options = ("name=seccomp,profile=builtin", "name=userns")
    assert USERS == users_of(plain)  # type: ignore[arg-type]
    assert MAPPED_USERS == users_of(rootless) == users_of(remapped)  # type: ignore[arg-type]
    assert USERS.stop < 2**31
    assert MAPPED_USERS.stop < 65_536


def held(
    users: range, engine: Listing | None = None, *, is_left: bool = False
) -> AbstractContextManager[tuple[int, Any]]:
    return held_user(engine or Listing(), users, lambda: is_left)  # type: ignore[arg-type]


def test_users_go_round_before_one_comes_again() -> None:
    had = []
    for _ in range(2 * len(FREE)):
        with held(FREE) as (user, _lock):
            had.append(user)
    assert set(FREE) == set(had[: len(FREE)])
    assert had[: len(FREE)] == had[len(FREE) :]


def test_a_user_is_nobody_else_s_while_it_is_held_and_none_is_given_when_all_are() -> None:
    with held(FREE) as (one, _1), held(FREE) as (two, _2), held(FREE) as (three, _3):
        assert set(FREE) == {one, two, three}
        with pytest.raises(SandboxError, match="all 3 users of boxes are taken"), held(FREE):
            pass


def test_another_process_of_this_machine_cannot_have_it_either() -> None:
    code = """
        import sys
        from sandbox.box.users import held_user
        class Engine:
            def containers(self, **_): return []
        with held_user(Engine(), [int(sys.argv[1])], bool) as (user, _):
            print(user)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(FREE[0])]
    with held(FREE[:1]):
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
    after = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "users of boxes are taken" in refused.stderr
    assert f"{FREE[0]}\n" == after.stdout


def test_a_user_whose_box_still_lies_on_the_engine_is_passed_over() -> None:
    with held(FREE[:2], Listing(held=(FREE[0],))) as (user, _):
        assert FREE[1] == user


def test_a_box_that_would_not_go_keeps_its_user() -> None:
    with held(KEPT, is_left=True):
        pass
    with pytest.raises(SandboxError, match="taken"), held(KEPT):
        pass


def test_a_user_of_another_namespace_is_the_kernel_s_word_for_it() -> None:
    assert 5 == seen_from_here(os.getpid(), 5)
    assert seen_from_here(2**22 + 1, 5) is None


# --- two real boxes ---


@pytest.fixture
def executor(engine: Engine, tmp_path: Path) -> DockerExecutor:
    return DockerExecutor(engine.base_url, engine.api_version, tmp_path / "runs")


class OneUser(DockerExecutor):
    """Gives every box the same user: this wall taken away."""

    @contextmanager
    def _hold_user(self, *_: object) -> Iterator[tuple[int, socket.socket]]:
        with socket.socket(socket.AF_UNIX) as lock:
            yield USERS[0], lock


def beside(
    executor: DockerExecutor,
    image: str,
    neighbour: str,
    program: str,
    mounts: tuple[dict[Path, str], dict[Path, str]] = ({}, {}),
) -> RunResult:
    """Run a program while another box, which has done its part, lives."""
    ready, over = threading.Event(), threading.Event()
    give_up = f"\nprint('ready', flush=True)\nimport time; time.sleep({BUSY})"
    first = python_spec(
        textwrap.dedent(neighbour) + give_up,
        image=image,
        mounts=mounts[0],
        wall_seconds=2 * BUSY,
        open_files=256,
    )
    second = python_spec(
        textwrap.dedent(program), image=image, mounts=mounts[1], wall_seconds=BUSY, log_bytes=2**16
    )
    with ThreadPoolExecutor() as pool:
        living = pool.submit(
            executor.run, first, on_log=lambda _: ready.set(), should_stop=over.is_set
        )
        try:
            assert ready.wait(BUSY), "the neighbour never got ready"
            return executor.run(second)
        finally:
            over.set()
            assert "ready" in living.result().log.head


MESSAGE = 137
QUEUE = f"""
    import os, signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {{40}})
    for _ in range({MESSAGE}): os.kill(os.getpid(), 40)
"""
ASK_QUEUE = """
    for line in open('/proc/self/status'):
        if line.startswith('SigQ'): print(line.split()[1].split('/')[0])
"""
USE_UP_PIPES = """
    import fcntl, os
    pipes = [os.pipe() for _ in range(64)]
    try:
        for _, end in pipes: fcntl.fcntl(end, 1031, 2**20)
    except OSError: pass
"""
ASK_PIPE = """
    import fcntl, os
    try: print(fcntl.fcntl(os.pipe()[1], 1031, 2**20))
    except OSError as error: print(error.strerror)
"""
COUNTERS = [
    pytest.param(QUEUE, ASK_QUEUE, "0\n", f"{MESSAGE}\n", id="queued signals"),
    pytest.param(
        USE_UP_PIPES, ASK_PIPE, "1048576\n", "Operation not permitted\n", id="pages of pipes"
    ),
]


@pytest.mark.parametrize(("neighbour", "program", "apart", "_"), COUNTERS)
def test_what_the_kernel_counts_of_one_box_s_user_another_box_does_not_feel(
    neighbour: str, program: str, apart: str, _: str, executor: DockerExecutor, image: ImageRecord
) -> None:
    assert apart == beside(executor, image.image_id, neighbour, program).log.head


@pytest.mark.parametrize(("neighbour", "program", "_", "together"), COUNTERS)
def test_boxes_of_one_user_would_meet_in_what_the_kernel_counts(
    neighbour: str, program: str, _: str, together: str, engine: Engine, image: Any, tmp_path: Path
) -> None:
    executor = OneUser(engine.base_url, engine.api_version, tmp_path / "runs")
    assert together == beside(executor, image.image_id, neighbour, program).log.head


BITS = 256
LOCK = f"""
    import fcntl, os, random
    random.seed(5)
    fd = os.open('/seen/file', os.O_RDONLY)
    for place in range({BITS}):
        if random.random() < 0.5: fcntl.lockf(fd, fcntl.LOCK_SH, 1, 2**40 + 2 * place)
"""
READ_LOCKS = f"""
    import fcntl, os, random, struct
    random.seed(5)
    fd, right, ones = os.open('/seen/file', os.O_RDONLY), 0, 0
    for place in range({BITS}):
        asked = struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 2**40 + 2 * place, 1, 0)
        is_locked = struct.unpack_from('h', fcntl.fcntl(fd, fcntl.F_GETLK, asked))[0] != 2
        right += is_locked == (random.random() < 0.5)
        ones += is_locked
    print(right, ones)
"""


@pytest.fixture
def seen(tmp_path: Path) -> Path:
    (tmp_path / "seen").mkdir()
    (tmp_path / "seen" / "file").write_text("pass\n")
    return tmp_path / "seen"


def test_boxes_on_copies_of_a_file_do_not_see_each_other_s_locks(
    executor: DockerExecutor, image: ImageRecord, seen: Path, tmp_path: Path
) -> None:
    shutil.copytree(seen, tmp_path / "copy")
    mounts = {seen: "/seen"}, {tmp_path / "copy": "/seen"}
    right, ones = beside(executor, image.image_id, LOCK, READ_LOCKS, mounts).log.head.split()
    assert "0" == ones
    assert BITS != int(right)
    apart = Apart()
    for each in mounts:
        apart.begin(python_spec("pass", mounts=each))


def test_boxes_on_one_file_would_read_all_of_each_other_s_locks_and_are_refused(
    executor: DockerExecutor, image: ImageRecord, seen: Path
) -> None:
    mounts = {seen: "/seen"}, {seen: "/seen"}
    right, _ = beside(executor, image.image_id, LOCK, READ_LOCKS, mounts).log.head.split()
    assert BITS == int(right)
    apart = Apart()
    apart.begin(python_spec("pass", mounts=mounts[0]))
    with pytest.raises(SandboxError, match="would see one file"):
        apart.begin(python_spec("pass", mounts=mounts[1]))


PLACES = (
    *("/usr/bin/python3", "/usr", "/etc/hosts", "/etc/hostname", "/nightlab/supervisor.py"),
    *("/dev/null", "/dev/shm", "/proc/version", "/proc/1/status", "/proc/sys/kernel/osrelease"),
    *("/sys/devices/system/cpu/online", "/sys/fs/cgroup"),
)
LOCK_ALL = f"""
    import fcntl, os
    kept = [os.open(place, os.O_RDONLY) for place in {PLACES}]
    for fd in kept: fcntl.flock(fd, fcntl.LOCK_SH)
"""
ASK_ALL = f"""
    import fcntl, os
    for place in {PLACES} + tuple(place for place in ('/seen',) if os.path.exists(place)):
        try: fcntl.flock(os.open(place, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError: print(place)
"""


def test_boxes_meet_in_no_file_of_the_image_the_engine_or_the_kernel(
    executor: DockerExecutor, image: ImageRecord, seen: Path
) -> None:
    assert "" == beside(executor, image.image_id, LOCK_ALL, ASK_ALL).log.head
    also = LOCK_ALL + "    fcntl.flock(os.open('/seen', os.O_RDONLY), fcntl.LOCK_SH)\n"
    mounts = {seen: "/seen"}, {seen: "/seen"}
    assert "/seen\n" == beside(executor, image.image_id, also, ASK_ALL, mounts).log.head


def test_boxes_at_once_and_one_after_another_have_users_of_their_own(
    executor: DockerExecutor, engine: Engine, image: ImageRecord, tmp_path: Path
) -> None:
    other = DockerExecutor(engine.base_url, engine.api_version, tmp_path / "others")
    spec = python_spec("import os; print(os.getuid(), os.getgid())", image=image.image_id)
    with ThreadPoolExecutor() as pool:
        results = [*pool.map(lambda by: by.run(spec), (executor, other, executor))]
    results.append(executor.run(spec))
    users = [int(result.log.head.split()[0]) for result in results]
    assert [f"{user} {user}\n" for user in users] == [result.log.head for result in results]
    assert len(set(users)) == len(results)
    assert set(users) <= {*USERS, *MAPPED_USERS}


SEND = """
    import socket
    def counted():
        with open('/proc/self/net/softnet_stat') as file:
            return sum(int(line.split()[0], 16) for line in file)
    before = counted()
    try:
        with socket.socket() as near: near.bind(('127.0.0.1', 0)); near.listen()
        with socket.socket(type=socket.SOCK_DGRAM) as one:
            one.bind(('127.0.0.1', 0))
            for _ in range(5000): one.sendto(b'x', one.getsockname()); one.recv(1)
    except OSError as error: print(error.strerror)
    else: print(counted() - before >= 5000)
"""


NO_SOCKETS = "Address family not supported by protocol\n"


@pytest.mark.parametrize(
    ("box", "loopback", "found"),
    [("train", True, "True\n"), ("train", False, NO_SOCKETS), ("model", False, NO_SOCKETS)],
)
def test_packets_that_are_counted_for_the_whole_machine_are_a_training_s_alone(
    box: str, loopback: bool, found: str, executor: DockerExecutor, image: ImageRecord
) -> None:
    spec = python_spec(textwrap.dedent(SEND), image=image.image_id, loopback=loopback)
    assert found == executor.run(spec.model_copy(update={"box": box})).log.head


def test_a_user_stays_taken_until_the_box_of_a_killed_controller_is_gone(
    engine: Engine, image: ImageRecord, tmp_path: Path
) -> None:
    session = f"killed-{os.getpid()}"
    code = "import time; print('up', flush=True); time.sleep(60)"
    spec = in_session(python_spec(code, image=image.image_id, wall_seconds=60), session)
    arguments = (engine.base_url, engine.api_version, str(tmp_path / "r"), spec.model_dump_json())
    with closing(connect(engine)) as docker_client:
        client = docker_client.api
        controller = subprocess.Popen([sys.executable, "-c", CONTROLLER, *arguments])
        try:
            assert wait_until(lambda: _is_running(boxes_of(client, session)))
            user = int(boxes_of(client, session)[0]["Labels"][LABEL_USER])
            # Where a label is not looked at, only the lock stands between.
            blind = Listing()
            with pytest.raises(SandboxError, match="taken"), held(range(user, user + 1), blind):
                pass
        finally:
            controller.send_signal(signal.SIGKILL)
            controller.wait()
        give_up = time.monotonic() + BUSY
        while not _is_free(client, user):
            assert time.monotonic() < give_up
            time.sleep(0.02)
        assert [] == boxes_of(client, session)


def _is_running(boxes: list[dict[str, Any]]) -> bool:
    return any(box["State"] == "running" for box in boxes)


def _is_free(client: Any, user: int) -> bool:
    take: Callable[..., Any] = held_user
    try:
        with take(client, range(user, user + 1), bool):
            return True
    except SandboxError:
        return False
