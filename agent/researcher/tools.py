"""The tools a researcher acts through; there is no shell."""

from __future__ import annotations

import difflib
import hashlib
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agent.attempt.lab import hashes_of
from agent.candidate.knobs import Suggestion
from agent.candidate.workspace import Workspace, WorkspaceError, clean_path
from agent.record.attempts import Attempt, Smoke
from agent.record.history import History
from agent.researcher.answers import history_answer, run_answer, smoke_answer, sweep_answer, to_json
from agent.researcher.arguments import (
    Arguments,
    Edit,
    Finish,
    ListFiles,
    Read,
    Run,
    Search,
    ShowHistory,
    Suggest,
    Sweep,
    ToolRefused,
    Write,
    parsed,
    schemas,
)
from agent.settings import Goal
from agent.text import one_line
from sandbox.contract.errors import BoxLost

MAX_READ_LINES = 2000
MAX_READ_CHARACTERS = 48_000
MAX_LINE_CHARACTERS = 2000
CLOSEST_LINES = 3
CLOSEST_CHARACTERS = 200
SYNTAX_CONTEXT_LINES = 3
SHA_DIGITS = 12


@dataclass(frozen=True)
class ToolResult:
    """What a tool answers."""

    text: str
    is_error: bool
    finished: str | None
    """Why the session should end, if the tool was `finish`."""


class Toolbox:
    """The tools of one session.

    Args:
        workspace: the files.
        history: the ledger's fold, as it is now.
        get_blob: content of a blob of the ledger.
        run_attempt: trains, scores and judges the workspace's files under a hypothesis.
        run_smoke: runs files for a few seconds.
        max_smokes: how many of these may be asked for between two attempts.
        find_known: the judged attempt whose files were byte for byte these.
        suggest: the sampler's next point; none when the files have no knobs.
        sweep: gives knobs and a number of attempts to the sampler; the judged attempts and why
            there are not more.
        goal: what is measured, and which way is better.
        on_change: told the path of each file that was written, what it held and what it holds.
    """

    def __init__(
        self,
        workspace: Workspace,
        history: Callable[[], History],
        get_blob: Callable[[str], bytes],
        run_attempt: Callable[[str], Attempt],
        run_smoke: Callable[[dict[str, bytes]], Smoke],
        max_smokes: int,
        find_known: Callable[[dict[str, bytes]], Attempt | None],
        suggest: Callable[[], Suggestion | None],
        sweep: Callable[[tuple[str, ...], int], tuple[list[Attempt], str]],
        goal: Goal,
        on_change: Callable[[str, str | None, str], object] = lambda *_: None,
    ) -> None:
        self._workspace = workspace
        self._history = history
        self._get_blob = get_blob
        self._run_attempt = run_attempt
        self._run_smoke = run_smoke
        self._max_smokes = max_smokes
        self._find_known = find_known
        self._suggest_point = suggest
        self._sweep_knobs = sweep
        self._goal = goal
        self._on_change = on_change
        self._seen: dict[str, str] = {}
        """SHA-256 of each file as the researcher knows it."""

    def schemas(self) -> list[dict[str, Any]]:
        """The tools in the Messages API's form, always in the same order and the same bytes."""
        return schemas()

    def call(self, name: str, arguments: dict[str, Any]) -> ToolResult:
        """Do what a researcher asks for.

        Raises:
            SandboxError: nightlab or the engine failed while a candidate ran.
        """
        try:
            return self._dispatch(parsed(name, arguments))
        except (ToolRefused, WorkspaceError) as error:
            answer = {"error": error.code, "message": error.message, "hint": error.hint}
            return ToolResult(to_json(answer), is_error=True, finished=None)

    def _dispatch(self, call: Arguments) -> ToolResult:
        match call:
            case Read():
                return _told(self._read(call))
            case Write():
                return _told(self._write(call))
            case Edit():
                return _told(self._edit(call))
            case ListFiles():
                return _told(self._list(call))
            case Search():
                return _told(self._search(call))
            case Run():
                return _told(self._run(call))
            case ShowHistory():
                return _told(self._show_history(call))
            case Suggest():
                return _told(self._suggest())
            case Sweep():
                return _told(self._sweep(call))
            case Finish():
                return ToolResult(to_json({"ok": True}), is_error=False, finished=call.reason)
            case _:
                raise AssertionError(call)

    def forget_reads(self) -> None:
        """Let nothing be stale: somebody put other files in place, and nobody works on the old."""
        self._seen.clear()

    def _read(self, call: Read) -> str:
        path = clean_path(call.file_path)
        text = self._workspace.read_text(path)
        self._seen[path] = _sha(text)
        lines = text.split("\n")
        if lines[-1] == "":
            lines.pop()
        first, last = _view(call.view_range, len(lines))
        shown = _numbered(lines, first, last)
        told = f"{path}: {len(lines)} lines, sha {_sha(text)[:SHA_DIGITS]}"
        if len(shown) < len(lines):
            told += f", here {first} to {first + len(shown) - 1}; use view_range for more"
        return "\n".join([told, *shown])

    def _write(self, call: Write) -> str:
        path = clean_path(call.file_path)
        old = self._present(path)
        if old is not None:
            self._refuse_stale(path, old)
        return self._replace(path, old or "", call.content, exists=old is not None)

    def _edit(self, call: Edit) -> str:
        path = clean_path(call.file_path)
        if call.old_string == call.new_string:
            raise _no_change()
        old = self._workspace.read_text(path)
        self._refuse_stale(path, old)
        places = old.count(call.old_string)
        if places == 0:
            raise _not_found(path, old, call.old_string)
        if places > 1 and not call.replace_all:
            raise _ambiguous(path, old, call.old_string)
        new = old.replace(call.old_string, call.new_string)
        return self._replace(path, old, new, exists=True)

    def _present(self, path: str) -> str | None:
        try:
            return self._workspace.read_text(path)
        except WorkspaceError as error:
            if error.code == "not_found":
                return None
            raise

    def _refuse_stale(self, path: str, text: str) -> None:
        if self._seen.get(path, _sha(text)) != _sha(text):
            message = f"{path} changed since you last read it"
            raise ToolRefused("stale", message, "read it again, then repeat the change")

    def _replace(self, path: str, old: str, new: str, *, exists: bool) -> str:
        if exists and old == new:
            raise _no_change()
        if not self._workspace.is_editable(path):
            hint = "list shows which files are editable"
            raise ToolRefused("not_editable", f"{path} may not be written", hint)
        if path.endswith(".py"):
            _refuse_broken_python(path, new)
        self._workspace.write_text(path, new)
        self._on_change(path, old if exists else None, new)
        self._seen[path] = _sha(new)
        added, removed = _line_counts(old, new)
        return to_json(
            {
                "ok": True,
                "file": path,
                "bytes": len(new.encode()),
                "sha": _sha(new)[:SHA_DIGITS],
                "lines_added": added,
                "lines_removed": removed,
            }
        )

    def _list(self, call: ListFiles) -> str:
        files = [
            {"file": entry.path, "bytes": entry.bytes, "editable": entry.editable}
            for entry in self._workspace.list_files(call.path)
        ]
        return to_json({"files": files[:200], "left_out": max(0, len(files) - 200)})

    def _search(self, call: Search) -> str:
        found = self._workspace.search(call.pattern, call.path)
        matches = [{"file": m.path, "line": m.line, "text": m.text} for m in found]
        return to_json({"matches": matches})

    def _run(self, call: Run) -> str:
        candidate = self._workspace.candidate()
        if call.smoke:
            return self._smoke(candidate)
        known = self._find_known(candidate)
        if known is not None:
            return run_answer(known, self._history(), repeated=True)
        attempt = self._run_attempt(call.hypothesis)
        # The run has put the best files in place, and its answer says so: nothing is stale.
        self._seen.clear()
        return run_answer(attempt, self._history(), repeated=False)

    def _smoke(self, candidate: dict[str, bytes]) -> str:
        left = self._max_smokes - self._history().smokes_in_a_row
        known = self._history().find_smoke(hashes_of(candidate))
        if known is not None:
            return smoke_answer(known, self._history(), left, repeated=True)
        if left <= 0:
            message = f"{self._max_smokes} smoke runs since the last attempt are enough"
            raise ToolRefused("too_many_smokes", message, "run without smoke, or change less")
        try:
            smoked = self._run_smoke(candidate)
        except BoxLost as error:
            hint = "change what may bring it about"
            raise ToolRefused("box_lost", error.message, hint) from error
        return smoke_answer(smoked, self._history(), left - 1, repeated=False)

    def _show_history(self, call: ShowHistory) -> str:
        if (call.attempt is not None) != (call.select == "attempt"):
            hint = 'give attempt together with select = "attempt", and neither without the other'
            raise ToolRefused("bad_arguments", "attempt and select do not fit together", hint)
        try:
            return history_answer(
                self._history(),
                self._get_blob,
                self._goal.direction,
                call.select,
                call.limit,
                call.attempt,
            )
        except KeyError:
            message = f"there is no attempt {call.attempt}"
            raise ToolRefused("not_found", message, 'see select = "recent"') from None

    def _suggest(self) -> str:
        suggestion = self._suggest_point()
        if suggestion is None:
            message = "the files have no knobs left to turn"
            hint = "a knob is a module-level NAME = literal; or change the code instead"
            raise ToolRefused("nothing_to_suggest", message, hint)
        changes = [
            {"file": c.file, "knob": one_line(c.name, 80), "from": c.old[:80], "to": c.new[:80]}
            for c in suggestion.changes
        ]
        return to_json({"changes": changes, "reason": suggestion.reason})

    def _sweep(self, call: Sweep) -> str:
        best = self._history().best
        if best is not None and best.started.files != hashes_of(self._workspace.candidate()):
            message = "the workspace holds changes that were not run"
            raise ToolRefused("unsaved_changes", message, "run them, or undo them, then sweep")
        attempts, why = self._sweep_knobs(tuple(call.knobs), call.attempts)
        if not attempts:
            hint = "a knob is a module-level NAME = literal; see suggest for those there are"
            raise ToolRefused("nothing_to_sweep", why, hint)
        self._seen.clear()
        return sweep_answer(attempts, self._history(), why)


def _told(text: str) -> ToolResult:
    return ToolResult(text, is_error=False, finished=None)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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
    lines = [line[:CLOSEST_CHARACTERS] for line in text.split("\n")]
    first = next((line for line in wanted.split("\n") if line.strip()), "")[:CLOSEST_CHARACTERS]
    unique = list(dict.fromkeys(lines))[:MAX_READ_LINES]
    close = difflib.get_close_matches(first, unique, n=CLOSEST_LINES, cutoff=0.6)
    places = "\n".join(f"{lines.index(line) + 1:6}\t{line}" for line in close)
    hint = f"closest lines:\n{places}" if close else "read the file and copy the text from there"
    return ToolRefused("no_match", f"old_string is not in {path}", hint)


def _ambiguous(path: str, text: str, wanted: str) -> ToolRefused:
    starts: list[int] = []
    position = text.find(wanted)
    while position >= 0 and len(starts) < 10:
        starts.append(text.count("\n", 0, position) + 1)
        position = text.find(wanted, position + len(wanted))
    message = f"old_string is in {path} {text.count(wanted)} times, on lines {starts}"
    hint = "take more lines around the place, or set replace_all"
    return ToolRefused("ambiguous", message, hint)


def _refuse_broken_python(path: str, text: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(text, path, "exec", dont_inherit=True)
    except SyntaxError as error:
        line = error.lineno or 1
        message = f"{path} would not parse: {one_line(error.msg, 160)}, line {line}"
        hint = f"nothing was written; around it:\n{_around(text, line)}"
        raise ToolRefused("syntax_error", message, hint) from None
    except (ValueError, RecursionError, MemoryError, OverflowError):
        hint = "nothing was written; avoid deep nesting and NUL characters"
        raise ToolRefused("syntax_error", f"{path} would not parse", hint) from None


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
