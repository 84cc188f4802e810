"""Runs one box on a Docker engine.

One run is one container: create, start, wait for PID 1 on the link, compare its walls with what
was asked, go, follow the link to the end, remove. The engine is asked as little as possible and
never waited for without a time limit, because a container can make its answers hang.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import docker
import docker.errors
import requests

from sandbox.box.causes import decide, gather, tried_bytes
from sandbox.box.files import OutputReceiver
from sandbox.box.hardening import Lease, Settings, container_settings, engine_differences
from sandbox.box.link import (
    ExitReport,
    FileHeader,
    Go,
    Link,
    LinkBroken,
    LinkEnded,
    Listener,
    Skipped,
    parse,
)
from sandbox.box.proof import Proof, require_walls
from sandbox.box.quota import CpuQuota
from sandbox.box.reaper import OWNER_FILE, lift_cpu_limit, process_owner
from sandbox.box.watchdog import MAY_COME_LATE, RUN_IS_OVER
from sandbox.contract.errors import (
    BoxLost,
    ContainerUnkillable,
    EngineUnavailable,
    ImageMissing,
    LimitNotEnforced,
    SandboxError,
    host_faults,
)
from sandbox.contract.record import Record
from sandbox.contract.run import Log, OutputFile, RunResult, RunSpec
from sandbox.gpu.request import TOOLKIT_HINT
from sandbox.gpu.run import Attendance, attended

ENGINE_SECONDS = 60
ANSWER_SECONDS = 5
"""How long an engine that is there may take to say so."""
HANDSHAKE_SECONDS = 30.0
LIFT_GRACE_SECONDS = 0.08
"""How long after PID 1's own deadline the engine is asked to lift the box's CPU limit, so that it
can die. Where this process may do it itself, which costs nothing, it does so at the deadline."""
ASK_SECONDS = 1.0
"""How often `should_stop` is asked about a program that says nothing."""
HOST_GRACE_SECONDS = 0.4
"""How long after PID 1's own deadline the host kills it."""
WATCHDOG_GRACE_SECONDS = 240.0
"""How much longer than its wall time and its output's way a run takes at most; a controller that
needs more is frozen, says the watchdog."""
DEATH_SECONDS = 10.0
REMOVAL_PAUSES_SECONDS = (0.1, 1.0)
LEFTOVER_SECONDS = 600.0
"""How long after its deadline a container of an unknown owner is taken for abandoned."""
OUTPUT_BYTES_PER_SECOND = 10e6
"""The slowest transfer of output that is not called a stall."""
HOSTS = b"127.0.0.1 localhost\n::1 localhost\n"
IMAGE_PATTERN = re.compile(r"^(\S+@)?sha256:[0-9a-f]{64}$")
Step = Literal[
    "prepared", "created", "started", "connected", "inspected", "compared", "reported", "ended"
]


def _nobody_notes(gpu: str, why: str, run_id: str) -> None:
    """Is told which GPU to take out of use where nobody leases any."""


def _nobody_measures(step: Step) -> None:
    """Is told what was done when nobody wants to know."""


def _nobody_reads(piece: bytes) -> None:
    """Is told the log when nobody wants to see it."""


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
    """

    def __init__(
        self,
        base_url: str,
        api_version: str,
        run_root: Path,
        build: Callable[[RunSpec, Lease], Settings] = container_settings,
        call_seconds: int = ENGINE_SECONDS,
        death_seconds: float = DEATH_SECONDS,
        quarantine: Callable[[str, str, str], None] = _nobody_notes,
        on_step: Callable[[Step], None] = _nobody_measures,
    ) -> None:
        self._quarantine = quarantine
        self._call_seconds = call_seconds
        self._death_seconds = death_seconds
        self._base_url = base_url
        self._api_version = api_version
        self._run_root = run_root
        self._build = build
        self._on_step = on_step
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
        with (
            host_faults(),
            _engine_errors(),
            contextlib.closing(_receiver(spec, output_dir)) as receiver,
            self._client() as client,
            _run_directory(self._run_root) as directory,
            contextlib.closing(Listener(directory)) as listener,
        ):
            digest = self._usable_image(client, spec.image)
            name = f"nightlab-{directory.name}"
            box = _Box(client, spec, name, self._death_seconds, self._on_step)
            with attended(spec, client.info, self._quarantine) as gpus:
                self._on_step("prepared")
                lease = _lease(spec, directory, gpus)
                with self._watched(box), _removed_at_the_end(box), gpus.watching_ends():
                    settings = self._build(spec, lease)
                    proof = box.open(listener, lease, settings)
                    environment = gpus.bound(box.pid(), box.end_now)
                    observed = box.follow(
                        receiver, channel, on_log or _nobody_reads, should_stop, environment
                    )
                gpus.look_back()
                container = {"asked": settings, "proved": proof.model_dump(mode="json")}
                return gpus.judged(_result(spec, digest, proof, observed, container, gpus))

    def answers(self) -> bool:
        """Tell within seconds whether the engine is there; see `contract.Executor.answers`."""
        try:
            with self._client(ANSWER_SECONDS) as client:
                return bool(client.ping())
        except (requests.RequestException, docker.errors.DockerException):
            return False

    @contextlib.contextmanager
    def _client(self, call_seconds: int | None = None) -> Iterator[docker.APIClient]:
        """Give a client of this call's own: the SDK's are not safe to share between threads."""
        client = docker.APIClient(
            base_url=self._base_url,
            version=self._api_version,
            timeout=call_seconds or self._call_seconds,
        )
        try:
            yield client
        finally:
            client.close()

    @contextlib.contextmanager
    def _watched(self, box: _Box) -> Iterator[None]:
        """Keep a process beside this one that ends the box if this one no longer can."""
        limits = box.spec.limits
        seconds = limits.wall_seconds + limits.output_bytes / OUTPUT_BYTES_PER_SECOND
        script = str(resources.files("sandbox.box").joinpath("watchdog.py"))
        socket_path = self._base_url.removeprefix("unix://")
        words = (socket_path, self._api_version, box.name, str(seconds + WATCHDOG_GRACE_SECONDS))
        with subprocess.Popen(
            [sys.executable, "-I", "-S", script, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},  # the host's keys are none of its business
            start_new_session=True,  # what is sent to the terminal's group is not for it
        ) as watchdog:
            try:
                yield
            finally:
                with contextlib.suppress(BrokenPipeError):
                    watchdog.communicate(MAY_COME_LATE if box.may_come_late else RUN_IS_OVER)

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


class Observed(Record):
    """What the host saw of a run between go and the end."""

    started_at: datetime
    finished_at: datetime
    wall_seconds: float
    report: ExitReport | None
    log: Log
    output: tuple[OutputFile, ...]
    skipped: dict[str, int]
    killed_by_host: bool
    asked_to_stop: bool
    ended_for: Literal["gpu_memory", "gpu_fault"] | None
    engine_state: dict[str, Any] | None


class _Box:
    """One container and the link to its PID 1."""

    def __init__(
        self,
        client: docker.APIClient,
        spec: RunSpec,
        name: str,
        death_seconds: float,
        on_step: Callable[[Step], None],
    ) -> None:
        self.name = name
        self.spec = spec
        self.may_come_late = False
        """The engine was asked for the container and never said that it is gone."""
        self._is_made = False
        self._client = client
        self._death_seconds = death_seconds
        self._is_unkillable = False
        self._on_step = on_step
        self._link: Link | None = None
        self._init: int | None = None
        self._ended_for: Literal["gpu_memory", "gpu_fault"] | None = None
        self._quota: CpuQuota | None = None
        self._head = bytearray()
        self._tail = bytearray()
        self._seen_bytes = 0
        self._is_asked_to_stop = False

    # --- before the program exists ---

    def open(self, listener: Listener, lease: Lease, settings: Settings) -> Proof:
        """Create and start the container and return what PID 1 proved, all of it as asked."""
        self._create(settings)
        self._on_step("created")
        self._start()
        self._on_step("started")
        self._link = self._await_link(listener)
        self._init = _open_process(self._link.peer_pid())
        self._quota = CpuQuota(self._link.peer_pid())
        self._on_step("connected")
        recorded = self._client.inspect_container(self.name)
        self._on_step("inspected")
        wrong = engine_differences(container_settings(self.spec, lease), recorded)
        payload = self._link.expect(b"H", time.monotonic() + HANDSHAKE_SECONDS)
        proof = parse(Proof, payload)
        require_walls(self.spec, proof, lease.gpus)
        if wrong:
            raise LimitNotEnforced("the engine recorded otherwise than asked: " + ", ".join(wrong))
        self._on_step("compared")
        return proof

    def _create(self, settings: Settings) -> None:
        """Create the container; an engine that warns has dropped a limit."""
        self.may_come_late = True
        try:
            # The SDK's friendlier calls throw the engine's warnings away.
            created = self._client.create_container_from_config(  # type: ignore[no-untyped-call]
                settings, self.name
            )
        except docker.errors.APIError:
            self.may_come_late = False  # a refusal is an answer
            raise
        self._is_made = True
        if created.get("Warnings"):
            raise LimitNotEnforced(f"the engine warns: {created['Warnings']}"[:1000])

    def _start(self) -> None:
        try:
            self._client.start(self.name)
        except docker.errors.APIError as error:
            if error.status_code == 400 or "python3" in str(error):
                hint = "the image needs a `python3` on its PATH"
                raise SandboxError(f"the box did not start: {error.explanation}", hint) from error
            if "could not select device driver" in str(error):
                raise SandboxError(
                    "the engine has no way to give a box GPUs", TOOLKIT_HINT
                ) from error
            raise

    def _await_link(self, listener: Listener) -> Link:
        give_up = time.monotonic() + HANDSHAKE_SECONDS
        while time.monotonic() < give_up:
            link = listener.accept(1.0)
            if link is not None:
                return link
            state = self._client.inspect_container(self.name)["State"]
            if not state["Running"]:
                break
        words = self._client.logs(self.name, tail=20)[-2000:].decode(errors="replace")
        raise SandboxError(f"PID 1 of the box never reported; its last words: {words}")

    # --- while it runs ---

    def pid(self) -> int:
        """Return PID 1's process id on this host; 0 where it has none."""
        return 0 if self._link is None else self._link.peer_pid()

    def end_now(self, why: Literal["gpu_memory", "gpu_fault"]) -> None:
        """Kill the box at once, from another thread; the first reason counts."""
        if self._ended_for is not None or self._link is None:
            return
        self._ended_for = why
        try:
            if self._init is None:
                raise ProcessLookupError
            signal.pidfd_send_signal(self._init, signal.SIGKILL)
        except OSError:
            self._link.shut()

    def follow(
        self,
        receiver: OutputReceiver,
        channel: socket.socket | None,
        on_log: Callable[[bytes], None],
        should_stop: Callable[[], bool] | None,
        environment: dict[str, str],
    ) -> Observed:
        """Let the program start, and return what was seen once it has ended.

        Args:
            receiver: gets the output files.
            channel: see `contract.Executor.run`.
            on_log: the same.
            should_stop: the same.
            environment: variables beside those of the spec.
        """
        assert self._link is not None
        started_at, started = datetime.now(UTC), time.monotonic()
        self._link.send_go(_go(self.spec, receiver, channel, environment), channel)
        deadline = started + self.spec.limits.wall_seconds
        report, killed_by_host = None, False
        try:
            report = self._await_report(deadline, on_log, should_stop)
            killed_by_host = report is None
        except LinkEnded:
            pass  # PID 1 died without a word: the engine's view must do
        except LinkBroken as error:
            raise BoxLost(error.message) from error
        wall_seconds, finished_at = time.monotonic() - started, datetime.now(UTC)
        self._on_step("reported")
        log, output, skipped = self._collect(report, receiver)
        self._on_step("ended")
        return Observed(
            started_at=started_at,
            finished_at=finished_at,
            wall_seconds=wall_seconds,
            report=report,
            log=log,
            output=output,
            skipped=skipped,
            killed_by_host=killed_by_host,
            asked_to_stop=self._is_asked_to_stop,
            ended_for=self._ended_for,
            engine_state=self._engine_state() if report is None else None,
        )

    def _await_report(
        self,
        deadline: float,
        on_log: Callable[[bytes], None],
        should_stop: Callable[[], bool] | None,
    ) -> ExitReport | None:
        """Return PID 1's report, or None when it came too late and the host killed the box."""
        lift_at = deadline if self._can_lift() else deadline + LIFT_GRACE_SECONDS
        report = self._follow_link(lift_at, on_log, should_stop)
        if report is None:
            if self._is_asked_to_stop:
                deadline = min(deadline, time.monotonic())
            self._lift()
            report = self._follow_link(deadline + HOST_GRACE_SECONDS, on_log)
        if report is None:
            self._kill()
        return report

    def _can_lift(self) -> bool:
        return self._quota is not None and self._quota.is_in_reach

    def _lift(self) -> None:
        """Give the box every CPU to die with: by the host's kernel, else through the engine."""
        if self._quota is None or not self._quota.lift():
            lift_cpu_limit(self._client, self.name)

    def _follow_link(
        self,
        give_up: float,
        on_log: Callable[[bytes], None],
        should_stop: Callable[[], bool] | None = None,
    ) -> ExitReport | None:
        """Pass the log on until PID 1 reports; None when it is late, or was told to stop."""
        assert self._link is not None
        while True:
            ask_at = give_up if should_stop is None else time.monotonic() + ASK_SECONDS
            frame = self._link.receive(min(give_up, ask_at))
            if frame is None and time.monotonic() >= give_up:
                return None
            kind, payload = frame or (b"", b"")
            if kind == b"X":
                return parse(ExitReport, payload)
            if kind == b"L":
                self._keep(payload)
                on_log(payload)
            elif kind:
                raise LinkBroken(f"PID 1 sent frame {kind!r} while the program ran")
            if should_stop is not None and should_stop():
                self._is_asked_to_stop = True
                self._link.send_stop()
                return None

    def _keep(self, piece: bytes) -> None:
        """Keep forwarded pieces, in case PID 1 does not live to send the log itself."""
        limit = self.spec.limits.log_bytes
        self._seen_bytes += len(piece)
        room = max(0, limit - len(self._head))
        self._head += piece[:room]
        self._tail += piece[room:]
        if len(self._tail) > 2 * limit:
            del self._tail[:-limit]

    def _collect(
        self, report: ExitReport | None, receiver: OutputReceiver
    ) -> tuple[Log, tuple[OutputFile, ...], dict[str, int]]:
        """Return log, output and what of the output was skipped."""
        if report is None:
            return self._forwarded_log(), (), {}
        assert self._link is not None
        limits = self.spec.limits
        give_up = time.monotonic() + 30 + limits.output_bytes / OUTPUT_BYTES_PER_SECOND
        try:
            head = self._link.expect(b"T", give_up)
            tail = self._link.expect(b"T", give_up)
            skipped = self._receive_output(receiver, give_up) if report.all_dead else {}
        except (LinkBroken, LinkEnded) as error:
            raise BoxLost(f"while it sent the output: {error.message}") from error
        return (
            _log(head, tail, report.log_omitted_bytes),
            receiver.finish(),
            skipped,
        )

    def _forwarded_log(self) -> Log:
        limit = self.spec.limits.log_bytes
        tail = bytes(self._tail[-limit:])
        return _log(bytes(self._head), tail, self._seen_bytes - len(self._head) - len(tail))

    def _receive_output(self, receiver: OutputReceiver, give_up: float) -> dict[str, int]:
        assert self._link is not None
        while (frame := self._link.receive(give_up)) is not None:
            kind, payload = frame
            if kind == b"E":
                return parse(Skipped, payload).skipped
            if kind == b"F":
                header = parse(FileHeader, payload)
                receiver.begin(header.name, header.bytes)
            elif kind == b"D":
                receiver.add(payload)
            else:
                raise LinkBroken(f"PID 1 sent frame {kind!r} among its output")
        raise LinkBroken("PID 1 did not send all of its output in time")

    # --- the end ---

    def remove(self) -> None:
        """Make sure that nothing of the container is left.

        Raises:
            ContainerUnkillable: it lives on.
        """
        try:
            self._remove()
        finally:
            if self._link is not None:
                self._link.close()
            if self._quota is not None:
                self._quota.close()
            if self._init is not None:
                os.close(self._init)

    def _remove(self) -> None:
        if self._link is not None:
            self._link.close()  # PID 1, if it still lives, ends the box by itself
        if self._init is not None and not self._is_unkillable and not _is_dead(self._init, 0.5):
            self._lift()
            with contextlib.suppress(ContainerUnkillable):  # the engine's removal may still do it
                self._kill()
        for pause_seconds in () if self._is_unkillable else REMOVAL_PAUSES_SECONDS:
            with contextlib.suppress(docker.errors.APIError, requests.RequestException):
                if self._is_removed():
                    return
            time.sleep(pause_seconds)
        try:
            self._is_removed()
        except (docker.errors.APIError, requests.RequestException) as error:
            self._require_dead(error)

    def _is_removed(self) -> bool:
        """Remove the container; also true when it is not there or somebody else removes it."""
        try:
            self._client.remove_container(self.name, v=True, force=True)
        except docker.errors.APIError as error:
            if error.status_code not in (404, 409):
                raise
            is_gone = error.status_code == 404 and self._is_made
        else:
            is_gone = True
        if is_gone:
            self.may_come_late = False
        return True

    def _require_dead(self, error: Exception) -> None:
        if self._init is None or _is_dead(self._init, 0):
            raise EngineUnavailable(f"the engine did not remove a container: {error}") from error
        raise self._unkillable() from error

    def _kill(self) -> None:
        """Kill PID 1 and so its whole pid namespace: by the host's kernel first, then the engine.

        The kernel's way needs no engine, whose calls a container can make hang.

        Raises:
            ContainerUnkillable: neither took.
        """
        if self._init is not None:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._init, signal.SIGKILL)
                if _is_dead(self._init, self._death_seconds):
                    return
        with contextlib.suppress(docker.errors.APIError, requests.RequestException):
            self._client.kill(self.name)
        if self._init is not None and not _is_dead(self._init, self._death_seconds):
            self._is_unkillable = True
            raise self._unkillable()

    def _unkillable(self) -> ContainerUnkillable:
        return ContainerUnkillable(
            f"container {self.name} was killed and lives on, inside the kernel",
            "look at it with `docker inspect` and at the kernel's log; a restart of the machine "
            "ends it, and the next start of nightlab removes what is left",
        )

    def _engine_state(self) -> dict[str, Any]:
        """Return the engine's own view of a container whose PID 1 said nothing."""
        if self._init is not None:
            _is_dead(self._init, self._death_seconds)
        self._client.wait(self.name, timeout=math.ceil(self._death_seconds))
        state = self._client.inspect_container(self.name)["State"]
        names = ("Status", "ExitCode", "OOMKilled", "Error", "StartedAt", "FinishedAt")
        return {name: state.get(name) for name in names}


def _open_process(pid: int) -> int | None:
    """Return a pidfd, which cannot come to mean another process; None where there is none."""
    try:
        return os.pidfd_open(pid) if pid > 0 else None
    except OSError:
        return None


def _is_dead(process: int, timeout_seconds: float) -> bool:
    """Tell whether a process is gone; of a pid namespace's init, only when all of it is."""
    poller = select.poll()
    poller.register(process, select.POLLIN)
    return bool(poller.poll(timeout_seconds * 1000))


@contextlib.contextmanager
def _removed_at_the_end(box: _Box) -> Iterator[None]:
    try:
        yield
    finally:
        box.remove()


@contextlib.contextmanager
def _engine_errors() -> Iterator[None]:
    """Turn the SDK's errors into ours."""
    try:
        yield
    except docker.errors.APIError as error:
        raise SandboxError(f"the engine refused: {error.explanation}"[:1000]) from error
    except (requests.RequestException, docker.errors.DockerException) as error:
        hint = "see whether the engine is running: `nightlab setup`"
        raise EngineUnavailable(f"the engine does not answer: {error}", hint) from error


@contextlib.contextmanager
def _run_directory(root: Path) -> Iterator[Path]:
    """Make the directory that is mounted at /nightlab, and remove it after the run."""
    directory = root.absolute() / secrets.token_hex(8)
    root.mkdir(parents=True, exist_ok=True)
    root.chmod(0o700)  # or another user of this machine could take PID 1's place at the link
    directory.mkdir(mode=0o755)
    try:
        directory.chmod(0o755)  # whatever the umask: the box's user must get in
        _write_readable(directory / OWNER_FILE, process_owner().encode())
        supervisor = resources.files("sandbox.box").joinpath("supervisor.py").read_bytes()
        _write_readable(directory / "supervisor.py", supervisor)
        _write_readable(directory / "hosts", HOSTS)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _write_readable(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o644)


def _receiver(spec: RunSpec, output_dir: Path | None) -> OutputReceiver:
    limits = spec.limits
    return OutputReceiver(output_dir, max_bytes=limits.output_bytes, max_files=limits.output_files)


def _lease(spec: RunSpec, directory: Path, gpus: Attendance) -> Lease:
    deadline = time.monotonic() + spec.limits.wall_seconds + LEFTOVER_SECONDS
    return Lease(
        run_directory=directory,
        owner=process_owner(),
        deadline_monotonic_seconds=int(deadline),
        gpus=gpus.request,
    )


def _go(
    spec: RunSpec,
    receiver: OutputReceiver,
    channel: socket.socket | None,
    environment: dict[str, str],
) -> Go:
    limits = spec.limits
    return Go(
        argv=spec.argv,
        environment=spec.environment | environment,
        working_directory=spec.working_directory,
        wall_seconds=limits.wall_seconds,
        log_bytes=limits.log_bytes,
        output_bytes=limits.output_bytes,
        output_files=limits.output_files,
        collect=receiver.wants_files,
        channel=channel is not None,
    )


def _log(head: bytes, tail: bytes, omitted_bytes: int) -> Log:
    """Return the log as text; a character cut in two becomes a replacement mark."""
    return Log(
        head=head.decode(errors="replace"),
        tail=tail.decode(errors="replace"),
        omitted_bytes=omitted_bytes,
    )


def _result(
    spec: RunSpec,
    digest: str,
    proof: Proof,
    observed: Observed,
    container: dict[str, Any],
    gpus: Attendance,
) -> RunResult:
    report, state = observed.report, observed.engine_state
    words = observed.log.tail or observed.log.head
    evidence = gather(
        spec,
        proof,
        report,
        log_tail=words,
        killed_by_host=observed.killed_by_host,
        asked_to_stop=observed.asked_to_stop,
        engine_oom_killed=None if state is None else bool(state["OOMKilled"]),
        ended_for=observed.ended_for,
        gpu_memory_reached=gpus.reaches_memory(tried_bytes(words)),
    )
    counters = report.counters if report else None
    return RunResult(
        run_id=spec.run_id,
        box=spec.box,
        outcome=decide(evidence),
        exit_code=evidence.exit_code,
        signal=evidence.signal,
        wall_seconds=observed.wall_seconds,
        limits=spec.limits,
        peak_memory_bytes=counters.peak_memory_bytes if counters else None,
        cpu_seconds=counters.cpu_seconds if counters else None,
        oom_kills=evidence.oom_kills,
        gpus=spec.gpus,
        gpu=gpus.uses(),
        log=observed.log,
        output=observed.output,
        image_digest=digest,
        started_at=observed.started_at,
        finished_at=observed.finished_at,
        evidence=evidence.model_dump()
        | {
            "engine_state": state,
            "output_skipped": observed.skipped,
            "report": report and report.model_dump(),
            "gpus": gpus.evidence(),
            "container": container,
        },
    )
