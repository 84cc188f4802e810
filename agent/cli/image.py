"""Commands about images: build, list, show, verify."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path

from rich.table import Table

from agent.cli.shared import (
    DEFAULT_PROGRAM,
    BaseImageOption,
    JsonOption,
    ProgramOption,
    TorchIndexOption,
    load,
    out,
    print_line,
    say,
    torch_index_of,
)
from agent.machine.setup import image_recipe, make_image, ready_engine
from agent.settings import Settings
from sandbox.engine.find import connect, find_engine
from sandbox.image.check import check_image
from sandbox.image.image import ImageRecord, find_image, known_images
from sandbox.image.profiles import known_profiles
from sandbox.machine import state_directory


def build(
    program: ProgramOption = DEFAULT_PROGRAM,
    base_image: BaseImageOption = None,
    torch_index: TorchIndexOption = "",
) -> None:
    """Build the image of a program unless it is there; setup does this and the rest."""
    settings, state_dir = _settings(program, base_image), state_directory(os.environ)
    make_image(
        ready_engine(state_dir, os.environ, say),
        settings,
        program.parent,
        state_dir=state_dir,
        environ=os.environ,
        torch_index=torch_index_of(torch_index),
        say=say,
    )


def list_(program: ProgramOption = DEFAULT_PROGRAM, as_json: JsonOption = False) -> None:
    """List the profiles that a program can name, and the images that were built."""
    profiles = known_profiles(program.parent)
    state_dir = state_directory(os.environ)
    images = known_images(find_engine(state_dir, environ=os.environ), state_dir)
    if as_json:
        described = {name: profile.model_dump(mode="json") for name, profile in profiles.items()}
        built = [image.model_dump(mode="json") for image in images]
        print_line(json.dumps({"profiles": described, "images": built}))
        return
    table = Table("profile", "devices", "for", box=None, pad_edge=False)
    for name, profile in profiles.items():
        table.add_row(name, profile.devices, profile.description)
    out.print(table)
    out.print()
    built_table = Table("image", "profile", "torch", "python", "base", box=None, pad_edge=False)
    for image in images:
        words = (image.reference, image.profile, image.torch, image.python, _base(image))
        built_table.add_row(*words)
    out.print(built_table if images else "no image was built yet: nightlab setup")


def show(
    program: ProgramOption = DEFAULT_PROGRAM,
    base_image: BaseImageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the image of a program: what it is made of, by digest."""
    image = _image(program, base_image)
    if as_json:
        print_line(image.model_dump_json())
        return
    wheel = image.torch_wheel
    rows = {
        "image": f"{image.reference}  {image.image_id}",
        "profile": image.profile,
        "base": f"{_base(image)}  {image.base.digest}",
        "python": image.python,
        "torch": f"{image.torch}  {wheel.sha256 if wheel else 'the base brought it'}",
        "built for": image.torch_build,
        "content": image.content_key,
    }
    for name, words in rows.items():
        say(f"{name:<9} {words}")


def verify(
    program: ProgramOption = DEFAULT_PROGRAM,
    base_image: BaseImageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look at the image of a program as before its first use: settings, Python, torch."""
    settings, state_dir = _settings(program, base_image), state_directory(os.environ)
    recipe = image_recipe(settings, program.parent)
    engine = find_engine(state_dir, environ=os.environ)
    image = find_image(engine, recipe, state_dir=state_dir)
    with closing(connect(engine)) as client:
        contents = check_image(client, image.image_id, recipe.profile)
    if as_json:
        print_line(contents.model_dump_json())
        return
    words = f"{image.reference} is fit: Python {contents.python}, torch {contents.torch}"
    say(f"{words} built for {contents.torch_build}, numpy {contents.numpy}")


def _settings(program: Path, base_image: str | None) -> Settings:
    return load(program).settings.with_overrides(base_image=base_image)


def _image(program: Path, base_image: str | None) -> ImageRecord:
    state_dir = state_directory(os.environ)
    recipe = image_recipe(_settings(program, base_image), program.parent)
    return find_image(find_engine(state_dir, environ=os.environ), recipe, state_dir=state_dir)


def _base(image: ImageRecord) -> str:
    return f"{image.base.reference} ({image.base.source})"
