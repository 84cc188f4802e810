"""Makes a base image of the host's own distribution's packages.

For machines whose engine reaches no registry: apt does, or they could not be kept up to date.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from sandbox.contract.errors import SandboxError
from sandbox.engine.find import connect
from sandbox.engine.host import (
    Say,
    install_packages,
    os_release,
    run_program,
    search_path,
    why_not_installable,
)
from sandbox.image.profiles import Profile
from sandbox.image.workshop import BUILD_SECONDS, Workshop

DEBIAN_SECONDS = 1800
ARCHIVE_KEYRINGS = Path("/usr/share/keyrings")
# Afterwards and not by dpkg's path-exclude, which runs a Python filter for every package;
# licences stay.
SLIMMING_HOOK = (
    'cd "$1/usr/share" && { find doc info locale man -type f ! -name copyright -delete || true; }'
)
HOW_TO_GET_A_BASE = (
    "let the engine reach a registry, or `docker load` an image with Python 3.11 and name it "
    "with `nightlab setup --base-image REF`, or install mmdebstrap on Debian or Ubuntu"
)


class BaseUnavailable(SandboxError):
    """There is no base image to build on, or it cannot carry torch."""


def import_debian(shop: Workshop, profile: Profile) -> str:
    """Make a base of the host's own distribution's packages and import it; its image id."""
    suite, distribution = archive_of(os_release())
    _need_mmdebstrap(shop.environ, shop.say)
    shop.say(f"Making a base from {distribution} {suite} packages (about half a minute).")
    with tempfile.TemporaryDirectory(prefix="base-", dir=shop.images) as folder:
        archive = Path(folder) / "base.tar"
        _bootstrap(profile, suite, distribution, archive, shop.environ)
        with closing(connect(shop.engine, timeout_seconds=BUILD_SECONDS)) as client:
            answer = client.api.import_image_from_file(
                str(archive), changes=["ENV LANG=C.UTF-8", 'CMD ["python3"]']
            )
    return str(json.loads(answer.strip().splitlines()[-1])["status"])


def archive_of(release: Mapping[str, str]) -> tuple[str, str]:
    """The suite and the distribution whose archives this host installs from.

    The host's own suite and not always Debian's, since apt here has its keys and mirrors; the
    wheels follow the Python that comes with it.

    Raises:
        BaseUnavailable: the host is neither Debian nor Ubuntu, nor made from them.
    """
    obstacle = why_not_installable(0, release)
    if obstacle is not None:
        raise BaseUnavailable(
            f"no registry answers, and nightlab cannot make a base image: {obstacle}",
            HOW_TO_GET_A_BASE,
        )
    if "UBUNTU_CODENAME" in release:
        return release["UBUNTU_CODENAME"], "ubuntu"
    suite = release.get("DEBIAN_CODENAME") or release.get("VERSION_CODENAME")
    if not suite:
        raise BaseUnavailable("this Debian does not name its suite", HOW_TO_GET_A_BASE)
    return suite, "debian"


def _need_mmdebstrap(environ: Mapping[str, str], say: Say) -> None:
    missing = shutil.which("mmdebstrap", path=search_path(environ)) is None
    if missing and os.geteuid() != 0:
        raise BaseUnavailable("no base image can be made without mmdebstrap", HOW_TO_GET_A_BASE)
    install_packages({"mmdebstrap": "mmdebstrap"}, environ=environ, say=say)


def _bootstrap(
    profile: Profile, suite: str, distribution: str, archive: Path, environ: Mapping[str, str]
) -> None:
    apt_environ = {**environ, "PATH": search_path(environ)}
    options = ["--variant=minbase", f"--include={','.join(profile.packages)}"]
    options.append(f"--customize-hook={SLIMMING_HOOK}")
    options += [f"--aptopt={setting}" for setting in transport_settings(apt_environ)]
    sources = archive_sources(suite, distribution, apt_environ)
    try:
        run_program(
            ["mmdebstrap", *options, suite, str(archive), *sources],
            environ=apt_environ,
            seconds=DEBIAN_SECONDS,
        )
    except SandboxError as error:
        raise BaseUnavailable(
            f"no base image could be made from {suite} packages: {error.message}",
            f"{HOW_TO_GET_A_BASE}\n{error.hint}",
        ) from error


def transport_settings(environ: Mapping[str, str]) -> list[str]:
    """How this host's apt reaches its archives: proxies, certificates, credentials."""
    dump = run_program(["apt-config", "dump", "--no-empty"], environ=environ, seconds=60)
    return [
        line for line in dump.splitlines() if line.startswith(("Acquire::http", "Acquire::https"))
    ]


def archive_sources(suite: str, distribution: str, environ: Mapping[str, str]) -> list[str]:
    """The host's own archives of its own suite as apt lines; third parties' stay out."""
    layout = "$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)"
    targets = run_program(
        ["apt-get", "indextargets", "--format", layout, "Created-By: Packages"],
        environ=environ,
        seconds=60,
    )
    keyring = ARCHIVE_KEYRINGS / f"{distribution}-archive-keyring.gpg"
    option = f"[signed-by={keyring}] " if keyring.exists() else ""
    lines = []
    for target in targets.splitlines():
        uri, release, component, origin = target.split("|")
        is_suite = release in {suite, f"{suite}-updates", f"{suite}-security"}
        if is_suite and component == "main" and origin.lower() in {"", distribution}:
            lines.append(f"deb {option}{uri} {release} main")
    return list(dict.fromkeys(lines))
