"""Fetches the image's wheels on the host with pip.

pip runs on the host so that a site's mirrors, certificates and local wheels work; the image build
has no network. Everything but torch is pinned by the lock. Of torch any CPU build of the exact
version is accepted, since the same build has one hash on PyTorch's own index and another in a
site's folder; which one was used is recorded. A CUDA build is refused before it is downloaded
where pip can tell, and never used.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

from pydantic import ValidationError

from sandbox.contract.errors import SandboxError
from sandbox.contract.record import Record, Sha256
from sandbox.engine.host import Say, last_lines
from sandbox.image.profiles import TorchBuild

PIP_SECONDS = 3600
OLDEST_GLIBC_MINOR = 17
NEWEST_GLIBC_MINOR = 28
LARGE_WHEEL_BYTES = 10_000_000
BYTES_OF_UNIT = {"bytes": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
ANNOUNCEMENT = re.compile(r"Downloading (\S+\.whl) \(([\d.]+) (bytes|kB|MB|GB)\)")
ACCELERATOR_PACKAGES = ("nvidia-", "cuda-", "triton", "pytorch-triton", "rocm", "intel-sycl")
ACCELERATOR_FIELD = re.compile(r"^(cuda|hip|rocm|xpu)\b[^=\n]*= *['\"]", re.MULTILINE)
HOW_TO_GET_CPU_TORCH = (
    "name PyTorch's wheel index for CPU builds (its address is on PyTorch's installation page) "
    "with `nightlab setup --torch-index URL` or NIGHTLAB_TORCH_INDEX, "
    "or put the `+cpu` wheel into a folder and name that in PIP_FIND_LINKS"
)


AS_TARGET = """
import platform, runpy, sys
version = sys.argv.pop(1) + ".0"
platform.python_version = lambda: version
platform.python_version_tuple = lambda: tuple(version.split("."))
sys.argv[:1] = ["pip", "download"]
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
"""pip takes another Python's wheels, but reads `python_version` in markers as its own."""


class WheelsUnavailable(SandboxError):
    """pip could not fetch what the image needs."""


class WrongTorchBuild(SandboxError):
    """The only torch to be had is no CPU build."""


class Target(Record):
    """The Python and the machine that wheels are fetched for."""

    python: str
    machine: str

    @property
    def tag(self) -> str:
        """The target as a folder name, `cp311-x86_64`."""
        return f"cp{self.python.replace('.', '')}-{self.machine}"


class TorchWheel(Record):
    """The torch that went into an image."""

    filename: str
    version: str
    sha256: Sha256


class Wheels(Record):
    """A folder that holds the locked wheels, and torch beside them."""

    lock: str
    locked: tuple[Path, ...]
    torch_path: Path
    torch: TorchWheel

    def requirements(self) -> str:
        """Every wheel by version and hash, as pip reads it."""
        return f"{self.lock}torch=={self.torch.version} --hash=sha256:{self.torch.sha256}\n"


@dataclass(frozen=True)
class Pip:
    """This host's pip, asked for wheels of another Python and machine."""

    target: Target
    environ: Mapping[str, str]
    torch_index: str
    """Where else to look for torch; empty for the index of the build that is wanted."""
    say: Say

    def download(self, into: Path, *arguments: str, limit_bytes: int | None = None) -> str | None:
        """Fetch wheels into a folder; None when they are there, else what pip said.

        Raises:
            WrongTorchBuild: pip announced a wheel larger than `limit_bytes`; it was stopped.
            WheelsUnavailable: this Python has no pip.
        """
        lines: deque[str] = deque(maxlen=200)
        options = ("-d", str(into), *_options_for(self.target))
        with subprocess.Popen(
            # -P: a pip.py in the current directory would be run instead.
            [sys.executable, "-P", "-c", AS_TARGET, self.target.python, *options, *arguments],
            env=_pip_environ(self.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            # pip's own time limit is for one read, not for a mirror that trickles.
            alarm = threading.Timer(PIP_SECONDS, process.kill)
            alarm.start()
            try:
                for line in process.stdout or ():
                    lines.append(line)
                    _watch_announcement(line, limit_bytes, self.say)
            except BaseException:
                process.kill()
                raise
            finally:
                alarm.cancel()
        if process.returncode == 0:
            return None
        output = "".join(lines)
        if "No module named pip" in output:
            problem = "the Python that runs nightlab has no pip"
            raise WheelsUnavailable(problem, f"{sys.executable} -m ensurepip")
        return last_lines(output, 200)


def fetch_wheels(wanted: TorchBuild, lock: str, pip: Pip, *, folder: Path) -> Wheels:
    """The wheels of `wanted` for pip's target, from `folder` or else by pip.

    Raises:
        WheelsUnavailable: pip does not find them, or not with the hashes of the lock.
        WrongTorchBuild: the only torch of that version is built for accelerators.
    """
    place = folder / pip.target.tag
    torch_place = place / "torch"
    torch_place.mkdir(parents=True, exist_ok=True)
    locked = _locked_wheels(lock, place, pip)
    torch = _cached_torch(wanted, torch_place) or _fetch_torch(wanted, torch_place, pip)
    return Wheels(lock=lock, locked=locked, torch_path=torch_place / torch.filename, torch=torch)


def read_lock(text: str) -> dict[str, frozenset[str]]:
    """The accepted sha256 hashes of each requirement in a lock file."""
    joined = re.sub(r"\\\n", " ", re.sub(r"^#.*$", "", text, flags=re.MULTILINE))
    requirements = [line.split() for line in joined.splitlines() if line.strip()]
    return {
        name: frozenset(option.removeprefix("--hash=sha256:") for option in options)
        for name, *options in requirements
    }


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def inspect_torch(path: Path) -> TorchWheel:
    """Open a torch wheel, without running anything of it, and say which build it is.

    Raises:
        WrongTorchBuild: it is built for CUDA or another accelerator.
        WheelsUnavailable: it is no wheel of torch, or damaged.
    """
    try:
        with zipfile.ZipFile(path) as wheel:
            (named,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
            metadata = Parser().parsestr(wheel.read(named).decode())
            source = wheel.read("torch/version.py").decode()
    except (zipfile.BadZipFile, ValueError, KeyError, OSError) as error:
        raise WheelsUnavailable(
            f"{path.name} is not a sound wheel of torch: {error}",
            "delete it where it comes from (pip's cache or find-links folder) and try again",
        ) from error
    # A wheel of PyTorch's names its libraries; a site's own may only say so in its version file.
    needs = metadata.get_all("Requires-Dist") or []
    brought = [name for name in needs if name.lower().startswith(ACCELERATOR_PACKAGES)]
    brought += ACCELERATOR_FIELD.findall(source)
    if brought:
        raise WrongTorchBuild(
            f"{path.name[:120]} is a build for accelerators (it brings {brought[0][:60]}), "
            "and this profile needs the CPU build",
            HOW_TO_GET_CPU_TORCH,
        )
    return TorchWheel(
        filename=path.name, version=str(metadata["Version"]), sha256=file_sha256(path)
    )


def _locked_wheels(lock: str, place: Path, pip: Pip) -> tuple[Path, ...]:
    requirement_of = {sha: name for name, hashes in read_lock(lock).items() for sha in hashes}
    if len(_sound_wheels(place, requirement_of)) < len(read_lock(lock)):
        pip.say(f"Fetching the image's wheels with pip ({pip.target.tag}).")
        _fetch_locked(lock, place, pip)
    found = _sound_wheels(place, requirement_of)
    absent = sorted(set(read_lock(lock)) - set(found))
    if absent:
        raise WheelsUnavailable(
            f"pip fetched no wheel of {', '.join(absent)} that the lock knows for {pip.target.tag}",
            "use a base image with Python 3.11 to 3.14 on x86-64 or AArch64",
        )
    return tuple(sorted(found.values()))


def _sound_wheels(place: Path, requirement_of: Mapping[str, str]) -> dict[str, Path]:
    """The wheels that the lock knows; the others, damaged or outdated, are deleted."""
    sound = {}
    for path in place.glob("*.whl"):
        name = requirement_of.get(file_sha256(path))
        if name is None:
            path.unlink()
        else:
            sound[name] = path
    return sound


def _fetch_locked(lock: str, place: Path, pip: Pip) -> None:
    with _incoming(place) as incoming:
        requirements = incoming / "requirements.txt"
        requirements.write_text(lock)
        complaint = pip.download(incoming, "--no-deps", "--require-hashes", "-r", str(requirements))
        if complaint is not None:
            raise WheelsUnavailable(
                "pip could not fetch the image's wheels",
                f"check pip's settings; it said:\n{last_lines(complaint)}",
            )
        for path in incoming.glob("*.whl"):
            path.replace(place / path.name)


def _cached_torch(wanted: TorchBuild, place: Path) -> TorchWheel | None:
    """The torch fetched before, if it is all there and of the right version; else a clean place."""
    try:
        torch = TorchWheel.model_validate_json((place / "torch.json").read_text())
        sound = file_sha256(place / torch.filename) == torch.sha256
    except (OSError, ValidationError):
        sound = False
    if sound and torch.version.partition("+")[0] == wanted.version:
        return torch
    shutil.rmtree(place)
    place.mkdir()
    return None


def _fetch_torch(wanted: TorchBuild, place: Path, pip: Pip) -> TorchWheel:
    """Ask for the marked CPU build, here and then in torch's index, and last for any build."""
    pip.say(f"Fetching torch {wanted.version}, the {wanted.build} build, with pip.")
    marked, unmarked = f"torch=={wanted.version}+{wanted.build}", f"torch=={wanted.version}"
    limit, index = wanted.limit_bytes, pip.torch_index or wanted.index
    with _incoming(place) as incoming:
        complaint = pip.download(incoming, "--no-deps", marked, limit_bytes=limit)
        if complaint is not None and index:
            complaint = pip.download(
                incoming, "--no-deps", "--index-url", index, marked, limit_bytes=limit
            )
        if complaint is not None:
            complaint = pip.download(incoming, "--no-deps", unmarked, limit_bytes=limit)
        if complaint is None:
            return _keep_torch(incoming, place)
    raise WheelsUnavailable(
        f"pip finds no torch {wanted.version} for {pip.target.tag}",
        f"torch {wanted.version}: {HOW_TO_GET_CPU_TORCH}; pip said:\n{last_lines(complaint)}",
    )


def _keep_torch(incoming: Path, place: Path) -> TorchWheel:
    (fetched,) = incoming.glob("torch-*.whl")
    torch = inspect_torch(fetched)
    fetched.replace(place / torch.filename)
    # Written last: a torch without its record is fetched again.
    unfinished = place / "torch.json.new"
    unfinished.write_text(torch.model_dump_json())
    unfinished.replace(place / "torch.json")
    return torch


def _options_for(target: Target) -> list[str]:
    """What makes pip choose wheels for the image's Python instead of its own."""
    minors = range(NEWEST_GLIBC_MINOR, OLDEST_GLIBC_MINOR - 1, -1)
    platforms = [f"manylinux_2_{minor}_{target.machine}" for minor in minors]
    platforms.append(f"manylinux2014_{target.machine}")
    options = ["--only-binary", ":all:", "--python-version", target.python]
    return [*options, *(f"--platform={name}" for name in platforms)]


@contextmanager
def _incoming(place: Path) -> Iterator[Path]:
    """A folder for what pip is writing; what an interrupted pip left there is never used."""
    for abandoned in place.glob("incoming-*"):
        shutil.rmtree(abandoned)
    with tempfile.TemporaryDirectory(prefix="incoming-", dir=place) as folder:
        yield Path(folder)


def _pip_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """The user's settings, except those that would hide what pip announces."""
    hiding = {"PIP_QUIET", "PIP_LOG", "PIP_REPORT"}
    kept = {name: value for name, value in environ.items() if name not in hiding}
    return kept | {"PYTHONUNBUFFERED": "1", "PIP_PROGRESS_BAR": "off", "PIP_NO_INPUT": "1"}


def _watch_announcement(line: str, limit_bytes: int | None, say: Say) -> None:
    """Pass on that something large is coming; stop what is too large for a CPU build."""
    announced = ANNOUNCEMENT.search(line)
    if announced is None:
        return
    size_bytes = float(announced[2]) * BYTES_OF_UNIT[announced[3]]
    filename = announced[1].rpartition("/")[2][:120]
    if limit_bytes is not None and size_bytes > limit_bytes:
        raise WrongTorchBuild(
            f"{filename} has {announced[2]} {announced[3]}, so it is no CPU build; "
            "its download was stopped",
            HOW_TO_GET_CPU_TORCH,
        )
    if size_bytes >= LARGE_WHEEL_BYTES:
        say(f"Downloading {filename} ({announced[2]} {announced[3]}).")
