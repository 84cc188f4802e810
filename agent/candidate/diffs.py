"""What changed between two candidates, as text and as patch."""

import difflib
from collections.abc import Iterable

from agent.candidate.merge import Files, lines_of

MAX_DIFF_CHARACTERS = 200_000
WORKSPACE = "workspace"


def unified_diff(old: Files, new: Files) -> bytes:
    """A unified diff over all files of two candidates, bounded."""
    pieces: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name, b""), new.get(name, b"")
        if before != after:
            pieces += difflib.unified_diff(
                before.decode(errors="replace").splitlines(keepends=True),
                after.decode(errors="replace").splitlines(keepends=True),
                f"a/{name}",
                f"b/{name}",
            )
    text = _joined(pieces)
    # Cut at one place for good: an audit makes every diff again and compares.
    whole = text if len(text) <= MAX_DIFF_CHARACTERS else f"{text[:MAX_DIFF_CHARACTERS]}\n[cut]\n"
    return whole.encode()


def patch(old: Files, new: Files, folder: str = WORKSPACE) -> bytes:
    """What `git apply` or `patch -p1` takes at the person's directory, byte for byte.

    Args:
        old: the files that the session began with.
        new: those that it ended with.
        folder: where they lie, as `[workspace] path` has it.
    """
    pieces = [
        _file_patch(beneath(folder, name), old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    return "".join(pieces).encode(errors="surrogateescape")


def beneath(folder: str, name: str) -> str:
    """A file's path from the directory that holds `folder`."""
    return name if folder == "." else f"{folder}/{name}"


def _file_patch(path: str, old: bytes | None, new: bytes | None) -> str:
    header = f"diff --git a/{path} b/{path}\n"
    if old is None:
        header += "new file mode 100644\n"
    if new is None:
        header += "deleted file mode 100644\n"
    end = "\t" if " " in path else ""
    lines = difflib.unified_diff(
        lines_of((old or b"").decode(errors="surrogateescape")),
        lines_of((new or b"").decode(errors="surrogateescape")),
        "/dev/null" if old is None else f"a/{path}{end}",
        "/dev/null" if new is None else f"b/{path}{end}",
    )
    return header + _joined(lines)


def _joined(lines: Iterable[str]) -> str:
    return "".join(
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines
    )
