"""Builds the box's image offline, once for each content.

Three steps, each remembered: a base (a given image, the profile's image from a registry, or Debian
packages where no registry answers), the wheels (fetched on the host), the build (no network). What
a person asks for besides is a second image on that one. An image's tag is the hash of what went
into it, so that equal content is never built twice.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path

import docker
from pydantic import ValidationError

from sandbox.contract.errors import ImageMissing
from sandbox.contract.record import Record, Sha256
from sandbox.engine.find import FAILED_CALLS, Engine, connect
from sandbox.engine.host import Say, exclusive, last_lines
from sandbox.image.base import BaseImage, base_for, base_tag, has_moved
from sandbox.image.check import KEY_LABEL, check_image
from sandbox.image.packages import fetch_packages, held_by, is_locked, require_one_build
from sandbox.image.profiles import Profile, lock_text, packaged_text
from sandbox.image.requirements import LOCK, Asked
from sandbox.image.wheels import Pip, TorchWheel, Wheels, fetch_wheels
from sandbox.image.workshop import (
    BUILD_SECONDS,
    TAG_DIGITS,
    BuildFailed,
    Workshop,
    drain,
    engine_digits,
    inspect_image,
    key_of,
    write_note,
)

IMAGE_NAME = "nightlab-train"
NOT_IN_THE_IMAGE = {"description", "base_advice", "dtype", "knobs", "peak_flops", "environment"}
"""Fields of a profile that no image is made of."""


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
    lock: str = ""
    """What a person's own packages came to, each with its hash; empty for none."""


class Recipe(Record):
    """What a person asks of an image; the same recipe finds the same image again."""

    profile: Profile
    dockerfile: str
    base_image: str
    """An image to build on instead of the profile's; empty for none."""
    asked: Asked = Asked()
    """The packages that a person asks for besides torch."""

    @property
    def key(self) -> str:
        """One hash over what goes into the image and what is asked of it, locked wheels included.

        What programs are told, such as the environment, goes into no image and builds none anew.
        """
        lock = lock_text(self.profile.torch) if self.profile.torch else ""
        parts = self.profile.model_dump_json(exclude=NOT_IN_THE_IMAGE)
        asked = (self.asked.wish(), self.asked.lock) if self.asked else ()
        return key_of(parts, lock, self.dockerfile, self.base_image, *asked)


class _Remembered(Record):
    """What an earlier set-up made, and from which recipe."""

    recipe: Sha256
    image: ImageRecord


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
        # Under the lock: whoever waited finds what the other one built.
        with suppress(ImageMissing):
            return _found(client, _remembered(_note_path(images, engine, recipe)), recipe)
        shop = Workshop(engine, client, images, environ, say)
        plain = recipe.model_copy(update={"asked": Asked()})
        image = _plain_image(shop, plain, state_dir, torch_index)
        if recipe.asked:
            pip = Pip(image.base.target, environ, torch_index, say)
            image = _with_packages(shop, recipe, image, pip)
            asked = recipe.asked.model_copy(update={"lock": image.lock})
            recipe = recipe.model_copy(update={"asked": asked})
        remember_image(engine, recipe, image, state_dir=state_dir)
        return image


def _plain_image(shop: Workshop, recipe: Recipe, state_dir: Path, torch_index: str) -> ImageRecord:
    """The image of torch alone, that there is or made now."""
    with suppress(ImageMissing):
        note = _remembered(_note_path(shop.images, shop.engine, recipe))
        return _found(shop.client, note, recipe)
    base = base_for(shop, recipe.profile, recipe.base_image)
    wheels = None
    if torch := recipe.profile.torch:
        pip = Pip(base.target, shop.environ, torch_index, shop.say)
        wheels = fetch_wheels(torch, lock_text(torch), pip, folder=state_dir / "wheels")
    image = _image(shop, recipe, base, wheels)
    remember_image(shop.engine, recipe, image, state_dir=state_dir)
    return image


def _with_packages(shop: Workshop, recipe: Recipe, plain: ImageRecord, pip: Pip) -> ImageRecord:
    """An image with a person's packages on the one of torch; the lock says which."""
    held = held_by(shop.client, plain.image_id)
    dockerfile = packaged_text("Dockerfile.packages")
    with tempfile.TemporaryDirectory(prefix="context-", dir=shop.images) as folder:
        context = Path(folder)
        lock = fetch_packages(recipe.asked, held, pip, context)
        key = key_of(plain.image_id, dockerfile, lock)
        reference = f"{IMAGE_NAME}:{key[:TAG_DIGITS]}"
        is_there = _is_built(shop, reference, key)
        if not is_there:
            shop.say(f"Building {reference} without network.")
            (context / "Dockerfile.train").write_text(dockerfile)
            (context / "requirements.txt").write_text(lock)
            _build(shop.engine, context, reference, plain.reference, key)
    contents = check_image(shop.client, reference, recipe.profile)
    image_id = str(shop.client.images.get(reference).attrs["Id"])
    require_one_build(shop.client, image_id, lock)
    return plain.model_copy(
        update={
            "reference": reference,
            "image_id": image_id,
            "digest": image_id,
            "torch": contents.torch,
            "content_key": key,
            "built": not is_there,
            "lock": lock,
        }
    )


def remember_image(engine: Engine, recipe: Recipe, image: ImageRecord, *, state_dir: Path) -> None:
    """Note an image as the one of a recipe, where `find_image` looks."""
    images = state_dir / "images"
    images.mkdir(parents=True, exist_ok=True)
    note = _Remembered(recipe=recipe.key, image=image)
    write_note(_note_path(images, engine, recipe), note.model_dump_json())


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
        notes = (state_dir / "images").glob(f"image-*-{engine_digits(engine)}.json")
        found = [note.image for path in notes if (note := _remembered(path)) is not None]
        return sorted(
            (image for image in found if _has(client, image)), key=lambda image: image.reference
        )


def has_image(engine: Engine, image_id: str) -> bool:
    """Whether the engine still has the image of that id."""
    with closing(connect(engine)) as client:
        return inspect_image(client, image_id) is not None


def _found(client: docker.DockerClient, note: _Remembered | None, recipe: Recipe) -> ImageRecord:
    """The image of a note, if the engine still has exactly that one."""
    if note is None or note.recipe != recipe.key:
        if recipe.asked.lock and not is_locked(recipe.asked):
            raise ImageMissing(
                f"{LOCK} does not fit {recipe.asked.file} as it is now",
                "run `nightlab setup`: it resolves and locks it anew",
            )
        base = f" on {recipe.base_image}" if recipe.base_image else ""
        base += f" with {recipe.asked.file}" if recipe.asked else ""
        raise ImageMissing(
            f"no image was set up for profile {recipe.profile.name}{base} on this engine",
            "run `nightlab setup`",
        )
    if has_moved(client, recipe.base_image, note.image.base):
        raise ImageMissing(
            f"{recipe.base_image} is another image now than when it was set up",
            "run `nightlab setup` to build on the new one",
        )
    if not _has(client, note.image):
        raise ImageMissing(
            f"the image {note.image.reference} is no longer on this engine", "run `nightlab setup`"
        )
    return note.image.model_copy(update={"built": False})


def _has(client: docker.DockerClient, image: ImageRecord) -> bool:
    facts = inspect_image(client, image.reference)
    return facts is not None and facts["Id"] == image.image_id


def _image(shop: Workshop, recipe: Recipe, base: BaseImage, wheels: Wheels | None) -> ImageRecord:
    """The image that these parts make, built unless the engine has it, and looked at."""
    requirements = wheels.requirements() if wheels else ""
    key = key_of(base.image_id, recipe.dockerfile, requirements)
    reference = f"{IMAGE_NAME}:{key[:TAG_DIGITS]}"
    is_there = _is_built(shop, reference, key)
    if not is_there:
        shop.say(f"Building {reference} without network (about a minute).")
        with tempfile.TemporaryDirectory(prefix="context-", dir=shop.images) as context:
            _fill_context(Path(context), recipe.dockerfile, requirements, wheels)
            _build(shop.engine, Path(context), reference, base_tag(base.image_id), key)
    contents = check_image(shop.client, reference, recipe.profile)
    image_id = str(shop.client.images.get(reference).attrs["Id"])
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


def _is_built(shop: Workshop, reference: str, key: str) -> bool:
    facts = inspect_image(shop.client, reference)
    return facts is not None and (facts["Config"]["Labels"] or {}).get(KEY_LABEL) == key


def _fill_context(context: Path, dockerfile: str, requirements: str, wheels: Wheels | None) -> None:
    """Lay out what the build sees: the recipe, the wheels, and a hash for every one of them."""
    (context / "Dockerfile.train").write_text(dockerfile)
    (context / "requirements.txt").write_text(requirements)
    for wheel in (*wheels.locked, wheels.torch_path) if wheels else ():
        try:
            os.link(wheel, context / wheel.name)
        except OSError:  # another file system
            shutil.copyfile(wheel, context / wheel.name)


def _build(engine: Engine, context: Path, reference: str, base_tag: str, key: str) -> None:
    try:
        with closing(connect(engine, timeout_seconds=BUILD_SECONDS)) as client:
            drain(
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


def _note_path(images: Path, engine: Engine, recipe: Recipe) -> Path:
    return images / f"image-{recipe.key[:TAG_DIGITS]}-{engine_digits(engine)}.json"


def _remembered(note: Path) -> _Remembered | None:
    """What was made before; a note from another version of nightlab counts as none."""
    try:
        return _Remembered.model_validate_json(note.read_text())
    except (OSError, ValidationError):
        return None
