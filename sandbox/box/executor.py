"""Runs one box on a Docker engine.

One run is one container: create, start, wait for PID 1 on the link, compare its walls with what
was asked, go, follow the link to the end, remove. Never exec, whose time limit kills the client and
not the work; never auto-remove, which races with asking how a run ended; never the archive calls,
which follow what a container laid out. Beside each run stands a watchdog (docs/decisions/0006).
"""

import contextlib
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path

import docker
import docker.errors
import requests

from sandbox.box.causes import conclude
from sandbox.box.container import Container, hint_for
from sandbox.box.files import OutputReceiver
from sandbox.box.follow import OUTPUT_BYTES_PER_SECOND, BoxRun, Ends, Step
from sandbox.box.hardening import Lease, Settings, container_settings
from sandbox.box.link import Listener
from sandbox.box.reaper import OWNER_FILE, process_owner
from sandbox.box.supervisor import counters_of_parts
from sandbox.box.users import held_user, users_of
from sandbox.box.watchdog import MAY_COME_LATE, RUN_IS_OVER
from sandbox.contract.errors import EngineUnavailable, ImageMissing, SandboxError, host_faults
from sandbox.contract.run import Limits, RunResult, RunSpec
from sandbox.engine.find import EngineClient
from sandbox.gpu.run import Attendance, attended

ENGINE_SECONDS = 60
ANSWER_SECONDS = 5
"""How long an engine that is there may take to say so."""
WATCHDOG_GRACE_SECONDS = 240.0
"""How much longer than its wall time and its output's way a run takes at most; a controller that
needs more is frozen, says the watchdog."""
DEATH_SECONDS = 10.0
LEFTOVER_SECONDS = 600.0
"""How long after its deadline a container of an unknown owner is taken for abandoned."""
HOSTS = b"127.0.0.1 localhost\n::1 localhost\n"
IMAGE_PATTERN = re.compile(r"^(\S+@)?sha256:[0-9a-f]{64}$")


def _ignore(*_: object) -> None:
    """Is told what nobody wants to know."""


class DockerExecutor:
    """Runs boxes on one Docker engine.

    Args:
        base_url: where the engine listens, as the docker SDK writes it.
        api_version: the negotiated version of its API, 1.41 or later.
        run_root: a directory for what lives as long as a run; the engine must be able to mount it.
        build: makes the container settings. What is recorded and proven is compared with
            `container_settings` in any case, so a weaker builder only gets its runs refused.
        call_seconds: how long the engine may take for one call; it has been seen to hang.
        death_seconds: how long a killed box may take to be gone before it counts as unkillable.
        quarantine: takes a GPU out of use: told its id, why, and in which run it failed.
        on_step: told the name of each step of a run once it is done; for those who measure.
        users: those that boxes get; without any, those that the engine can give.
    """

    def __init__(
        self,
        base_url: str,
        api_version: str,
        run_root: Path,
        build: Callable[[RunSpec, Lease], Settings] = container_settings,
        call_seconds: int = ENGINE_SECONDS,
        death_seconds: float = DEATH_SECONDS,
        quarantine: Callable[[str, str, str], None] = _ignore,
        on_step: Callable[[Step], None] = _ignore,
        users: Sequence[int] = (),
    ) -> None:
        self._quarantine = quarantine
        self._call_seconds = call_seconds
        self._death_seconds = death_seconds
        self._base_url = base_url
        self._api_version = api_version
        self._run_root = run_root
        self._build = build
        self._on_step = on_step
        self._users = users
        # An id is a hash of the content, so what was true of it once stays true.
        self._usable_images: dict[str, str] = {}

    def run(
        self,
        spec: RunSpec,
        *,
        output_dir: Path | None = None,
        channel: socket.socket | None = None,
        on_log: Callable[[bytes], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> RunResult:
        """Run `spec` to its end; see `contract.Executor.run`."""
        # From the outside in: what stands further up is needed to clear away what stands below.
        with (
            host_faults(),
            _engine_errors(),
            contextlib.closing(_receiver(spec.limits, output_dir)) as receiver,
            self._client(self._call_seconds) as client,
            _run_directory(self._run_root) as directory,
            contextlib.closing(Listener(directory)) as listener,
        ):
            digest = self._usable_image(client, spec.image)
            ends = Ends(receiver, channel, on_log or _ignore, should_stop, self._on_step)
            container = Container(client, f"nightlab-{directory.name}", self._death_seconds)
            box = BoxRun(spec, container, ends)
            # Before the container: a GPU that does not answer is never given to one.
            with (
                attended(spec, client.info, self._quarantine) as gpus,
                self._hold_user(client, container) as (user, lock),
            ):
                self._on_step("prepared")
                lease = _lease(spec, directory, gpus, user)
                settings = self._build(spec, lease)
                with (
                    self._watched(container, spec.limits, lock),
                    contextlib.closing(box),
                    gpus.watching_ends(),
                ):
                    proof = box.open(listener, lease, settings)
                    environment = gpus.bound(container.pid, box.end_now)
                    observed = box.follow(environment)
                # After it: only now what is still taken on a GPU was left there.
                gpus.look_back()
                return gpus.judged(conclude(spec, digest, proof, observed, settings, gpus))

    def answers(self) -> bool:
        """Tell within seconds whether the engine is there; see `contract.Executor.answers`."""
        try:
            with self._client(ANSWER_SECONDS) as client:
                return bool(client.ping())
        except (requests.RequestException, docker.errors.DockerException):
            return False

    def _client(self, call_seconds: int) -> contextlib.closing[EngineClient]:
        """Give a client of this call's own: the SDK's are not safe to share between threads."""
        return contextlib.closing(EngineClient(self._base_url, self._api_version, call_seconds))

    def _hold_user(
        self, client: EngineClient, container: Container
    ) -> contextlib.AbstractContextManager[tuple[int, socket.socket]]:
        """Have a user for one box; whether an engine maps users is asked once."""
        self._users = self._users or users_of(client)
        return held_user(client, self._users, lambda: container.may_come_late)

    @contextlib.contextmanager
    def _watched(self, container: Container, limits: Limits, lock: socket.socket) -> Iterator[None]:
        """Keep a process beside this one that ends the box if this one no longer can."""
        seconds = limits.wall_seconds + limits.output_bytes / OUTPUT_BYTES_PER_SECOND
        script = str(resources.files("sandbox.box").joinpath("watchdog.py"))
        socket_path = self._base_url.removeprefix("unix://")
        give_up = str(seconds + WATCHDOG_GRACE_SECONDS)
        arguments = (socket_path, self._api_version, container.name, give_up)
        with subprocess.Popen(
            # Neither site nor the current directory: nothing that an agent can write is imported.
            [sys.executable, "-I", "-S", script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},  # the host's keys are none of its business
            pass_fds=(lock.fileno(),),  # the box's user stays taken until this one is done, too
            start_new_session=True,  # what is sent to the terminal's group is not for it
        ) as watchdog:
            try:
                yield
            finally:
                with contextlib.suppress(BrokenPipeError):
                    watchdog.communicate(MAY_COME_LATE if container.may_come_late else RUN_IS_OVER)

    def _usable_image(self, client: docker.APIClient, image: str) -> str:
        """Return the image's id once it is known to be there and to declare no volume."""
        if image in self._usable_images:
            return self._usable_images[image]
        if not IMAGE_PATTERN.match(image):
            raise ImageMissing(f"an image is named by its digest, not as {image!r}")
        try:
            about = client.inspect_image(image)  # type: ignore[no-untyped-call]
        except docker.errors.ImageNotFound as error:
            hint = "run `nightlab setup`"
            raise ImageMissing(f"the image is not on this engine: {image}", hint) from error
        if (about.get("Config") or {}).get("Volumes"):
            raise SandboxError(
                "the image declares volumes, which would be writable without a bound",
                "build it without VOLUME",
            )
        self._usable_images[image] = about["Id"]
        return self._usable_images[image]


@contextlib.contextmanager
def _engine_errors() -> Iterator[None]:
    """Turn the SDK's errors into ours."""
    try:
        yield
    except docker.errors.APIError as error:
        words = str(error.explanation)
        raise SandboxError(f"the engine refused: {words}"[:1000], hint_for(words)) from error
    except (requests.RequestException, docker.errors.DockerException) as error:
        hint = "see whether the engine is running: `nightlab setup`"
        raise EngineUnavailable(f"the engine does not answer: {error}", hint) from error


@contextlib.contextmanager
def _run_directory(root: Path) -> Iterator[Path]:
    """Make the directory that is mounted at /nightlab, and remove it after the run."""
    # The name is the container's too, and must be no other's on this engine.
    directory = root.absolute() / secrets.token_hex(8)
    root.mkdir(parents=True, exist_ok=True)
    root.chmod(0o700)  # or another user of this machine could take PID 1's place at the link
    directory.mkdir(mode=0o755)
    try:
        directory.chmod(0o755)  # whatever the umask: the box's user must get in
        supervisor = resources.files("sandbox.box").joinpath("supervisor.py").read_bytes()
        # Its owner first, so that a sweep can tell whose it is, however early this process dies.
        files = {OWNER_FILE: process_owner().encode(), "supervisor.py": supervisor, "hosts": HOSTS}
        for name, content in files.items():
            (directory / name).write_bytes(content)
            (directory / name).chmod(0o644)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _receiver(limits: Limits, output_dir: Path | None) -> OutputReceiver:
    return OutputReceiver(output_dir, max_bytes=limits.output_bytes, max_files=limits.output_files)


def _lease(spec: RunSpec, directory: Path, gpus: Attendance, user: int) -> Lease:
    deadline = time.monotonic() + spec.limits.wall_seconds + LEFTOVER_SECONDS
    return Lease(
        run_directory=directory,
        owner=process_owner(),
        deadline_monotonic_seconds=int(deadline),
        user=user,
        counters=tuple(counters_of_parts()),  # anew: disks come and go
        gpus=gpus.request,
    )
