"""One program on two images: what must stay the same, and what tells them apart."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest

from sandbox.engine.find import Engine, connect
from sandbox.image.image import ImageRecord
from tests.bench.swap import Seen, Swap, session_on, table, unlike
from tests.support.nights import TOY

pytestmark = pytest.mark.docker
OWN = "nightlab-test:own-torch"
WITH_MORE_IN_IT = """
USER 0
ENV TEAM=ours LD_LIBRARY_PATH=/opt/team NVIDIA_VISIBLE_DEVICES=all
ENTRYPOINT ["/opt/team/start.sh"]
RUN mkdir -p /opt/team && echo 'raise SystemExit' > /opt/team/tool.py
"""


@pytest.fixture(scope="module")
def seen(
    engine: Engine, image: ImageRecord, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Seen]]:
    """The toy program on the shipped image, and on one that somebody made with torch in it."""
    recipe = f"FROM {image.reference}{WITH_MORE_IN_IT}".encode()
    with closing(connect(engine)) as client:
        build = client.api.build(
            fileobj=io.BytesIO(recipe), tag=OWN, network_mode="none", rm=True, decode=True
        )
        assert [] == [event for event in build if "error" in event]
        try:
            yield [
                session_on(swap, tmp_path_factory.mktemp("swap") / "it", TOY, 1)
                for swap in (Swap("shipped", "", "cpu"), Swap("own", OWN, "own-torch"))
            ]
        finally:
            client.images.remove(OWN, force=True)


def test_another_image_leaves_the_same_record_and_the_same_report(seen: list[Seen]) -> None:
    assert [] == unlike(seen)
    assert {"session_started", "attempt_finished", "session_ended"} <= set(seen[0].shape["events"])
    assert "All attempts" in seen[0].shape["headings"]
    assert "Alike in all" in table(seen)


def test_each_record_names_its_own_image(seen: list[Seen]) -> None:
    shipped, own = (one.image for one in seen)
    assert shipped["content_key"] != own["content_key"]
    assert shipped["base"]["digest"] != own["base"]["digest"]
    assert ("cpu", "own-torch") == (shipped["profile"], own["profile"])
    assert own["torch_wheel"] is None


def test_a_record_of_another_form_would_be_seen(seen: list[Seen]) -> None:
    changed = replace(seen[1], shape={**seen[1].shape, "results": "commit\tscore"})
    (difference,) = unlike([seen[0], changed])
    assert "own: results is not as on shipped" in difference
