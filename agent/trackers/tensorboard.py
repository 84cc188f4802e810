"""TensorBoard event files: one folder for each attempt.

The file's name holds the attempt's fingerprint and it appears whole or not at all, so that a file
that is there is right. Metrics have the attempt's number as their step: side by side they show
the night.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from agent.text import for_markdown
from agent.trackers.attempts import MAX_TEXT_CHARACTERS, Content, TrackedRun


class TensorBoardFiles:
    """A folder for `tensorboard --logdir`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def holds(self, run: TrackedRun) -> bool:
        folder = self._folder(run)
        return folder.is_dir() and [_file_name(run)] == [path.name for path in folder.iterdir()]

    def put(self, run: TrackedRun, content: Content) -> None:
        folder = self._folder(run)
        whole = folder.parent / f".{folder.name}"
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir(parents=True)
        with (whole / _file_name(run)).open("wb") as file:
            # Not EventFileWriter, which names the file itself and writes from its own thread.
            writer = RecordWriter(file)
            for event in _events(run, content):
                writer.write(event.SerializeToString())
        shutil.rmtree(folder, ignore_errors=True)  # a rename replaces empty folders alone
        whole.rename(folder)

    def close(self) -> None:
        """Nothing is open between two attempts."""

    def _folder(self, run: TrackedRun) -> Path:
        return self._directory / run.group / run.name


def _file_name(run: TrackedRun) -> str:
    return f"events.out.tfevents.{int(run.finished_seconds)}.nightlab.{run.fingerprint}"


def _events(run: TrackedRun, content: Content) -> Iterator[Event]:
    began, ended = run.started_at.timestamp(), run.finished_seconds
    yield Event(wall_time=began, file_version="brain.Event:2")
    compared = {"verdict": run.verdict, **content.knobs}
    yield Event(wall_time=began, summary=hparams_pb(compared, run.key, began))
    for name, text in {"hypothesis": run.hypothesis, **run.facts}.items():
        shown = for_markdown(text, 2 * MAX_TEXT_CHARACTERS)
        yield Event(wall_time=began, step=run.attempt, summary=text_pb(name, shown))
    for curve in content.curves:
        for step, time, row in curve.rows():
            for name, number in row.items():
                yield Event(wall_time=time, step=step, summary=scalar_pb(name, number))
    for name, number in run.metrics.items():
        yield Event(wall_time=ended, step=run.attempt, summary=scalar_pb(name, number))
