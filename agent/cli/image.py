"""Commands about images: list, show."""

import os

from rich.table import Table

from agent.cli import flags
from agent.cli.shared import out, print_event, print_table, say
from agent.machine.setup import image_recipe
from agent.program import load_program
from sandbox.image.image import ImageRecord, find_image, known_images
from sandbox.image.profiles import known_profiles
from sandbox.machine import engine_and_state


def list_(program: flags.Program = flags.PROGRAM, as_json: flags.Json = False) -> None:
    """List the profiles that a program can name, and the images that were built."""
    profiles = known_profiles(program.parent)
    images = known_images(*engine_and_state(os.environ))
    if as_json:
        described = {name: profile.model_dump(mode="json") for name, profile in profiles.items()}
        built = [image.model_dump(mode="json") for image in images]
        print_event("images", profiles=described, images=built)
        return
    table = Table("profile", "devices", "for", box=None, pad_edge=False)
    for name, profile in profiles.items():
        table.add_row(name, profile.devices, profile.description)
    print_table(out, table)
    out.print()
    built_table = Table("image", "profile", "torch", "python", "base", box=None, pad_edge=False)
    for image in images:
        row = (image.reference, image.profile, image.torch, image.python, _base(image))
        built_table.add_row(*row)
    if images:
        print_table(out, built_table)
    else:
        out.print("no image was built yet: nightlab setup")


def show(
    program: flags.Program = flags.PROGRAM,
    base_image: flags.BaseImage = None,
    as_json: flags.Json = False,
) -> None:
    """Show the image of a program: what it is made of, by digest."""
    settings = load_program(program).settings.with_overrides(base_image=base_image)
    engine, state_dir = engine_and_state(os.environ)
    image = find_image(engine, image_recipe(settings, program.parent), state_dir=state_dir)
    if as_json:
        print_event("image", **image.model_dump(mode="json"))
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
    for name, text in rows.items():
        say(f"{name:<9} {text}")


def _base(image: ImageRecord) -> str:
    return f"{image.base.reference} ({image.base.source})"
