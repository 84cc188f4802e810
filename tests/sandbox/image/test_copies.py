"""Boxes that see held-out rows have files of their own: nothing stays in memory for other boxes."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import docker
import pytest

from sandbox.box.executor import DockerExecutor
from sandbox.contract.run import Outcome
from sandbox.engine.find import Engine, connect
from sandbox.image import copies as copies_module
from sandbox.image.check import ask_python, python_container
from sandbox.image.copies import (
    KEPT,
    MARKER,
    Copies,
    FilesShared,
    ensure_copies,
    forget_pages,
    remove_orphans,
    require_apart,
    settings_of,
)
from sandbox.image.image import ImageRecord
from tests.support.boxes import python_spec

WORD = "".join(random.Random(7).choices("01", k=128))
OPEN = f"""
import glob, os, time
files = [p for p in glob.glob("/usr/**/*", recursive=True) if os.path.isfile(p) and ".so" not in p]
carrier = os.open(max(files, key=os.path.getsize), os.O_RDONLY)  # no box here runs it
# In the middle of a page each, and so far apart that what is read ahead reaches no other.
places = [(2 * n + 1) * (os.fstat(carrier).st_size // {2 * len(WORD)}) for n in range({len(WORD)})]
"""
FORGET = f"{OPEN}os.posix_fadvise(carrier, 0, 0, os.POSIX_FADV_DONTNEED)"
SEND = f"""{OPEN}
for bit, place in zip({WORD!r}, places):
    if bit == "1":
        os.pread(carrier, 1, place)
"""
RECEIVE = f"""{OPEN}
seconds = []
for place in places:
    began = time.perf_counter()
    os.pread(carrier, 1, place)
    seconds.append(time.perf_counter() - began)
# What comes from memory takes the quickest one's time, what comes from a disk many times as much.
print("".join("1" if each < 6 * min(seconds) else "0" for each in seconds))
"""


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[docker.DockerClient]:
    with closing(connect(engine)) as opened:
        yield opened


@pytest.fixture(scope="module")
def copies(engine: Engine, image: ImageRecord, state_dir: Path) -> Copies:
    return ensure_copies(engine, image, state_dir=state_dir, say=print)


@pytest.fixture
def say_in_box(engine: Engine, tmp_path: Path) -> Callable[[str, str], str]:
    """Runs a program in a real box of an image; what it printed."""
    executor = DockerExecutor(engine.base_url, engine.api_version, tmp_path)

    def run(image_id: str, code: str) -> str:
        result = executor.run(python_spec(code, image=image_id, memory_bytes=2**29))
        assert Outcome.OK == result.outcome, result.log.tail
        return result.log.head.strip()

    return run


def carried(
    client: docker.DockerClient,
    say_in_box: Callable[[str, str], str],
    sender: str,
    receiver: str,
    between: Callable[[], None] = lambda: None,
) -> float:
    """The share of a word's bits that come through from one box to a later one by page cache."""
    for image_id in {sender, receiver}:
        # In a container without our seccomp profile: a box's own way to do it is the kernel's
        # reclaim, which takes longer.
        with python_container(client, image_id, FORGET, {}) as container:
            client.api.start(container)
            client.api.wait(container)
    say_in_box(sender, SEND)
    between()
    heard = say_in_box(receiver, RECEIVE)
    return sum(a == b for a, b in zip(WORD, heard, strict=True)) / len(WORD)


def test_what_a_box_that_saw_rows_left_in_memory_says_nothing_to_a_later_training(
    client: docker.DockerClient,
    say_in_box: Callable[[str, str], str],
    image: ImageRecord,
    copies: Copies,
) -> None:
    assert 0.7 > carried(client, say_in_box, copies.model, image.image_id)


def test_nor_does_the_box_that_scored_say_anything_to_the_one_that_checks_it(
    client: docker.DockerClient, say_in_box: Callable[[str, str], str], copies: Copies
) -> None:
    assert 0.7 > carried(client, say_in_box, copies.model, copies.check)


def test_with_one_image_for_all_boxes_a_word_passes_from_one_to_the_next(
    client: docker.DockerClient, say_in_box: Callable[[str, str], str], image: ImageRecord
) -> None:
    assert 0.85 < carried(client, say_in_box, image.image_id, image.image_id)


def test_boxes_that_check_forget_what_an_earlier_one_read(
    engine: Engine,
    client: docker.DockerClient,
    say_in_box: Callable[[str, str], str],
    copies: Copies,
) -> None:
    assert 0.85 < carried(client, say_in_box, copies.check, copies.check)
    forget = partial(forget_pages, engine, copies.check)
    assert 0.7 > carried(client, say_in_box, copies.check, copies.check, forget)


def test_copies_have_the_images_settings_and_content_and_a_file_that_tells_them_apart(
    client: docker.DockerClient, image: ImageRecord, copies: Copies
) -> None:
    original = client.images.get(image.image_id).attrs["Config"]
    for role, copy in (("model", copies.model), ("check", copies.check)):
        config = client.images.get(copy).attrs["Config"]
        assert {name: original[name] for name in KEPT} == {name: config[name] for name in KEPT}
        program = f"print(open('/{MARKER}').read()); import torch; print(torch.__version__)"
        assert [role, image.torch] == ask_python(client, copy, program, {}).split()


def test_copies_are_made_once(
    engine: Engine, image: ImageRecord, copies: Copies, state_dir: Path
) -> None:
    said: list[str] = []
    assert copies == ensure_copies(engine, image, state_dir=state_dir, say=said.append)
    assert [] == said


def test_images_whose_boxes_share_pages_are_refused(
    client: docker.DockerClient, image: ImageRecord, copies: Copies
) -> None:
    with pytest.raises(FilesShared, match="share pages in memory with another image's: /usr/"):
        require_apart(client, (image.image_id, image.image_id))
    with pytest.raises(FilesShared, match="share pages"):
        require_apart(client, (image.image_id, copies.model, copies.model))


def test_an_engine_that_does_not_tell_what_is_in_memory_is_refused(
    client: docker.DockerClient,
    image: ImageRecord,
    copies: Copies,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As the kernel answers whoever may not ask: everything is said to be there.
    blind = copies_module.PAGES.replace("def drop(", "in_memory = lambda path: 1.0\ndef drop(")
    monkeypatch.setattr(copies_module, "PAGES", blind)
    with pytest.raises(FilesShared, match="cannot be told"):
        require_apart(client, (image.image_id, copies.model))


def test_copies_go_when_their_image_is_gone(
    client: docker.DockerClient, image: ImageRecord, copies: Copies
) -> None:
    with contextlib.ExitStack() as stack:
        for tag in ("gone-model", "gone-check", "kept", "kept-model", "gone-other"):
            client.images.get(image.image_id).tag("nightlab-test-copies", tag)
            name = f"nightlab-test-copies:{tag}"
            stack.callback(partial(client.api.remove_image, name, noprune=True))
        remove_orphans(client, "nightlab-test-copies")
        left = {
            tag for each in client.api.images("nightlab-test-copies") for tag in each["RepoTags"]
        }
        assert {"kept", "kept-model", "gone-other"} == {tag.split(":")[1] for tag in left}
        stack.pop_all()
        for tag in left:
            client.api.remove_image(tag, noprune=True)


def test_settings_come_through_whatever_stands_in_them() -> None:
    config = {
        "User": "65534:65534",
        "Cmd": ["python3"],
        "Env": ["PATH=/bin", 'ODD=a "b" $HOME \\ c'],
        "Labels": {"a": "1"},
    }
    assert [
        "USER 65534:65534",
        'CMD ["python3"]',
        'ENV PATH="/bin"',
        'ENV ODD="a \\"b\\" \\$HOME \\\\ c"',
        'LABEL "a"="1"',
    ] == settings_of(config)
