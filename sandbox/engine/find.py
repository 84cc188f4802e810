"""Finds a local Docker engine that can hold boxes.

Four places are asked, in this order: `DOCKER_HOST`, the current docker context, the default socket,
nightlab's own socket. An engine that the user named is used or refused, never passed over. Only a
Docker Engine behind a Unix socket of this machine will do: snapshots are bind mounts and the link
to PID 1 is a Unix socket, and Podman's Docker API drops GPU requests without a word.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import docker
from docker.context import ContextAPI
from docker.errors import DockerException
from requests import PreparedRequest, Response
from requests.exceptions import RequestException

from sandbox.contract.errors import EngineUnavailable
from sandbox.contract.log import log
from sandbox.contract.record import Record
from sandbox.engine.host import last_lines, own_places

DEFAULT_SOCKET = Path("/var/run/docker.sock")
OLDEST_API = (1, 41)
"""Docker Engine 20.10; what is older cannot keep a cgroup private."""
ANSWER_SECONDS = 10
CALL_SECONDS = 60
FAILED_CALLS = (DockerException, RequestException, OSError)
"""All that a call of the SDK may raise: its own errors, those of its HTTP library, the socket's."""


class Engine(Record):
    """A container engine that answered, and what of it matters to a box."""

    base_url: str
    engine_id: str
    version: str
    api_version: str
    owned: bool
    """Started by nightlab, so that nightlab may stop it."""
    rootless: bool
    cgroup_version: Literal["1", "2"]
    cgroup_driver: str
    storage_driver: str
    machine: str


def find_engine(
    state_dir: Path, *, environ: Mapping[str, str], default_socket: Path = DEFAULT_SOCKET
) -> Engine:
    """The engine to use.

    Raises:
        EngineUnavailable: none answers, or the one that answers cannot be used; with the reason.
    """
    own = own_places(state_dir).url
    # Never passed over: a person who named an engine would be surprised by any other.
    named = named_address(environ)
    if named is not None:
        return describe_engine(named, owned=named == own)
    refusals = []
    for address in (f"unix://{default_socket}", own):
        try:
            return describe_engine(address, owned=address == own)
        except EngineUnavailable as refusal:
            refusals.append(refusal.message)
    raise EngineUnavailable(
        f"there is no container engine to use: {'; '.join(refusals)}",
        "start Docker, or set DOCKER_HOST, or run `nightlab setup` as root on Debian or Ubuntu",
    )


class EngineClient(docker.APIClient):
    """The SDK's client of one engine, for one thread; calls that are slow stand in the log."""

    slow_seconds = 5.0
    """A call that takes longer is one that a person looks for when a night was slow."""

    def send(self, request: PreparedRequest, **options: Any) -> Response:
        """Send one request; its answer has begun, or never came, when this returns."""
        began = time.monotonic()
        try:
            return super().send(request, **options)
        finally:
            seconds = time.monotonic() - began
            call = f"{request.method} {request.path_url.partition('?')[0]}"
            if seconds > self.slow_seconds and not call.endswith("/wait"):
                log.warning("engine_call_slow", call=call, seconds=round(seconds, 1))


def connect(engine: Engine, *, timeout_seconds: int = CALL_SECONDS) -> docker.DockerClient:
    """A client of `engine` for one thread, with its API version pinned; the caller closes it."""
    client = docker.DockerClient(
        base_url=engine.base_url, version=engine.api_version, timeout=timeout_seconds
    )
    # The SDK makes a client of its own kind; it has not spoken to the engine yet.
    client.api = EngineClient(engine.base_url, engine.api_version, timeout_seconds)
    return client


@contextmanager
def must_answer(problem: str) -> Iterator[None]:
    """Turn an engine that does not answer, or refuses, into our own error."""
    try:
        yield
    except (DockerException, RequestException) as error:
        raise EngineUnavailable(f"{problem}: {error}"[:1000]) from error


def named_address(environ: Mapping[str, str]) -> str | None:
    """The engine the user named by DOCKER_HOST or a docker context; None for the default."""
    if environ.get("DOCKER_HOST"):
        return environ["DOCKER_HOST"]
    try:
        context = ContextAPI.get_context(environ.get("DOCKER_CONTEXT"))
    except (DockerException, OSError, ValueError, KeyError) as error:
        raise EngineUnavailable(
            f"the current docker context cannot be read: {error}",
            "repair it with `docker context`, or set DOCKER_HOST",
        ) from error
    if context is None:
        raise EngineUnavailable(
            "the current docker context does not exist",
            "choose one with `docker context use`, or set DOCKER_HOST",
        )
    return None if context.Name == "default" else str(context.Host)


def describe_engine(address: str, *, owned: bool) -> Engine:
    """Ask the engine at `address` what it is; refuse one that cannot hold a box."""
    _refuse_unreachable(address)
    try:
        with closing(docker.DockerClient(address, version="auto", timeout=ANSWER_SECONDS)) as api:
            version = api.version()
            _refuse_unusable(address, version)
            return _engine(address, owned, version, api.info())
    except FAILED_CALLS as error:
        raise EngineUnavailable(
            f"the engine at {address} does not answer: {last_lines(str(error), 1)}",
            "start it, or set DOCKER_HOST to one that runs",
        ) from error
    except (KeyError, ValueError) as error:
        raise EngineUnavailable(
            f"what answers at {address} is no Docker Engine: {last_lines(str(error), 1)}",
            "set DOCKER_HOST to the socket of a Docker Engine",
        ) from error


def _refuse_unreachable(address: str) -> None:
    if not address.startswith("unix://"):
        raise EngineUnavailable(
            f"the engine at {address} is not on this machine: "
            "snapshots are bind mounts and the link into a box is a Unix socket",
            "unset DOCKER_HOST, or set it to the unix:// socket of a local Docker Engine",
        )
    path = address.removeprefix("unix://")
    if not Path(path).exists():
        raise EngineUnavailable(f"nothing listens at {path}", "start Docker, or set DOCKER_HOST")
    if not os.access(path, os.W_OK):
        raise EngineUnavailable(
            f"this user may not use the engine at {path}",
            "run as root, or join the group that owns the socket (`usermod -aG docker $USER`)",
        )


def _refuse_unusable(address: str, version: Mapping[str, Any]) -> None:
    names = [str(component.get("Name", "")) for component in version.get("Components") or []]
    if any("podman" in name.lower() for name in names):
        raise EngineUnavailable(
            f"the engine at {address} is Podman, whose Docker API drops GPU requests silently",
            "set DOCKER_HOST to the socket of a Docker Engine",
        )
    if tuple(int(part) for part in str(version["ApiVersion"]).split(".")) < OLDEST_API:
        raise EngineUnavailable(
            f"the engine at {address} is Docker {version['Version']}, which is too old",
            "install Docker Engine 20.10 or later",
        )


def _engine(
    address: str, owned: bool, version: Mapping[str, Any], facts: Mapping[str, Any]
) -> Engine:
    # Its socket is here and its kernel is not: nothing that this host measures would be true.
    if facts["OperatingSystem"] == "Docker Desktop":
        raise EngineUnavailable(
            f"the engine at {address} is Docker Desktop, which runs boxes in a machine of its own",
            "set DOCKER_HOST to the socket of a Docker Engine on this machine",
        )
    return Engine(
        base_url=address,
        engine_id=facts["ID"],
        version=version["Version"],
        api_version=version["ApiVersion"],
        owned=owned,
        rootless="name=rootless" in facts["SecurityOptions"],
        cgroup_version=facts.get("CgroupVersion", "1"),
        cgroup_driver=facts["CgroupDriver"],
        storage_driver=facts["Driver"],
        machine=facts["Architecture"],
    )
