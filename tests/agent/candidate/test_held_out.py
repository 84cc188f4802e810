"""Held-out text in a candidate's files is found however it is written down."""

from __future__ import annotations

import base64
import bz2
import json
import lzma
import random
import zlib
from pathlib import Path

import numpy as np
import pytest

from agent.attempt.decide import (
    LEAST_BLOCKS,
    MUCH_GROWTH_BYTES,
    UNREAD_LITERALS,
    next_step,
)
from agent.attempt.lab import Lab
from agent.candidate.held_out import index_of, read_literals
from agent.candidate.literals import MAX_UNPACKED_BYTES
from agent.morning.audit import audit
from agent.morning.derive import derive
from agent.night.waiting import run_with_retries
from agent.record.attempts import HELD_OUT_TEXT, Attempt
from agent.record.events import LiteralsRead, Verdict
from agent.record.history import fold
from agent.report.summary import summary
from agent.researcher.answers import run_answer
from tests.support.held_out import (
    HOLDOUT,
    PACKED,
    TAKEN,
    TRAIN,
    VAL,
    prose,
    write_data,
    write_split,
)
from tests.support.nights import Place


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return index_of(write_data(tmp_path_factory.mktemp("data")))


def assigned(value: object) -> bytes:
    return f"import torch\nDEPTH = 4\nTEXT = {value!r}\n".encode()


def in_pieces(text: bytes) -> bytes:
    lines = [f"P{i} = {text[i : i + 70]!r}" for i in range(0, len(text), 70)]
    return "\n".join(lines).encode()


IDS = np.frombuffer(TAKEN, np.uint8).astype("<u2")

WAYS: dict[str, bytes] = {
    "plain": assigned(TAKEN.decode()),
    "words": assigned(TAKEN.decode().upper().split()),
    "comment": b"\n".join(b"# " + line for line in TAKEN.split(b"\n")),
    "base64": assigned(base64.b64encode(TAKEN)),
    "base64_lines": assigned(base64.encodebytes(TAKEN).decode()),
    "urlsafe": assigned(base64.urlsafe_b64encode(zlib.compress(TAKEN))),
    "base32": assigned(base64.b32encode(bz2.compress(TAKEN)).decode()),
    "hex": assigned(bz2.compress(TAKEN).hex()),
    "ascii85_list": assigned(
        [base64.a85encode(zlib.compress(TAKEN))[i:][:60] for i in range(0, 4000, 60)]
    ),
    "base85_lzma": assigned(PACKED),
    "lzma_alone": assigned(base64.b85encode(lzma.compress(TAKEN, format=lzma.FORMAT_ALONE))),
    "bytes": assigned(zlib.compress(TAKEN)),
    "escapes": assigned(zlib.compress(TAKEN).decode("latin-1")),
    "numbers": assigned(list(lzma.compress(TAKEN))),
    "token_list": assigned(IDS.tolist()),
    "token_words": assigned(" ".join(map(str, IDS.tolist()))),
    "token_array": assigned(base64.b85encode(zlib.compress(IDS.tobytes()))),
    "token_array_32": assigned(base64.b64encode(IDS.astype(">u4").tobytes())),
    "nested": assigned(base64.b64encode(zlib.compress(PACKED))),
    "in_pieces": in_pieces(PACKED),
    "behind_a_head": assigned(b"head" + lzma.compress(TAKEN)),
    "utf16": assigned(base64.b85encode(zlib.compress(TAKEN.decode().encode("utf-16")))),
    "holdout": assigned(base64.b85encode(lzma.compress(HOLDOUT[2000:6000]))),
}


@pytest.mark.parametrize("way", WAYS)
def test_held_out_text_is_found_however_it_is_written(way: str, index: bytes) -> None:
    read = read_literals(3, {"train.py": WAYS[way]}, index)
    assert sum(found.blocks for found in read.held_out) > 50, read
    assert {"train.py"} == {found.file for found in read.held_out}
    assert read.is_read_whole


def test_it_is_found_in_a_data_file_as_well(index: bytes) -> None:
    read = read_literals(3, {"words.bin": lzma.compress(TAKEN), "train.py": b"X = 1\n"}, index)
    assert ["words.bin"] == [found.file for found in read.held_out]


@pytest.mark.parametrize("text", [TRAIN, prose(9, 20_000), VAL[:1000], VAL[2000:2100]])
def test_what_train_has_what_is_new_and_a_quotation_are_nobodys_secret(
    text: bytes, index: bytes
) -> None:
    read = read_literals(3, {"train.py": assigned(base64.b85encode(lzma.compress(text)))}, index)
    assert sum(found.blocks for found in read.held_out) < LEAST_BLOCKS, read


def test_an_index_holds_no_text_and_none_of_trains_blocks(index: bytes, tmp_path: Path) -> None:
    assert VAL[2000:2040] not in index
    write_split(tmp_path / "train", VAL)
    write_split(tmp_path / "val", VAL)
    assert b"" == index_of(tmp_path)


def test_a_persons_own_form_of_data_is_searched_as_bytes(tmp_path: Path) -> None:
    for split, text in {"train": TRAIN, "val": VAL, "holdout": HOLDOUT}.items():
        (tmp_path / split).mkdir()
        (tmp_path / split / "set.dat").write_bytes(bytes((255 - b) for b in text))
    taken = bytes((255 - b) for b in TAKEN)
    read = read_literals(3, {"train.py": assigned(base64.b64encode(taken))}, index_of(tmp_path))
    assert sum(found.blocks for found in read.held_out) > 50


@pytest.mark.parametrize(
    "bomb",
    [
        lzma.compress(bytes(2**26)),
        zlib.compress(bytes(2**26) + TAKEN),
        zlib.compress(zlib.compress(zlib.compress(bytes(2**28)))),
    ],
    ids=["lzma", "zlib_and_text", "nested"],
)
def test_a_bomb_is_not_unpacked_and_does_not_pass(bomb: bytes, index: bytes) -> None:
    read = read_literals(3, {"train.py": assigned(base64.b85encode(bomb))}, index)
    assert not read.is_read_whole


def test_many_small_bombs_are_one(index: bytes) -> None:
    bombs = [base64.b64encode(zlib.compress(bytes([n]) * 2**20)) for n in range(20)]
    files = {"train.py": b"\n".join(b"B%d = %r" % pair for pair in enumerate(bombs))}
    assert len(files["train.py"]) < MAX_UNPACKED_BYTES / 100
    assert not read_literals(3, files, index).is_read_whole


@pytest.mark.parametrize(
    "source",
    [b"(" * 5000, b"\xff\xfe", b"x = '", b"", b"\0", b"f'{" * 300, b"X = 0x" + b"f" * 6000],
)
def test_files_that_do_not_parse_or_are_odd_are_searched_all_the_same(
    source: bytes, index: bytes
) -> None:
    text = source + b"\n# " + TAKEN.replace(b"\n", b"\n# ")
    assert read_literals(3, {"train.py": text}, index).held_out


def test_literals_are_counted_and_code_is_not() -> None:
    files = {"train.py": b"def f(x):\n    return x + 'abc'  # why\n", "data.bin": bytes(100)}
    assert len("'abc'") + len("# why") + 100 == read_literals(3, files, None).literal_bytes


def night(place: Place, *values: object, data: bool = True) -> tuple[Lab, list[Attempt]]:
    """The baseline, and an attempt with each of these literals; nothing runs in boxes."""
    if data:
        write_data(place.root / "data")
    with (lab := place.begin("tpe")).ledger:
        run_with_retries(lab, "baseline", "the files as they are", "nightlab")
        for value in values:
            text = lab.workspace.read_text("train.py")
            lab.workspace.write("train.py", f"{text}\nTEXT = {value!r}\n".encode())
            run_with_retries(lab, "candidate", "an edit", "claude")
    return lab, lab.history.candidates


def test_nothing_runs_of_a_candidate_that_holds_held_out_text(tmp_path: Path) -> None:
    place = Place(tmp_path, changes={"economy": {"smoke": "always"}})
    lab, (refused,) = night(place, PACKED)
    assert refused.finished is not None
    assert (Verdict.INVALID, HELD_OUT_TEXT) == (refused.finished.verdict, refused.finished.reason)
    assert refused.runs == []
    assert refused.smoke is None
    assert refused.literals is not None

    told = run_answer(refused, lab.history, repeated=False)
    assert "base85, then lzma" in told
    blocks = sum(found.blocks for found in refused.literals.held_out)
    assert str(blocks) not in json.loads(told)["explanation"]
    assert [] == audit(place.directory, lab.ledger.entries)


def test_without_an_index_the_same_candidate_is_trained_and_judged(tmp_path: Path) -> None:
    _, (judged,) = night(Place(tmp_path), PACKED, data=False)
    assert judged.finished is not None
    assert HELD_OUT_TEXT != judged.finished.reason
    assert ["train"] == [run.result.box for run in judged.runs][:1]


def test_what_cannot_be_looked_through_is_refused(tmp_path: Path) -> None:
    _, (refused,) = night(Place(tmp_path), base64.b85encode(lzma.compress(bytes(2**26))))
    assert refused.finished is not None
    assert UNREAD_LITERALS == refused.finished.reason
    assert refused.runs == []


def test_literals_that_grow_are_said_with_the_verdict_and_to_the_person(tmp_path: Path) -> None:
    noise = random.Random(5).randbytes(MUCH_GROWTH_BYTES)
    place = Place(tmp_path)
    lab, (small, large) = night(place, noise[:4000].hex(), noise.hex())
    assert small.finished is not None
    assert large.finished is not None
    assert "literals grew" not in small.finished.explanation
    assert large.finished.explanation.endswith("its literals grew by 32 kB")
    (item,) = [one for one in summary(lab.ledger.entries).attention if one.kind == "literals"]
    assert (large.number,) == item.attempts
    assert [] == audit(place.directory, lab.ledger.entries)


def test_the_audit_searches_again(tmp_path: Path) -> None:
    place = Place(tmp_path)
    lab, _ = night(place, PACKED)
    entries = lab.ledger.entries
    number = next(e.seq for e in entries if isinstance(e.event, LiteralsRead) and e.event.held_out)
    clean = entries[number].event.model_copy(update={"held_out": ()})
    history = fold(entries[:number])
    assert clean != derive(history, clean, lab.ledger.get_blob)
    history.apply(entries[number])
    history.attempts[-1].literals = None
    with pytest.raises(ValueError, match="were not searched"):
        next_step(history, history.attempts[-1].number, lab.ledger.get_blob)
