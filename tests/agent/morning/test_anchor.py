"""Who knows an earlier head finds a cut tail and a ledger that was written anew."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from agent.cli.app import app
from agent.cli.shared import keep_head
from agent.morning.anchor import Anchor, anchor_path, anchored, compare_heads
from agent.record.chain import LEDGER_NAME, LedgerError, read_ledger
from agent.record.events import Noticed
from agent.record.ledger import Ledger
from tests.support.nights import Place
from tests.support.sessions import Lines, forge, found, only, resumed, sampled

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return sampled(tmp_path_factory.mktemp("anchored"))


@pytest.fixture
def copy(tmp_path: Path, night: Place) -> Path:
    return Path(shutil.copytree(night.directory, tmp_path / "runs" / "night"))


def cut(directory: Path, lines: int) -> None:
    path = directory / LEDGER_NAME
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-lines]))
    shutil.rmtree(directory / "approved", ignore_errors=True)  # which the last line is about


def rewrite(directory: Path) -> None:
    forge(directory, lambda lines: only(lines, "human_decided").update(reason="it is not"))


def heard(directory: Path, *, noted: str | None = None, anchor: Path | None = None) -> list[str]:
    entries = read_ledger(directory)
    return compare_heads(directory, entries, noted=noted, anchor=anchor).differences


def audit(directory: Path, *options: str) -> Result:
    words = ["audit", directory.name, "--runs", str(directory.parent), *options]
    return CliRunner().invoke(app, words)


# --- a head that the person noted ----------------------------------------------------------------


def test_a_noted_head_tells_whether_it_is_the_head_now(copy: Path) -> None:
    entries = read_ledger(copy)
    now = audit(copy, "--head", entries[-1].hash)
    assert (0, True) == (now.exit_code, f"event {len(entries) - 1}, the head now" in now.stdout)
    before = audit(copy, "--head", entries[-3].hash[:12])
    assert (0, True) == (before.exit_code, "and 2 came later" in before.stdout)


def test_a_noted_head_finds_a_cut_tail_and_a_rewritten_one(copy: Path) -> None:
    head = read_ledger(copy)[-1].hash
    rewrite(copy)
    assert [f"no event has the hash {head}: the tail was cut off, or the ledger written anew"] == (
        heard(copy, noted=head)
    )
    cut(copy, 1)
    assert heard(copy, noted=head)
    assert 1 == audit(copy, "--head", head).exit_code
    assert 0 == audit(copy).exit_code


@pytest.mark.parametrize("noted", ["abc", "x" * 64, "A" * 12, "0" * 65])
def test_what_is_no_hash_is_refused_with_what_to_give(copy: Path, noted: str) -> None:
    refused = audit(copy, "--head", noted)
    assert 2 == refused.exit_code
    assert "is no hash" in refused.stderr
    assert "12 to 64 digits" in refused.stderr


# --- a file elsewhere ----------------------------------------------------------------------------


def test_each_new_head_is_a_line_of_the_anchor(tmp_path: Path, copy: Path, night: Place) -> None:
    anchor = Anchor(tmp_path / "elsewhere" / "heads.jsonl", "night", night.clock.now)
    entries = read_ledger(copy)
    for count in (1, 5, 5, len(entries)):
        anchor.add(entries[:count])
    anchor.add([])
    lines = [json.loads(line) for line in anchor.path.read_text().splitlines()]
    assert [0, 4, len(entries) - 1] == [line["seq"] for line in lines]
    assert {"session", "seq", "head", "at"} == lines[-1].keys()
    assert entries[-1].hash == lines[-1]["head"]
    assert [] == heard(copy, anchor=anchor.path)


def test_the_anchor_finds_a_cut_tail_and_a_rewritten_one(tmp_path: Path, copy: Path) -> None:
    path, last = tmp_path / "heads.jsonl", len(read_ledger(copy)) - 1
    Anchor(path, "night").add(read_ledger(copy))
    rewrite(copy)
    assert "with another hash: the ledger was written anew" in heard(copy, anchor=path)[0]
    cut(copy, 2)
    assert [f"the ledger ends at event {last - 2}: its tail was cut off"] == [
        what.split("; ")[1] for what in heard(copy, anchor=path)
    ]
    assert 1 == audit(copy, "--anchor", str(path)).exit_code


def test_the_anchor_in_the_settings_is_compared_without_being_named(
    tmp_path: Path, copy: Path
) -> None:
    path = tmp_path / "heads.jsonl"
    forge(copy, lambda lines: resumed(lines, "record", anchor=str(path)))
    missing = audit(copy)
    assert (0, True) == (missing.exit_code, "there is no" in missing.stderr)
    Anchor(path, "night").add(read_ledger(copy))
    agreeing = audit(copy)
    assert (0, True) == (agreeing.exit_code, "agrees: event" in agreeing.stdout)
    rewrite(copy)
    assert 1 == audit(copy).exit_code


def test_other_sessions_and_torn_lines_of_an_anchor_are_passed_over(
    tmp_path: Path, copy: Path
) -> None:
    path = tmp_path / "heads.jsonl"
    path.write_text('{"session":"night","seq":9999,"he')
    Anchor(path, "another").add(read_ledger(copy))
    Anchor(path, "night").add(read_ledger(copy))
    assert 3 == len(path.read_text().splitlines())
    assert ["another", "night"] == [
        head.session for name in ("another", "night") for head in anchored(path, name)
    ]
    assert [] == heard(copy, anchor=path)


def test_a_second_place_that_fails_is_noticed_once_and_ends_no_night(copy: Path) -> None:
    with Ledger.open(copy) as ledger:
        anchor = Anchor(Path("/dev/full"), "night")
        for _ in range(3):
            keep_head(ledger, anchor)
        noticed = [e.event for e in ledger.entries if isinstance(e.event, Noticed)]
        assert ["anchor_failed"] == [event.kind for event in noticed]
        assert "No space left on device" in noticed[0].explanation
        anchor.path = copy.parent / "heads.jsonl"
        keep_head(ledger, anchor)
        assert [ledger.head] == [head.head for head in anchored(anchor.path, "night")]


def test_a_fifo_as_anchor_fails_and_does_not_hang(tmp_path: Path, copy: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LedgerError, match="could not be written"):
        Anchor(tmp_path / "pipe", "night").add(read_ledger(copy))


def test_an_anchor_in_the_session_itself_is_refused(copy: Path) -> None:
    with pytest.raises(LedgerError, match="the session's own directory"):
        anchor_path(str(copy / "heads.jsonl"), copy)
    assert anchor_path(None, copy) is None
    assert Path.home() / "heads.jsonl" == anchor_path("~/heads.jsonl", copy)


# --- a signature ---------------------------------------------------------------------------------


def test_the_lines_of_the_docs_sign_a_head_and_check_it(tmp_path: Path, copy: Path) -> None:
    """As they stand in docs/ledger.md, with the person's key, session and directory."""
    words = ["-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(tmp_path / "id_ed25519")]
    subprocess.run(["ssh-keygen", *words], check=True, timeout=30, stdin=subprocess.DEVNULL)
    page = (ROOT / "docs" / "ledger.md").read_text()
    sign, check = re.findall(r"^ *(ssh-keygen .+)$", page, re.MULTILINE)
    (tmp_path / "head.json").write_text(audit(copy, "--json").stdout)
    assert 0 == bash(tmp_path, sign.replace("KEY", "id_ed25519")).returncode
    assert 'Good "nightlab" signature' in bash(tmp_path, check).stdout
    (tmp_path / "head.json").write_text("forged")
    assert 0 != bash(tmp_path, check).returncode


def bash(place: Path, line: str) -> subprocess.CompletedProcess[str]:
    words = ["bash", "-c", line]
    return subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=30, check=False)


# --- the command ---------------------------------------------------------------------------------


def test_the_events_asked_for_are_shown_and_everything_is_verified_all_the_same(
    copy: Path,
) -> None:
    shown = audit(copy, "--attempt", "0", "--type", "attempt_finished,scored")
    header, *rows, verified = shown.stdout.splitlines()
    assert 0 == shown.exit_code
    assert ["seq", "time", "(UTC)", "type", "attempt", "facts"] == header.split()
    assert {"attempt_finished", "scored"} == {row.split()[3] for row in rows}
    assert {"0"} == {row.split()[4] for row in rows}
    assert verified.startswith(f"{len(read_ledger(copy))} events, nothing differs; head ")
    forge(copy, lambda lines: only(lines, "human_decided").update(attempt=0))
    differing = audit(copy, "--type", "session_ended", "--json")
    assert 1 == differing.exit_code
    told = [json.loads(line) for line in differing.stdout.splitlines()]
    assert "session_ended" == told[0]["entry"]["event"]["type"]
    assert "which was not the best" in told[1]["what"]
    assert ("audited", 1) == (told[-1]["event"], told[-1]["differences"])


def test_a_script_is_told_the_head(copy: Path) -> None:
    (told,) = map(json.loads, audit(copy, "--json").stdout.splitlines())
    entries = read_ledger(copy)
    assert (len(entries), 0, entries[-1].hash) == (
        told["events"],
        told["differences"],
        told["head"],
    )


def test_a_type_that_is_none_lists_those_that_are(copy: Path) -> None:
    refused = audit(copy, "--type", "verdicts")
    assert 2 == refused.exit_code
    assert "attempt_finished" in refused.stderr


def forget_all(lines: Lines) -> None:
    lines.clear()


def test_an_empty_ledger_is_named(copy: Path) -> None:
    forge(copy, forget_all)
    assert ["the ledger is empty"] == found(copy)
    refused = audit(copy)
    assert (2, True) == (refused.exit_code, "holds nothing" in refused.stderr)
