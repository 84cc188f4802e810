"""nightlab's own log: nightlab.log beside the ledger.

The ledger says what was tried and how it ended; this file says what the machinery did meanwhile,
for a person who wonders why a night took so long. Nothing is ever computed from it, so a disk that
refuses it costs lines and no night. docs/log.md names the events.
"""

import logging
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import structlog

from agent.cli.shared import warn
from agent.researcher.redaction import hidden, secrets_in
from agent.text import one_line
from sandbox.contract.log import log

LOG_NAME = "nightlab.log"
MAX_LOG_BYTES = 16 * 2**20
MAX_FACT_CHARACTERS = 500


@contextmanager
def operational_log(
    directory: Path, command: str, environ: Mapping[str, str], *, is_verbose: bool
) -> Iterator[None]:
    """Let events go to the log in `directory`, which must exist, while a command works there.

    Secrets of `environ` are kept out, whatever an error repeats of them. With `is_verbose` events
    are shown on stderr as well, and more of them.
    """
    secrets, file = secrets_in(environ), _LogFile(directory / LOG_NAME)

    def bounded(_logger: object, _method: str, facts: MutableMapping[str, Any]) -> Any:
        for name, fact in facts.items():
            if not isinstance(fact, bool | int | float | None):
                text = ", ".join(map(str, fact)) if isinstance(fact, list | tuple) else str(fact)
                facts[name] = one_line(hidden(text, secrets), MAX_FACT_CHARACTERS)
        return facts

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
            bounded,
            *([_show] if is_verbose else []),
            structlog.processors.JSONRenderer(ensure_ascii=False, sort_keys=True),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.DEBUG if is_verbose else logging.INFO
        ),
        logger_factory=lambda *_: file,
    )
    log.info("command_started", command=command)
    try:
        yield
    except BaseException as error:
        log.warning("command_failed", command=command, error=type(error).__name__)
        raise
    else:
        log.info("command_ended", command=command)
    finally:
        structlog.reset_defaults()  # silent again: the directory may be gone by the next event


def _show(_logger: object, _method: str, facts: MutableMapping[str, Any]) -> Any:
    """One short line for a person: the time of day, the event, its facts."""
    named = (f"{n}={fact}" for n, fact in facts.items() if n not in ("event", "at", "level"))
    warn(" ".join([facts["at"][11:19], facts["event"], *named]), "dim")
    return facts


class _LogFile:
    """A file that lines are appended to; beyond its bound it begins anew, once kept beside it.

    It is opened for each line: events are rare, and a file that somebody moved away comes back.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._turn = threading.Lock()  # boxes are watched by threads, which log too

    def msg(self, line: str) -> None:
        """Append a line, if the disk lets us."""
        content = f"{line}\n".encode(errors="backslashreplace")
        with self._turn, suppress(OSError):
            with suppress(FileNotFoundError):
                if self._path.stat().st_size + len(content) > MAX_LOG_BYTES:
                    self._path.replace(self._path.with_name(f"{LOG_NAME}.1"))
            with self._path.open("ab", buffering=0) as file:
                file.write(content)

    debug = info = warning = msg
