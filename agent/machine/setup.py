"""Makes a machine ready, and finds what was made ready."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from agent.candidate.own_files import folder_facts
from agent.machine.calibration import Calibration
from agent.night.session import Outfit, SessionError
from agent.record.events import SessionStarted
from agent.settings import DataSettings, Settings
from sandbox.contract.errors import EngineUnavailable, ImageMissing, SandboxError
from sandbox.engine.find import Engine, find_engine
from sandbox.engine.own import install_and_start
from sandbox.engine.versions import installed
from sandbox.image.image import ImageRecord, Recipe, ensure_image, find_image, has_image
from sandbox.image.profiles import find_profile
from sandbox.machine import box_environment, clean_up, executor, gpu_source

Say = Callable[[str], None]

TEMPLATE = Path(str(files("agent") / "template"))
SHIPPED_WORKSPACE = "workspace"
PREPARE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Ready:
    """What set-up found or made."""

    engine: Engine
    image: ImageRecord
    data_dir: Path | None


def template(name: str, beside: Path) -> Path:
    """The person's own file or folder where there is one, else the shipped one."""
    own = beside / name
    return own if own.exists() else TEMPLATE / name


def own_workspace(settings: Settings, place: Path) -> Path:
    """The files that an experiment is made of: the person's own, else the shipped ones.

    Raises:
        SessionError: there are none, and the shipped ones are not what is meant.
    """
    own = place / settings.workspace.path
    if own.is_dir():
        return own
    if settings.goal.is_reported or settings.workspace.path != SHIPPED_WORKSPACE:
        hint = 'name the directory under [workspace], such as path = "." for this one'
        raise SessionError(f"{own} is no directory", hint)
    return TEMPLATE / SHIPPED_WORKSPACE


def set_up(
    settings: Settings,
    place: Path,
    *,
    state_dir: Path,
    environ: Mapping[str, str],
    torch_index: str,
    say: Say,
) -> Ready:
    """Find or start an engine, find or build the image, find or make the data.

    Args:
        settings: of the program.
        place: the directory that holds program.md, workspace/ and maybe Dockerfile.train.
        state_dir: see `state_directory`.
        environ: the environment that pip, apt and docker may read.
        torch_index: a wheel index to ask for torch.
        say: told what is done, in plain sentences.

    Raises:
        SandboxError: a step failed; the hint says what to do.
        SessionError: the data could not be made.
    """
    engine = ready_engine(state_dir, environ, say)
    image = make_image(
        engine,
        settings,
        place,
        state_dir=state_dir,
        environ=environ,
        torch_index=torch_index,
        say=say,
    )
    workspace = own_workspace(settings, place)
    data_dir = make_data(settings, workspace, state_dir, say)
    say(f"data: {data_dir or 'none; the program reports its own score'}")
    clean_up(engine, state_dir)
    return Ready(engine, image, data_dir)


def make_image(
    engine: Engine,
    settings: Settings,
    place: Path,
    *,
    state_dir: Path,
    environ: Mapping[str, str],
    torch_index: str,
    say: Say,
) -> ImageRecord:
    """Build the image of a program unless it is there; see `set_up`."""
    image = ensure_image(
        engine,
        image_recipe(settings, place),
        state_dir=state_dir,
        torch_index=torch_index,
        environ=environ,
        say=say,
    )
    say(f"image: {image.reference} with torch {image.torch} on {image.base.reference}")
    return image


def image_recipe(settings: Settings, place: Path) -> Recipe:
    """What a program asks of its image.

    Raises:
        SandboxError: its profile is not known, or Dockerfile.train cannot be read.
    """
    dockerfile = template("Dockerfile.train", place)
    try:
        text = dockerfile.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SandboxError(f"{dockerfile.name} cannot be read: {error}", "mend it") from error
    hardware = settings.hardware
    return Recipe(
        profile=find_profile(hardware.profile, place),
        dockerfile=text,
        base_image=hardware.base_image,
    )


def find_outfit(
    settings: Settings, place: Path, *, state_dir: Path, environ: Mapping[str, str]
) -> Outfit:
    """What set-up left for a session, without making anything.

    Raises:
        SandboxError: there is no engine or no image.
        SessionError: there is no data.
    """
    engine = find_engine(state_dir, environ=environ)
    recipe = image_recipe(settings, place)
    image = find_image(engine, recipe, state_dir=state_dir)
    recorded = image.model_dump(mode="json") | {
        "environment": recipe.profile.variables,
        "peak_flops": recipe.profile.peak_flops,
        "devices": recipe.profile.devices,
        "allocator_variable": recipe.profile.allocator_variable,
    }
    workspace = own_workspace(settings, place)
    data_dir, data = _data(settings, workspace, state_dir)
    outfit = _outfit(engine, recorded, settings, data_dir, data, state_dir, environ)
    calibration = _calibration(calibration_path(state_dir, recorded, settings))
    return replace(outfit, calibration=calibration)


def calibration_path(state_dir: Path, image: Mapping[str, Any], settings: Settings) -> Path:
    """Where the calibration of an image under these limits lies or would lie."""
    limits = settings.train_limits().model_dump(exclude={"wall_seconds"})
    content = json.dumps([image["image_id"], image["environment"], limits], sort_keys=True)
    digits = hashlib.sha256(content.encode()).hexdigest()[:16]
    return state_dir / "calibration" / f"{digits}.json"


def _calibration(path: Path) -> dict[str, Any] | None:
    """What was measured, if it was; a file of another version of nightlab counts as none."""
    try:
        return Calibration.model_validate_json(path.read_text("utf-8")).model_dump(mode="json")
    except (OSError, ValueError):
        return None


def recorded_outfit(
    session: SessionStarted,
    settings: Settings,
    place: Path,
    *,
    state_dir: Path,
    environ: Mapping[str, str],
) -> Outfit:
    """What a session ran with: its very image and its very data, found again on this machine.

    Raises:
        SandboxError: there is no engine, or it lacks the image.
        SessionError: the data is missing or differs.
    """
    engine = find_engine(state_dir, environ=environ)
    image_id = str(session.image["image_id"])
    if not has_image(engine, image_id):
        raise ImageMissing(
            f"the image of session {session.session} is not on this engine: {image_id}",
            "bring it from the machine where it ran: `docker save` there, `docker load` here",
        )
    data_dir, data = _data_again(session, settings, place / SHIPPED_WORKSPACE, state_dir)
    return _outfit(engine, session.image, settings, data_dir, data, state_dir, environ)


def _data(
    settings: Settings, workspace: Path, state_dir: Path
) -> tuple[Path | None, dict[str, Any]]:
    """Where the data of these settings lies, and what the record says of it.

    Raises:
        SessionError: there is none, although these settings need it.
    """
    if settings.data is None:
        return None, {}
    if settings.goal.is_reported:
        folder = _shown_folder(settings.data)
        return folder, folder_facts(folder)
    data_dir = data_directory(settings.data, workspace, state_dir)
    manifest = data_dir / "manifest.json"
    if not manifest.is_file():
        raise SessionError(f"there is no data for {settings.data.source}", "run `nightlab setup`")
    return data_dir, {
        "key": data_dir.name,
        "manifest_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest(),
        **_described(manifest),
    }


def _data_again(
    session: SessionStarted, settings: Settings, workspace: Path, state_dir: Path
) -> tuple[Path | None, dict[str, Any]]:
    """The data that a session ran with.

    Raises:
        SessionError: it is missing or differs.
    """
    try:
        data_dir, data = _data(settings, workspace, state_dir)
    except SessionError as error:
        raise SessionError(
            f"the data of session {session.session} is not on this machine: {error.message}",
            f"make it again: nightlab setup --program {workspace.parent / 'program.md'}; "
            "or copy that directory from where the session ran",
        ) from error
    if data.get("manifest_sha256") != session.data.get("manifest_sha256"):
        raise SessionError(
            f"the data in {data_dir} is not what session {session.session} was scored on",
            "copy the data directory of that time to this place, or set up again where it ran",
        )
    return data_dir, data


def _shown_folder(data: DataSettings) -> Path:
    """The folder that trainings see as it is, where the program reports its own score."""
    folder = Path(data.source.removeprefix("folder:")).expanduser().absolute()
    if not folder.is_dir():
        raise SessionError(f"{folder} is no directory", "see source under [data] in program.md")
    return folder


def _outfit(
    engine: Engine,
    image: dict[str, Any],
    settings: Settings,
    data_dir: Path | None,
    data: dict[str, Any],
    state_dir: Path,
    environ: Mapping[str, str],
) -> Outfit:
    """An outfit around an image as it is, or will be, recorded."""
    # A session from before its profile's variables were recorded had a shipped profile.
    named: dict[str, str] = (
        image.get("environment") or find_profile(settings.hardware.profile).variables
    )
    return Outfit(
        executor=executor(engine, state_dir),
        engine=engine.model_dump(mode="json")
        | {"components": [part.model_dump() for part in installed(engine, environ)]},
        image=image,
        image_id=str(image["image_id"]),
        device=named.get("NIGHTLAB_DEVICE", "cpu"),
        environment=box_environment(named, settings.limits.cpus),
        data_dir=data_dir,
        data=data,
        gpus=gpu_source(
            engine,
            state_dir,
            image.get("devices", "none"),
            settings.hardware.gpus,
            settings.hardware.gpus_per_run,
        ),
        gpu_memory=settings.hardware.gpu_memory(image.get("allocator_variable", "")),
    )


def data_directory(data: DataSettings, workspace: Path, state_dir: Path) -> Path:
    """Where the data of these settings lies or would lie.

    Raises:
        SessionError: the workspace has no prepare.py.
    """
    script = _prepare_script(workspace)
    content = json.dumps(data.model_dump(), sort_keys=True).encode()
    key = hashlib.sha256(script.read_bytes() + b"\0" + content).hexdigest()[:16]
    return state_dir / "data" / key


def make_data(settings: Settings, workspace: Path, state_dir: Path, say: Say) -> Path | None:
    """Run the person's prepare.py unless its data is there; a folder is shown as it is.

    Raises:
        SessionError: prepare.py failed; what it said was shown.
    """
    data = settings.data
    if data is None or settings.goal.is_reported:
        return None if data is None else _shown_folder(data)
    directory = data_directory(data, workspace, state_dir)
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
        "--cache": str(state_dir / "downloads"),
    }
    arguments = [piece for option in options.items() for piece in option]
    # -P: the script's own folder must not shadow the standard library.
    done = subprocess.run(
        [sys.executable, "-P", str(script), *arguments], timeout=PREPARE_SECONDS, check=False
    )
    if done.returncode != 0:
        raise SessionError(
            f"{script.name} could not prepare {data.source} (exit code {done.returncode})",
            "its own message above says why; then run `nightlab setup` again",
        )
    return directory


def _prepare_script(workspace: Path) -> Path:
    script = workspace / "prepare.py"
    if not script.is_file():
        raise SessionError(
            f"{script} is missing",
            "it makes the data; put it there. For a program that prints its own score and brings "
            'its data: [goal] source = "reported"',
        )
    return script


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


def _set_lines(path: Path, values: Mapping[str, str], *, keep_comment: bool) -> None:
    """Give each `NAME = …` line of a copied file another value."""
    text = path.read_text(encoding="utf-8")
    for name, value in values.items():
        pattern = rf"^({name} = )\S+" if keep_comment else rf"^({name} = ).*$"
        text, changed = re.subn(pattern, lambda m, v=value: m[1] + v, text, flags=re.MULTILINE)  # type: ignore[misc]
        if changed != 1:
            raise SandboxError(f"{path.name} has no line of its own for {name}", "see its profile")
    path.write_text(text, encoding="utf-8")


def ready_engine(state_dir: Path, environ: Mapping[str, str], say: Say) -> Engine:
    """The engine there is, or one of nightlab's own, installed and started first."""
    try:
        engine = find_engine(state_dir, environ=environ)
    except EngineUnavailable as missing:
        if environ.get("DOCKER_HOST"):
            raise
        say(missing.message)
        engine = install_and_start(state_dir, environ=environ, say=say)
    owner = "started by nightlab" if engine.owned else "not nightlab's own"
    say(f"engine: Docker {engine.version} at {engine.base_url} ({owner})")
    return engine


def _described(manifest: Path) -> dict[str, Any]:
    content = json.loads(manifest.read_text(encoding="utf-8"))
    return {"source": content.get("source"), "splits": content.get("splits")}
