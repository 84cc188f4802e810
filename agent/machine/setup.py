"""Makes a machine ready: engine, image, data."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path

from agent.candidate.own_files import refuse_unreadable
from agent.machine.cost import cost_of_data
from agent.machine.readiness import require_capacity, try_a_box
from agent.settings import Settings
from sandbox.check.self_check import LOCKS_WORDS
from sandbox.contract.errors import EngineUnavailable, SandboxError, UsageError
from sandbox.contract.reading import MAX_SCRIPT_BYTES, read_named
from sandbox.engine.find import Engine, find_engine
from sandbox.engine.own import install_and_start
from sandbox.image.copies import ensure_copies
from sandbox.image.image import ImageRecord, Recipe, ensure_image
from sandbox.image.profiles import find_profile
from sandbox.image.requirements import LOCK, read_asked
from sandbox.machine import clean_up, executor, state_directory

Say = Callable[[str], None]

TEMPLATE = Path(str(files("agent") / "template"))
SHIPPED_WORKSPACE = "workspace"
PREPARE_SECONDS = 24 * 3600
"""Downloads of a person's own data may be long; nobody waits for a script that hangs for a day."""


def set_up(
    settings: Settings,
    place: Path,
    environ: Mapping[str, str],
    *,
    torch_index: str,
    say: Say,
) -> None:
    """Find or start an engine, find or build the image, find or make the data.

    Args:
        place: the directory that holds program.md, workspace/ and maybe Dockerfile.train.
        environ: what pip, apt and docker may read; names the engine and nightlab's folder.
        torch_index: a wheel index to ask for torch.

    Raises:
        SandboxError: a step failed; the hint says what to do.
        UsageError: the data could not be made.
    """
    state_dir = state_directory(environ)
    engine = _ready_engine(state_dir, environ, say)
    require_capacity(engine, settings)
    recipe = image_recipe(settings, place)
    image = ensure_image(
        engine,
        recipe,
        state_dir=state_dir,
        torch_index=torch_index,
        environ=environ,
        say=say,
    )
    if image.lock != recipe.asked.lock:
        (place / LOCK).write_text(image.lock, encoding="utf-8")
        say(f"new: {LOCK}, by which the same image can be had again: keep it with your files")
    say(f"image: {image.reference} with torch {image.torch} on {image.base.reference}")
    copies_for(engine, image, settings, state_dir, say)
    data_dir = make_data(settings, own_workspace(settings, place), state_dir, say)
    shown = ", ".join(str(folder.path) for folder in settings.folders) or "none"
    say(f"data: {data_dir or f'{shown}; the program reports its own score'}")
    if settings.folders:
        say(f"locks: {LOCKS_WORDS}")
    if data_dir is not None and (cost := cost_of_data(settings, data_dir)):
        say(cost.words)
    clean_up(engine, state_dir)
    try_a_box(executor(engine, state_dir), image.image_id, settings, data_dir)


def copies_for(
    engine: Engine, image: ImageRecord, settings: Settings, state_dir: Path, say: Say
) -> dict[str, str]:
    """The copies of an image that a program's boxes run on, by what they are for.

    A program that reports its own score has no box that sees rows, and needs none.
    """
    if settings.goal.is_reported:
        return {}
    copies = ensure_copies(engine, image, state_dir=state_dir, say=say)
    return {"model": copies.model, "check": copies.check}


def template(name: str, beside: Path) -> Path:
    """The person's own file or folder where there is one, else the shipped one."""
    own = beside / name
    return own if own.exists() else TEMPLATE / name


def own_workspace(settings: Settings, place: Path) -> Path:
    """The files that an experiment is made of.

    Raises:
        UsageError: there are none: somebody else's task is never run in their place.
    """
    own = place / settings.workspace.path
    if own.is_dir():
        return own
    hint = 'name the directory under [workspace], such as path = "." for this one'
    if not settings.goal.is_reported and settings.workspace.path == SHIPPED_WORKSPACE:
        hint += "; `nightlab init` puts the shipped task there"
    raise UsageError(f"{own} is no directory", hint)


def image_recipe(settings: Settings, place: Path) -> Recipe:
    """What a program asks of its image.

    Raises:
        SandboxError: its profile is not known, or Dockerfile.train cannot be read.
        UsageError: its file of packages cannot be read or taken.
    """
    dockerfile = template("Dockerfile.train", place)
    try:
        text = read_named(dockerfile).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise SandboxError(f"{dockerfile.name} cannot be read: {error}", "mend it") from error
    hardware = settings.hardware
    return Recipe(
        profile=find_profile(hardware.profile, place),
        dockerfile=text,
        base_image=hardware.base_image,
        asked=read_asked(place, hardware.requirements),
    )


def data_directory(settings: Settings, workspace: Path, state_dir: Path) -> Path | None:
    """Where prepared data lies or would lie; None for a program that reports its own score.

    Raises:
        UsageError: the workspace has no prepare.py, or a folder to be shown cannot be seen.
    """
    for folder in settings.folders:
        refuse_unreadable(folder.path)
    if settings.data is None or settings.goal.is_reported:
        return None
    content = json.dumps(settings.data.model_dump(exclude={"folders"}), sort_keys=True).encode()
    # Of the script too: a person who changes how data is made gets it made again.
    script = read_named(_prepare_script(workspace), MAX_SCRIPT_BYTES)
    return state_dir / "data" / hashlib.sha256(script + b"\0" + content).hexdigest()[:16]


def make_data(settings: Settings, workspace: Path, state_dir: Path, say: Say) -> Path | None:
    """Run the person's prepare.py unless its data is there; returns `data_directory`.

    Raises:
        UsageError: prepare.py failed; what it said was shown.
    """
    data, directory = settings.data, data_directory(settings, workspace, state_dir)
    if data is None or directory is None:
        return directory
    # A source with a path may have changed under the same settings: prepare.py alone can tell.
    if (directory / "manifest.json").is_file() and ":" not in data.source:
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    say(f"preparing data from {data.source}")
    script = _prepare_script(workspace)
    options = {
        "--source": data.source,
        "--output": str(directory),
        "--vocab-size": str(data.vocab_size),
        "--context": str(data.context),
        "--rows": str(data.rows),
        "--cache": str(state_dir / "downloads"),
    }
    arguments = [piece for option in options.items() for piece in option]
    # -P: the script's own folder must not shadow the standard library.
    done = subprocess.run(
        [sys.executable, "-P", str(script), *arguments], timeout=PREPARE_SECONDS, check=False
    )
    if done.returncode != 0:
        raise UsageError(
            f"{script.name} could not prepare {data.source} (exit code {done.returncode})",
            "its own message above says why; then run `nightlab setup` again",
        )
    _let_boxes_read(directory)
    return directory


def _let_boxes_read(directory: Path) -> None:
    """Let every user read what a script made, whatever the umask: each box has its own."""
    for path in (directory, *directory.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))


def copy_template(target: Path, profile_name: str) -> list[str]:
    """Copy program.md, Dockerfile.train and workspace/ into `target`; returns what was new.

    Args:
        target: made where missing; what is there already stays as it is.
        profile_name: the hardware profile that program.md then names and train.py starts for.

    Raises:
        SandboxError: there is no such profile.
    """
    profile = find_profile(profile_name, target)
    target.mkdir(parents=True, exist_ok=True)
    copied = []
    for source in sorted(TEMPLATE.iterdir()):
        destination = target / source.name
        if destination.exists():
            continue
        if source.is_dir():
            shutil.copytree(source, destination, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, destination)
        copied.append(source.name)
    if "program.md" in copied:
        _set_lines(target / "program.md", {"profile": f'"{profile.name}"'}, keep_comment=True)
    if "workspace" in copied:
        _set_lines(target / "workspace" / "train.py", profile.knobs, keep_comment=False)
    return copied


def _ready_engine(state_dir: Path, environ: Mapping[str, str], say: Say) -> Engine:
    """The engine there is, or one of nightlab's own, installed and started first."""
    try:
        engine = find_engine(state_dir, environ=environ)
    except EngineUnavailable as missing:
        # Whoever names an engine wants that one, and none beside it.
        if environ.get("DOCKER_HOST"):
            raise
        say(f"{missing.message}; so nightlab makes one of its own, as is usual the first time")
        engine = install_and_start(state_dir, environ=environ, say=say)
    owner = "started by nightlab" if engine.owned else "not nightlab's own"
    say(f"engine: Docker {engine.version} at {engine.base_url} ({owner})")
    return engine


def _prepare_script(workspace: Path) -> Path:
    script = workspace / "prepare.py"
    if not script.is_file():
        raise UsageError(
            f"{script} is missing",
            "it makes the data; put it there. For a program that prints its own score and brings "
            'its data: [goal] source = "reported"',
        )
    return script


def _set_lines(path: Path, values: Mapping[str, str], *, keep_comment: bool) -> None:
    """Give each `NAME = …` line of a copied file another value."""
    text = path.read_text(encoding="utf-8")
    for name, value in values.items():
        pattern = rf"^({name} = )\S+" if keep_comment else rf"^({name} = ).*$"
        # A function, since a replacement text would be read for backslashes and group numbers.
        text, changed = re.subn(pattern, lambda m, v=value: m[1] + v, text, flags=re.MULTILINE)  # type: ignore[misc]
        if changed != 1:
            raise SandboxError(f"{path.name} has no line of its own for {name}", "see its profile")
    path.write_text(text, encoding="utf-8")
