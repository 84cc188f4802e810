"""Holds a session's images, lest a clean-up take them.

`docker system prune -a` takes every image that no container runs on, and between two boxes that is
all of them; a rebuilt one has another id, and a record is of one image. So a container that only
sleeps runs on each image that a session uses, and ends by itself after a while.
"""

import secrets
import time
from collections.abc import Iterable
from contextlib import closing

import docker

from sandbox.contract.log import log
from sandbox.engine.find import FAILED_CALLS, Engine, connect
from sandbox.image.check import create_python

LABEL_HOLDS = "nightlab.holds"
HELD_SECONDS = 7 * 24 * 3600
"""From a session's last use: long enough to look at it and to approve it."""
RENEWED_SECONDS = 24 * 3600


def hold_images(engine: Engine, image_ids: Iterable[str]) -> None:
    """Hold these images for a week from now, as far as the engine lets us."""
    try:
        with closing(connect(engine)) as client:
            for image_id in image_ids:
                _hold(client, image_id)
    except FAILED_CALLS as error:
        log.warning("images_not_held", why=str(error)[:300])


def _hold(client: docker.DockerClient, image_id: str) -> None:
    held = client.api.containers(filters={"label": f"{LABEL_HOLDS}={image_id}"})
    if any(each["Created"] > time.time() - RENEWED_SECONDS for each in held):
        return
    name = f"nightlab-holds-{image_id.partition(':')[2][:12]}-{secrets.token_hex(2)}"
    program = f"import time; time.sleep({HELD_SECONDS})"
    labels = {LABEL_HOLDS: image_id}
    client.api.start(create_python(client, image_id, program, labels, name=name, auto_remove=True))
    for older in held:
        client.api.remove_container(older["Id"], force=True, v=True)
