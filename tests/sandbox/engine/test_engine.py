"""The engine: found, refused with the reason, started and ended without touching any other."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any

import pytest
from requests.exceptions import RequestException
from structlog.testing import capture_logs

from sandbox.contract.errors import EngineUnavailable
from sandbox.engine.find import Engine, EngineClient, connect, find_engine
from sandbox.engine.host import last_lines, own_places, why_not_installable
from sandbox.engine.own import install_and_start, stop_own_engine

NO_SOCKET = Path("/nonexistent/docker.sock")
PLAIN_ENVIRON = {
    name: value for name, value in os.environ.items() if not name.startswith("DOCKER_")
}


@pytest.fixture(autouse=True)
def _no_docker_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docker-py looks for contexts in the home of whoever runs the tests."""
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "config.json").write_text("{}")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))


@contextmanager
def engine_that_says(socket: Path, version: Mapping[str, Any]) -> Iterator[None]:
    """Something that answers /version on a Unix socket, and nothing else."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(version).encode()
            self.send_response(200 if self.path.endswith("/version") else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def address_string(self) -> str:
            return "unix"

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (its name there)
            return

    with ThreadingUnixStreamServer(str(socket), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield
        server.shutdown()
        thread.join()


def refusal_of(state_dir: Path, environ: Mapping[str, str]) -> EngineUnavailable:
    with pytest.raises(EngineUnavailable) as refusal:
        find_engine(state_dir, environ=environ, default_socket=NO_SOCKET)
    assert refusal.value.hint
    return refusal.value


def test_without_any_engine_the_refusal_names_the_places_looked_at(tmp_path: Path) -> None:
    refusal = refusal_of(tmp_path, {})
    assert str(NO_SOCKET) in refusal.message
    assert str(own_places(tmp_path).socket) in refusal.message


@pytest.mark.parametrize("address", ["tcp://10.0.0.1:2375", "ssh://somebody@elsewhere"])
def test_an_engine_on_another_machine_is_refused_with_the_reason(
    tmp_path: Path, address: str
) -> None:
    assert "not on this machine" in refusal_of(tmp_path, {"DOCKER_HOST": address}).message


def test_a_context_that_names_another_machine_is_refused(tmp_path: Path) -> None:
    write_context(tmp_path / "docker", "far", "tcp://10.0.0.1:2375")
    assert "not on this machine" in refusal_of(tmp_path, {"DOCKER_CONTEXT": "far"}).message


def write_context(config: Path, name: str, host: str) -> None:
    folder = config / "contexts" / "meta" / hashlib.sha256(name.encode()).hexdigest()
    folder.mkdir(parents=True)
    endpoint = {"docker": {"Host": host, "SkipTLSVerify": False}}
    (folder / "meta.json").write_text(
        json.dumps({"Name": name, "Metadata": {}, "Endpoints": endpoint})
    )


def test_a_context_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    refusal = refusal_of(tmp_path, {"DOCKER_CONTEXT": "forgotten"})
    assert "context does not exist" in refusal.message


def test_podman_is_refused_because_it_drops_gpu_requests(tmp_path: Path) -> None:
    socket = tmp_path / "podman.sock"
    version = {
        "ApiVersion": "1.41",
        "Version": "5.4.0",
        "Components": [{"Name": "Podman Engine", "Version": "5.4.0"}],
    }
    with engine_that_says(socket, version):
        refusal = refusal_of(tmp_path, {"DOCKER_HOST": f"unix://{socket}"})
    assert "drops GPU requests" in refusal.message


def test_an_engine_older_than_20_10_is_refused(tmp_path: Path) -> None:
    socket = tmp_path / "old.sock"
    version = {"ApiVersion": "1.40", "Version": "19.03.15", "Components": [{"Name": "Engine"}]}
    with engine_that_says(socket, version):
        refusal = refusal_of(tmp_path, {"DOCKER_HOST": f"unix://{socket}"})
    assert "19.03.15, which is too old" in refusal.message


def test_something_else_behind_the_socket_is_no_engine(tmp_path: Path) -> None:
    socket = tmp_path / "else.sock"
    with engine_that_says(socket, {"hello": "world", "ApiVersion": "1.41"}):
        refusal = refusal_of(tmp_path, {"DOCKER_HOST": f"unix://{socket}"})
    assert "no Docker Engine" in refusal.message


def test_a_named_engine_that_does_not_answer_is_never_passed_over(tmp_path: Path) -> None:
    gone = tmp_path / "gone.sock"
    refusal = refusal_of(tmp_path, {"DOCKER_HOST": f"unix://{gone}"})
    assert f"nothing listens at {gone}" == refusal.message


@pytest.mark.parametrize(
    ("uid", "release", "expected"),
    [
        (0, {"ID": "debian"}, None),
        (0, {"ID": "ubuntu", "ID_LIKE": "debian"}, None),
        (0, {"ID": "linuxmint", "ID_LIKE": "ubuntu debian"}, None),
        (1000, {"ID": "debian"}, "only root can"),
        (0, {"ID": "fedora", "NAME": "Fedora"}, "Debian and Ubuntu only, and this is Fedora"),
        (0, {}, "Debian and Ubuntu only, and this is ?"),
    ],
)
def test_nightlab_installs_an_engine_only_as_root_on_debian_or_ubuntu(
    uid: int, release: dict[str, str], expected: str | None
) -> None:
    reason = why_not_installable(uid, release)
    assert (expected or "") in (reason or "")
    assert (expected is None) == (reason is None)


def test_the_sockets_of_a_deep_state_directory_move_to_a_short_path(tmp_path: Path) -> None:
    short = own_places(Path("/var/lib/nightlab"))
    deep = own_places(tmp_path / ("d" * 100))
    assert Path("/var/lib/nightlab/engine/docker.sock") == short.socket
    assert Path("/run") == deep.socket.parent.parent
    assert deep.socket != own_places(tmp_path / ("e" * 100)).socket
    assert deep.data.is_relative_to(tmp_path)


def test_what_a_tool_said_is_shown_bounded_and_without_control_characters() -> None:
    assert "b\nc" == last_lines("a\nb\x1b\x07\nc\r\n", 2)
    assert len(last_lines("x" * 100_000)) <= 8000


def test_stopping_never_touches_a_process_that_is_not_nightlabs_dockerd(tmp_path: Path) -> None:
    places = own_places(tmp_path)
    places.root.mkdir()
    lookalike = [sys.executable, "-c", "import sys; sys.stdin.read()", f"--data-root={places.data}"]
    with subprocess.Popen(lookalike, stdin=subprocess.PIPE) as other:
        places.pid_file.write_text(str(other.pid))
        assert not stop_own_engine(tmp_path)
        assert other.poll() is None


def test_no_engine_is_started_in_place_of_one_the_user_named(tmp_path: Path) -> None:
    environ = {**PLAIN_ENVIRON, "DOCKER_HOST": "unix:///nonexistent/docker.sock"}
    with pytest.raises(EngineUnavailable, match="nothing listens"):
        install_and_start(tmp_path, environ=environ, say=lambda _: None)
    assert not own_places(tmp_path).root.exists()


def test_stopping_where_nothing_was_started_says_so(tmp_path: Path) -> None:
    assert not stop_own_engine(tmp_path)


@pytest.mark.usefixtures("dockerd")
def test_nightlabs_own_engine_is_started_found_again_and_ended(tmp_path: Path) -> None:
    state_dir = tmp_path / ("long-state-directory-" * 4)
    places = own_places(state_dir)
    places.root.mkdir(parents=True)
    # As a crash leaves them: a pid that belongs to another by now, and a dead socket.
    places.pid_file.write_text(str(os.getpid()))
    places.socket.parent.mkdir(parents=True, exist_ok=True)
    places.socket.touch()
    said: list[str] = []
    try:
        started = install_and_start(state_dir, environ=PLAIN_ENVIRON, say=said.append)
        found = find_engine(state_dir, environ={}, default_socket=NO_SOCKET)
        again = install_and_start(state_dir, environ=PLAIN_ENVIRON, say=said.append)
        assert (started, started, True) == (found, again, started.owned)
        assert 1 == len([line for line in said if line.startswith("Starting")])
        with closing(connect(started)) as client:
            assert [] == client.containers.list(all=True)
    finally:
        assert stop_own_engine(state_dir)
    assert not places.socket.parent.exists()
    assert "nothing listens" in refusal_of(state_dir, {}).message


@pytest.mark.usefixtures("dockerd")
def test_a_killed_engine_does_not_keep_the_next_one_from_starting(tmp_path: Path) -> None:
    said: list[str] = []
    try:
        install_and_start(tmp_path, environ=PLAIN_ENVIRON, say=said.append)
        pid = int(own_places(tmp_path).pid_file.read_text())
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert install_and_start(tmp_path, environ=PLAIN_ENVIRON, say=said.append).owned
    finally:
        assert stop_own_engine(tmp_path)
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.usefixtures("dockerd")
def test_an_engine_that_cannot_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    places = own_places(tmp_path)
    places.root.mkdir()
    places.data.write_text("in the way")
    with pytest.raises(EngineUnavailable, match="did not come up") as refusal:
        install_and_start(tmp_path, environ=PLAIN_ENVIRON, say=lambda _: None)
    assert str(places.data) in refusal.value.hint
    assert not stop_own_engine(tmp_path)


@pytest.mark.docker
def test_a_client_keeps_to_the_engines_version_and_a_time_limit(engine: Engine) -> None:
    with closing(connect(engine, timeout_seconds=7)) as client:
        assert (engine.api_version, 7) == (client.api.api_version, client.api.timeout)
        assert engine.engine_id == client.info()["ID"]


@pytest.mark.docker
def test_docker_host_and_a_context_lead_to_the_same_engine(engine: Engine, tmp_path: Path) -> None:
    write_context(tmp_path / "docker", "near", engine.base_url)
    by_host = find_engine(
        tmp_path, environ={"DOCKER_HOST": engine.base_url}, default_socket=NO_SOCKET
    )
    by_context = find_engine(tmp_path, environ={"DOCKER_CONTEXT": "near"}, default_socket=NO_SOCKET)
    assert by_host == by_context
    assert engine.engine_id == by_host.engine_id


def test_a_slow_call_stands_in_the_log_by_its_name(tmp_path: Path) -> None:
    with engine_that_says(tmp_path / "s.sock", {}):
        client = EngineClient(f"unix://{tmp_path}/s.sock", "1.41")
        with capture_logs() as events, closing(client):
            client.version(api_version=False)
            client.slow_seconds = 0
            client.version(api_version=False)
    assert ["engine_call_slow"] == [event["event"] for event in events]
    assert "GET /version" == events[0]["call"]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the SDK forgets a socket that failed
def test_a_call_that_was_never_answered_stands_in_the_log_too(tmp_path: Path) -> None:
    client = EngineClient(f"unix://{tmp_path}/s.sock", "1.41")
    client.slow_seconds = 0
    with capture_logs() as events, closing(client), pytest.raises(RequestException):
        client.ping()
    assert ["GET /v1.41/_ping"] == [event["call"] for event in events]
    del client
    gc.collect()
