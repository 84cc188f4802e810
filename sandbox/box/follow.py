"""One run in its container: proven, let go, followed, collected.

PID 1 keeps the run's deadline, the host keeps it again a little later, and a third time by killing:
each is enough alone. Nothing of what PID 1 sends is kept without a bound.
"""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from sandbox.box import supervisor
from sandbox.box.causes import Observed
from sandbox.box.container import Container, hint_for
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
from sandbox.box.users import seen_from_here
from sandbox.contract.errors import BoxLost, LimitNotEnforced, SandboxError
from sandbox.contract.run import Log, OutputFile, RunSpec

HANDSHAKE_SECONDS = 30.0
LIFT_GRACE_SECONDS = 0.08
"""How long after PID 1's own deadline the engine is asked to lift the box's CPU limit, so that it
can die. Where this process may do it itself, which costs nothing, it does so at the deadline."""
ASK_SECONDS = 1.0
"""How often `should_stop` is asked about a program that says nothing."""
HOST_GRACE_SECONDS = 0.4
"""How long after PID 1's own deadline the host kills it."""
OUTPUT_BYTES_PER_SECOND = 10e6
"""The slowest transfer of output that is not called a stall."""
OUTPUT_GRACE_SECONDS = 30
Step = Literal[
    "prepared", "created", "started", "connected", "inspected", "compared", "reported", "ended"
]


@dataclass(frozen=True)
class Ends:
    """What a caller holds of a run while it goes on; see `contract.Executor.run`."""

    receiver: OutputReceiver
    channel: socket.socket | None
    on_log: Callable[[bytes], None]
    should_stop: Callable[[], bool] | None
    on_step: Callable[[Step], None]


class BoxRun:
    """One run, from an empty container to everything that it left."""

    def __init__(self, spec: RunSpec, container: Container, ends: Ends) -> None:
        self._spec = spec
        self._container = container
        self._ends = ends
        self._link: Link | None = None
        # What PID 1 forwarded, in case that it does not live to send the log.
        self._forwarded = supervisor.Log(spec.limits.log_bytes)
        self._ended_for: Literal["gpu_memory", "gpu_fault"] | None = None
        self._is_asked_to_stop = False

    def open(self, listener: Listener, lease: Lease, settings: Settings) -> Proof:
        """Create and start the container and return what PID 1 proved, all of it as asked.

        Raises:
            LimitNotEnforced: a wall is not as asked, by the engine's record or from inside.
            SandboxError: the box did not come up.
        """
        container, on_step = self._container, self._ends.on_step
        container.create(settings)
        on_step("created")
        container.start()
        on_step("started")
        self._link = self._await_link(listener)
        pid, user = self._link.peer()
        container.hold(pid)
        on_step("connected")
        expected = seen_from_here(pid, lease.user)
        if expected not in (None, user):  # also one that lies about itself from inside
            raise LimitNotEnforced(f"user: asked {expected}, the host sees {user}")
        recorded = container.inspect()
        on_step("inspected")
        # Never with `settings`: a builder that leaves out a wall must not be asked about it.
        wrong = engine_differences(container_settings(self._spec, lease), recorded)
        proof = parse(Proof, self._link.expect(b"H", time.monotonic() + HANDSHAKE_SECONDS))
        require_walls(self._spec, lease, proof)
        if wrong:
            raise LimitNotEnforced("the engine recorded otherwise than asked: " + ", ".join(wrong))
        on_step("compared")
        return proof

    def _await_link(self, listener: Listener) -> Link:
        give_up = time.monotonic() + HANDSHAKE_SECONDS
        while time.monotonic() < give_up:
            link = listener.accept(1.0)
            if link is not None:
                return link
            if not self._container.inspect()["State"]["Running"]:
                break
        printed = self._container.last_lines()
        problem = f"PID 1 of the box never reported; its last words: {printed}"
        raise SandboxError(problem, hint_for(printed))

    def end_now(self, why: Literal["gpu_memory", "gpu_fault"]) -> None:
        """Kill the box at once, from another thread; the first reason counts."""
        if self._ended_for is not None or self._link is None:
            return
        self._ended_for = why
        if not self._container.end_now():
            self._link.shut()

    def follow(self, environment: dict[str, str]) -> Observed:
        """Let the program start, and return what was seen once it has ended.

        Args:
            environment: variables beside those of the spec.

        Raises:
            BoxLost: PID 1 sent what it never sends, so nothing that it said is believed.
        """
        assert self._link is not None
        started_at, started = datetime.now(UTC), time.monotonic()
        self._link.send_go(self._go(environment), self._ends.channel)
        report, counters, killed_by_host = None, None, False
        try:
            report = self._await_report(started + self._spec.limits.wall_seconds)
            killed_by_host = report is None
        except LinkEnded:
            # PID 1 died without a word: what the host's kernel still knows must do, or the engine.
            counters = self._container.counters()
        except LinkBroken as error:
            raise BoxLost(error.message) from error
        # On the host's clock: PID 1's is in a place that the program shares.
        wall_seconds = time.monotonic() - started
        self._ends.on_step("reported")
        log, output, skipped = self._collect(report)
        self._ends.on_step("ended")
        return Observed(
            started_at=started_at,
            finished_at=started_at + timedelta(seconds=wall_seconds),
            wall_seconds=wall_seconds,
            report=report,
            counters=report.counters if report else counters,
            log=log,
            output=output,
            skipped=skipped,
            killed_by_host=killed_by_host,
            asked_to_stop=self._is_asked_to_stop,
            ended_for=self._ended_for,
            engine_state=self._container.end_state() if report is None else None,
        )

    def _go(self, environment: dict[str, str]) -> Go:
        spec = self._spec
        return Go(
            argv=spec.argv,
            environment=spec.environment | environment,
            working_directory=spec.working_directory,
            limits=spec.limits,
            collect=self._ends.receiver.wants_files,
            channel=self._ends.channel is not None,
        )

    def _await_report(self, deadline: float) -> ExitReport | None:
        """Return PID 1's report, or None when it came too late and the host killed the box."""
        container = self._container
        lift_at = deadline if container.can_lift else deadline + LIFT_GRACE_SECONDS
        report = self._follow_link(lift_at, self._ends.should_stop)
        if report is None:
            if self._is_asked_to_stop:
                deadline = min(deadline, time.monotonic())
            # PID 1 dies, and lets others die, on the box's own CPU time.
            container.lift()
            report = self._follow_link(deadline + HOST_GRACE_SECONDS, None)
        if report is None:
            container.kill()
        return report

    def _follow_link(
        self, give_up: float, should_stop: Callable[[], bool] | None
    ) -> ExitReport | None:
        """Pass the log on until PID 1 reports; None when it is late, or was asked to stop."""
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
                self._forwarded.add(payload)
                self._ends.on_log(payload)
            elif kind:
                raise LinkBroken(f"PID 1 sent frame {kind!r} while the program ran")
            if should_stop is not None and should_stop():
                self._is_asked_to_stop = True
                self._link.send_stop()
                return None

    def _collect(
        self, report: ExitReport | None
    ) -> tuple[Log, tuple[OutputFile, ...], dict[str, int]]:
        """Return log, output and what of the output was skipped."""
        if report is None:
            omitted_bytes = self._forwarded.finish()
            return _log(self._forwarded.head, self._forwarded.tail, omitted_bytes), (), {}
        assert self._link is not None
        way_seconds = self._spec.limits.output_bytes / OUTPUT_BYTES_PER_SECOND
        give_up = time.monotonic() + OUTPUT_GRACE_SECONDS + way_seconds
        try:
            head = self._link.expect(b"T", give_up)
            tail = self._link.expect(b"T", give_up)
            # With something alive in the box its files may still change.
            skipped = self._receive_output(give_up) if report.all_dead else {}
        except (LinkBroken, LinkEnded) as error:
            raise BoxLost(f"while it sent the output: {error.message}") from error
        log = _log(head, tail, report.log_omitted_bytes)
        return log, self._ends.receiver.finish(), skipped

    def _receive_output(self, give_up: float) -> dict[str, int]:
        assert self._link is not None
        receiver = self._ends.receiver
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

    def close(self) -> None:
        """Make sure that nothing of the container is left.

        Raises:
            ContainerUnkillable: it lives on.
        """
        if self._link is not None:
            self._link.close()  # PID 1, if it still lives, ends the box by itself
        self._container.remove()


def _log(head: bytes | bytearray, tail: bytes | bytearray, omitted_bytes: int) -> Log:
    """Return the log as text; a character cut in two becomes a replacement mark."""
    return Log(
        head=head.decode(errors="replace"),
        tail=tail.decode(errors="replace"),
        omitted_bytes=omitted_bytes,
    )
