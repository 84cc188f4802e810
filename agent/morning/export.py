"""Hands the result over: patch, files, a branch.

The person's repository is worked on with git's plumbing alone: neither work tree nor index is
touched, and nothing in the repository can run code (decision 0005).
"""

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.attempt.lab import fresh_directory
from agent.candidate.diffs import WORKSPACE, beneath, patch
from agent.candidate.merge import Conflict, merge_files
from agent.morning.ablation import BEST, SMALLER, ablation, kept_chain, reviews
from agent.record.attempts import Attempt
from agent.record.chain import read_files
from agent.record.events import Entry, HumanDecided
from agent.record.history import History, fold
from agent.record.ledger import Ledger
from agent.text import one_line
from sandbox.contract.errors import UsageError

APPROVED, PATCH_NAME = "approved", "nightlab.patch"
GIT_SECONDS = 60
PLAIN, EXECUTABLE = "100644", "100755"
HARMLESS = (
    *("-c", "core.hooksPath=/dev/null"),
    *("-c", "core.fsmonitor=false"),
    *("-c", "commit.gpgSign=false"),
)
"""Whatever a repository's configuration says, git runs no program of its choice here."""
# Set in the person's shell, or by a hook that we are called from, they lead to another repository.
_POINTERS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_NAMESPACE")

Files = dict[str, bytes]


@dataclass(frozen=True)
class Person:
    """Who decides, as git knows them."""

    name: str
    email: str


@dataclass(frozen=True)
class Git:
    """git in the person's own repository, with nothing in it able to run code."""

    place: Path
    """Where it is started; never in a tree that an agent writes."""
    environ: Mapping[str, str]

    def __call__(self, *arguments: str, stdin: bytes = b"", **variables: str) -> bytes:
        """What git writes.

        Raises:
            UsageError: git is not there, took too long, or failed.
        """
        try:
            done = subprocess.run(
                ["git", "-C", str(self.place), *HARMLESS, *arguments],
                input=stdin,
                env=self._environment() | variables,
                capture_output=True,
                timeout=GIT_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            hint = "install git; a decision is recorded with the name that git knows"
            raise UsageError(f"git did not work: {error}", hint) from None
        if done.returncode != 0:
            problem = one_line(done.stderr.decode(errors="replace"), 300)
            hint = "look at --repo and --branch; without --branch git only tells who you are"
            raise UsageError(f"git {arguments[0]} failed in {self.place}: {problem}", hint)
        return done.stdout

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in self.environ.items() if name not in _POINTERS}
        return kept | {
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_OPTIONAL_LOCKS": "0",
            "GIT_NO_LAZY_FETCH": "1",
        }


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
    git: Git,
    name: str,
    old: Files,
    new: Files,
    person: Person,
    message: str,
    folder: str = WORKSPACE,
) -> str:
    """A new branch on top of HEAD that has the result; neither work tree nor index is touched.

    What the person committed since the session began is kept: the change is merged into it.

    Returns:
        The commit.

    Raises:
        UsageError: the branch exists, or the person changed the same lines meanwhile.
    """
    git("check-ref-format", "--branch", name)
    head = git("rev-parse", "--verify", "HEAD^{commit}").decode().strip()
    prefix = git("rev-parse", "--show-prefix").decode().rstrip("\n")
    changed = sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))
    paths = {name: prefix + beneath(folder, name) for name in changed}
    theirs, modes = _committed(git, head, paths)
    if missing := sorted(_only(old, changed).keys() - theirs.keys()):
        raise UsageError(
            f"HEAD has no {beneath(folder, missing[0])}",
            "name the directory that program.md lies in with --repo, and commit its files first",
        )
    merged = _merged(_only(old, changed), theirs, _only(new, changed))
    with tempfile.TemporaryDirectory(prefix="nightlab-") as scratch:
        index = f"{scratch}/index"
        git("read-tree", head, GIT_INDEX_FILE=index)
        for path in changed:
            _stage(git, paths[path], merged.get(path), modes.get(path, PLAIN), index)
        tree = git("write-tree", GIT_INDEX_FILE=index).decode().strip()
    commit = git(
        "commit-tree", tree, "-p", head, stdin=message.encode(), **_signature(person)
    ).decode().strip()  # fmt: skip
    # Against zeros: only if there is no such branch, whoever makes one in the same moment.
    git("update-ref", "-m", "nightlab approve", f"refs/heads/{name}", commit, "0" * len(commit))
    return commit


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
    difference, commit = patch(old, files, folder), None
    if branch is not None:
        message = f"{ledger.directory.name}: {reason}"
        commit = _make_branch(git, branch, old, files, person, message, folder)
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
    )
    ledger.append(decided)
    return decided


def reject(ledger: Ledger, person: Person, reason: str) -> None:
    """Record that the person turned the best down."""
    best = ledger.history.best
    if best is None:
        raise UsageError("this session has no result yet", "wait for its baseline")
    files = {"attempt": best.number, "variant": BEST, "files": best.started.files}
    nothing = {"patch": None, "branch": None, "commit": None}
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


def _only(files: Files, names: list[str]) -> Files:
    return {name: files[name] for name in names if name in files}


def _committed(git: Git, head: str, paths: Mapping[str, str]) -> tuple[Files, dict[str, str]]:
    """The person's own version of the files, and their modes; what HEAD lacks is left out."""
    found: Files = {}
    modes: dict[str, str] = {}
    for name, path in paths.items():
        listed = git("ls-tree", "--full-tree", head, "--", path).decode(errors="surrogateescape")
        if not listed:
            continue
        modes[name], _, sha = listed.split("\t", 1)[0].split(" ")
        if modes[name] not in (PLAIN, EXECUTABLE):
            raise UsageError(f"{path} is not a plain file in the repository", "take the patch")
        found[name] = git("cat-file", "blob", sha)
    return found, modes


def _merged(old: Files, theirs: Files, new: Files) -> Files:
    try:
        return merge_files(old, theirs, new)
    except Conflict as conflict:
        raise UsageError(
            f"the repository changed since the session began, at the same place: {conflict}",
            "take the patch over by hand; approve without --branch writes it",
        ) from None


def _stage(git: Git, path: str, content: bytes | None, mode: str, index: str) -> None:
    if content is None:
        entry = f"0 {'0' * 40}\t{path}"
    else:
        # A filter is a program of the repository's choice.
        blob = git("hash-object", "-w", "--no-filters", "--stdin", stdin=content).decode().strip()
        entry = f"{mode} {blob}\t{path}"
    git("update-index", "-z", "--index-info", stdin=f"{entry}\0".encode(), GIT_INDEX_FILE=index)


def _signature(person: Person) -> dict[str, str]:
    return {
        f"GIT_{role}_{kind}": value
        for role in ("AUTHOR", "COMMITTER")
        for kind, value in (("NAME", person.name), ("EMAIL", person.email))
    }
