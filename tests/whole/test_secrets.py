"""Planted secrets are nowhere: not in the record, the report, the spans or on the screen."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from agent.night.assemble import check_models
from agent.record.chain import read_blob, read_ledger
from agent.record.events import RetryWaited, RunFinished, SessionEnded
from agent.record.ledger import Ledger
from agent.record.usage import Spend
from agent.report.report import write_report
from agent.researcher.redaction import HIDDEN, hidden, secrets_in
from sandbox.contract.errors import UsageError
from sandbox.engine.find import Engine
from sandbox.image.image import ImageRecord
from tests.support.labs import Quiet, play, traced, with_observer
from tests.support.messages_server import (
    Entry,
    MessagesServer,
    Status,
    Turn,
    say,
    text,
    thinking,
    tinker,
    tool,
)
from tests.support.nights import TOY, Place
from tests.support.spans import Collector

PLANTED = {
    "ANTHROPIC_API_KEY": "sk-ant-planted-0f1e2d3c4b5a",
    "AWS_SECRET_ACCESS_KEY": "planted/AwsSecret+Access=Key",
    "HF_TOKEN": "hf_plantedTokenOfTheHub",
    "HTTPS_PROXY": "http://somebody:pl4nted-proxy-w0rd@proxy.invalid:3128",
}
ECHO = PLANTED["HF_TOKEN"]
DOCKER_PROXY = "http://somebody:pl4nted-docker-w0rd@proxy.invalid:3128"
NEEDLES = (
    *(PLANTED[name] for name in ("ANTHROPIC_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN")),
    "pl4nted-proxy-w0rd",
    "pl4nted-docker-w0rd",
)
TELLTALE = (
    "refused: x-api-key sk-ant-planted-0f1e2d3c4b5a, "
    "by way of http://somebody:pl4nted-proxy-w0rd@proxy.invalid:3128"
)
"""What a service or a proxy may answer that repeats what it was sent."""
NOSY = """
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
print(dict(os.environ), flush=True)
for place in ("/proc/self/environ", "/proc/1/environ", "/root/.docker/config.json"):
    try:
        print(Path(place).read_bytes(), flush=True)
    except OSError as error:
        print(error, flush=True)
"""


def script(*, last: int) -> Iterator[Entry]:
    """Errors that repeat secrets before the second answer and, in the end, for good."""
    yield tinker
    yield Status(529, "overloaded_error", TELLTALE)
    for _ in range(4):
        yield tinker
    while True:
        yield Status(last, "authentication_error", TELLTALE)


def leaks(*places: Path | str) -> list[tuple[str, str]]:
    """Which needle lies where, in any file or text."""
    found = []
    for place in places:
        files = [place] if isinstance(place, str) else [p for p in place.rglob("*") if p.is_file()]
        for file in files:
            content = file.encode() if isinstance(file, str) else file.read_bytes()
            name = "text" if isinstance(file, str) else str(file.relative_to(place))
            found += [(needle, name) for needle in NEEDLES if needle.encode() in content]
            found += [(n, name) for n in NEEDLES if json.dumps(n)[1:-1].encode() in content]
    return found


@dataclass
class Listening(Quiet):
    """An observer that remembers what it was told of waits."""

    said: list[str]

    def waiting(self, *words: Any) -> None:
        self.said += words


def simulated(root: Path) -> tuple[Place, Collector, list[str]]:
    """A night with planted secrets on pretended boxes: its place, spans and what was said."""
    changes: dict[str, dict[str, Any]] = {"session": {"attempts": 3}, "researcher": {"then": []}}
    place = Place(root, changes=changes)
    collector, said = Collector(), list[str]()
    lab = with_observer(place.begin("claude"), Listening(said))
    server = MessagesServer(script(last=401), clock=place.clock.monotonic, endless=True)
    with server, lab.ledger:
        environ = PLANTED | {"ANTHROPIC_BASE_URL": server.url}
        ended = play(traced(lab, collector), place.program, "claude", environ)
        said.append(ended.explanation)
        write_report(place.directory, lab.ledger.entries, lab.ledger.get_blob)
    return place, collector, said


def test_a_night_with_a_telltale_service_keeps_every_secret(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place, collector, said = simulated(tmp_path)
    spans = str([(span.name, span.attributes) for span in collector.spans])
    printed = capfd.readouterr()
    assert [] == leaks(place.directory, spans, *said, printed.out, printed.err)

    events = [entry.event for entry in read_ledger(place.directory)]
    waited = [event.error for event in events if isinstance(event, RetryWaited)]
    ended = [event.explanation for event in events if isinstance(event, SessionEnded)]
    assert ["x-api-key [secret], by way of http://somebody:[secret]@proxy"] == [
        text[text.index("x-api-key") :].split(".invalid")[0] for text in waited
    ]
    assert "x-api-key [secret]" in ended[0]
    assert 2 <= len(said)


def _bent(kind: str, *path: str) -> Turn:
    """A reply whose event of that kind holds a secret there."""

    def bend(events: list[dict[str, Any]]) -> list[dict[str, Any] | str]:
        for event in events:
            if event["type"] == kind:
                event[path[0]][path[1]] = ECHO
        return [*events]

    return Turn((text("I"), tool("list")), odd=True, bend=bend)


ECHOES: dict[str, Turn] = {
    "words": say(text(ECHO), tool("list")),
    "thoughts": say(thinking(ECHO), tool("list")),
    "a tool's input": say(tool("read", file_path=ECHO), tool("run", hypothesis=ECHO, smoke=True)),
    "a tool's name": replace(say(tool(ECHO, **{ECHO: 1})), odd=True),
    "a tool's id": say({**tool("list"), "id": ECHO}),
    "the model's name": _bent("message_start", "message", "model"),
    "the reason of the end": _bent("message_delta", "delta", "stop_reason"),
    "a refusal": Turn((text("I"),), "refusal", {"type": "refusal", "explanation": ECHO}),
    "an error inside": Turn(
        (text("I"),),
        odd=True,
        bend=lambda events: [
            *events[:2],
            {"type": "error", "error": {"type": "api_error", "message": ECHO}},
        ],
    ),
}


@pytest.mark.parametrize("is_known", [True, False], ids=["hidden", "not known as a secret"])
@pytest.mark.parametrize("name", ECHOES)
def test_what_a_gateway_repeats_in_a_reply_is_hidden_too(
    name: str, is_known: bool, tmp_path: Path
) -> None:
    changes: dict[str, dict[str, Any]] = {"session": {"attempts": 1}}
    place, said = Place(tmp_path, changes=changes), list[str]()
    lab = with_observer(place.begin("claude"), Listening(said))
    twice: list[Entry] = [ECHOES[name]] * 2
    answers = itertools.chain(twice, itertools.repeat(tinker))
    server = MessagesServer(answers, clock=place.clock.monotonic, endless=True, helpful=False)
    with server, lab.ledger:
        environ = PLANTED | {"ANTHROPIC_BASE_URL": server.url}
        if not is_known:
            del environ["HF_TOKEN"]
        said.append(play(lab, place.program, "claude", environ).explanation)
        write_report(place.directory, lab.ledger.entries, lab.ledger.get_blob)
        assert is_known == (leaks(place.directory, *said) == [])
        server.unplanned.clear()  # a changed thought or id is refused, and asked anew


def test_a_refusal_before_the_night_tells_no_secret(tmp_path: Path) -> None:
    program = Place(tmp_path).program
    with MessagesServer([], key="another") as server, pytest.raises(UsageError) as refusal:
        check_models(program, PLANTED | {"ANTHROPIC_BASE_URL": server.url}, [], Spend())

    assert HIDDEN in refusal.value.message
    assert [] == leaks(refusal.value.message, refusal.value.hint)


def test_a_leak_would_be_seen_wherever_it_lies(tmp_path: Path) -> None:
    place, _, _ = simulated(tmp_path)
    with Ledger.open(place.directory) as ledger:
        ledger.append(RetryWaited(conversation=1, error=TELLTALE, wait_seconds=1.0))
        ledger.put_blob(PLANTED["HF_TOKEN"].encode())
    (place.directory / "report.html").write_text(f"<p>{PLANTED['AWS_SECRET_ACCESS_KEY']}</p>")
    found = {(needle, name.split("/")[0]) for needle, name in leaks(place.directory, DOCKER_PROXY)}
    assert {
        (PLANTED["ANTHROPIC_API_KEY"], "ledger.jsonl"),
        ("pl4nted-proxy-w0rd", "ledger.jsonl"),
        (PLANTED["HF_TOKEN"], "blobs"),
        (PLANTED["AWS_SECRET_ACCESS_KEY"], "report.html"),
        ("pl4nted-docker-w0rd", "text"),
    } == found


@pytest.mark.docker
def test_a_real_night_with_nosy_code_keeps_every_secret(
    tmp_path: Path, engine: Engine, image: ImageRecord
) -> None:
    place = tmp_path / "night"
    shutil.copytree(TOY, place, ignore=shutil.ignore_patterns("__pycache__"))
    train = place / "workspace" / "train.py"
    train.write_text(train.read_text() + "".join(f"    {line}\n" for line in NOSY.splitlines()))
    config = tmp_path / "docker"
    config.mkdir()
    proxies = {"default": {"httpProxy": DOCKER_PROXY, "httpsProxy": DOCKER_PROXY}}
    (config / "config.json").write_text(json.dumps({"proxies": proxies}))

    def nightlab(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "agent.cli", *words],
            cwd=place,
            env={**os.environ, **environ},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    made = nightlab("setup")
    assert made.returncode == 0, made.stderr
    with MessagesServer(script(last=401), endless=True) as server:
        done = nightlab(
            *("run", "--researcher", "claude", "--attempts", "2", "--session", "planted"),
            **PLANTED,
            DOCKER_CONFIG=str(config),
            ANTHROPIC_BASE_URL=server.url,
        )
    audited = nightlab("audit", "planted", "--type", "retry_waited,session_ended")
    assert 0 == audited.returncode, audited.stdout
    session = place / "runs" / "planted"
    runs = [e.event for e in read_ledger(session) if isinstance(e.event, RunFinished)]
    logs = [read_blob(session, run.log).decode() for run in runs if run.result.box == "train"]
    assert logs
    assert all("NIGHTLAB_SEED" in log for log in logs)  # it did print all that it could see
    assert "[secret]" in audited.stdout
    assert [] == leaks(session, done.stdout, done.stderr, audited.stdout)


def test_secrets_are_known_by_their_names_and_as_passwords_in_addresses(tmp_path: Path) -> None:
    assert {*NEEDLES} - {"pl4nted-docker-w0rd"} == {*secrets_in(PLANTED)}
    assert ("p@ss-word", "p%40ss-word") == tuple(
        sorted(secrets_in({"ALL_PROXY": "socks5://me:p%40ss-word@host:1"}), key=len)
    )
    identity = tmp_path / "identity"
    gateway = {
        "ANTHROPIC_CUSTOM_HEADERS": "x-team: planted-team-word\nAuthorization: Bearer planted-bear",
        "AWS_BEARER_TOKEN_BEDROCK": "planted-bedrock-word",
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(identity),
    }
    identity.write_text("planted-identity\n")
    told = "planted-team-word planted-bear planted-bedrock-word planted-identity"
    assert " ".join([HIDDEN] * 4) == hidden(told, secrets_in(gateway))
    assert () == secrets_in({"PATH": "/usr/bin:/bin", "API_KEY": "", "TERM": "xterm-256color"})


@pytest.mark.parametrize("text", ["", "nothing", "x" * 10_000])
def test_what_holds_no_secret_stays_as_it_is(text: str) -> None:
    assert text == hidden(text, secrets_in(PLANTED))


def test_the_longer_of_two_secrets_goes_first() -> None:
    environ = {"A_KEY": "abcdefgh", "B_KEY": "abcdefghijkl"}
    assert "[secret] and [secret]" == hidden("abcdefghijkl and abcdefgh", secrets_in(environ))
