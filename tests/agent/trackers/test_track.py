"""What trackers hold is what the ledger says, once, whatever happened in between."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agent.candidate.knobs import find_knobs
from agent.cli.app import app
from agent.cli.night import _work
from agent.record.attempts import Attempt
from agent.record.chain import read_ledger
from agent.record.curves import packed, unpacked
from agent.record.events import Noticed, Scored, Verdict
from agent.record.history import fold
from agent.text import for_markdown, one_line
from agent.trackers.attempts import MAX_TEXT_CHARACTERS, content_of, tracked_runs
from agent.trackers.export import LOCK_NAME, Export, Tracker, exporter, offline
from tests.support.histories import Night, baseline, night, start
from tests.support.nights import Place

READER = Path(__file__).parents[2] / "support" / "tracker_files.py"
EXPORT = """
import os, sys
from pathlib import Path
from agent.trackers.export import Export, Tracker
session, tracker, files = sys.argv[1:]
sys.exit(Export(Tracker(tracker), Path(files), os.environ)(Path(session)) or 0)
"""
"""A process that can be killed, or given another environment."""
MADE = night(8, hostile=True)
PATIENCE_SECONDS = 100.0


@dataclass
class Tracked:
    """One tracker, where it keeps its files, and the session that it follows."""

    tracker: Tracker
    root: Path

    @property
    def session(self) -> Path:
        return self.root / "session"

    @property
    def files(self) -> Path:
        return self.root / "files"

    @property
    def argv(self) -> list[str]:
        paths = (str(self.session), self.tracker.value, str(self.files))
        return [sys.executable, "-P", "-c", EXPORT, *paths]

    def export(self) -> str:
        return Export(self.tracker, self.files, os.environ)(self.session)

    def read(self) -> dict[str, dict[str, Any]]:
        """The runs by attempt, as the tracker's own library reads them."""
        argv = [sys.executable, "-P", str(READER), self.tracker.value, str(self.files)]
        read = subprocess.run(argv, check=True, capture_output=True, timeout=PATIENCE_SECONDS)
        runs = json.loads(read.stdout)
        by_attempt = {run["key"].split("/")[-1]: run for run in runs}
        assert len(runs) == len(by_attempt)
        return by_attempt

    def count(self) -> int:
        """How many runs were at least begun."""
        if self.tracker is Tracker.MLFLOW:
            return _rows(self.files / "mlflow.db", "SELECT count(*) FROM runs")
        pattern = "*/*/events*" if self.tracker is Tracker.TENSORBOARD else "wandb/*/*.wandb"
        return len(list(self.files.glob(pattern)))

    def hashes(self) -> dict[str, str]:
        """Every file that belongs to the tracker, as it is now."""
        return {
            str(path.relative_to(self.files)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.files.rglob("*")
            if path.is_file() and ".nightlab" not in path.parts
        }


def _rows(store: Path, question: str) -> int:
    try:
        connection = sqlite3.connect(f"file:{store}?mode=ro", uri=True)
        try:
            return int(connection.execute(question).fetchone()[0])
        finally:
            connection.close()
    except sqlite3.OperationalError:  # not made yet, or being written
        return 0


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tracker, Path], Tracked]:
    """A tracker's files with nothing in them yet: it takes MLflow seconds to make its tables."""
    made: dict[Tracker, Tracked] = {}

    def begin(tracker: Tracker, root: Path) -> Tracked:
        if tracker not in made:
            made[tracker] = Tracked(tracker, tmp_path_factory.mktemp("begun"))
            Night(entries=_up_to(0)[:1], blobs=MADE.blobs).write(made[tracker].session)
            assert "" == made[tracker].export()
        shutil.copytree(made[tracker].files, root / "files")
        return Tracked(tracker, root)

    return begin


@pytest.fixture(scope="module", params=list(Tracker))
def whole(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    begun: Callable[[Tracker, Path], Tracked],
) -> tuple[Tracked, dict[str, dict[str, Any]]]:
    """A whole night, exported at once, and what can be read of it."""
    tracked = begun(request.param, tmp_path_factory.mktemp("whole"))
    MADE.write(tracked.session)
    assert tracked.export() == ""
    return tracked, tracked.read()


def finished(made: Night) -> dict[str, Attempt]:
    return {f"attempt-{a.number:04d}": a for a in made.history.attempts if a.finished}


def exactly(tracker: Tracker, expected: Any) -> Any:
    """TensorBoard keeps 32 bits of a number."""
    return pytest.approx(expected, rel=1e-6) if tracker is Tracker.TENSORBOARD else expected


def test_every_attempt_with_a_verdict_is_one_run(
    whole: tuple[Tracked, dict[str, dict[str, Any]]],
) -> None:
    _, runs = whole
    verdicts = {n: a.finished.verdict.value for n, a in finished(MADE).items() if a.finished}
    assert verdicts == {name: run["verdict"] for name, run in runs.items()}
    assert {v.value for v in Verdict} <= set(verdicts.values())


def test_metrics_are_the_ledgers_numbers(whole: tuple[Tracked, dict[str, dict[str, Any]]]) -> None:
    tracked, runs = whole
    for name, attempt in finished(MADE).items():
        found = runs[name]["metrics"]
        assert attempt.finished is not None
        value = attempt.finished.value
        assert (value is None) == ("val_bpb" not in found)
        assert value is None or exactly(tracked.tracker, value) == found["val_bpb"]
        assert exactly(tracked.tracker, attempt.cost_usd) == found["cost_usd"]
        assert exactly(tracked.tracker, attempt.finished.seconds) == found["attempt_seconds"]
        seconds = sum(r.result.wall_seconds for r in attempt.runs if r.result.box == "train")
        assert exactly(tracked.tracker, seconds) == found["train_seconds"]
        if numbers := attempt.finished.arithmetic:
            assert exactly(tracked.tracker, numbers.gain) == found["gain"]
            assert exactly(tracked.tracker, numbers.noise) == found["noise"]
        assert 3 * 2**29 == found["peak_memory_bytes"]


def test_curves_are_those_of_every_training(
    whole: tuple[Tracked, dict[str, dict[str, Any]]],
) -> None:
    tracked, runs = whole
    for name, attempt in finished(MADE).items():
        expected: dict[str, list[list[float]]] = {}
        trainings = [run for run in attempt.runs if run.result.box == "train"]
        assert trainings
        for number, training in enumerate(trainings, start=1):
            assert training.curve is not None
            prefix = "train" if number == 1 else f"train-{number}"
            for point in unpacked(MADE.get_blob(training.curve)):
                for key in ("seconds", "loss", "tokens"):
                    row = [int(point["step"]), point[key]]
                    expected.setdefault(f"{prefix}/{key}", []).append(row)
        assert sorted(expected) == sorted(runs[name]["curves"])
        for key, rows in expected.items():
            found = runs[name]["curves"][key]
            assert [row[0] for row in rows] == [row[0] for row in found]
            values = [row[1] for row in rows]
            assert exactly(tracked.tracker, values) == [row[1] for row in found]


def test_hostile_hypotheses_are_text(whole: tuple[Tracked, dict[str, dict[str, Any]]]) -> None:
    tracked, runs = whole
    for name, attempt in finished(MADE).items():
        hypothesis = one_line(attempt.started.hypothesis, MAX_TEXT_CHARACTERS)
        escaped = for_markdown(hypothesis, 2 * MAX_TEXT_CHARACTERS)
        texts = runs[name]["texts"]
        if tracked.tracker is Tracker.TENSORBOARD:
            assert escaped == texts["hypothesis"]
            html = runs[name]["html"]["hypothesis"]
            assert set(_tags(html)) <= {"p", "/p"}
        else:
            assert hypothesis == texts["hypothesis"]
            assert escaped in (texts.get("mlflow.note.content"), texts.get("notes"))


def _tags(html: str) -> list[str]:
    return [piece.split(">")[0].split()[0] for piece in html.split("<")[1:]]


def test_what_was_tried_can_be_compared(whole: tuple[Tracked, dict[str, dict[str, Any]]]) -> None:
    _, runs = whole
    assert 4 == float(runs["attempt-0000"]["knobs"]["DEPTH"])
    for name, attempt in finished(MADE).items():
        run = runs[name]
        source = MADE.get_blob(attempt.started.files["train.py"])
        expected = {knob.name: knob.value for knob in find_knobs("train.py", source)}
        assert expected == {knob: float(value) for knob, value in run["knobs"].items()}
        assert "sha256:" + "5" * 64 == run["texts"]["image"].replace("\\", "")
        assert "cpu" == run["texts"]["profile"]
        assert "seeds" in run["texts"]


def test_a_second_export_changes_nothing(whole: tuple[Tracked, dict[str, dict[str, Any]]]) -> None:
    tracked, _ = whole
    before = tracked.hashes()
    assert "" == tracked.export()
    assert before == tracked.hashes()


@pytest.mark.slow
def test_a_night_that_broke_is_told_once_and_with_what_came_later(
    whole: tuple[Tracked, dict[str, dict[str, Any]]],
    begun: Callable[[Tracker, Path], Tracked],
    tmp_path: Path,
) -> None:
    """Half the night; then killed while the rest is written; then gone on with."""
    tracked, expected = begun(whole[0].tracker, tmp_path), whole[1]
    Night(entries=_up_to(4), blobs=MADE.blobs).write(tracked.session)
    assert "" == tracked.export()
    half = tracked.count()
    assert 5 == half
    MADE.write(tracked.session)
    _kill_when(tracked, lambda: tracked.count() > half)
    later = Night(now=MADE.now, entries=list(MADE.entries), blobs=MADE.blobs)
    scored = next(e.event for e in MADE.entries if isinstance(e.event, Scored))
    later.add(scored.model_copy(update={"split": "holdout", "value": 2.5}))
    later.write(tracked.session)
    assert "" == tracked.export()
    found = tracked.read()
    assert 2.5 == found["attempt-0000"]["metrics"].pop("val_bpb_holdout")
    for runs in (found, expected):
        runs["attempt-0000"]["texts"].pop("nightlab.fingerprint", None)
    assert expected == found


def _up_to(attempt: int) -> list[Any]:
    ends = [e.event.type == "attempt_finished" and e.event.attempt == attempt for e in MADE.entries]
    return MADE.entries[: ends.index(True) + 1]


def _kill_when(tracked: Tracked, is_time: Callable[[], bool]) -> None:
    child = subprocess.Popen(
        tracked.argv,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_time() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


@pytest.fixture
def internet() -> Iterator[tuple[str, list[bytes]]]:
    """What stands for every address outside: it counts who comes."""
    server, visits = socket.create_server(("127.0.0.1", 0)), list[bytes]()

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(1)
                visits.append(connection.recv(200))

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}", visits
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


@pytest.mark.parametrize("tracker", Tracker)
def test_nothing_goes_to_the_network(
    tracker: Tracker, tmp_path: Path, internet: tuple[str, list[bytes]]
) -> None:
    address, visits = internet
    tracked = Tracked(tracker, tmp_path)
    night(1).write(tracked.session)
    proxies = {f"{name}_proxy": address for name in ("http", "https", "all")}
    keys = {"WANDB_MODE": "online", "WANDB_BASE_URL": address, "WANDB_API_KEY": "k" * 40}
    done = subprocess.run(
        tracked.argv,
        env=os.environ | proxies | {name.upper(): a for name, a in proxies.items()} | keys,
        check=True,
        capture_output=True,
        timeout=PATIENCE_SECONDS,
    )
    assert [] == visits
    assert (b"", b"") == (done.stdout, done.stderr)


def test_an_export_knows_nothing_of_the_persons_keys_and_addresses(tmp_path: Path) -> None:
    person = {
        "PATH": "/bin",
        "ANTHROPIC_API_KEY": "secret",
        "WANDB_API_KEY": "secret",
        "WANDB_MODE": "online",
        "MLFLOW_TRACKING_URI": "http://example.invalid",
        "HTTPS_PROXY": "http://example.invalid",
    }
    given = dict(person)
    with contextlib.suppress(KeyboardInterrupt), offline(given, tmp_path):
        assert "offline" == given["WANDB_MODE"]
        assert ["PATH"] == [name for name in person if given.get(name) == person[name]]
        assert "secret" not in given.values()
        raise KeyboardInterrupt
    assert person == given


@pytest.mark.parametrize("tracker", Tracker)
def test_an_export_leaves_the_process_as_it_was(
    tracker: Tracker,
    begun: Callable[[Tracker, Path], Tracked],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def state() -> tuple[object, ...]:
        handlers = [signal.getsignal(number) for number in signal.valid_signals()]
        return dict(os.environ), sys.exit, sys.excepthook, logging.root.handlers[:], handlers

    tracked, before, others = begun(tracker, tmp_path), state(), _children()
    night(1).write(tracked.session)
    assert "" == tracked.export()
    assert before == state()
    assert ("", "") == capfd.readouterr()
    assert set() == _children() - others


def _children() -> set[str]:
    """The processes that this one has started and that still run."""
    found = Path("/proc/self/task").glob("*/children")
    return {pid for task in found for pid in task.read_text().split()}


def test_an_export_beside_another_one_is_not_waited_for(tmp_path: Path) -> None:
    tracked = Tracked(Tracker.TENSORBOARD, tmp_path)
    night(1).write(tracked.session)
    tracked.files.mkdir()
    with (tracked.files / LOCK_NAME).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "BlockingIOError" in tracked.export()
    assert "" == tracked.export()


def test_a_library_that_is_not_there_is_told_before_the_night(tmp_path: Path) -> None:
    """A command line whose packages are all of ours but one."""
    packages = next(Path(p) for p in sys.path if (Path(p) / "mlflow" / "__init__.py").is_file())
    there = tmp_path / "packages"
    there.mkdir()
    for entry in packages.iterdir():
        if not entry.name.startswith("mlflow"):
            (there / entry.name).symlink_to(entry)
    (there / "mlflow").mkdir()  # a folder of that name is no library
    program = Path(__file__).parents[3] / "program.md"
    words = f"run --program {program} --researcher tpe --track mlflow --runs {tmp_path / 'runs'}"
    ran = subprocess.run(
        [
            sys.executable,
            "-S",
            "-P",
            "-c",
            "from agent.cli.app import main; main()",
            *words.split(),
        ],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
        | {"PYTHONPATH": f"{Path(__file__).parents[3]}:{there}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert (2, "") == (ran.returncode, ran.stdout)
    expected = "error: --track mlflow needs mlflow\npip install 'nightlab[mlflow]'\n"
    assert expected == ran.stderr
    assert not (tmp_path / "runs").exists()


def test_what_is_installed_is_not_missing(tmp_path: Path) -> None:
    made = [exporter(tracker, None, tmp_path, {}) for tracker in Tracker]
    folders = [tmp_path / name for name in ("tensorboard", "mlflow", "wandb")]
    assert folders == [export.directory for export in made if export]


def test_a_night_is_tracked_while_it_goes_on(tmp_path: Path) -> None:
    place = Place(tmp_path, changes={"session": {"attempts": 1}})
    lab = place.begin("random")
    export = Export(Tracker.TENSORBOARD, tmp_path / "files", os.environ)
    with lab.ledger:
        _work(lab, place.program, "random", export, as_json=True)
        names = [f"attempt-{a.number:04d}" for a in lab.ledger.history.attempts if a.finished]
    assert sorted(names) == sorted(p.name for p in (tmp_path / "files").glob("night-*/*"))
    assert 2 == len(names)


def test_a_tracker_that_fails_ends_no_night_and_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "files").write_text("in the way\n")
    place = Place(tmp_path, changes={"session": {"attempts": 2}})
    lab = place.begin("random")
    export = Export(Tracker.TENSORBOARD, tmp_path / "files", os.environ)
    with lab.ledger:
        _work(lab, place.program, "random", export, as_json=True)
    entries = read_ledger(place.directory)
    notices = [e.event.explanation for e in entries if isinstance(e.event, Noticed)]
    told = [n for n in notices if n.startswith("tensorboard was not brought up to date")]
    assert 1 == len(told)
    assert "FileExistsError" in told[0]
    assert 1 == capsys.readouterr().err.count("tensorboard was not brought up to date")
    assert 2 == len(fold(entries).completed)


def test_a_session_can_be_tracked_afterwards(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    night(2).write(runs / "mar7")
    argv = ["report", "mar7", "--runs", str(runs), "--track", "tensorboard"]
    ran = CliRunner().invoke(app, argv)
    assert (0, "") == (ran.exit_code, ran.stderr)
    assert 3 == len(list((runs / "tensorboard").glob("mar7-evening-*/attempt-*/events*")))
    (tmp_path / "file").touch()
    ran = CliRunner().invoke(app, [*argv, "--track-dir", str(tmp_path / "file")])
    assert 3 == ran.exit_code


def test_a_damaged_curve_is_left_out_and_the_rest_is_told() -> None:
    made = Night()
    start(made)
    baseline(made, random.Random(1))
    run = next(tracked_runs(made.entries))
    first, second, _ = (training.curve for training in run.trainings)
    assert first is not None
    assert second is not None
    made.blobs[first] = b'{"names": ["seconds", "loss"], "rows": [[1, NaN]]}'
    content = content_of(run, made.get_blob)
    assert ["train-2", "train-3"] == [curve.name for curve in content.curves]


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ([0, 20, 40], (0, 20, 40)),
        ([20, 20, 40], (0, 1, 2)),
        ([5, 4, 6], (0, 1, 2)),
        ([-1, 0, 1], (0, 1, 2)),
        ([0, None, 1], (0, 1, 2)),
        ([0.2, 0.4, 2], (0, 1, 2)),
        ([0, 1, 1e15], (0, 1, 10**15)),
    ],
)
def test_steps_that_do_not_rise_are_counted_instead(
    own: list[float | None], told: tuple[int, ...]
) -> None:
    made = Night()
    start(made)
    baseline(made, random.Random(1))
    run = next(tracked_runs(made.entries))
    rows = [{"seconds": 1.0, "loss": 2.0} | ({} if s is None else {"step": s}) for s in own]
    assert run.trainings[0].curve is not None
    made.blobs[run.trainings[0].curve] = packed(rows)
    assert told == content_of(run, made.get_blob).curves[0].steps


def test_times_never_leave_the_training() -> None:
    made = Night()
    start(made)
    baseline(made, random.Random(1))
    run = next(tracked_runs(made.entries))
    training = run.trainings[0]
    assert training.curve is not None
    made.blobs[training.curve] = packed([{"seconds": 1e15, "loss": 2.0}])
    (told,) = content_of(run, made.get_blob).curves[0].times
    result = training.result
    assert result.started_at.timestamp() + result.wall_seconds == told


def test_a_fingerprint_changes_with_anything_that_is_told() -> None:
    made = night(3)
    run = list(tracked_runs(made.entries))[1]
    changes: list[dict[str, Any]] = [
        {"hypothesis": "another"},
        {"metrics": run.metrics | {"gain": 1.0}},
        {"facts": run.facts | {"reason": "another"}},
        {"files": {}},
        {"trainings": ()},
    ]
    prints = {run.model_copy(update=change).fingerprint for change in changes}
    assert len(changes) + 1 == len(prints | {run.fingerprint})
