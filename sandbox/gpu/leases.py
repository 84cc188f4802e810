"""Who has which GPU, who waits, which are unusable.

A GPU is taken while a living container's label names it, or while a living process holds a ticket
that was granted it: nothing is left to clean up after a crash, since the kernel takes back a dead
process's file lock and the engine knows its containers. Tickets are served in the order in which
they were drawn. Why not a database of leases: docs/decisions/0014.
"""

import fcntl
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from sandbox.contract.errors import SandboxError
from sandbox.contract.gpu import Devices
from sandbox.contract.log import log
from sandbox.contract.record import Record
from sandbox.gpu.inventory import named_gpus
from sandbox.gpu.request import Gpu

POLL_SECONDS = 0.5
"""Each look asks the engine who lives, so not more often than a person would notice."""
FROZEN_SECONDS = 30.0
"""A waiter that has not looked for so long is passed over until it looks again. One that froze with
a GPU keeps it: it would go on using it when it thaws."""


class Ticket(Record):
    """What one process wants, and what it was granted."""

    pool: tuple[str, ...]
    """Ids of the GPUs that it may have, the preferred ones first."""
    count: int
    granted: tuple[str, ...]
    owner: str
    purpose: str


class Quarantined(Record):
    """A GPU out of use, and why."""

    gpu: str
    why: str
    run_id: str
    at: str


class LeaseStatus(Record):
    """Everything about leases at one moment."""

    held: dict[str, str]
    """By whom each GPU is held, by its id."""
    waiting: tuple[str, ...]
    quarantined: tuple[Quarantined, ...]


class GpuRow(Record):
    """One GPU as a person is told of it."""

    index: str
    id: str
    name: str
    memory_bytes: int | None
    status: Literal["free", "in use", "out of use"]
    words: str


def gpu_rows(gpus: Sequence[Gpu], status: LeaseStatus) -> tuple[GpuRow, ...]:
    """Return every GPU of this machine with who has it, and those out of use that are gone."""
    lost = {entry.gpu: f"{entry.why} ({entry.run_id}, {entry.at})" for entry in status.quarantined}
    rows = {
        gpu.id: GpuRow(
            index=gpu.index,
            id=gpu.id,
            name=gpu.name,
            memory_bytes=gpu.memory_bytes,
            status="in use" if gpu.id in status.held else "free",
            words=status.held.get(gpu.id, ""),
        )
        for gpu in gpus
    }
    for gpu, why in lost.items():
        row = rows.get(gpu) or GpuRow(
            index="", id=gpu, name="", memory_bytes=None, status="out of use", words=""
        )
        rows[gpu] = row.model_copy(update={"status": "out of use", "words": why})
    return tuple(rows.values())


def overlap(one: str, other: str, parents: Mapping[str, str | None]) -> bool:
    """Tell whether two devices are one, or a GPU and an instance of it."""
    return one == other or parents.get(one) == other or parents.get(other) == one


def allot(
    waiting: Sequence[tuple[int, Ticket]], taken: Collection[str], parents: Mapping[str, str | None]
) -> dict[int, tuple[str, ...]]:
    """Return what each waiting ticket may have now, by its number; most get nothing.

    The first in the line chooses first. What is free for one that waits for more stays free for
    it, so that those behind, who want less, cannot keep it waiting for ever.
    """
    held = set(taken)
    grants: dict[int, tuple[str, ...]] = {}
    for number, ticket in waiting:
        mine: list[str] = []
        for gpu in ticket.pool:
            if len(mine) < ticket.count and not any(
                overlap(gpu, other, parents) for other in held.union(mine)
            ):
                mine.append(gpu)
        if len(mine) == ticket.count:
            grants[number] = tuple(mine)
        held.update(mine)
    return grants


class Leases:
    """The GPUs of one machine, shared by every nightlab process with this state directory.

    Args:
        directory: where tickets and quarantine are kept.
        living: asks the engine for the GPUs that its living containers have.
        owner: the mark of this process, see `reaper.process_owner`.
        sleep: waits between two looks.
        now: seconds since the epoch, by the clock that stamps files.
    """

    def __init__(
        self,
        directory: Path,
        living: Callable[[], Iterable[str]],
        owner: str,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._living = living
        self._owner = owner
        self._sleep = sleep
        self._now = now
        self._queue, self._quarantine = directory / "queue", directory / "quarantine"
        for place in (self._queue, self._quarantine):
            place.mkdir(parents=True, exist_ok=True, mode=0o700)

    @contextmanager
    def lease(
        self,
        pool: Sequence[Gpu],
        count: int,
        purpose: str,
        on_wait: Callable[[str], None] = lambda _: None,
        while_waiting: Callable[[], object] = lambda: None,
    ) -> Iterator[tuple[str, ...]]:
        """Have `count` GPUs of the pool until the end of the block; wait for them in line.

        Args:
            pool: the GPUs that will do, the preferred ones first.
            count: how many of them.
            purpose: a few words for those who ask who holds a GPU.
            on_wait: told once why it has to wait.
            while_waiting: called after each look in vain; gives the place up by raising.

        Raises:
            SandboxError: so many will never be free: the pool is too small, or out of use.
        """
        parents = {gpu.id: gpu.parent for gpu in pool}
        owner = self._owner
        wish = Ticket(pool=tuple(parents), count=count, granted=(), owner=owner, purpose=purpose)
        with self._drawn(wish) as (number, descriptor):
            waits_since = None
            while not (granted := self._granted(number, descriptor, wish, parents)):
                if waits_since is None:
                    waits_since = self._now()
                    on_wait(self._why_waiting(number))
                while_waiting()
                self._sleep(POLL_SECONDS)
            if waits_since is not None:
                seconds = round(self._now() - waits_since, 1)
                log.info("gpu_waited_for", purpose=purpose, gpus=granted, seconds=seconds)
            yield granted

    def status(self) -> LeaseStatus:
        """Return who holds and who waits now."""
        with self._locked():
            tickets = self._tickets()
            held = dict.fromkeys(self._living(), "a container")
            held |= {gpu: t.purpose for _, t in tickets for gpu in t.granted}
            waiting = tuple(t.purpose for _, t in tickets if not t.granted)
        return LeaseStatus(held=held, waiting=waiting, quarantined=self.quarantined())

    def quarantine(self, gpu: str, why: str, run_id: str) -> None:
        """Take a GPU out of use until a person says otherwise."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        entry = Quarantined(gpu=gpu, why=why[:500], run_id=run_id, at=at)
        path = self._quarantined_as(gpu)
        partial = path.with_suffix(".partial")
        partial.write_text(entry.model_dump_json(indent=2) + "\n")
        partial.replace(path)  # a reader sees the whole entry or none
        log.warning("gpu_out_of_use", gpu=gpu, run=run_id, why=entry.why)

    def _quarantined_as(self, gpu: str) -> Path:
        return self._quarantine / f"{gpu.replace(':', '_').replace('/', '_')}.json"

    def quarantined(self) -> tuple[Quarantined, ...]:
        """Return the GPUs that are out of use."""
        found = []
        for path in sorted(self._quarantine.glob("*.json")):
            with suppress(OSError, ValidationError):
                found.append(Quarantined.model_validate_json(path.read_text()))
        return tuple(found)

    def lift(self, gpu: str) -> bool:
        """Put a GPU back into use; tell whether it was out of it."""
        path = self._quarantined_as(gpu)
        was = path.exists()
        path.unlink(missing_ok=True)
        return was

    @contextmanager
    def _drawn(self, wish: Ticket) -> Iterator[tuple[int, int]]:
        """Draw the next ticket; whoever holds its file's lock is alive."""
        with self._locked():
            numbers = [int(path.stem) for path in self._queue.glob("*.json")]
            number = max(numbers, default=0) + 1
            path = self._queue / f"{number:012d}.json"
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
            # Before it can be seen: a ticket without a lock is a dead one's, and is removed.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                _write(descriptor, wish)
            except OSError:  # with its lock it would stand in the line unread, as long as we live
                path.unlink()
                os.close(descriptor)
                raise
        try:
            yield number, descriptor
        finally:
            with self._locked():
                path.unlink(missing_ok=True)
                os.close(descriptor)

    def _granted(
        self, number: int, descriptor: int, wish: Ticket, parents: Mapping[str, str | None]
    ) -> tuple[str, ...]:
        """Return what this ticket may have now; nothing while it has to wait."""
        with self._locked():
            os.utime(descriptor)  # says that this one still looks
            tickets = self._tickets()
            out_of_use = {entry.gpu for entry in self.quarantined()}
            # Looked at each time: a GPU that goes out of use may have been the last.
            self._refuse_hopeless(wish, out_of_use, parents)
            taken = out_of_use.union(self._living(), *(t.granted for _, t in tickets))
            waiting = [
                (n, ticket)
                for n, ticket in tickets
                if not ticket.granted and (n == number or not self._is_frozen(n))
            ]
            granted = allot(waiting, taken, parents).get(number, ())
            if granted:
                _write(descriptor, wish.model_copy(update={"granted": granted}))
        return granted

    def _refuse_hopeless(
        self, wish: Ticket, out_of_use: Collection[str], parents: Mapping[str, str | None]
    ) -> None:
        left = allot([(0, wish)], out_of_use, parents)
        if left:
            return
        lost = [gpu for gpu in wish.pool if any(overlap(gpu, o, parents) for o in out_of_use)]
        words = f"; out of use: {', '.join(lost)}" if lost else ""
        raise SandboxError(
            f"{wish.count} of {len(wish.pool)} GPUs will never be free for this run{words}",
            "look at `nightlab gpus`; `nightlab gpus --lift ID` puts one back into use"
            if lost
            else "name more GPUs with --gpus, or ask for fewer a run in [hardware]",
        )

    def _tickets(self) -> list[tuple[int, Ticket]]:
        """Return the tickets of living processes in their order; those of dead ones are removed."""
        found = []
        for path in sorted(self._queue.glob("*.json")):
            with suppress(OSError):
                if _is_held(path):
                    found.append((int(path.stem), Ticket.model_validate_json(path.read_bytes())))
                else:
                    path.unlink(missing_ok=True)
        return found

    def _is_frozen(self, number: int) -> bool:
        path = self._queue / f"{number:012d}.json"
        try:
            return self._now() - path.stat().st_mtime > FROZEN_SECONDS
        except OSError:
            return True

    def _why_waiting(self, number: int) -> str:
        with self._locked():
            ahead = [t.purpose for n, t in self._tickets() if n < number]
        return f"waiting for a GPU; before it: {'; '.join(ahead) or 'a container'}"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Be the only one who looks and changes; the kernel frees the lock of one that dies."""
        path = self._directory / "lock"
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class Pool:
    """The GPUs that a person lets some runs have; see `contract.GpuSource`."""

    leases: Leases
    devices: Devices
    words: tuple[str, ...]
    """Indices or ids; none for all of the kind."""
    count: int
    """How many each run gets."""

    def lease(
        self,
        purpose: str,
        on_wait: Callable[[str], None] = lambda _: None,
        while_waiting: Callable[[], object] = lambda: None,
    ) -> AbstractContextManager[tuple[str, ...]]:
        """Have the GPUs of one run until the end of the block; wait for them in line."""
        gpus = named_gpus(self.devices, self.words)
        return self.leases.lease(gpus, self.count, purpose, on_wait, while_waiting)


def _write(descriptor: int, ticket: Ticket) -> None:
    """Write in place: another file would not bear the lock."""
    content = ticket.model_dump_json().encode()
    os.pwrite(descriptor, content, 0)  # before the cut: a disk that refuses leaves what was there
    os.ftruncate(descriptor, len(content))


def _is_held(path: Path) -> bool:
    """Tell whether a living process holds a ticket's lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)
