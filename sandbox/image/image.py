"""Builds the box's image offline, once for each content.

Three steps, each remembered: a base (a given image, the profile's image from a registry, or Debian
packages where no registry answers), the wheels (fetched on the host), the build (no network). The
image's tag is the hash of what went into it, so that equal content is never built twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Literal

import docker
from docker.errors import ImageNotFound
from docker.utils import parse_repository_tag
from pydantic import ValidationError

from sandbox.contract.errors import ImageMissing, SandboxError
from sandbox.contract.record import Record, Sha256
from sandbox.engine.find import FAILED_CALLS, Engine, connect
from sandbox.engine.host import (
    exclusive,
    install_packages,
    last_lines,
    os_release,
    run_program,
    search_path,
    why_not_installable,
)
from sandbox.image.check import KEY_LABEL, OLDEST_PYTHON, ask_python, check_image
from sandbox.image.profiles import Profile, lock_text
from sandbox.image.wheels import Pip, Target, TorchWheel, Wheels, fetch_wheels

Say = Callable[[str], None]

IMAGE_NAME = "nightlab-train"
BASE_NAME = "nightlab-base"
REGISTRY_SECONDS = 20
BUILD_SECONDS = 1800
DEBIAN_SECONDS = 1800
TAG_DIGITS = 16
MACHINES = ("x86_64", "aarch64")
NOT_IN_THE_IMAGE = {"description", "base_advice", "dtype", "knobs", "peak_flops", "environment"}
"""Fields of a profile that no image is made of."""
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
PROBE = (
    "import json, platform, sys; print(json.dumps({"
    "'python': '%d.%d' % sys.version_info[:2], "
    "'machine': platform.machine(), 'libc': platform.libc_ver()[0]}))"
)


class BaseUnavailable(SandboxError):
    """There is no base image to build on, or it cannot carry torch."""


class BuildFailed(SandboxError):
    """The engine could not build the image."""


class BaseImage(Record):
    """What the image is built on, and where it came from."""

    reference: str
    image_id: str
    digest: str
    """The registry's digest, or the image's own id where it came from no registry."""
    source: Literal["given", "registry", "debian"]
    target: Target


class ImageRecord(Record):
    """An image that programs run in, and everything that went into it."""

    reference: str
    image_id: str
    digest: str
    base: BaseImage
    python: str
    torch: str
    """Version of torch as the image's own Python says it."""
    torch_build: str
    """What that torch was built for: `CUDA 12.8`, or `no accelerator`."""
    torch_wheel: TorchWheel | None
    """None where the base brought its own."""
    content_key: Sha256
    profile: str
    built: bool
    """Whether this call built it; false when it was there."""


class Recipe(Record):
    """What a person asks of an image; the same recipe finds the same image again."""

    profile: Profile
    dockerfile: str
    base_image: str
    """An image to build on instead of the profile's; empty for none."""

    @property
    def key(self) -> str:
        """One hash over what goes into the image and what is asked of it, locked wheels included.

        What programs are told, such as the environment, goes into no image and builds none anew.
        """
        lock = lock_text(self.profile.torch) if self.profile.torch else ""
        parts = self.profile.model_dump_json(exclude=NOT_IN_THE_IMAGE)
        return _key(parts, lock, self.dockerfile, self.base_image)


class _Remembered(Record):
    """What an earlier set-up made, and from which recipe."""

    recipe: Sha256
    image: ImageRecord


class _Probed(Record):
    python: str
    machine: str
    libc: str


def ensure_image(
    engine: Engine,
    recipe: Recipe,
    *,
    state_dir: Path,
    torch_index: str,
    environ: Mapping[str, str],
    say: Say,
) -> ImageRecord:
    """The image of `recipe` on this engine, built and looked at first where it is not there yet.

    Args:
        torch_index: a wheel index to ask for torch after pip's own; empty for the profile's.
        environ: the environment of pip and apt; nothing of it reaches the image.

    Raises:
        SandboxError: a step failed; the hint says which way round it leads.
    """
    images = state_dir / "images"
    images.mkdir(parents=True, exist_ok=True)
    with exclusive(images / "lock"), closing(connect(engine)) as client:
        with suppress(ImageMissing):
            return _found(client, _remembered(_note_path(images, engine, recipe)), recipe)
        base = _base(engine, client, recipe, images, environ, say)
        wheels = None
        if recipe.profile.torch:
            wheels = fetch_wheels(
                recipe.profile.torch,
                lock_text(recipe.profile.torch),
                base.target,
                folder=state_dir / "wheels",
                pip=Pip(environ=dict(environ), torch_index=torch_index),
                say=say,
            )
        image = _image(engine, client, recipe, base, wheels, images, say)
        note = _Remembered(recipe=recipe.key, image=image)
        _write(_note_path(images, engine, recipe), note.model_dump_json())
        return image


def find_image(engine: Engine, recipe: Recipe, *, state_dir: Path) -> ImageRecord:
    """The image that was made from `recipe` on this engine; nothing is built.

    Raises:
        ImageMissing: there was none, or it was removed from the engine.
    """
    note = _remembered(_note_path(state_dir / "images", engine, recipe))
    with closing(connect(engine)) as client:
        return _found(client, note, recipe)


def known_images(engine: Engine, state_dir: Path) -> list[ImageRecord]:
    """Every image that was made on this engine and is still there, by name."""
    with closing(connect(engine)) as client:
        notes = (state_dir / "images").glob(f"image-*-{_engine_digits(engine)}.json")
        found = [note.image for path in notes if (note := _remembered(path)) is not None]
        return sorted(
            (image for image in found if _has(client, image)), key=lambda image: image.reference
        )


def has_image(engine: Engine, image_id: str) -> bool:
    """Whether the engine still has the image of that id."""
    with closing(connect(engine)) as client:
        return _inspect(client, image_id) is not None


def _found(client: docker.DockerClient, note: _Remembered | None, recipe: Recipe) -> ImageRecord:
    """The image of a note, if the engine still has exactly that one."""
    if note is None or note.recipe != recipe.key:
        base = f" on {recipe.base_image}" if recipe.base_image else ""
        raise ImageMissing(
            f"no image was set up for profile {recipe.profile.name}{base} on this engine",
            "run `nightlab setup`",
        )
    if _has_moved(client, recipe, note.image.base):
        raise ImageMissing(
            f"{recipe.base_image} is another image now than when it was set up",
            "run `nightlab setup` to build on the new one",
        )
    if not _has(client, note.image):
        raise ImageMissing(
            f"the image {note.image.reference} is no longer on this engine", "run `nightlab setup`"
        )
    return note.image.model_copy(update={"built": False})


def _has_moved(client: docker.DockerClient, recipe: Recipe, base: BaseImage) -> bool:
    """Whether the name that a person gave stands for another image on this engine now."""
    facts = _inspect(client, recipe.base_image) if recipe.base_image else None
    return facts is not None and facts["Id"] != base.image_id


def _has(client: docker.DockerClient, image: ImageRecord) -> bool:
    facts = _inspect(client, image.reference)
    return facts is not None and facts["Id"] == image.image_id


def _base(
    engine: Engine,
    client: docker.DockerClient,
    recipe: Recipe,
    images: Path,
    environ: Mapping[str, str],
    say: Say,
) -> BaseImage:
    """The base chosen before for the same wish, or a new choice."""
    profile = recipe.profile
    wish = _key(profile.base_image, *profile.packages, recipe.base_image)
    note = images / f"base-{wish[:TAG_DIGITS]}-{_engine_digits(engine)}.json"
    with suppress(OSError, ValidationError):
        base = BaseImage.model_validate_json(note.read_text())
        facts = _inspect(client, _base_tag(base.image_id))
        is_there = facts is not None and facts["Id"] == base.image_id
        if is_there and not _has_moved(client, recipe, base):
            return base
    base = _choose_base(engine, client, recipe, images, environ, say)
    _write(note, base.model_dump_json())
    return base


def _choose_base(
    engine: Engine,
    client: docker.DockerClient,
    recipe: Recipe,
    images: Path,
    environ: Mapping[str, str],
    say: Say,
) -> BaseImage:
    profile, given = recipe.profile, recipe.base_image
    wanted = given or profile.base_image
    if not wanted and not profile.torch:
        raise BaseUnavailable(
            f"profile {profile.name} needs a base image that brings its own torch",
            "name it: `[hardware] base_image` in program.md, or --base-image REF"
            + (f"; {profile.base_advice}" if profile.base_advice else ""),
        )
    if wanted:
        reference = _local(client, wanted, has_digest=not given) or _pull(engine, wanted, say)
        if reference is not None:
            return _describe(client, reference, "given" if given else "registry")
    if given or not profile.torch:
        raise BaseUnavailable(
            f"the base image {wanted} is neither on this engine nor to be had from its registry",
            "check the name, `docker pull` or `docker load` it, or leave it out",
        )
    return _describe(client, _import_debian(engine, profile, images, environ, say), "debian")


def _local(client: docker.DockerClient, reference: str, *, has_digest: bool) -> str | None:
    """The reference, if the engine has it; by digest if it must have come from a registry."""
    facts = _inspect(client, reference)
    if facts is None:
        return None
    return next(iter(facts["RepoDigests"] or ()), None) if has_digest else reference


def _pull(engine: Engine, reference: str, say: Say) -> str | None:
    """Pull an image by the digest its tag stands for today; None where no registry gives one."""
    say(f"Asking the registry for {reference} (at most {REGISTRY_SECONDS} s).")
    try:
        with closing(connect(engine, timeout_seconds=REGISTRY_SECONDS)) as client:
            digest = client.images.get_registry_data(reference).attrs["Descriptor"]["digest"]
        pinned = f"{parse_repository_tag(reference)[0]}@{digest}"
        say(f"Pulling {pinned}.")
        with closing(connect(engine, timeout_seconds=REGISTRY_SECONDS * 10)) as client:
            _drain(client.api.pull(pinned, stream=True, decode=True))
    except (BuildFailed, *FAILED_CALLS) as error:
        say(f"No registry gives it: {last_lines(str(error), 1)[:200]}")
        return None
    return pinned


def _describe(
    client: docker.DockerClient, reference: str, source: Literal["given", "registry", "debian"]
) -> BaseImage:
    """Tag a base, ask its Python what it is, and record where it came from."""
    facts = client.images.get(reference).attrs
    digests = [name.partition("@")[2] for name in facts["RepoDigests"] or ()]
    base = BaseImage(
        reference=reference if source != "debian" else _base_tag(facts["Id"]),
        image_id=facts["Id"],
        digest=digests[0] if digests else facts["Id"],
        source=source,
        target=_target(reference, ask_python(client, facts["Id"], PROBE)),
    )
    # The builder takes a local tag on every engine, a bare id only on some.
    client.images.get(base.image_id).tag(_base_tag(base.image_id))
    return base


def _target(reference: str, printed: str) -> Target:
    """The wheels' target for a base whose Python said this of itself."""
    try:
        probed = _Probed.model_validate_json(printed)
    except ValidationError as error:
        raise BaseUnavailable(
            f"the base image {reference} has no usable python3: {last_lines(printed, 1)}",
            "give `--base-image` one that has Python 3.11 or later",
        ) from error
    version = tuple(int(part) for part in probed.python.split("."))
    if version < OLDEST_PYTHON or probed.libc != "glibc" or probed.machine not in MACHINES:
        raise BaseUnavailable(
            f"the base image {reference} has Python {probed.python}, {probed.libc or 'no glibc'}, "
            f"{probed.machine}; torch's wheels need Python 3.11, glibc, x86-64 or AArch64",
            "give `--base-image` one that has them, such as an official python:3.11 image",
        )
    return Target(python=probed.python, machine=probed.machine)


def _import_debian(
    engine: Engine, profile: Profile, images: Path, environ: Mapping[str, str], say: Say
) -> str:
    """Make a base of the host's own distribution's packages and import it; its image id."""
    suite, distribution = archive_of(os_release())
    _need_mmdebstrap(environ, say)
    say(f"Making a base from {distribution} {suite} packages (about half a minute).")
    with tempfile.TemporaryDirectory(prefix="base-", dir=images) as folder:
        archive = Path(folder) / "base.tar"
        _bootstrap(profile, suite, distribution, archive, environ)
        with closing(connect(engine, timeout_seconds=BUILD_SECONDS)) as client:
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
    options += [f"--aptopt={setting}" for setting in _transport_settings(apt_environ)]
    sources = _archive_sources(suite, distribution, apt_environ)
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


def _transport_settings(environ: Mapping[str, str]) -> list[str]:
    """How this host's apt reaches its archives: proxies, certificates, credentials."""
    dump = run_program(["apt-config", "dump", "--no-empty"], environ=environ, seconds=60)
    return [
        line for line in dump.splitlines() if line.startswith(("Acquire::http", "Acquire::https"))
    ]


def _archive_sources(suite: str, distribution: str, environ: Mapping[str, str]) -> list[str]:
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


def _image(
    engine: Engine,
    client: docker.DockerClient,
    recipe: Recipe,
    base: BaseImage,
    wheels: Wheels | None,
    images: Path,
    say: Say,
) -> ImageRecord:
    """The image that these parts make, built unless the engine has it, and looked at."""
    requirements = wheels.requirements() if wheels else ""
    key = _key(base.image_id, recipe.dockerfile, requirements)
    reference = f"{IMAGE_NAME}:{key[:TAG_DIGITS]}"
    facts = _inspect(client, reference)
    is_there = facts is not None and (facts["Config"]["Labels"] or {}).get(KEY_LABEL) == key
    if not is_there:
        say(f"Building {reference} without network (about a minute).")
        with tempfile.TemporaryDirectory(prefix="context-", dir=images) as context:
            _fill_context(Path(context), recipe.dockerfile, requirements, wheels)
            _build(engine, Path(context), reference, _base_tag(base.image_id), key)
    contents = check_image(client, reference, recipe.profile)
    image_id = str(client.images.get(reference).attrs["Id"])
    return ImageRecord(
        reference=reference,
        image_id=image_id,
        digest=image_id,
        base=base,
        python=contents.python,
        torch=contents.torch,
        torch_build=contents.torch_build,
        torch_wheel=wheels.torch if wheels else None,
        content_key=key,
        profile=recipe.profile.name,
        built=not is_there,
    )


def _fill_context(context: Path, dockerfile: str, requirements: str, wheels: Wheels | None) -> None:
    """Lay out what the build sees: the recipe, the wheels, and a hash for every one of them."""
    (context / "Dockerfile.train").write_text(dockerfile)
    (context / "requirements.txt").write_text(requirements)
    for wheel in (*wheels.locked, wheels.torch_path) if wheels else ():
        try:
            os.link(wheel, context / wheel.name)
        except OSError:
            shutil.copyfile(wheel, context / wheel.name)


def _build(engine: Engine, context: Path, reference: str, base_tag: str, key: str) -> None:
    try:
        with closing(connect(engine, timeout_seconds=BUILD_SECONDS)) as client:
            _drain(
                client.api.build(
                    path=str(context),
                    dockerfile="Dockerfile.train",
                    tag=reference,
                    buildargs={"BASE_IMAGE": base_tag},
                    labels={KEY_LABEL: key},
                    network_mode="none",
                    use_config_proxy=False,
                    nocache=True,  # a crafted image can poison it: CVE-2024-24557
                    rm=True,
                    forcerm=True,
                    decode=True,
                )
            )
    except FAILED_CALLS as error:
        raise BuildFailed(
            f"the engine gave up building {reference}: {last_lines(str(error), 1)}",
            "see the engine's log; then run `nightlab setup` again",
        ) from error


def _drain(events: Iterable[Mapping[str, Any]]) -> None:
    """Follow a pull or a build to its end.

    Raises:
        BuildFailed: the engine reported an error; with the end of what was said before.
    """
    printed, errors = "", []
    for event in events:  # to its end even after an error: until then its connection is not free
        printed = (printed + str(event.get("stream", "")))[-8000:]
        errors += [str(event["error"])] if "error" in event else []
    if errors:
        raise BuildFailed(
            f"the engine reports: {last_lines(errors[0], 3)[-300:]}",
            f"the end of its output:\n{last_lines(printed)}",
        )


def _inspect(client: docker.DockerClient, reference: str) -> dict[str, Any] | None:
    try:
        return dict(client.images.get(reference).attrs)
    except ImageNotFound:
        return None


def _base_tag(image_id: str) -> str:
    return f"{BASE_NAME}:{image_id.partition(':')[2][:TAG_DIGITS]}"


def _key(*parts: str | bytes) -> str:
    """One hash over several parts, each with its length, so that none runs into the next."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def _note_path(images: Path, engine: Engine, recipe: Recipe) -> Path:
    return images / f"image-{recipe.key[:TAG_DIGITS]}-{_engine_digits(engine)}.json"


def _engine_digits(engine: Engine) -> str:
    # Engines of one machine may share an id (20.10 keeps it under /etc), never an address.
    return _key(engine.base_url, engine.engine_id)[:TAG_DIGITS]


def _remembered(note: Path) -> _Remembered | None:
    """What was made before; a note from another version of nightlab counts as none."""
    try:
        return _Remembered.model_validate_json(note.read_text())
    except (OSError, ValidationError):
        return None


def _write(path: Path, text: str) -> None:
    """Replace a note as a whole, never half."""
    unfinished = path.with_suffix(".new")
    unfinished.write_text(text)
    unfinished.replace(path)
