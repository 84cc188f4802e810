"""Runs the walls' tests on cgroup v2, in a machine that qemu emulates.

`python -m tests.bench.cgroup2 [--suite trixie|bookworm] [TEST...]`: a disk with a Debian of that
suite, its kernel, systemd, its Docker engine and the base image of this machine's boxes, made once;
then pytest runs in there. Exits 1 when a test failed.

The machine's clock counts its instructions: one takes two to the power of `SHIFT` nanoseconds. So
it does not notice how slowly it is emulated, waiting costs nothing and no time limit is changed: to
what runs in there it is a machine with one steady processor of a billion instructions a second. It
has no torch, so what needs torch is left out.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from sandbox.engine.find import Engine, connect, find_engine
from sandbox.engine.host import install_packages, run_program
from sandbox.image.base import BaseImage
from sandbox.image.image import find_image
from sandbox.machine import state_directory
from tests.support.boxes import shipped_recipe

ROOT = Path(__file__).parents[2]
PYTHONS = {"trixie": "3.13", "bookworm": "3.11"}
PACKAGES = (
    *("systemd-sysv", "udev", "kmod", "procps", "iptables", "ca-certificates"),
    *("initramfs-tools", "linux-image-cloud-amd64", "docker.io", "python3"),
)
TEST_LIBRARIES = ("pytest>=9", "pytest-timeout>=2.4", "hypothesis>=6.140")
PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "mmdebstrap": "mmdebstrap",
    "mkfs.ext4": "e2fsprogs",
}
DISK_BYTES = 6 * 2**30
MEMORY_MEBIBYTES = 2048
SHIFT = 0
BUILD_SECONDS = 1800
TESTS = (
    *(
        "tests/sandbox/box/test_cases.py",
        "tests/sandbox/box/test_executor.py",
        "tests/sandbox/box/test_deadlines.py",
    ),
    *(
        "tests/sandbox/check/test_self_check.py",
        "tests/sandbox/box/test_crash_safety.py",
        "tests/sandbox/box/test_reaper.py",
    ),
    *("tests/sandbox/box/test_supervisor.py", "tests/sandbox/box/test_hardening.py"),
)
COPIED = (
    *("agent", "sandbox", "tests", "workspace", "docs", "program.md", "Dockerfile.train"),
    *("pyproject.toml", "README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"),
)
UNIT = """
[Unit]
After=docker.service
Wants=docker.service
[Service]
Type=oneshot
Environment=PYTHONPATH=/opt/libraries:. HOME=/root PYTHONDONTWRITEBYTECODE=1
StandardOutput=file:/dev/ttyS1
StandardError=file:/dev/ttyS1
ExecStart=/bin/sh -c 'rm -rf /task; mkdir /task; cd /task; tar -xf /dev/vdb; exec sh task.sh'
ExecStopPost=/bin/systemctl poweroff --force
[Install]
WantedBy=multi-user.target
"""


class Machine(NamedTuple):
    """A disk with everything on it, and the kernel that starts it."""

    folder: Path

    @property
    def disk(self) -> Path:
        """The root file system."""
        return self.folder / "disk"

    @property
    def kernel(self) -> Path:
        """Debian's kernel for clouds."""
        return self.folder / "vmlinuz"

    @property
    def first_disk(self) -> Path:
        """What the kernel finds its drivers in."""
        return self.folder / "initrd"


def libraries() -> list[str]:
    """Return what nightlab and its tests import."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *TEST_LIBRARIES]


def machine_of(suite: str, engine: Engine, base: BaseImage, root: Path) -> Machine:
    """Return the machine of a suite, made now if there is none from the same parts."""
    parts = (suite, base.image_id, UNIT, *PACKAGES, *libraries())
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    machine = Machine(root / f"{suite}-{key}")
    if not machine.folder.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, ignore_cleanup_errors=True) as name:
            made = Machine(Path(name) / "made")
            made.folder.mkdir()
            make_disk(suite, made, Path(name))
            load_image(made, engine, base)
            made.folder.rename(machine.folder)
    return machine


def make_disk(suite: str, machine: Machine, folder: Path) -> None:
    """Install a Debian into a directory, and make a file system of it."""
    root = folder / "root"
    say(f"installing Debian {suite}")
    leave_out = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("man", "doc", "locale")]
    command = ["mmdebstrap", "--variant=minbase", *leave_out, f"--include={','.join(PACKAGES)}"]
    build([*command, suite, str(root)])
    (kernel,) = (root / "boot").glob("vmlinuz-*")
    (first_disk,) = (root / "boot").glob("initrd.img-*")
    shutil.copy(kernel, machine.kernel)
    shutil.copy(first_disk, machine.first_disk)
    place = root / "opt" / "libraries"
    fetch = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:"]
    build([*fetch, f"--python-version={PYTHONS[suite]}", f"--target={place}", *libraries()])
    build(["chroot", str(root), "python3", "-m", "compileall", "-q", "/opt/libraries"], check=False)
    units = root / "etc" / "systemd" / "system"
    (units / "task.service").write_text(UNIT)
    (units / "multi-user.target.wants" / "task.service").symlink_to("../task.service")
    (root / "etc" / "fstab").write_text("/dev/vda / ext4 rw,relatime 0 1\n")
    with machine.disk.open("wb") as disk:
        disk.truncate(DISK_BYTES)
    build(["mkfs.ext4", "-q", "-d", str(root), str(machine.disk)])
    build(["rm", "-rf", str(root)])


def load_image(machine: Machine, engine: Engine, base: BaseImage) -> None:
    """Start the machine once to hand its engine the base image of the boxes."""
    say("loading the base image")
    with task_of("python3 -m tests.bench.cgroup2_guest load base.tar") as (task, folder):
        with closing(connect(engine)) as client, (folder / "base.tar").open("wb") as archive:
            archive.writelines(client.images.get(base.image_id).save(named=base.reference))
        run_task(machine, task, folder, keep=True)


@contextmanager
def task_of(*commands: str) -> Iterator[tuple[Path, Path]]:
    """Give a file for a task and the folder that it is made of."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "task"
        folder.mkdir()
        for part in COPIED:
            source, target = ROOT / part, folder / part
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        (folder / "task.sh").write_text("".join(f"{command} || failed=1\n" for command in commands))
        with (folder / "task.sh").open("a") as script:
            script.write('[ -z "$failed" ] && echo "all went well"\n')
        yield Path(name) / "task.tar", folder


def run_task(machine: Machine, task: Path, folder: Path, *, keep: bool) -> bool:
    """Start the machine, let it do its task, show what it says; whether all went well."""
    with tarfile.open(task, "w") as archive:
        archive.add(folder, arcname=".")
    report = task.with_suffix(".report")
    report.touch()
    snapshot = "off" if keep else "on"
    command = [
        *("qemu-system-x86_64", "-machine", "q35", "-cpu", "max", "-smp", "1"),
        *("-m", str(MEMORY_MEBIBYTES), "-nodefaults", "-nographic", "-no-reboot", "-net", "none"),
        *("-accel", "tcg", "-icount", f"shift={SHIFT},sleep=off", "-rtc", "clock=vm"),
        *("-device", "virtio-rng-pci", "-kernel", str(machine.kernel)),
        *("-initrd", str(machine.first_disk), "-append", "root=/dev/vda rw quiet panic=-1"),
        *("-drive", f"file={machine.disk},format=raw,if=virtio,snapshot={snapshot},cache=unsafe"),
        *("-drive", f"file={task},format=raw,if=virtio,readonly=on"),
        *("-serial", "null", "-serial", f"file:{report}"),
    ]
    with subprocess.Popen(command, start_new_session=True) as qemu, report.open() as said:
        try:
            lines = list(shown(qemu, said))
        finally:
            qemu.kill()
    return lines[-1:] == ["all went well"]


def shown(qemu: subprocess.Popen[bytes], said: Iterator[str]) -> Iterator[str]:
    """Show what the machine says as it comes; give each whole line."""
    line, is_over = "", False
    while True:
        piece = next(said, "")
        sys.stdout.write(piece)
        sys.stdout.flush()
        line += piece
        if line.endswith("\n"):
            yield line.strip()
            line = ""
        elif not piece and is_over:
            return
        elif not piece:
            is_over = is_done(qemu)


def is_done(qemu: subprocess.Popen[bytes]) -> bool:
    """Wait a moment for the machine to switch itself off."""
    try:
        qemu.wait(0.5)
    except subprocess.TimeoutExpired:
        return False
    return True


def build(command: list[str], *, check: bool = True) -> None:
    """Run one step of making a disk."""
    if check:
        run_program(command, environ=os.environ, seconds=BUILD_SECONDS)
    else:
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False)


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    """Run the tests; 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.bench.cgroup2")
    parser.add_argument("--suite", choices=sorted(PYTHONS), default="trixie")
    parser.add_argument("tests", nargs="*", default=TESTS, help="files, or options of pytest")
    wanted = parser.parse_args()
    install_packages(PROGRAMS, environ=os.environ, say=say)
    state_dir = state_directory(os.environ)
    engine = find_engine(state_dir, environ=os.environ)
    base = find_image(engine, shipped_recipe(), state_dir=state_dir).base
    machine = machine_of(wanted.suite, engine, base, state_dir / "cgroup2")
    words = ("python3", "-m", "tests.bench.cgroup2_guest", "test", base.reference, *wanted.tests)
    with task_of(shlex.join(words)) as (task, folder):
        return 0 if run_task(machine, task, folder, keep=False) else 1


if __name__ == "__main__":
    sys.exit(main())
