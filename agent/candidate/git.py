"""git in a person's repository, with nothing in it run."""

import hashlib
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agent.candidate.own_files import POINTERS
from agent.record.events import Repository
from agent.text import one_line
from sandbox.contract.errors import UsageError

GIT_SECONDS = 60
PLAIN, EXECUTABLE = "100644", "100755"
HARMLESS = (
    *("-c", "core.hooksPath=/dev/null"),
    *("-c", "core.fsmonitor=false"),
    *("-c", "commit.gpgSign=false"),
    *("-c", "core.safecrlf=false"),  # it may refuse what is hashed, and nothing is written back
)
"""Whatever a repository's configuration says, git runs no program of its choice here."""
_NO_DRIVERS = {"unspecified", "set", "unset"}
_DRIVER = re.compile(r"[A-Za-z0-9_-]+")


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

    def line(self, *arguments: str) -> str:
        """The one line that git writes, without its end."""
        return self(*arguments).decode(errors="surrogateescape").rstrip("\n")

    def commit(self, name: str) -> str | None:
        """The commit of that name; None where there is none."""
        try:
            return self.line("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
        except UsageError:
            return None

    def listed(self, commit: str, folder: str) -> dict[str, tuple[str, str]]:
        """Mode and blob of each file of a commit below a folder, by its path in the repository."""
        where = ("--", folder) if folder else ()
        text = self("ls-tree", "-r", "-z", "--full-tree", commit, *where)
        found = {}
        for entry in text.decode(errors="surrogateescape").split("\0")[:-1]:
            facts, _, path = entry.partition("\t")
            mode, _, sha = facts.split(" ")
            found[path] = (mode, sha)
        return found

    def cleaned(
        self, files: Mapping[str, bytes], known: Mapping[str, str], *, is_kept: bool = False
    ) -> dict[str, str]:
        """The blobs that git makes of files: line ends and such by its attributes, no filters.

        A filter is a program of the repository's choice, so those named are turned off.

        Args:
            files: as they lie in the work tree, by their paths from where git is started.
            known: blobs of commits by path; git is not asked for each file that is one of them.
            is_kept: whether the blobs are written into the repository.

        Raises:
            UsageError: a filter has a name that cannot be turned off.
        """
        same = {p: known[p] for p, c in files.items() if p in known and _blob(c, known[p])}
        files = {path: content for path, content in files.items() if path not in same}
        names = "\0".join(files).encode(errors="surrogateescape")
        told = self("check-attr", "-z", "--stdin", "filter", stdin=names).split(b"\0")[2::3]
        drivers = {name.decode(errors="surrogateescape") for name in told} - _NO_DRIVERS
        if odd := sorted(name for name in drivers if not _DRIVER.fullmatch(name)):
            raise UsageError(f"filter {odd[0][:80]!r} cannot be turned off", "take the patch")
        keys = ("clean=", "process=", "required=false")
        off = [word for d in sorted(drivers) for k in keys for word in ("-c", f"filter.{d}.{k}")]
        words = (*off, "hash-object", *(["-w"] if is_kept else []), "--stdin")
        return same | {
            path: self(*words, f"--path={path}", stdin=content).decode().strip()
            for path, content in files.items()
        }

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in self.environ.items() if name not in POINTERS}
        return kept | {
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_OPTIONAL_LOCKS": "0",
            "GIT_NO_LAZY_FETCH": "1",
        }


def _blob(content: bytes, sha: str) -> bool:
    """Whether a blob holds just that."""
    algorithm = "sha1" if len(sha) == 40 else "sha256"
    whole = b"blob %d\0%b" % (len(content), content)
    return hashlib.new(algorithm, whole, usedforsecurity=False).hexdigest() == sha


def repository_of(git: Git, files: Mapping[str, bytes]) -> Repository | None:
    """The commit that a workspace stands at, and which of its files are otherwise than there.

    Args:
        git: started in the workspace.
        files: of the workspace.
    """
    head = git.commit("HEAD")
    if head is None:
        return None
    prefix = git.line("rev-parse", "--show-prefix")
    listed = git.listed(head, prefix.rstrip("/"))
    there = {path.removeprefix(prefix): sha for path, (_, sha) in listed.items()}
    changed = {name for name, sha in git.cleaned(files, there).items() if there.get(name) != sha}
    gone = {name for name in there if not (git.place / name).exists()}
    return Repository(head=head, changed=tuple(sorted(changed | gone)))
