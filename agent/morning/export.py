"""Hands the result over: patch, files, a branch.

The person's repository is worked on with git's plumbing alone: neither work tree nor index is
touched, and nothing in the repository can run code (decision 0005).
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.attempt.lab import fresh_directory
from agent.candidate.diffs import WORKSPACE, beneath, patch
from agent.candidate.git import EXECUTABLE, PLAIN, Git
from agent.candidate.merge import Conflict, merge_files
from agent.candidate.own_files import is_wanted
from agent.morning.ablation import BEST, SMALLER, ablation, kept_chain, reviews
from agent.record.attempts import Attempt
from agent.record.chain import read_files
from agent.record.events import Entry, HumanDecided
from agent.record.history import History, fold
from agent.record.ledger import Ledger
from agent.settings import FIXED_FILES
from agent.text import one_line
from sandbox.contract.errors import UsageError

APPROVED, PATCH_NAME = "approved", "nightlab.patch"
MOST_NAMES = 8
GONE = f"0 {'0' * 40}"
"""An entry for git's index that takes a file out."""
Files = dict[str, bytes]


@dataclass(frozen=True)
class Person:
    """Who decides, as git knows them."""

    name: str
    email: str


def find_person(git: Git) -> Person:
    """The identity in force where git is started.

    Raises:
        UsageError: none is set; the hint says how to set one.
    """
    found = [
        git("config", "--default", "", "--get", name).decode(errors="replace").strip()
        for name in ("user.name", "user.email")
    ]
    if not all(found):
        raise UsageError(
            "git does not know who you are, and a decision is recorded with a name",
            'git config --global user.name "Your Name" and '
            "git config --global user.email you@example.org",
        )
    return Person(*found)


def _standing(history: History, number: int | None) -> Attempt:
    """The attempt that a person takes: the best, or another one that was kept and still stands.

    Raises:
        UsageError: nothing was kept, or that one was not, or a score of it was refused.
    """
    if number is None and (history.best is None or not kept_chain(history)):
        raise UsageError(
            "this session kept no change: there is nothing to approve",
            "go on with `nightlab resume NAME --attempts N`, or record that with `nightlab reject`",
        )
    attempts = {attempt.number: attempt for attempt in history.attempts}
    taken = history.best if number is None else attempts.get(number)
    others = [a.number for a in history.candidates if a.kept and not history.refusals.of(a.number)]
    hint = (
        f"take attempt {others[-1]}, which stands" if others else "no attempt is left that stands"
    )
    if taken is None or not taken.was_kept or taken is history.baseline:
        raise UsageError(f"attempt {number} was not kept", hint)
    if (refusal := history.refusals.of(taken.number)) is not None:
        why = f"{one_line(refusal.reason or '', 60)}: {one_line(refusal.explanation, 200)}"
        where = f"in {refusal.purpose}, on {refusal.split}, at seed {refusal.seed}"
        raise UsageError(f"attempt {taken.number} was refused {where} ({why})", hint)
    return taken


def _result_files(ledger: Ledger, taken: Attempt, *, smaller: bool) -> Files:
    """The files that a person takes: the attempt's, or those of the review's smaller model."""
    shas = taken.started.files if not smaller else _smaller_files(ledger)
    return read_files(ledger.directory, shas)


def result_diff(directory: Path, entries: Sequence[Entry]) -> str:
    """What the best's files changed in those that the session began with, as text."""
    history = fold(entries)
    if history.session is None or history.best is None:
        return ""
    shas = (history.session.files, history.best.started.files)
    old, new = (read_files(directory, files) for files in shas)
    return patch(old, new).decode(errors="replace")


def _write_approved(directory: Path, files: Files, difference: bytes) -> None:
    """Put files and patch into the session's directory; an earlier export is replaced."""
    target = fresh_directory(directory / APPROVED)
    for name, content in files.items():
        path = target / WORKSPACE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (target / PATCH_NAME).write_bytes(difference)


def _make_branch(
    git: Git, name: str, ledger: Ledger, new: Files, person: Person, message: str
) -> tuple[str, tuple[str, ...]]:
    """A new branch on top of HEAD that has the result; neither work tree nor index is touched.

    It holds the files that were measured, edits among them that were not committed when the session
    began. What the person committed since is kept: then the result is merged into it.

    Returns:
        The commit, and the files of it that are not those that were measured.

    Raises:
        UsageError: the branch exists, or the person changed the same lines meanwhile.
    """
    git("check-ref-format", "--branch", name)
    head = git.line("rev-parse", "--verify", "HEAD^{commit}")
    sides = _sides(git, head, ledger, new)
    merged = {path: blob for path in sides.paths if (blob := _merged(git, sides, path)) is not None}
    with tempfile.TemporaryDirectory(prefix="nightlab-") as scratch:
        index = f"{scratch}/index"
        git("read-tree", head, GIT_INDEX_FILE=index)
        for path in sides.paths:
            if merged.get(path) != sides.theirs.get(path):
                entry = f"{sides.modes.get(path, PLAIN)} {merged[path]}" if path in merged else GONE
                line = f"{entry}\t{sides.prefix}{path}\0".encode(errors="surrogateescape")
                git("update-index", "-z", "--index-info", stdin=line, GIT_INDEX_FILE=index)
        tree = git("write-tree", GIT_INDEX_FILE=index).decode().strip()
    commit = git(
        "commit-tree", tree, "-p", head, stdin=message.encode(), **_signature(person)
    ).decode().strip()  # fmt: skip
    # Against zeros: only if there is no such branch, whoever makes one in the same moment.
    git("update-ref", "-m", "nightlab approve", f"refs/heads/{name}", commit, "0" * len(commit))
    return commit, sides.unmeasured(merged)


@dataclass(frozen=True)
class _Sides:
    """Blobs of a workspace's files in several versions, by path from where git is started.

    As git would store them: a file whose line ends git turns round when it checks it out differs
    from itself in nothing.
    """

    prefix: str
    """From the top of the repository to where git is started."""
    base: dict[str, str] | None
    """At the commit that the session began at; None where that is not known here."""
    old: dict[str, str]
    """As the session began with them, committed or not."""
    new: dict[str, str]
    """The result: those that were measured."""
    scorers: dict[str, str]
    """The fixed files that measured them."""
    theirs: dict[str, str]
    """At HEAD now, whatever else lies there."""
    modes: dict[str, str]

    @property
    def paths(self) -> list[str]:
        return sorted(self.old.keys() | self.new.keys())

    def unmeasured(self, merged: Mapping[str, str]) -> tuple[str, ...]:
        """Files of the branch's workspace that were not measured so, or not measured with."""
        branch = {p: blob for p, blob in self.theirs.items() if p not in self.paths} | dict(merged)
        due = self.new | self.scorers
        others = (path for path in branch if Path(path).name not in FIXED_FILES)
        looked_at = due.keys() | {path for path in others if is_wanted(Path(path), is_tracked=True)}
        return tuple(sorted(path for path in looked_at if branch.get(path) != due.get(path)))


def _sides(git: Git, head: str, ledger: Ledger, new: Files) -> _Sides:
    session, folder = ledger.history.session, ledger.history.in_force.workspace.path
    assert session is not None
    prefix = git.line("rev-parse", "--show-prefix")
    where = (prefix + ("" if folder == "." else folder)).rstrip("/")
    began = git.commit(session.repository.head) if session.repository else None

    def stored(files: Files) -> dict[str, str]:
        below = {beneath(folder, name): content for name, content in files.items()}
        return git.cleaned(below, known, is_kept=True)

    def at(commit: str) -> dict[str, tuple[str, str]]:
        listed = git.listed(commit, where).items()
        return {path.removeprefix(prefix): found for path, found in listed}

    theirs, base = at(head), None if began is None else at(began)
    known = {path: blob for path, (_, blob) in (theirs | (base or {})).items()}
    return _Sides(
        prefix=prefix,
        base=None if base is None else {path: blob for path, (_, blob) in base.items()},
        old=stored(read_files(ledger.directory, session.files)),
        new=stored(new),
        scorers=stored(read_files(ledger.directory, session.fixed_files)),
        theirs={path: blob for path, (_, blob) in theirs.items()},
        modes={path: mode for path, (mode, _) in theirs.items()},
    )


def _merged(git: Git, sides: _Sides, path: str) -> str | None:
    """The blob of a file in the branch: HEAD's, with what the session changed in it.

    Raises:
        UsageError: HEAD lacks a file that it needs, or has changed at the same place.
    """
    old, new, theirs = sides.old.get(path), sides.new.get(path), sides.theirs.get(path)
    base = old if sides.base is None else sides.base.get(path)
    if sides.base is None and old == new:
        return theirs  # without a common commit only what the session changed is taken over
    if sides.base is None and old is not None and theirs is None:
        hint = "name the directory that program.md lies in with --repo, and commit its files first"
        raise UsageError(f"HEAD has no {path}", hint)
    if sides.modes.get(path, PLAIN) not in (PLAIN, EXECUTABLE):
        raise UsageError(f"{path} is not a plain file in the repository", "take the patch")
    # Nobody touched it since, or what was not committed then is committed now.
    if theirs in (base, old):
        return new
    blobs = (base, theirs, new)
    versions = ({path: git("cat-file", "blob", blob)} if blob else {} for blob in blobs)
    try:
        content = merge_files(*versions).get(path)
    except Conflict as conflict:
        raise UsageError(
            f"the repository changed since the session began, at the same place: {conflict}",
            "take the patch over by hand; approve without --branch writes it",
        ) from None
    if content is None:
        return None
    # It is made of what git has cleaned already.
    return git("hash-object", "-w", "--no-filters", "--stdin", stdin=content).decode().strip()


def branch_notes(history: History, decided: HumanDecided) -> Iterator[str]:
    """What a person should know of a branch: what nobody measured, what was not committed."""
    begun = history.session.repository if history.session else None
    if decided.unmeasured:
        names = ", ".join(one_line(name, 100) for name in decided.unmeasured[:MOST_NAMES])
        more = len(decided.unmeasured) - MOST_NAMES
        yield f"merged, not measured: {names}" + (f" and {more} more" if more > 0 else "")
    if begun is not None and begun.changed:
        names = ", ".join(one_line(name, 100) for name in begun.changed[:MOST_NAMES])
        yield f"not committed when the session began, and measured as it was: {names}"


def refuse_inside(place: Path, runs: Path) -> None:
    """No git where an agent writes: its hooks and settings would run on the host.

    Raises:
        UsageError: `place` lies in the directory of the sessions.
    """
    if place.resolve().is_relative_to(runs.resolve()):
        raise UsageError(
            f"{place} lies inside {runs}, where agents write", "name your own repository"
        )


def approve(
    ledger: Ledger,
    person: Person,
    reason: str,
    git: Git,
    *,
    attempt: int | None = None,
    smaller: bool = False,
    branch: str | None = None,
) -> HumanDecided:
    """Write the result into the session's directory, make the branch if asked, and record that.

    Raises:
        UsageError: there is nothing to approve, or the branch cannot be made.
    """
    assert ledger.history.session is not None
    taken = _standing(ledger.history, attempt)
    files = _result_files(ledger, taken, smaller=smaller)
    old = read_files(ledger.directory, ledger.history.session.files)
    folder = ledger.history.in_force.workspace.path
    difference = patch(old, files, folder)
    commit: str | None = None
    unmeasured: tuple[str, ...] = ()
    if branch is not None:
        message = f"{ledger.directory.name}: {reason}"
        commit, unmeasured = _make_branch(git, branch, ledger, files, person, message)
    _write_approved(ledger.directory, files, difference)
    decided = _decision(
        person,
        reason,
        decision="approve",
        attempt=taken.number,
        variant=SMALLER if smaller else BEST,
        files={name: ledger.put_blob(content) for name, content in files.items()},
        patch=ledger.put_blob(difference),
        branch=branch,
        commit=commit,
        unmeasured=unmeasured,
    )
    ledger.append(decided)
    return decided


def reject(ledger: Ledger, person: Person, reason: str) -> None:
    """Record that the person turned the best down."""
    best = ledger.history.best
    if best is None:
        raise UsageError("this session has no result yet", "wait for its baseline")
    files = {"attempt": best.number, "variant": BEST, "files": best.started.files}
    nothing = {"patch": None, "branch": None, "commit": None, "unmeasured": ()}
    ledger.append(_decision(person, reason, decision="reject", **files, **nothing))


def _decision(person: Person, reason: str, **result: Any) -> HumanDecided:
    return HumanDecided(reason=reason, person=person.name, email=person.email, **result)


def _smaller_files(ledger: Ledger) -> dict[str, str]:
    found, best = reviews(ledger.entries)[-1:], ledger.history.best
    last = next((one for one in found if best and one.started.best == best.number), None)
    table = ablation(last, ledger.history) if last else None
    if last is None or table is None or table.smaller is None:
        raise UsageError("no review offers a smaller equal model", "run `nightlab review` first")
    files = last.variants[SMALLER].files
    if files is None or not table.smaller.is_equal:
        raise UsageError("the smaller model is not equal to the best", "approve without --smaller")
    return files


def _signature(person: Person) -> dict[str, str]:
    return {
        f"GIT_{role}_{kind}": value
        for role in ("AUTHOR", "COMMITTER")
        for kind, value in (("NAME", person.name), ("EMAIL", person.email))
    }
