"""The agent's only way to files, confined by the kernel.

Every path is opened relative to the workspace's own directory with `openat2(2)`: beneath it,
through no symbolic link and no magic link. Where the kernel has no `openat2`, each component is
opened on its own, relative to the one before, and links are refused. Either way the check and the
use are one file descriptor, so nothing can be exchanged between them. Only regular files with one
name are read (a second name may lie outside), and a write replaces a file as a whole or not at all.

Not covered: whoever can already write the workspace as this user needs no help from here.
"""

import errno
import itertools
import os
import secrets
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from agent.candidate.confinement import OpenBeneath, choose_opener, closing
from agent.candidate.own_files import NEVER_COPIED, matches
from agent.candidate.texts import decoded
from agent.settings import FIXED_FILES
from sandbox.contract.errors import MAKE_ROOM, NightlabError, SandboxError

MAX_FILE_BYTES = 256 * 1024
MAX_CANDIDATE_BYTES = 16 * 2**20
MAX_FILES = 500
"""What may be written is bounded so; of all others the person says how much there may be."""
MAX_DEPTH = 32
MAX_PATH_BYTES = 1024
MAX_NAME_BYTES = 200
"""Leaves room for what a temporary name adds below the 255 bytes of common file systems."""
WHOLE = ("", ".", "./")
"""How a model may write the workspace itself."""
TOO_MUCH = "name fewer files under editable in [workspace]"
MAX_MATCHES = 100
MAX_MATCH_CHARACTERS = 200


class WorkspaceError(NightlabError):
    """A file operation that is refused or cannot be done.

    Args:
        code: short snake_case name of the case.
        message: what is wrong; names nothing of the host.
        hint: what to do next.
    """

    usual_hint = "list shows the files that there are"

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.code = code


@dataclass(frozen=True)
class FileEntry:
    """One file of the workspace."""

    path: str
    bytes: int
    editable: bool


@dataclass(frozen=True)
class Match:
    """One line that a search found."""

    path: str
    line: int
    text: str


class Workspace:
    """Files below `root`, of which those that match `editable` may be written.

    Args:
        root: the workspace's directory; it must exist.
        editable: paths, or patterns such as "src/*.py" and "src/**/*.py": a `*` stays within one
            name, and `**` stands for any folders.
        opener: how paths are opened; without it the strongest way that this kernel has.
        left_out: files at its top that no snapshot holds, since they decide the score.
    """

    def __init__(
        self,
        root: Path,
        editable: tuple[str, ...],
        opener: OpenBeneath | None = None,
        *,
        left_out: tuple[str, ...] = FIXED_FILES,
    ) -> None:
        self._root = root
        self._editable = editable
        self._left_out = left_out
        self._open_beneath = opener or choose_opener(root)
        self._known: dict[str, tuple[tuple[int, ...], bytes]] = {}
        """What nobody here writes, as it was when its file was last another one."""

    def is_editable(self, path: str) -> bool:
        """Whether the agent may write `path`."""
        with suppress(WorkspaceError):  # nobody writes what is not even shown
            return may_be_written(_parts(path), self._editable)
        return False

    def read(self, path: str) -> bytes:
        """A file as it is.

        Raises:
            WorkspaceError: there is none, it is too large, or not one that the agent may have.
        """
        return self._read(path, MAX_FILE_BYTES)

    def read_text(self, path: str) -> str:
        """Text of a file in its own encoding, line ends as they are.

        Raises:
            WorkspaceError: there is none, it is no text, or not one that the agent may have.
        """
        return text_of(path, self.read(path))

    def list_files(self, path: str = "") -> list[FileEntry]:
        """Regular files in `path` and below, sorted; hidden names and links are left out.

        Raises:
            WorkspaceError: there is no such directory, or too much in it.
        """
        below = "" if path in WHOLE else clean_path(path)
        with self._root_for(path or "the workspace") as root:
            found = [
                FileEntry(name, status.st_size, self.is_editable(name))
                for name, status in self._walk(root, below, MAX_DEPTH)
            ]
        return sorted(found, key=lambda entry: entry.path)

    def search(self, text: str, path: str = "") -> list[Match]:
        """Lines that hold `text` literally, in a file or below a directory; the first 100.

        Raises:
            WorkspaceError: there is no such path.
        """
        # No regular expressions: one can need exponential time, and `re` cannot be interrupted.
        matches = (
            Match(name, number, line[:MAX_MATCH_CHARACTERS])
            for name, content in self._texts(path)
            for number, line in enumerate(content.split("\n"), start=1)
            if text in line
        )
        return list(itertools.islice(matches, MAX_MATCHES))

    def candidate(self) -> dict[str, bytes]:
        """All files of a snapshot by path, hidden ones too: everything but what is left out of it.

        Raises:
            WorkspaceError: those that may be written are more than a candidate may have.
        """
        with self._root_for("the workspace") as root:
            found = dict(self._walk(root, "", MAX_DEPTH, is_hidden_shown=True))
            files = self.editable_files()
            for path in found.keys() - files.keys() - set(self._left_out):
                files[path] = self._fixed(root, path, found[path])
        return dict(sorted(files.items()))

    def editable_files(self) -> dict[str, bytes]:
        """The files of the candidate that the agent may write.

        Raises:
            WorkspaceError: they are more than a candidate may have.
        """
        paths = [entry.path for entry in self.list_files() if entry.editable]
        if len(paths) > MAX_FILES:
            raise WorkspaceError(
                "too_many_files", f"more than {MAX_FILES} files may be edited", TOO_MUCH
            )
        files = {path: self._read(path, MAX_CANDIDATE_BYTES) for path in paths}
        if sum(map(len, files.values())) > MAX_CANDIDATE_BYTES:
            held = f"the files that may be edited hold more than {MAX_CANDIDATE_BYTES // 2**20} MiB"
            raise WorkspaceError("too_large", held, TOO_MUCH)
        return files

    def restore(self, files: dict[str, bytes]) -> None:
        """Make the editable files equal to those in `files`; all others stay as they are.

        Raises:
            WorkspaceError: a file cannot be written.
        """
        wanted = {path: data for path, data in files.items() if self.is_editable(path)}
        present = self.editable_files()
        for path in present.keys() - wanted.keys():
            self.remove(path)
        for path, content in sorted(wanted.items()):
            if present.get(path) != content:
                self.write(path, content)

    @contextmanager
    def _root_for(self, path: str) -> Iterator[int]:
        """The root's descriptor; what goes wrong meanwhile is described as about `path`."""
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        with closing(os.open(self._root, flags)) as root, _describing_errors(path):
            yield root

    def _fixed(self, root: int, path: str, status: os.stat_result) -> bytes:
        """A file that nobody here writes: read again only where it is another one than it was."""
        facts = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if self._known.get(path, ((),))[0] != facts:
            self._known[path] = facts, self._read_plain(root, path, path, status.st_size)
        return self._known[path][1]

    def _read(self, path: str, limit: int) -> bytes:
        with self._root_for(path) as root:
            return self._read_plain(root, clean_path(path), path, limit)

    def _read_plain(self, root: int, name: str, path: str, limit: int) -> bytes:
        with _describing_errors(path):
            # Checked first without opening it: to open a FIFO or a device already is to use it.
            with closing(self._open_beneath(root, name, os.O_PATH)) as found:
                _refuse_all_but_plain_files(os.fstat(found), path)
            descriptor = self._open_beneath(root, name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
            with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor, not a path
                # And once more: meanwhile something else may have been put in its place.
                _refuse_all_but_plain_files(os.fstat(descriptor), path)
                content = file.read(limit + 1)
        if len(content) > limit:
            hint = "keep files small; large data does not belong into the workspace"
            raise WorkspaceError("too_large", f"{path} is over {limit // 1024} KiB", hint)
        return content

    def write(self, path: str, content: bytes) -> None:
        """Replace an editable file, or make one that matches an editable pattern.

        Raises:
            WorkspaceError: the path is not editable, or the content too large.
        """
        parts = _parts(path)
        if not self.is_editable(path):
            hint = f"editable: {', '.join(self._editable)}"
            raise WorkspaceError("not_editable", f"{path} may not be written", hint)
        if len(content) > MAX_FILE_BYTES:
            limit = MAX_FILE_BYTES // 1024
            raise WorkspaceError("too_large", f"{path} would be over {limit} KiB", "write less")
        with self._root_for(path) as root, closing(self._parent(root, parts[:-1])) as parent:
            _replace(parent, parts[-1], content, path)

    def exists(self, path: str) -> bool:
        """Whether anything lies there.

        Raises:
            WorkspaceError: the path leads through a link, or cannot be looked at.
        """
        try:
            with self._root_for(path) as root, closing(self._open_beneath(root, path, os.O_PATH)):
                return True
        except WorkspaceError as error:
            if error.code != "not_found":
                raise
            return False

    def remove(self, path: str) -> None:
        """Take an editable file out.

        Raises:
            WorkspaceError: there is none, or it may not be written.
        """
        if not self.is_editable(path):
            raise WorkspaceError("not_editable", f"{path} may not be written")
        folder, _, name = clean_path(path).rpartition("/")
        with self._root_for(path) as root, closing(self._directory(root, folder)) as parent:
            os.unlink(name, dir_fd=parent)

    def _directory(self, root: int, path: str) -> int:
        return self._open_beneath(root, path or ".", os.O_RDONLY | os.O_DIRECTORY)

    def _parent(self, root: int, parents: list[str]) -> int:
        """The directory a file goes into; missing ones are made, since a pattern allows them."""
        current = self._directory(root, "")
        for depth, name in enumerate(parents, start=1):
            with closing(current), suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=current)
            current = self._directory(root, "/".join(parents[:depth]))
        return current

    def _walk(
        self, root: int, below: str, depth: int, *, is_hidden_shown: bool = False
    ) -> Iterator[tuple[str, os.stat_result]]:
        with closing(self._directory(root, below)) as directory:
            found = _entries(directory, is_hidden_shown=is_hidden_shown)
        for name, status in found:
            path = f"{below}/{name}" if below else name
            if stat.S_ISDIR(status.st_mode) and depth > 1:
                yield from self._walk(root, path, depth - 1, is_hidden_shown=is_hidden_shown)
            elif stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                yield path, status

    def _texts(self, path: str) -> list[tuple[str, str]]:
        if path not in WHOLE:
            try:
                return [(path, self.read_text(path))]
            except WorkspaceError as error:
                if error.code != "is_directory":
                    raise
        texts = []
        for entry in self.list_files(path):
            if entry.bytes <= MAX_FILE_BYTES:
                content = self._read(entry.path, MAX_FILE_BYTES)
                texts.append((entry.path, content.decode("utf-8", "replace")))
        return texts


def text_of(path: str, content: bytes) -> str:
    """Text of a file in its own encoding, line ends as they are.

    Raises:
        WorkspaceError: it is none.
    """
    try:
        text = decoded(path, content)
    except ValueError:
        raise WorkspaceError("not_text", f"{path} is not UTF-8 text") from None
    if "\0" in text:
        raise WorkspaceError("not_text", f"{path} is binary")
    return text


def clean_path(path: str) -> str:
    """The one spelling of a path of the workspace.

    Raises:
        WorkspaceError: it is not a plain relative path.
    """
    return "/".join(_parts(path))


def may_be_written(parts: Sequence[str], editable: Iterable[str]) -> bool:
    """Whether a path of these components is one that the agent may write."""
    if parts[-1] in FIXED_FILES or any(part.startswith(".") for part in parts):
        return False
    return any(matches(parts, pattern.split("/")) for pattern in editable)


def _parts(path: str) -> list[str]:
    """Components of a path, cleaned of "." and "//".

    Raises:
        WorkspaceError: it is not a plain relative path.
    """
    hint = "use a plain path relative to the workspace, such as train.py"
    if not isinstance(path, str) or not path.isprintable() or "\\" in path or path.startswith("/"):
        raise WorkspaceError("bad_path", "not a plain relative path", hint)
    if len(path.encode("utf-8", "replace")) > MAX_PATH_BYTES:
        raise WorkspaceError("bad_path", "the path is too long", hint)
    # Two spellings of one name would be two files here and one file on other file systems.
    if unicodedata.normalize("NFC", path) != path:
        raise WorkspaceError("bad_path", "the path is not in Unicode normal form C", hint)
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or len(parts) > MAX_DEPTH:
        raise WorkspaceError("bad_path", "the path names no file", hint)
    for part in parts:
        if part.startswith(".") or len(part.encode()) > MAX_NAME_BYTES:
            raise WorkspaceError("bad_path", "hidden, '..' or overlong names are refused", hint)
    return parts


def _entries(directory: int, *, is_hidden_shown: bool) -> list[tuple[str, os.stat_result]]:
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if _is_presentable(entry.name) or (is_hidden_shown and entry.name not in NEVER_COPIED):
                with suppress(FileNotFoundError):
                    found.append((entry.name, entry.stat(follow_symlinks=False)))
    return found


def _is_presentable(name: str) -> bool:
    try:
        return name not in NEVER_COPIED and len(_parts(name)) == 1
    except WorkspaceError:
        return False


def _refuse_all_but_plain_files(status: os.stat_result, path: str) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise WorkspaceError("is_directory", f"{path} is a directory", "list it instead")
    if stat.S_ISLNK(status.st_mode):
        raise OSError(errno.ELOOP, "link")
    if not stat.S_ISREG(status.st_mode):
        raise WorkspaceError("not_a_file", f"{path} is not a regular file")
    if status.st_nlink > 1:
        raise WorkspaceError("hard_link", f"{path} has a second name elsewhere")


def _replace(parent: int, name: str, content: bytes, path: str) -> None:
    """Put `content` in the place of `name`, whole or not at all."""
    with suppress(FileNotFoundError):
        _refuse_all_but_plain_files(os.stat(name, dir_fd=parent, follow_symlinks=False), path)
    temporary = f".{secrets.token_hex(8)}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o644, dir_fd=parent)
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor, not a path
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        # Renaming replaces the entry itself: a link put there meanwhile is not followed.
        os.replace(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
    except BaseException:
        os.unlink(temporary, dir_fd=parent)
        raise
    os.fsync(parent)


OS_ERRORS = {
    errno.ENOENT: ("not_found", "does not exist", "list the files"),
    errno.ELOOP: ("outside_workspace", "goes through a link", "use the file's own path"),
    errno.EXDEV: ("outside_workspace", "leaves the workspace", "use a path inside it"),
    errno.ENOTDIR: ("not_found", "goes through what is not a directory", "list the files"),
    errno.EISDIR: ("is_directory", "is a directory", "list it instead"),
    errno.EACCES: ("not_permitted", "may not be opened", ""),
    errno.ENAMETOOLONG: ("bad_path", "is too long a name", "use a shorter one"),
    errno.ENXIO: ("not_a_file", "is not a regular file", ""),
}


@contextmanager
def _describing_errors(path: str) -> Iterator[None]:
    """Turn an operating system's error into a text that names nothing of the host.

    Raises:
        WorkspaceError: the path cannot be used so.
        SandboxError: the disk is full, which is no answer for a researcher.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SandboxError(f"{path} cannot be written: {error.strerror}", MAKE_ROOM) from error
        name = errno.errorcode.get(error.errno or 0, "unknown")
        fallback = ("cannot_access", f"cannot be accessed ({name})", "")
        code, what, hint = OS_ERRORS.get(error.errno or 0, fallback)
        raise WorkspaceError(code, f"{path} {what}", hint) from None
