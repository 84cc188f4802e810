"""train.py's way over a GPU, on the stand-ins that a machine without one has."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from sandbox.engine.find import Engine
from sandbox.image.image import ImageRecord
from sandbox.machine import run_box

ROOT = Path(__file__).parents[2]
VOCABULARY, TOKENS = 257, 4000

pytestmark = pytest.mark.docker


@pytest.fixture(scope="module")
def seen(
    engine: Engine, image: ImageRecord, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the program in the box saw."""
    assert engine.base_url
    assert image.image_id
    code, data = tmp_path_factory.mktemp("code"), tmp_path_factory.mktemp("data")
    for path in (ROOT / "workspace" / "train.py", ROOT / "tests" / "support" / "train_ways.py"):
        (code / path.name).write_bytes(path.read_bytes())
    stream = random.Random(1).choices(range(VOCABULARY), k=TOKENS)
    (data / "tokens.bin").write_bytes(struct.pack(f"<{TOKENS}H", *stream))
    meta = {"vocab_size": VOCABULARY, "bos_token": VOCABULARY - 1, "context": 256}
    (data / "meta.json").write_text(json.dumps(meta))
    for folder in (code, data):
        folder.chmod(0o755)
    result = run_box(
        ["python3", "/code/train_ways.py"],
        "training",
        mounts={code: "/code", data: "/data"},
        wall_seconds=240,
    )
    assert result.exit_code == 0, result.log.head[-2000:] + result.log.tail
    found: dict[str, Any] = json.loads((result.log.head + result.log.tail).splitlines()[-1])
    return found


def test_the_fused_and_compiled_way_computes_what_the_plain_one_computes(
    seen: dict[str, Any],
) -> None:
    assert pytest.approx(seen["plain"], abs=2e-3) == seen["like_a_gpu"]
    assert seen["plain"][0] > seen["plain"][-1]


def test_all_blocks_compile_as_one_and_no_graph_breaks(seen: dict[str, Any]) -> None:
    """One graph for the blocks, one for the loss, one for each of Muon's four shapes."""
    assert (6, {}) == (seen["graphs"], seen["breaks"])


def test_a_step_asks_the_device_for_no_value(seen: dict[str, Any]) -> None:
    expected = {"can_be_read": False, "dtype": "torch.bfloat16", "device": "meta"}
    assert expected == seen["without_values"]


def test_the_host_is_two_steps_ahead_at_most(seen: dict[str, Any]) -> None:
    assert [[3, 1], [4, 2], [5, 3]] == seen["waits"]


def test_a_whole_training_goes_that_way_and_leaves_a_model(seen: dict[str, Any]) -> None:
    assert [2, 128, VOCABULARY] == seen["whole_run"]["logits"]
