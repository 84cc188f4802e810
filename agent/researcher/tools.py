"""The tools that read and change the workspace's files.

There is no shell. A file is written only where the person allows it, as the researcher last saw it,
and code and configuration only if they parse: what would cost a training to find out costs nothing
here. Encoding and line ends stay the file's own.
"""

import difflib
import hashlib
from collections import Counter
from itertools import accumulate
from pathlib import PurePosixPath

from agent.candidate.diffs import unified_diff
from agent.candidate.texts import (
    OWN_PYTHON,
    NotParsed,
    decoded,
    encoded,
    refuse_broken,
    with_ends_of,
)
from agent.candidate.workspace import Workspace, WorkspaceError, clean_path, text_of
from agent.record.events import FileChanged
from agent.record.ledger import Ledger
from agent.researcher.answers import to_json
from agent.researcher.arguments import (
    Delete,
    Edit,
    ListFiles,
    Read,
    Rename,
    Search,
    ToolRefused,
    Write,
)
from agent.text import one_line

MAX_READ_LINES = 2000
MAX_READ_CHARACTERS = 48_000
MAX_LINE_CHARACTERS = 2000
MAX_LISTED_FILES = 200
CLOSEST_LINES = 3
CLOSEST_CHARACTERS = 200
SYNTAX_CONTEXT_LINES = 3
SHA_DIGITS = 12


class FileTools:
    """What is done with files, each as the class of its arguments describes it.

    All raise ToolRefused or WorkspaceError for what cannot be done as it was asked.

    Args:
        workspace: the files.
        ledger: every change goes on record.
    """

    def __init__(self, workspace: Workspace, ledger: Ledger) -> None:
        self._workspace = workspace
        self._ledger = ledger
        self._seen: dict[str, str] = {}
        """SHA-256 of each file as the researcher knows it."""

    def forget_reads(self) -> None:
        """Let nothing be stale: somebody put other files in place, and nobody works on the old."""
        self._seen.clear()

    def read(self, call: Read) -> str:
        path = clean_path(call.file_path)
        content, text = self._present(path)
        self._seen[path] = sha = _sha(content)
        lines = text.replace("\r\n", "\n").split("\n")
        if lines[-1] == "":
            lines.pop()
        first, last = _view(call.view_range, len(lines))
        shown = _numbered(lines, first, last)
        head = f"{path}: {len(lines)} lines, sha {sha[:SHA_DIGITS]}"
        if len(shown) < len(lines):
            head += f", here {first} to {first + len(shown) - 1}; use view_range for more"
        return "\n".join([head, *shown])

    def write(self, call: Write) -> str:
        path = clean_path(call.file_path)
        try:
            content, old = self._present(path)
        except WorkspaceError as error:
            if error.code != "not_found":
                raise
            return self._replace(path, None, call.content)
        self._refuse_stale(path, content)
        return self._replace(path, content, with_ends_of(old, call.content))

    def edit(self, call: Edit) -> str:
        path = clean_path(call.file_path)
        # A model is shown line feeds alone, whatever ends the file's own lines.
        wanted, put = (t.replace("\r\n", "\n") for t in (call.old_string, call.new_string))
        if wanted == put:
            raise _no_change()
        content, text = self._present(path)
        self._refuse_stale(path, content)
        old = text.replace("\r\n", "\n")
        places = old.count(wanted)
        if places == 0:
            raise _not_found(path, old, wanted)
        if places > 1 and not call.replace_all:
            raise _ambiguous(path, old, wanted)
        return self._replace(path, content, with_ends_of(text, old.replace(wanted, put)))

    def delete(self, call: Delete) -> str:
        path = clean_path(call.file_path)
        content = self._removable(path)
        self._workspace.remove(path)
        self._note_change(path, content, None)
        self._seen.pop(path, None)
        return to_json({"ok": True, "file": path, "deleted": True})

    def rename(self, call: Rename) -> str:
        path, target = clean_path(call.file_path), clean_path(call.new_path)
        content = self._removable(path)
        self._refuse_fixed(target)
        if self._workspace.exists(target):
            raise ToolRefused("exists", f"{target} is there already", "take another new_path")
        if PurePosixPath(path).suffix != PurePosixPath(target).suffix:
            self._refuse_broken(target, None, text_of(path, content))
        self._workspace.write(target, content)
        self._note_change(target, None, content)
        self._workspace.remove(path)
        self._note_change(path, content, None)
        self._seen[target] = self._seen.pop(path, _sha(content))
        return to_json({"ok": True, "file": target, "renamed_from": path})

    def list(self, call: ListFiles) -> str:
        files = [
            {"file": entry.path, "bytes": entry.bytes, "editable": entry.editable}
            for entry in self._workspace.list_files(call.path)
        ]
        shown = files[:MAX_LISTED_FILES]
        return to_json({"files": shown, "left_out": len(files) - len(shown)})

    def search(self, call: Search) -> str:
        found = self._workspace.search(call.pattern, call.path)
        matches = [{"file": m.path, "line": m.line, "text": m.text} for m in found]
        return to_json({"matches": matches})

    def _present(self, path: str) -> tuple[bytes, str]:
        """A file as it is, and its text."""
        content = self._workspace.read(path)
        return content, text_of(path, content)

    def _removable(self, path: str) -> bytes:
        """What of a file that is to go from its place is put on record."""
        content = self._workspace.read(path)
        self._refuse_stale(path, content)
        self._refuse_fixed(path)
        return content

    def _refuse_stale(self, path: str, content: bytes) -> None:
        if self._seen.get(path, _sha(content)) != _sha(content):
            message = f"{path} changed since you last read it"
            raise ToolRefused("stale", message, "read it again, then repeat the change")

    def _refuse_fixed(self, path: str) -> None:
        if not self._workspace.is_editable(path):
            hint = "list shows which files are editable"
            raise ToolRefused("not_editable", f"{path} may not be written", hint)

    def _refuse_broken(self, path: str, old: bytes | None, text: str) -> None:
        """What does not parse would cost a box and a failed attempt to find out."""
        session = self._ledger.history.session
        told = str(session.image.get("python", "")).split(".")[:2] if session else []
        python = (
            (int(told[0]), int(told[1])) if all(map(str.isdecimal, told or "-")) else OWN_PYTHON
        )
        try:
            refuse_broken(path, text, python)
        except NotParsed as broken:
            if old is not None and not path.endswith(".py") and not _is_whole(path, old):
                return  # a file with templates or comments that its reader takes, as it was
            message = f"{path} would not parse"
            hint = "nothing was written; avoid deep nesting and NUL characters"
            if broken.problem:
                message += f": {one_line(broken.problem, 160)}, line {broken.line}"
                hint = f"nothing was written; around it:\n{_around(text, broken.line)}"
            raise ToolRefused("syntax_error", message, hint) from None

    def _replace(self, path: str, old: bytes | None, text: str) -> str:
        self._refuse_fixed(path)
        try:
            new = encoded(path, text, old)
        except ValueError as error:
            hint = "write what its encoding has, or take a coding line that has it"
            raise ToolRefused("not_text", one_line(str(error), 160), hint) from None
        if old == new:
            raise _no_change()
        self._refuse_broken(path, old, text)
        self._workspace.write(path, new)
        self._note_change(path, old, new)
        self._seen[path] = _sha(new)
        added, removed = _line_counts("" if old is None else decoded(path, old), text)
        return to_json(
            {
                "ok": True,
                "file": path,
                "bytes": len(new),
                "sha": _sha(new)[:SHA_DIGITS],
                "lines_added": added,
                "lines_removed": removed,
            }
        )

    def _note_change(self, path: str, old: bytes | None, new: bytes | None) -> None:
        before = {} if old is None else {path: old}
        after = {} if new is None else {path: new}
        put = self._ledger.put_blob
        self._ledger.append(
            FileChanged(
                path=path,
                before=None if old is None else put(old),
                after=None if new is None else put(new),
                diff=put(unified_diff(before, after)),
            )
        )


def _is_whole(path: str, content: bytes) -> bool:
    try:
        refuse_broken(path, decoded(path, content))
    except NotParsed:
        return False
    return True


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _view(view_range: list[int] | None, total: int) -> tuple[int, int]:
    if view_range is None:
        return 1, total
    first, last = view_range[0], total if view_range[1] == -1 else view_range[1]
    if not 1 <= first <= max(total, 1) or last < first:
        hint = f"give [first, last] with 1 <= first <= last <= {total}, or -1 as last"
        raise ToolRefused("bad_range", f"the file has {total} lines", hint)
    return first, min(last, total)


def _numbered(lines: list[str], first: int, last: int) -> list[str]:
    shown: list[str] = []
    room = MAX_READ_CHARACTERS
    for number in range(first, min(last, first + MAX_READ_LINES - 1) + 1):
        line = lines[number - 1]
        cut = line if len(line) <= MAX_LINE_CHARACTERS else line[:MAX_LINE_CHARACTERS] + " [cut]"
        room -= len(cut) + 8
        if room < 0:
            break
        shown.append(f"{number:6}\t{cut}")
    return shown


def _no_change() -> ToolRefused:
    return ToolRefused("no_change", "the file would stay as it is", "change something, or run")


def _not_found(path: str, text: str, wanted: str) -> ToolRefused:
    # Lines are cut before they are compared: difflib is quadratic in their length.
    lines = [line[:CLOSEST_CHARACTERS] for line in text.split("\n")]
    first = next((line for line in wanted.split("\n") if line.strip()), "")[:CLOSEST_CHARACTERS]
    unique = list(dict.fromkeys(lines))[:MAX_READ_LINES]
    close = difflib.get_close_matches(first, unique, n=CLOSEST_LINES, cutoff=0.6)
    places = "\n".join(f"{lines.index(line) + 1:6}\t{line}" for line in close)
    hint = f"closest lines:\n{places}" if close else "read the file and copy the text from there"
    return ToolRefused("no_match", f"old_string is not in {path}", hint)


def _ambiguous(path: str, text: str, wanted: str) -> ToolRefused:
    pieces = text.split(wanted, 10)[:-1]
    lines = [1 + before.count("\n") for before in accumulate(pieces, lambda a, b: a + wanted + b)]
    message = f"old_string is in {path} {text.count(wanted)} times, on lines {lines}"
    hint = "take more lines around the place, or set replace_all"
    return ToolRefused("ambiguous", message, hint)


def _around(text: str, line: int) -> str:
    lines = text.split("\n")
    first = max(1, line - SYNTAX_CONTEXT_LINES)
    last = min(len(lines), line + SYNTAX_CONTEXT_LINES)
    return "\n".join(
        f"{'>' if number == line else ' '}{number:6}\t{lines[number - 1][:CLOSEST_CHARACTERS]}"
        for number in range(first, last + 1)
    )


def _line_counts(old: str, new: str) -> tuple[int, int]:
    """Lines added and removed, wherever they stand: cheap whatever the texts are."""
    before, after = old.split("\n"), new.split("\n")
    common = (Counter(before) & Counter(after)).total()
    return len(after) - common, len(before) - common
