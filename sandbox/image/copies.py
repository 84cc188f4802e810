"""Gives boxes that see held-out rows files of their own.

Boxes of one image read the same files, and the kernel keeps one set of a file's pages for all of
them. Which pages are in memory is then a message: a box reads some of them, and a later box times
single bytes. So whoever sees rows of val or holdout runs on a copy of the image, with layers,
inodes and pages of its own: one copy for the box that scores, another for those that check it.
That pages are apart is tried out and not believed, since engines and file systems may share what
is equal.
"""

import json
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, Literal, get_args

import docker
from pydantic import ValidationError

from sandbox.contract.errors import SandboxError
from sandbox.contract.log import log
from sandbox.contract.record import Record
from sandbox.engine.find import FAILED_CALLS, Engine, connect, must_answer
from sandbox.engine.host import Say, exclusive, last_lines
from sandbox.image.check import ANSWER_SECONDS, python_container, settings_problems
from sandbox.image.image import ImageRecord
from sandbox.image.workshop import (
    BUILD_SECONDS,
    TAG_DIGITS,
    BuildFailed,
    engine_digits,
    inspect_image,
    key_of,
    write_note,
)

Role = Literal["model", "check"]
"""What a copy is for: the box whose answers are the score, and those that ask again."""
MARKER = "etc/nightlab-copy"
"""A file that makes the layers of two copies differ: of equal ones an engine keeps only one."""
KEPT = ("Env", "User", "Cmd", "Labels")
"""Of an image's settings, those that a copy must have as well."""
READ_SHARE = 0.9
"""Of a file's pages, when it counts as read: under pressure the kernel may drop some at once."""
POLL_SECONDS = 0.1
PAGES = """
import ctypes, json, os, signal, stat
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mincore.argtypes = libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
PAGE = os.sysconf("SC_PAGE_SIZE")

def in_memory(path):  # which the kernel tells the owner of a file, and so this runs as root
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        place = libc.mmap(None, size, 1, 1, file.fileno(), 0)
    pages = ctypes.create_string_buffer(-(-size // PAGE))
    if place == ctypes.c_void_p(-1).value or libc.mincore(place, size, pages):
        raise OSError(ctypes.get_errno(), "mmap or mincore")
    libc.munmap(place, size, None)
    return sum(byte & 1 for byte in pages.raw) / len(pages.raw)

def drop(path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # a driver that copies whole images has just written it
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return in_memory(path)

def read(path):
    with open(path, "rb") as file:
        while file.read(2**20):
            pass
    return in_memory(path)
"""
"""What of a file is in memory, and how it is dropped and read."""
PROBE = """
found = []
for folder, _, names in os.walk("/usr"):
    for path in (os.path.join(folder, name) for name in names):
        if os.path.isfile(path) and not os.path.islink(path) and os.stat(path).st_size < 2**25:
            found.append((os.stat(path).st_size, path))
paths = [path for _, path in sorted(found)[-6:]]
dropped = {path: drop(path) for path in paths}
if WAITS:
    print("dropped", flush=True)
    signal.sigwait([signal.SIGUSR1])
waited = {path: in_memory(path) for path in paths}
seen = [[path, dropped[path], waited[path], read(path)] for path in paths]
print(json.dumps([{"path": p, "dropped": d, "found": f, "read": r} for p, d, f, r in seen]))
"""
"""Drops some files of an image from memory, looks whether they come back, and reads them."""
FORGET = """
# Of each file all is in memory afterwards or nothing, whatever was before. What this program itself
# runs on cannot be dropped, and is read to its end instead; so are libraries, up to a part of this
# container's memory, or each box would begin by loading torch from disk.
own = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
looked_at, left_bytes = [], 2**31
for folder, folders, names in os.walk("/"):
    folders[:] = [n for n in folders if not os.path.ismount(os.path.join(folder, n))]
    for path in (os.path.join(folder, name) for name in names):
        about = os.lstat(path)
        if stat.S_ISREG(about.st_mode) and about.st_size and os.access(path, os.R_OK):
            is_library = ".so" in path and about.st_size < left_bytes
            if is_library or path in own:
                read(path)
                left_bytes -= about.st_size
            else:
                file = os.open(path, os.O_RDONLY)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(file)
            if path in own or about.st_size > 2**20 or about.st_ino % 64 == 0:
                looked_at.append(path)
print(json.dumps([path for path in looked_at if 0 < in_memory(path) < 1][:100]))
"""
"""Brings every file of an image into a state that tells nothing of the boxes before."""


class FilesShared(SandboxError):
    """Boxes of two images would read the same pages, or it cannot be told."""


class Copies(Record):
    """Images with the same content as another and no file in common with it."""

    image_id: str
    """Of the image that they are copies of."""
    model: str
    check: str


class _Seen(Record):
    """What was in memory of one file, as a share of its pages."""

    path: str
    dropped: float
    """After it was dropped."""
    found: float
    """After another box had read the same file of its own image."""
    read: float
    """After it was read: shows that this look sees what is in memory."""


def ensure_copies(engine: Engine, image: ImageRecord, *, state_dir: Path, say: Say) -> Copies:
    """The copies of an image on this engine, made and tried out first where they are not there yet.

    Raises:
        FilesShared: this engine or its file system shares pages between images, or does not let
            itself be asked.
        SandboxError: a copy could not be made.
    """
    images = state_dir / "images"
    note = images / f"copies-{key_of(image.image_id)[:TAG_DIGITS]}-{engine_digits(engine)}.json"
    with (
        exclusive(images / "lock"),
        closing(connect(engine, timeout_seconds=BUILD_SECONDS)) as client,
    ):
        with suppress(OSError, ValidationError):
            copies = Copies.model_validate_json(note.read_text())
            if all(inspect_image(client, one) for one in (copies.model, copies.check)):
                return copies
        remove_orphans(client, image.reference.partition(":")[0])
        facts = client.images.get(image.image_id).attrs
        gigabytes = 2 * facts["Size"] / 1e9
        say(f"Copying the image for boxes that see held-out text ({gigabytes:.1f} GB on disk).")
        made = {role: _copy(engine, client, image, facts, role) for role in get_args(Role)}
        say("Trying out whether boxes of different copies share any page in memory.")
        require_apart(client, (image.image_id, *made.values()))
        copies = Copies(image_id=image.image_id, **made)
        write_note(note, copies.model_dump_json())
        return copies


def forget_pages(engine: Engine, image_id: str) -> None:
    """Make what is in memory of an image's files the same, whatever boxes did before.

    Boxes that check a score share one copy, and what one of them read in the next could see.

    Raises:
        SandboxError: it could not be done.
    """
    with (
        must_answer("the engine does not answer"),
        closing(connect(engine)) as client,
        python_container(client, image_id, PAGES + FORGET, {}, user="0:0") as container,
    ):
        client.api.start(container)
        mixed = _printed_by(client, container)
    if mixed:  # a box of another night has them open, or memory is short
        log.warning("pages_kept", image=image_id, files=len(mixed), first=mixed[0])


def remove_orphans(client: docker.DockerClient, name: str) -> None:
    """Remove copies whose image is no longer on the engine, by their tags."""
    tags = {tag for image in client.api.images(name) for tag in image["RepoTags"] or ()}
    for tag in tags:
        original, _, role = tag.rpartition("-")
        if role in get_args(Role) and original not in tags:
            with suppress(*FAILED_CALLS):  # one that a box still runs on goes the next time
                client.images.remove(tag)


def _copy(
    engine: Engine,
    client: docker.DockerClient,
    image: ImageRecord,
    facts: dict[str, Any],
    role: str,
) -> str:
    """Import what an image's container would see as an image of one layer; its id."""
    tag = f"{image.reference}-{role}"
    name, _, version = tag.partition(":")
    try:
        # A client of its own: one connection gives while the other takes.
        with (
            closing(connect(engine, timeout_seconds=BUILD_SECONDS)) as source,
            python_container(source, image.image_id, "", {}) as container,
        ):
            content = _marked(role, source.api.export(container))
            client.api.import_image_from_stream(
                content, repository=name, tag=version, changes=settings_of(facts["Config"])
            )
        copy = client.images.get(tag).attrs
    except FAILED_CALLS as error:
        raise BuildFailed(
            f"the engine could not copy {image.reference}: {last_lines(str(error), 1)}",
            "see whether its disk is full; then run `nightlab setup` again",
        ) from error
    wrong = settings_problems(copy["Config"])
    wrong += [name for name in KEPT if copy["Config"][name] != facts["Config"][name]]
    if wrong:
        raise BuildFailed(f"the copy {tag} came out otherwise than {image.reference}: {wrong[0]}")
    return str(copy["Id"])


def _marked(role: str, archive: Iterator[bytes]) -> Iterator[bytes]:
    """A tar archive with one more file in front."""
    entry, content = tarfile.TarInfo(MARKER), role.encode()
    entry.size = len(content)
    yield entry.tobuf() + content.ljust(tarfile.BLOCKSIZE, b"\0")
    yield from archive


def settings_of(config: dict[str, Any]) -> list[str]:
    """An image's settings as lines of a Dockerfile, which is how an import takes them."""
    environment = [entry.partition("=") for entry in config["Env"] or ()]
    labels = (config["Labels"] or {}).items()
    return [
        f"USER {config['User']}",
        f"CMD {json.dumps(config['Cmd'] or [])}",
        *(f"ENV {name}={_quoted(value)}" for name, _, value in environment),
        *(f"LABEL {_quoted(name)}={_quoted(value)}" for name, value in labels),
    ]


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$")
    return f'"{escaped}"'


def require_apart(client: docker.DockerClient, image_ids: Sequence[str]) -> None:
    """Try out that no box of one of these images changes what of another's is in memory.

    Each watches files of its own; the first reads, then the second, and none may notice.

    Raises:
        FilesShared: one noticed, or the kernel does not tell.
    """
    first, *others = image_ids
    with ExitStack() as stack:
        waiting = [_started(client, stack, image_id, waits=True) for image_id in others]
        for container in waiting:
            _await_drop(client, container)
        have_read = _read_in(_seen_by(client, _started(client, stack, first, waits=False)))
        for image_id, container in zip(others, waiting, strict=True):
            client.api.kill(container, "SIGUSR1")
            seen = _seen_by(client, container)
            _require_unnoticed(image_id, [one for one in seen if one.path in have_read])
            have_read |= _read_in(seen)


def _started(client: docker.DockerClient, stack: ExitStack, image_id: str, *, waits: bool) -> str:
    program = f"{PAGES}WAITS = {waits}{PROBE}"
    container = stack.enter_context(python_container(client, image_id, program, {}, user="0:0"))
    client.api.start(container)
    return container


def _await_drop(client: docker.DockerClient, container: str) -> None:
    """Wait until a container has dropped its files; one that ended is asked what it said."""
    give_up = time.monotonic() + ANSWER_SECONDS
    while time.monotonic() < give_up and b"dropped" not in client.api.logs(container):
        if not client.api.inspect_container(container)["State"]["Running"]:
            raise _cannot_tell(last_lines(client.api.logs(container).decode(errors="replace"), 1))
        time.sleep(POLL_SECONDS)


def _seen_by(client: docker.DockerClient, container: str) -> list[_Seen]:
    return [_Seen.model_validate(entry) for entry in _printed_by(client, container)]


def _printed_by(client: docker.DockerClient, container: str) -> list[Any]:
    """The list in the last line of what a container prints until it ends."""
    client.api.wait(container, timeout=ANSWER_SECONDS)
    printed = client.api.logs(container, tail=20).decode(errors="replace")
    try:
        return list(json.loads(printed.strip().rpartition("\n")[2]))
    except ValueError as error:
        raise _cannot_tell(last_lines(printed, 1)) from error


def _read_in(seen: list[_Seen]) -> set[str]:
    return {one.path for one in seen if one.read >= READ_SHARE}


def _require_unnoticed(image_id: str, seen: list[_Seen]) -> None:
    # A file that something else holds in memory cannot be dropped, and tells nothing.
    telling = [one for one in seen if one.dropped == 0 and one.read >= READ_SHARE]
    if not telling:
        raise _cannot_tell("no file of it could be dropped from memory and read again")
    if came := [one.path for one in telling if one.found > 0]:
        raise FilesShared(
            f"boxes of {image_id[:19]} share pages in memory with another image's: {came[0]}",
            "text of the validation set could pass from a score to the next training; keep the "
            "engine's images on a storage driver and a file system that copy files (overlay2 on "
            "ext4 or xfs does)",
        )


def _cannot_tell(why: str) -> FilesShared:
    return FilesShared(
        f"it cannot be told whether boxes of different images share pages in memory: {why}",
        "use an engine whose containers may ask the kernel (mincore) about an image's files",
    )
