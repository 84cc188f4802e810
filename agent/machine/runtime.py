"""Finds what a session runs with: engine, image, data."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from agent.candidate.own_files import folder_facts
from agent.machine.calibration import Calibration
from agent.machine.readiness import require_capacity
from agent.machine.setup import (
    SHIPPED_WORKSPACE,
    Say,
    copies_for,
    data_directory,
    image_recipe,
    own_workspace,
)
from agent.night.session import Runtime
from agent.record.events import SessionStarted
from agent.record.files import FileHashes
from agent.record.ledger import Ledger
from agent.settings import Settings
from sandbox.contract.errors import ImageMissing, UsageError
from sandbox.engine.find import Engine
from sandbox.engine.versions import installed
from sandbox.image.copies import forget_pages
from sandbox.image.hold import hold_images
from sandbox.image.image import find_image, has_image
from sandbox.machine import (
    box_environment,
    engine_and_state,
    executor,
    gpu_source,
    state_directory,
)

SPLITS = ("train", "val", "holdout")


def find_runtime(settings: Settings, place: Path, environ: Mapping[str, str], say: Say) -> Runtime:
    """What set-up left for a session; only copies of its image are made where they are gone.

    Raises:
        SandboxError: there is no engine or no image, or its boxes would share files.
        UsageError: there is no data, or the machine is smaller than a limit.
    """
    engine, state_dir = engine_and_state(environ)
    require_capacity(engine, settings)
    recipe = image_recipe(settings, place)
    # What the profile says goes on record with the image: profiles change, and are a person's own.
    found = find_image(engine, recipe, state_dir=state_dir)
    image = found.model_dump(mode="json") | {
        "copies": copies_for(engine, found, settings, state_dir, say),
        "environment": recipe.profile.variables,
        "peak_flops": recipe.profile.peak_flops,
        "devices": recipe.profile.devices,
        "allocator_variable": recipe.profile.allocator_variable,
    }
    data = _data(settings, own_workspace(settings, place), state_dir)
    runtime = _runtime(engine, image, settings, data, state_dir, environ)
    with suppress(OSError, ValueError):  # a damaged calibration counts as none: measuring helps
        text = calibration_path(state_dir, image, settings).read_text("utf-8")
        calibration = Calibration.model_validate_json(text)
        return replace(runtime, calibration=calibration.model_dump(mode="json"))
    return runtime


def recorded_runtime(ledger: Ledger, settings: Settings, environ: Mapping[str, str]) -> Runtime:
    """What a session ran with: its very image and its very data, found again on this machine.

    Scores of another image or other data are scores of something else.

    Raises:
        SandboxError: there is no engine, or it lacks the image.
        UsageError: the data is missing or differs.
    """
    session, place = ledger.history.session, ledger.directory
    assert session is not None
    engine, state_dir = engine_and_state(environ)
    for image_id in (session.image["image_id"], *session.image["copies"].values()):
        if not has_image(engine, image_id):
            raise ImageMissing(
                f"an image of session {session.session} is not on this engine: {image_id}",
                "bring it from the machine where it ran: `docker save` there, `docker load` here",
            )
    try:
        data_dir, data = _data(settings, place / SHIPPED_WORKSPACE, state_dir)
    except UsageError as error:
        raise UsageError(
            f"the data of session {session.session} is not on this machine: {error.message}",
            f"make it again: nightlab setup --program {place / 'program.md'}; "
            "or copy that directory from where the session ran",
        ) from error
    if data.get("manifest_sha256") != session.data.get("manifest_sha256"):
        raise UsageError(
            f"the data{f' in {data_dir}' if data_dir else ''} is not what session "
            f"{session.session} was scored on",
            "copy the data directory of that time to this place, or set up again where it ran",
        )
    if changed := data_differences(session.data, data):
        raise UsageError(
            f"the data in {data_dir} was changed since the session began: {'; '.join(changed)}",
            f"remove it and make it again: nightlab setup --program {place / 'program.md'}",
        )
    return _runtime(engine, session.image, settings, (data_dir, data), state_dir, environ)


def data_differences(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Which files of prepared data are other ones than those on record."""
    then, now = recorded.get("files") or {}, found.get("files") or {}
    return [
        f"{split}/{name}"
        for split in sorted(then)
        for name in sorted(then[split].keys() | now.get(split, {}).keys())
        if then[split].get(name) != now.get(split, {}).get(name)
    ]


def data_on_this_machine(
    session: SessionStarted, place: Path, environ: Mapping[str, str]
) -> list[str]:
    """What of a session's prepared data is not as it was, where it lies on this machine.

    Args:
        session: as it began.
        place: its directory.
        environ: tells where nightlab keeps its state.
    """
    if "manifest_sha256" not in session.data:
        return []
    try:
        _, data = _data(session.settings, place / SHIPPED_WORKSPACE, state_directory(environ))
    except (UsageError, OSError, ValueError):
        return []  # elsewhere, or gone: a resume says so
    if data.get("manifest_sha256") != session.data.get("manifest_sha256"):
        return ["the data's manifest.json is another one"]
    return [f"the data's {name} is another one" for name in data_differences(session.data, data)]


def calibration_path(state_dir: Path, image: Mapping[str, Any], settings: Settings) -> Path:
    """Where the calibration of an image under these limits lies or would lie."""
    # Not by the wall: a calibration tries several budgets and holds for all.
    limits = settings.train_limits().model_dump(exclude={"wall_seconds"})
    content = json.dumps([image["image_id"], image["environment"], limits], sort_keys=True)
    digits = hashlib.sha256(content.encode()).hexdigest()[:16]
    return state_dir / "calibration" / f"{digits}.json"


def _data(
    settings: Settings, workspace: Path, state_dir: Path
) -> tuple[Path | None, dict[str, Any]]:
    """Where the data of these settings lies, and what the record says of it.

    Raises:
        UsageError: there is none, although these settings need it.
    """
    data_dir = data_directory(settings, workspace, state_dir)
    if settings.data is None or data_dir is None:
        return None, folder_facts({folder.path: folder.at for folder in settings.folders})
    manifest, hashes = data_dir / "manifest.json", FileHashes()
    if not manifest.is_file():
        raise UsageError(f"there is no data for {settings.data.source}", "run `nightlab setup`")
    content = manifest.read_bytes()
    made = json.loads(content)
    return data_dir, {
        "key": data_dir.name,
        "manifest_sha256": hashlib.sha256(content).hexdigest(),
        "source": made.get("source"),
        "splits": made.get("splits"),
        "files": {split: hashes.below(data_dir / split) for split in SPLITS},
    }


def _runtime(
    engine: Engine,
    image: dict[str, Any],
    settings: Settings,
    data: tuple[Path | None, dict[str, Any]],
    state_dir: Path,
    environ: Mapping[str, str],
) -> Runtime:
    """A runtime around an image as it is, or will be, recorded."""
    hardware, variables = settings.hardware, image["environment"]
    hold_images(engine, (image["image_id"], *image["copies"].values()))
    return Runtime(
        executor=executor(engine, state_dir),
        engine=engine.model_dump(mode="json")
        | {"components": [part.model_dump() for part in installed(engine, environ)]},
        image=image,
        image_id=image["image_id"],
        device=variables["NIGHTLAB_DEVICE"],
        environment=box_environment(variables, settings.limits.cpus),
        data_dir=data[0],
        data=data[1],
        gpus=gpu_source(engine, state_dir, image["devices"], hardware.gpus, hardware.gpus_per_run),
        gpu_memory=hardware.gpu_memory(image["allocator_variable"]),
        forget_pages=partial(forget_pages, engine),
    )
