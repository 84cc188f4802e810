"""A person's directory with the toy task, and nightlab called in it.

A command is a process of its own. It is forked from one that has imported nightlab and what a night
needs, since half of what a command of seconds costs is to import: the tests wait for two cores.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from agent.record.chain import read_ledger
from agent.record.history import History, fold
from sandbox.box.hardening import LABEL_OWNER, LABEL_RUN
from sandbox.engine.find import Engine, connect

COMMAND = "import agent.cli.app; agent.cli.app.main()"
FORETOLD = """
import random
import agent.attempt.experiment as experiment, agent.cli.app
def seeds(lab):
    chance = random.Random(len(lab.history.completed))
    return tuple(chance.sample(range(1, 2**31), lab.settings.noise.max_repeats))
experiment._fresh_seeds = seeds
agent.cli.app.main()
"""
"""nightlab whose fresh seeds follow from the attempts before: nights of one seed are then equal."""
FOR_THE_INTERPRETER = ("PYTHON", "LC_", "LANG", "COLUMNS")
"""How variables begin that are read at the start or at import: by a process that is not forked."""
SECONDS = 240.0
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["agent.cli.app", "agent.researcher.claude", "matplotlib.pyplot"])


class CommandLine:
    """A person's directory with the toy task in it."""

    def __init__(self, root: Path, engine: Engine) -> None:
        self.root = root
        self.engine = engine
        self.code = COMMAND
        self.environ = {k: v for k, v in os.environ.items() if not k.startswith("ANTHROPIC_")}

    def foretell_seeds(self) -> None:
        """From now on, see `FORETOLD`."""
        self.code = FORETOLD

    def nightlab(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Wait for a command to end, for `SECONDS` at most."""
        if any(name.startswith(FOR_THE_INTERPRETER) for name in environ):
            return subprocess.run(
                self._words(arguments),
                cwd=self.root,
                env=self.environ | environ,
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
        with tempfile.TemporaryDirectory() as outputs:
            out, err = Path(outputs, "out"), Path(outputs, "err")
            given = (self.code, arguments, self.root, self.environ | environ, out, err)
            process = _FORKS.Process(target=_run, args=given)
            process.start()
            process.join(SECONDS)
            if process.exitcode is None:
                process.kill()
                raise subprocess.TimeoutExpired(arguments, SECONDS, out.read_bytes())
            return subprocess.CompletedProcess(
                arguments, process.exitcode, out.read_text(), err.read_text()
            )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._words(arguments),
            cwd=self.root,
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _words(self, arguments: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-P", "-c", self.code, *arguments]

    def session(self, name: str) -> Path:
        return self.root / "runs" / name

    def history(self, name: str) -> History:
        return fold(read_ledger(self.session(name)))

    def events(self, name: str, kind: type) -> list[Any]:
        return [e.event for e in read_ledger(self.session(name)) if isinstance(e.event, kind)]

    def containers(self, name: str) -> list[str]:
        """Ids of a session's boxes: other checkouts on this engine may have sessions so named."""
        place = f"{self.session(name)}/"
        return self._boxes(
            lambda box: any(m.get("Source", "").startswith(place) for m in box["Mounts"])
        )

    def boxes_of(self, pid: int, *, running: bool = False) -> list[str]:
        return self._boxes(
            lambda box: box["Labels"].get(LABEL_OWNER, "").startswith(f"{pid} "), running=running
        )

    def _boxes(
        self, is_meant: Callable[[dict[str, Any]], bool], *, running: bool = False
    ) -> list[str]:
        with closing(connect(self.engine)) as client:
            found = client.api.containers(all=not running, filters={"label": LABEL_RUN})
        return [box["Id"] for box in found if is_meant(box)]

    def rewrite(self, file: str, old: str, new: str) -> None:
        path = self.root / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))


def _run(
    code: str, words: tuple[str, ...], place: Path, environ: dict[str, str], out: Path, err: Path
) -> None:
    """What a new interpreter would find: place, environment, arguments, and two outputs."""
    os.chdir(place)
    os.environ.clear()
    os.environ.update(environ)
    for path, number in ((out, 1), (err, 2)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.argv = ["nightlab", *words]
    exec(code, {"__name__": "__main__"})


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
