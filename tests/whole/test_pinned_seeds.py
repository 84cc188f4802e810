"""Nights over programs whose score no seed reaches: whatever they print, nothing is kept."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import pytest

from agent.record.chain import read_ledger
from agent.record.events import Verdict
from agent.record.history import History, fold
from agent.report.summary import summary
from sandbox.contract.run import Log, RunResult, RunSpec
from tests.support.labs import play
from tests.support.nights import Place

NIGHTS = 10
ATTEMPTS = 6


def played(root: Path, kind: str, night: int, **noise: Any) -> tuple[Place, History]:
    """A night of the sampler over a program that pins its seed, or asks for none."""

    def prints(spec: RunSpec, result: RunResult, output_dir: Path | None) -> RunResult:
        code = next(m.source for m in spec.mounts if m.target == "/workspace") / "train.py"
        text = f"{night}{code.read_text()}"
        # A pinned seed: each change draws its luck anew, and every repeat draws the same. Without
        # any: what a change is worth shows alone, each time alike.
        luck = random.Random(hashlib.sha256(text.encode()).digest()).gauss(0, 0.1)
        worth = text.count("1") / 1000 + night / 100
        value = 2 + (luck if kind == "pinned" else worth)
        log = Log(head=f"distance: {value!r}\n", tail="", omitted_bytes=0)
        return result.model_copy(update={"log": log})

    place = Place(
        root,
        name=f"night-{night}",
        changes={
            "goal": {"source": "reported"},
            "scoring": None,
            "data": None,
            "session": {"attempts": ATTEMPTS},
            "noise": noise,
        },
    )
    place.boxes.outcome = prints
    lab = place.begin("tpe" if night % 2 else "random")
    with lab.ledger:
        play(lab, place.program)
    return place, fold(read_ledger(place.directory))


@pytest.mark.parametrize("kind", ["pinned", "ignored"])
def test_in_ten_nights_nothing_is_kept(tmp_path: Path, kind: str) -> None:
    for night in range(NIGHTS):
        place, history = played(tmp_path, kind, night)

        assert ATTEMPTS <= len(history.completed)
        assert 0 == history.count(Verdict.KEPT)
        told = [one.kind for one in summary(read_ledger(place.directory)).attention]
        assert "no_noise" in told


def test_the_same_nights_tempt_whoever_states_what_counts(tmp_path: Path) -> None:
    kept = [
        played(tmp_path, "pinned", night, smallest_gain=0.001)[1].count(Verdict.KEPT)
        for night in range(3)
    ]

    assert sum(kept)
