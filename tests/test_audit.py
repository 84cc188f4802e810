"""The audit is silent about an honest night and names what was changed."""

from __future__ import annotations

import random
from pathlib import Path

from agent.audit import audit
from agent.ledger import read_ledger
from agent.records import AttemptFinished, AttemptStarted, Verdict
from tests import histories


def begun() -> histories.Night:
    made = histories.Night()
    histories.start(made)
    histories.baseline(made, random.Random(1))
    return made


def differences(made: histories.Night, directory: Path) -> list[tuple[int | None, str]]:
    made.write(directory)
    return [(d.seq, d.what) for d in audit(directory, read_ledger(directory))]


def test_an_honest_baseline_has_no_differences(tmp_path: Path) -> None:
    assert [] == differences(begun(), tmp_path)


def test_a_lost_and_a_changed_blob_are_named_with_their_event(tmp_path: Path) -> None:
    made = begun()
    made.write(tmp_path)
    for sha in made.blobs:
        path = tmp_path / "blobs" / sha[:2] / sha[2:]
        body = path.read_bytes()
        path.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
        assert 1 == len(audit(tmp_path, made.entries))
        path.unlink()
        assert 1 == len(audit(tmp_path, made.entries))
        path.write_bytes(body)


def test_a_keep_without_arithmetic_is_found(tmp_path: Path) -> None:
    made = begun()
    made.add(
        AttemptStarted(
            attempt=1,
            kind="candidate",
            hypothesis="none",
            researcher="tpe",
            files={},
            diff=None,
            parent=0,
        )
    )
    entry = made.add(
        AttemptFinished(
            attempt=1,
            verdict=Verdict.KEPT,
            reason="better",
            explanation="",
            value=None,
            arithmetic=None,
            seconds=1.0,
        )
    )
    assert [(entry.seq, "kept without arithmetic")] == differences(made, tmp_path)
