"""Files beside the ledger are compared with the record: before each use, and by the audit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agent.attempt.experiment import run_attempt
from agent.attempt.lab import Lab
from agent.cli.app import app
from agent.machine.runtime import data_differences, data_on_this_machine
from agent.machine.setup import data_directory
from agent.morning.anchor import Anchor
from agent.morning.audit import audit
from agent.record.chain import read_blob, read_ledger
from agent.record.events import Noticed, Scored, StopReason
from agent.record.files import FileHashes
from agent.record.history import History, fold
from agent.report.report import report_differences, write_report
from sandbox.contract.errors import SandboxError
from sandbox.contract.run import RunResult, RunSpec
from sandbox.machine import state_directory
from tests.support import sessions
from tests.support.labs import work
from tests.support.nights import Place


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = sessions.sampled(tmp_path_factory.mktemp("sampled"))
    write(place.directory)
    return place


@pytest.fixture
def copy(tmp_path: Path, night: Place) -> Path:
    return Path(shutil.copytree(night.directory, tmp_path / "night"))


def write(directory: Path) -> None:
    write_report(directory, read_ledger(directory), lambda sha: read_blob(directory, sha))


def found(directory: Path) -> list[str]:
    return [difference.what for difference in audit(directory, read_ledger(directory))]


def of_report(directory: Path) -> list[str]:
    get_blob = lambda sha: read_blob(directory, sha)  # noqa: E731
    return list(report_differences(directory, read_ledger(directory), get_blob))


def checkpoint(directory: Path) -> Path:
    return max((directory / "checkpoints").iterdir())


# --- what the audit says ----------------------------------------------------------------------

CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "the program": (
        lambda d: (d / "program.md").write_text("# Lower it by any means\n"),
        "program.md is not the one that the session began with",
    ),
    "the scorer": (
        lambda d: (d / "fixed" / "evaluate.py").write_text("print(0.1)\n"),
        "fixed/evaluate.py is another one, not what the session began with",
    ),
    "a module beside the scorer": (
        lambda d: (d / "fixed" / "json.py").write_text(""),
        "fixed/json.py is on no record, not what the session began with",
    ),
    "a checkpoint": (
        lambda d: (checkpoint(d) / "point.json").write_text('{"x": 3.0, "y": 16, "noise": 0}'),
        "/point.json is another one, not what the training left",
    ),
    "a file in a checkpoint": (
        lambda d: (checkpoint(d) / "more.bin").write_text(""),
        "/more.bin is on no record, not what the training left",
    ),
    "a link in a checkpoint": (
        lambda d: (checkpoint(d) / "link").symlink_to("/etc/passwd"),
        "link cannot be read as a plain file, not what the training left",
    ),
    "a checkpoint of nobody": (
        lambda d: shutil.copytree(checkpoint(d), d / "checkpoints" / "77-7"),
        "checkpoints/77-7/point.json is on no record, not what the training left",
    ),
    "the workspace": (
        lambda d: (d / "workspace" / "train.py").write_text("X = 3.0\n"),
        "workspace/train.py is neither the best's nor an edit on record",
    ),
    "a file of the workspace": (
        lambda d: (d / "workspace" / "helper.py").write_text("X = 3.0\n"),
        "workspace/helper.py is neither the best's nor an edit on record",
    ),
    "an approved file": (
        lambda d: (d / "approved" / "workspace" / "train.py").write_text("X = 3.0\n"),
        "approved/workspace/train.py is another one, not what was approved",
    ),
    "the approved patch": (
        lambda d: (d / "approved" / "nightlab.patch").unlink(),
        "approved/nightlab.patch is missing, not what was approved",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_is_named_and_all_else_is_whole(change: str, copy: Path) -> None:
    assert [] == found(copy)
    make, words = CHANGES[change]
    make(copy)
    assert 1 == len(found(copy))
    assert words in found(copy)[0]


def test_a_session_that_is_brought_elsewhere_with_its_record_alone_is_whole(
    tmp_path: Path, copy: Path
) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copy(copy / "ledger.jsonl", tmp_path / "bare")
    shutil.copytree(copy / "blobs", tmp_path / "bare" / "blobs")
    assert [] == found(tmp_path / "bare")


@pytest.mark.parametrize("name", ["report.html", "report.md", "results.tsv"])
def test_a_report_that_says_otherwise_is_named_and_an_older_one_is_not(
    name: str, copy: Path
) -> None:
    assert [] == of_report(copy)
    sessions.forge(copy, lambda lines: sessions.resumed(lines, "session", attempts=99))
    assert [] == of_report(copy)  # it tells of an earlier moment, truly
    path = copy / name
    path.write_text(path.read_text().replace("kept", "kept!").replace("keep", "crash"))
    assert [f"{name} is not what the record came to; nightlab report writes it anew"] == of_report(
        copy
    )
    shown = CliRunner().invoke(app, ["audit", "night", "--runs", str(copy.parent)])
    assert 1 == shown.exit_code
    assert f"{name} is not what the record came to" in shown.stdout.replace("\n", " ")


def test_a_report_with_the_head_of_another_ledger_is_named(copy: Path) -> None:
    head = read_ledger(copy)[-1].hash
    path = copy / "report.html"
    path.write_text(path.read_text().replace(head, "0" * 64))
    assert "report.html is not what the record came to" in of_report(copy)[0]


def test_a_ledger_written_anew_is_found_under_whatever_name_its_directory_has(
    tmp_path: Path, copy: Path
) -> None:
    path = tmp_path / "heads.jsonl"
    sessions.forge(copy, lambda ls: ls[0]["event"]["settings"]["record"].update(anchor=str(path)))
    Anchor(path, "night").add(read_ledger(copy))
    write(copy)
    moved = copy.rename(tmp_path / "another-name")
    shown = CliRunner().invoke(app, ["audit", moved.name, "--runs", str(tmp_path)])
    assert 0 == shown.exit_code, shown.stdout
    sessions.forge(moved, lambda ls: sessions.only(ls, "attempt_finished").update(seconds=1.0))
    shown = CliRunner().invoke(app, ["audit", moved.name, "--runs", str(tmp_path)])
    assert (1, True) == (shown.exit_code, "was written anew" in shown.stdout)
    # Also where the one who wrote it anew gave the session another name in it.
    sessions.forge(moved, lambda ls: ls[0]["event"].update(session="another-name"))
    shown = CliRunner().invoke(app, ["audit", moved.name, "--runs", str(tmp_path)])
    assert (1, True) == (shown.exit_code, "holds no head of this session" in shown.stdout)


# --- what is compared before it is used -------------------------------------------------------


def changed_meanwhile(place: Place, lab: Lab, change: Callable[[Path], object]) -> None:
    """Change something once the first candidate has been trained, before it is scored."""

    def outcome(spec: RunSpec, result: RunResult, output: Path | None) -> RunResult:
        del output
        if spec.box == "train" and lab.history.attempts[-1].number == 1:
            change(place.directory)
        return result

    place.boxes.outcome = outcome


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (CHANGES["the scorer"][0], "evaluate.py is another one"),
        (CHANGES["a module beside the scorer"][0], "json.py is on no record"),
        (
            lambda d: (d.parent / "data" / "val" / "tokens.bin").write_bytes(b"easy"),
            "tokens.bin is another one",
        ),
    ],
)
def test_nothing_is_scored_with_what_was_changed(
    tmp_path: Path, change: Callable[[Path], object], words: str
) -> None:
    place = with_data(tmp_path)
    lab = place.begin("tpe")
    changed_meanwhile(place, lab, change)
    ended = work(lab, place.program)
    assert StopReason.SANDBOX_FAULT is ended.reason
    assert words in ended.explanation
    events = [entry.event for entry in read_ledger(place.directory)]
    assert not [e for e in events if isinstance(e, Scored) and e.attempt > 0]


def test_without_the_wall_the_changed_scorer_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lab, "_refuse_changed", lambda *_: None)
    place = with_data(tmp_path)
    lab = place.begin("tpe")
    changed_meanwhile(place, lab, CHANGES["the scorer"][0])
    assert StopReason.ATTEMPTS is work(lab, place.program).reason
    assert ["fixed/evaluate.py is another one, not what the session began with"] == found(
        place.directory
    )


def test_a_changed_checkpoint_is_not_scored_on_holdout_but_trained_again(tmp_path: Path) -> None:
    place = Place(tmp_path, changes={"session": {"attempts": 4}})
    lab = place.begin("tpe")
    trainings: list[int] = []

    def outcome(spec: RunSpec, result: RunResult, output: Path | None) -> RunResult:
        is_first = not trainings and any(m.source.name == "holdout" for m in spec.mounts)
        if spec.box == "scorer" and is_first:  # the baseline's first; what follows is changed
            trainings.append(place.boxes.trainings)
            best = lab.history.best
            assert best is not None
            for path in (place.directory / "checkpoints").glob(f"{best.number}-*"):
                (path / "point.json").write_text('{"x": 3.0, "y": 16.0, "noise": 0.0}')
        return result

    place.boxes.outcome = outcome
    work(lab, place.program)
    history = fold(entries := read_ledger(place.directory))
    assert history.best is not None
    assert history.best is not history.baseline
    (value,) = history.best.values("holdout").values()
    assert value > 0.06  # the changed one would have 0.05, the least there is
    assert trainings[0] + 1 == place.boxes.trainings
    notices = [e.event for e in entries if isinstance(e.event, Noticed)]
    assert [n for n in notices if n.kind == "checkpoint_changed" and "point.json" in n.explanation]
    # Those of its other seeds lie there as they were changed, and are used for nothing.
    assert all("not what the training left" in what for what in found(place.directory))


def with_data(root: Path) -> Place:
    """A place whose prepared data is on record, file by file."""
    for split in ("train", "val", "holdout"):
        (root / "data" / split).mkdir(parents=True)
        (root / "data" / split / "tokens.bin").write_bytes(split.encode())
    return Place(root, changes={"session": {"attempts": 3}})


# --- hashes, and data on record ---------------------------------------------------------------


def test_a_file_is_read_again_when_it_changed_also_if_its_time_was_set_back(
    tmp_path: Path,
) -> None:
    path, hashes = tmp_path / "file", FileHashes()
    path.write_bytes(b"one")
    first, stat = hashes.of(path), path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert first != hashes.of(path)
    assert FileHashes().of(path) == hashes.of(path)


def test_a_link_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"")
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(OSError, match="symbolic links"):
        FileHashes().of(tmp_path / "link")


def test_prepared_data_that_was_changed_is_named(tmp_path: Path, copy: Path) -> None:
    then = {"files": {"val": {"tokens.bin": "a", "meta.json": "b"}}}
    now = {"files": {"val": {"tokens.bin": "c", "more": "d", "meta.json": "b"}}}
    assert ["val/more", "val/tokens.bin"] == data_differences(then, now)
    environ = {"XDG_STATE_HOME": str(tmp_path / "state"), "HOME": str(tmp_path)}
    history = fold(read_ledger(copy))
    assert history.session is not None
    assert [] == data_on_this_machine(history.session, copy, environ)  # it is not here
    place = made_data(history, copy, environ)
    assert [] == data_on_this_machine(history.session, copy, environ)
    (place / "val" / "tokens.bin").write_bytes(b"other")
    changed = data_on_this_machine(history.session, copy, environ)
    assert ["the data's val/tokens.bin is another one"] == changed


def made_data(history: History, place: Path, environ: dict[str, str]) -> Path:
    """Prepared data where these settings look for it, and on record."""
    assert history.session is not None
    state = state_directory(environ)
    directory = data_directory(history.in_force, place / "workspace", state)
    assert directory is not None
    for split in ("train", "val", "holdout"):
        (directory / split).mkdir(parents=True)
        (directory / split / "tokens.bin").write_bytes(split.encode())
    (directory / "manifest.json").write_text("{}")
    files = {s: FileHashes().below(directory / s) for s in ("train", "val", "holdout")}
    facts = {"files": files, "manifest_sha256": FileHashes().of(directory / "manifest.json")}
    history.session = history.session.model_copy(update={"data": facts})
    return directory


def test_the_refusal_is_an_error_of_ours_and_says_where_to_look(tmp_path: Path) -> None:
    place = with_data(tmp_path)
    lab = place.begin("tpe")
    with lab.ledger:
        (place.directory / "fixed" / "evaluate.py").write_text("")
        with pytest.raises(SandboxError) as refused:
            run_attempt(lab, "baseline", "the files as they are", "nightlab")
    assert "nightlab audit" in refused.value.hint
