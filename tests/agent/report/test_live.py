"""A session can be watched while it runs, by nobody but who has the address, and without harm."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.record.chain import LEDGER_NAME, Follower
from agent.record.events import SessionEnded, SessionResumed, StopReason
from agent.report.activity import NOTE_NAME, Activity, RunNotes, activity
from agent.report.console import JsonConsole
from agent.report.live import LiveReport, WatchServer
from tests.support import histories
from tests.support.browser import Browser
from tests.support.growing import Session, begun_training

NIGHT = histories.night(12)
HOSTILE = histories.night(12, hostile=True, ended=False)


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    made = Session(tmp_path / "night", NIGHT)
    with made.ledger:
        yield made


@pytest.fixture
def live(session: Session) -> LiveReport:
    return LiveReport(session.directory, lambda: histories.EVENING)


@pytest.fixture
def server(live: LiveReport) -> Iterator[WatchServer]:
    with WatchServer(live) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.02,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(
    server: WatchServer, method: str = "GET", path: str | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    where = f"/{server.token}/" if path is None else path
    try:
        connection.request(method, where, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def now_at(live: LiveReport) -> str:
    """What the page says of the present, as text."""
    live.page()
    news = live.news(-1)
    assert news is not None
    return " ".join(re.sub(r"<[^>]*>", " ", news["parts"]["now"]).split())


# The door


def test_it_listens_on_this_machine_alone(server: WatchServer) -> None:
    assert server.server_address[0] == "127.0.0.1"


def test_who_has_the_address_sees_the_report(session: Session, server: WatchServer) -> None:
    session.go_on(4)
    status, _, body = ask(server)
    assert 200 == status
    assert '<details id="a3" class="attempt' in body.decode()


@pytest.mark.parametrize("path", ["/", "/news?since=0", "/x/", "/../", "//", "/%00/", "/t%C3%B6/"])
def test_without_the_token_there_is_nothing(server: WatchServer, path: str) -> None:
    status, _, body = ask(server, path=path)
    assert (404, b"") == (status, body)


def test_a_token_is_long_and_never_the_same(live: LiveReport) -> None:
    with WatchServer(live) as one, WatchServer(live) as other:
        assert one.token != other.token
        assert len(one.token) >= 32


def test_only_the_two_pages_exist(server: WatchServer) -> None:
    for name in ("ledger.jsonl", "../ledger.jsonl", "%2e%2e/ledger.jsonl", "news/x", "blobs/"):
        assert 404 == ask(server, path=f"/{server.token}/{name}")[0]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"])
def test_nothing_but_reading_is_answered(server: WatchServer, method: str) -> None:
    status, _, body = ask(server, method)
    assert (405, b"") == (status, body)


def test_head_is_get_without_a_body(session: Session, server: WatchServer) -> None:
    session.go_on(2)
    got, asked = ask(server), ask(server, "HEAD")
    assert (200, b"") == (asked[0], asked[2])
    assert got[1]["Content-Length"] == asked[1]["Content-Length"]


@pytest.mark.parametrize(
    "host", ["evil.example:{port}", "127.0.0.1.evil.example", "", "localhost@x"]
)
def test_a_name_from_elsewhere_that_points_here_is_refused(server: WatchServer, host: str) -> None:
    assert 403 == ask(server, Host=host.format(port=server.server_port))[0]


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "localhost:9", "[::1]:9"])
def test_the_near_end_of_a_tunnel_is_this_machine(server: WatchServer, host: str) -> None:
    assert 200 == ask(server, Host=host.format(port=server.server_port))[0]


def test_every_answer_forbids_what_is_not_needed(server: WatchServer) -> None:
    for path in (None, "/", f"/{server.token}/news?since=0"):
        headers = ask(server, path=path)[1]
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; ")
        assert policy.endswith("; frame-ancestors 'none'")
        assert "connect-src 'self'" in policy
        assert "unsafe" not in policy
        assert "no-store" == headers["Cache-Control"]
        assert "nosniff" == headers["X-Content-Type-Options"]
        assert "no-referrer" == headers["Referrer-Policy"]
        assert "Server" not in headers


def test_the_pages_own_policy_is_the_headers(server: WatchServer) -> None:
    _, headers, body = ask(server)
    found = re.search(r'Content-Security-Policy" content="([^"]*)"', body.decode())
    assert found
    inner = found[1].replace("&#39;", "'")
    assert headers["Content-Security-Policy"] == f"{inner}; frame-ancestors 'none'"


def test_a_body_is_never_taken_for_the_next_request(server: WatchServer) -> None:
    smuggled = f"GET /{server.token}/ HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request("GET", f"/{server.token}/news?since=0", body=smuggled)
    answer = connection.getresponse()
    assert "close" == answer.getheader("Connection")
    connection.close()


def test_a_browser_that_leaves_in_the_middle_leaves_no_trace(
    server: WatchServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as leaving:
        leaving.sendall(b"GET /")
        wait_for(lambda: len(answering()) == 1)
        leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_for(lambda: not answering())
    assert "" == capsys.readouterr().err


def answering() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if "process_request_thread" in t.name]


def wait_for(is_so: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < give_up
        time.sleep(0.01)


@pytest.mark.parametrize("since", ["", "-1", "x", "1e9", "9" * 40, "%D9%A3"])
def test_nonsense_is_refused(server: WatchServer, since: str) -> None:
    assert 400 == ask(server, path=f"/{server.token}/news?since={since}")[0]


# What it tells


def test_nothing_new_is_told_as_nothing(session: Session, server: WatchServer) -> None:
    session.go_on(3)
    _, _, body = ask(server, path=f"/{server.token}/news?since=0")
    version = json.loads(body)["version"]
    status, _, body = ask(server, path=f"/{server.token}/news?since={version}")
    assert (204, b"") == (status, body)


def test_only_what_changed_is_told(session: Session, live: LiveReport) -> None:
    session.go_on(5)
    first = live.news(0)
    assert first is not None
    session.go_on(6)
    second = live.news(first["version"])
    assert second is not None
    assert {"5"} == {name for name in second["parts"] if name.isdigit()}
    assert 6 == second["count"]


def test_what_did_not_change_is_not_made_again(session: Session, live: LiveReport) -> None:
    session.go_on(5)
    live.page()
    shutil.rmtree(session.directory / "blobs")
    session.go_on(6)
    page = live.page()
    assert "+DEPTH = 4  # blocks" in page
    assert 1 == page.count("(the diff cannot be shown")


def test_a_session_is_followed_from_its_first_event_to_a_resume(
    session: Session, live: LiveReport
) -> None:
    assert "The session has not begun to write its record yet." == now_at(live)
    session.begin_attempt()
    assert now_at(live).startswith("At work on the baseline since ")
    session.go_on(3)
    assert "Between two attempts: the researcher is at work." == now_at(live)
    session.add(SessionEnded(reason=StopReason.STOPPED, explanation="the person asked to stop"))
    assert "Ended: the person asked to stop" == now_at(live)
    session.add(resumed())
    assert "Between two attempts: the researcher is at work." == now_at(live)
    session.begin_attempt()
    assert now_at(live).startswith("At work on attempt #3 since ")


def test_a_session_that_nobody_works_on_says_how_to_go_on(
    session: Session, live: LiveReport
) -> None:
    session.go_on(2)
    session.ledger.close()
    assert now_at(live).endswith("it was cut off. Go on with: nightlab resume night")


def test_a_pause_is_told(session: Session, live: LiveReport) -> None:
    session.go_on(2)
    (session.directory / "pause").touch()
    assert "Paused. Go on with: nightlab continue night" == now_at(live)


def test_a_torn_last_line_is_waited_for(session: Session, live: LiveReport) -> None:
    session.go_on(3)
    written = (session.directory / LEDGER_NAME).read_bytes()
    torn = LiveReport(copied(session, written[:-40]), lambda: histories.EVENING)
    assert "cannot be read" not in now_at(torn)
    (session.directory.parent / "copy" / LEDGER_NAME).write_bytes(written)
    assert '<details id="a2" class="attempt' in torn.page()


def test_a_damaged_record_is_said_and_what_stands_before_it_is_shown(session: Session) -> None:
    session.go_on(4)
    lines = (session.directory / LEDGER_NAME).read_bytes().splitlines(keepends=True)
    damaged = [*lines[:-2], lines[-2].replace(b'"attempt":3', b'"attempt":4'), lines[-1]]
    live = LiveReport(copied(session, b"".join(damaged)), lambda: histories.EVENING)
    assert "The record cannot be read to its end" in now_at(live)
    assert "its content does not match its hash" in now_at(live)
    assert '<details id="a2" class="attempt' in live.page()


def test_a_record_that_is_damaged_while_watched_is_noticed_and_so_is_its_repair(
    session: Session, live: LiveReport
) -> None:
    session.go_on(4)
    path = session.directory / LEDGER_NAME
    good = path.read_bytes()
    assert "cannot be read" not in now_at(live)
    path.write_bytes(good.replace(b"Halve", b"Heave"))
    assert "The record cannot be read to its end" in now_at(live)
    path.write_bytes(good)
    assert "cannot be read" not in now_at(live)


def test_a_record_that_is_gone_is_said(session: Session, live: LiveReport) -> None:
    session.go_on(2)
    live.page()
    (session.directory / LEDGER_NAME).unlink()
    assert "there is no ledger in" in now_at(live)


def test_a_look_takes_in_only_what_is_new(session: Session) -> None:
    follower = Follower(session.directory)
    session.go_on(3)
    assert follower.poll()
    before = list(follower.entries)
    assert not follower.poll()
    session.go_on(4)
    assert follower.poll()
    assert all(one is other for one, other in zip(before, follower.entries, strict=False))
    assert session.ledger.entries == follower.entries
    assert session.ledger.history == follower.history


def test_hostile_text_is_text_in_news_too(tmp_path: Path) -> None:
    made = Session(tmp_path / "night", HOSTILE)
    with made.ledger:
        made.go_on(9)
        made.begin_attempt()
        news = LiveReport(made.directory, lambda: histories.EVENING).news(0)
    assert news is not None
    text = " ".join(news["parts"].values())
    assert not re.search(r"<(script|img|h1>Verified)", text)
    assert "\x1b" not in text
    assert "\u202e" not in text


# The run that goes on now


def test_a_wait_for_a_quiet_machine_is_said(session: Session, live: LiveReport) -> None:
    session.go_on(2)
    session.begin_attempt()
    result = histories.run_result("now", "train", log="")
    session.add(histories.run_started(2, 7, result))
    session.add(histories.run_finished(2, 7, result, disturbed=True))
    assert now_at(live).startswith("Waiting for a quiet machine, at attempt #2")
    session.add(histories.run_started(2, 7, result))
    assert now_at(live).startswith("Training attempt #2")


def test_the_running_training_is_shown_with_its_curve_so_far(
    session: Session, live: LiveReport
) -> None:
    session.go_on(2)
    session.begin_attempt()
    session.add(begun_training(2, seed=7))
    session.note(seed=7)
    assert now_at(live).startswith("Training attempt #2 since ")
    assert "seed 7" in now_at(live)
    assert "training loss, as the program reported it" in now_at(live)


@pytest.mark.parametrize(
    "note", ["", "{", "[]", '{"box": "train"}', "null", '{"box":"train","seed":7,"curve":3}']
)
def test_a_broken_note_costs_only_the_curve(session: Session, live: LiveReport, note: str) -> None:
    session.go_on(2)
    session.begin_attempt()
    session.add(begun_training(2, seed=7))
    (session.directory / NOTE_NAME).write_text(note)
    assert now_at(live).startswith("Training attempt #2 since ")


def test_a_note_about_another_run_is_not_shown(session: Session) -> None:
    session.go_on(2)
    session.begin_attempt()
    session.add(begun_training(2, seed=7))
    session.note(seed=8)
    assert () == present(session).curve


def test_notes_are_taken_while_a_run_goes_on_and_are_gone_after_it(session: Session) -> None:
    session.go_on(2)
    session.begin_attempt()
    session.add(begun_training(2, seed=7))
    lines: list[str] = []
    clock = iter(range(0, 1000, 3))
    notes = RunNotes(session.directory, lambda: float(next(clock)))
    taker = JsonConsole(notes, lines.append)
    result = histories.run_result("a2-s7-train", "train", log="")
    taker.run_started(histories.run_started(2, 7, result), 300.0)
    taker.log(histories.progress_log(1, 20).encode())
    assert 20 == len(present(session).curve)
    taker.run_finished(histories.run_finished(2, 7, result))
    assert not (session.directory / NOTE_NAME).exists()
    assert ["run_started", "run_finished"] == [json.loads(line)["event"] for line in lines]


def test_a_disk_that_refuses_a_note_does_not_stop_the_night(session: Session) -> None:
    notes = RunNotes(session.directory / "gone", lambda: 0.0)
    taker = JsonConsole(notes, lambda _line: None)
    result = histories.run_result("a2-s7-train", "train", log="")
    taker.run_started(histories.run_started(2, 7, result), 300.0)
    taker.close()


def present(session: Session) -> Activity:
    ledger = session.ledger
    return activity(session.directory, ledger.history, ledger.entries)


def resumed() -> SessionResumed:
    return SessionResumed(
        nightlab_version="0.1.0",
        settings=histories.IN_FORCE,
        interrupted_attempts=(),
        removed_containers=(),
        engine={},
        machine={},
    )


def copied(session: Session, ledger: bytes) -> Path:
    directory = session.directory.parent / "copy"
    shutil.copytree(session.directory, directory)
    (directory / LEDGER_NAME).write_bytes(ledger)
    return directory


# In a browser


@pytest.mark.slow
def test_the_page_grows_under_the_readers_eyes_and_keeps_their_place(
    chromium: Path, tmp_path: Path, session: Session, server: WatchServer
) -> None:
    session.go_on(6)
    with Browser(chromium, tmp_path / "profile") as browser:
        browser.open(server.address)
        browser.wait_for("document.getElementById('live').textContent === 'live'")
        browser.click("#theme")
        browser.click("#k1 > summary")
        browser.click("#a1 > summary")
        browser.run("scrollBy(0, 40)")
        before = browser.run("document.getElementById('a1').getBoundingClientRect().top")
        session.go_on(8)
        browser.wait_for("document.getElementById('a7') !== null")
        session.begin_attempt()
        session.add(begun_training(8, seed=1))
        browser.wait_for(
            "document.getElementById('p-now').textContent.includes('Training attempt #8')"
        )
        seen = browser.run(
            """({
                rows: [...document.querySelectorAll(".attempt")].map((row) => row.id),
                open: ["a1", "k1"].every((id) => document.getElementById(id).open),
                kept: document.querySelectorAll("table.chain details").length,
                theme: document.documentElement.dataset.theme,
                button: document.getElementById("theme").textContent,
                top: document.getElementById("a1").getBoundingClientRect().top,
                dots: document.querySelectorAll(".wide a.dot").length,
            })"""
        )
        session.add(SessionEnded(reason=StopReason.STOPPED, explanation="enough"))
        browser.wait_for("document.getElementById('p-now').textContent.includes('Ended: enough')")
        assert [f"a{number}" for number in range(9)] == seen["rows"]
        assert (True, "light", "theme: light") == (seen["open"], seen["theme"], seen["button"])
        assert before == pytest.approx(seen["top"], abs=2)
        assert (9, 2) == (seen["dots"], seen["kept"])
        assert [] == browser.console
        assert {True} == {address.startswith(server.address) for address in browser.requests}


@pytest.mark.slow
def test_a_hostile_session_does_nothing_to_its_watcher(chromium: Path, tmp_path: Path) -> None:
    made = Session(tmp_path / "night", HOSTILE)
    with made.ledger, WatchServer(LiveReport(made.directory, lambda: histories.EVENING)) as server:
        made.go_on(4)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Browser(chromium, tmp_path / "profile") as browser:
            browser.open(server.address)
            made.go_on(11)
            browser.wait_for("document.getElementById('a10') !== null")
            assert "mar7-evening · nightlab" == browser.run("document.title")
            assert 1 == browser.run("document.querySelectorAll('h1').length")
            assert [] == browser.console
            assert {True} == {address.startswith(server.address) for address in browser.requests}
        server.shutdown()


# The command


def nightlab(*arguments: str, **options: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "agent.cli", *arguments]
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
    )


def test_the_command_prints_its_address_and_ends_with_ctrl_c(session: Session) -> None:
    session.go_on(2)
    runs = str(session.directory.parent)
    with nightlab("watch", "night", "--runs", runs, "--json") as watching:
        assert watching.stdout
        address = json.loads(watching.stdout.readline())["address"]
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/([\w-]{32,})/", address)
        assert found
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=20)
        connection.request("GET", f"/{found[2]}/")
        assert 200 == connection.getresponse().status
        connection.close()
        watching.send_signal(signal.SIGINT)
        rest, errors = watching.communicate(timeout=20)
        assert (0, "", "") == (watching.returncode, rest, errors)


def test_a_port_that_is_taken_is_said_in_a_sentence(session: Session, server: WatchServer) -> None:
    session.go_on(2)
    runs, port = str(session.directory.parent), str(server.server_port)
    with nightlab("watch", "night", "--runs", runs, "--port", port) as watching:
        _, errors = watching.communicate(timeout=20)
    assert 2 == watching.returncode
    assert errors.startswith(f"error: port {port} cannot be opened: Address already in use")
