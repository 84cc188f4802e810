"""Reads trackers' files with the trackers' own libraries, as JSON on stdout.

It runs as a process of its own: these libraries change the interpreter that loads them.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Stored = dict[str, Any]
WANDB_BLOCK_BYTES, WANDB_FILE_HEADER_BYTES, WANDB_CHUNK_HEADER_BYTES = 32_768, 7, 7


def tensorboard_runs(directory: Path) -> Iterator[Stored]:
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.plugin_util import markdown_to_safe_html
    from tensorboard.plugins.hparams import metadata
    from tensorboard.util.tensor_util import make_ndarray

    every_point = {"scalars": 0}
    events = EventMultiplexer(tensor_size_guidance=every_point)
    events.AddRunsFromDirectory(str(directory))
    for run, tags in events.Reload().Runs().items():
        stored: Stored = {"key": run, "metrics": {}, "curves": {}, "texts": {}, "html": {}}
        for tag in tags["tensors"]:
            kind = events.SummaryMetadata(run, tag).plugin_data.plugin_name
            values = [(e.step, make_ndarray(e.tensor_proto)) for e in events.Tensors(run, tag)]
            if kind == "text":
                text = values[-1][1].item().decode()
                stored["texts"][tag] = text
                stored["html"][tag] = markdown_to_safe_html(text)
            elif kind == "scalars" and "/" in tag:
                stored["curves"][tag] = [[step, float(value)] for step, value in values]
            elif kind == "scalars":
                ((_, number),) = values
                stored["metrics"][tag] = float(number)
        content = events.SummaryMetadata(run, metadata.SESSION_START_INFO_TAG).plugin_data.content
        hparams = metadata.parse_session_start_info_plugin_data(content).hparams
        knobs = {name: getattr(v, v.WhichOneof("kind")) for name, v in hparams.items()}
        stored["verdict"] = knobs.pop("verdict")
        yield stored | {"knobs": knobs}


def mlflow_runs(directory: Path) -> Iterator[Stored]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{directory}/mlflow.db")
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            tags, names = run.data.tags, run.data.metrics
            history = {n: client.get_metric_history(run.info.run_id, n) for n in names}
            yield {
                "key": f"{experiment.name}/{run.info.run_name}",
                "metrics": {n: v for n, v in names.items() if "/" not in n},
                "curves": {
                    n: [[m.step, m.value] for m in found]
                    for n, found in history.items()
                    if "/" in n
                },
                "texts": tags | {"status": run.info.status},
                "knobs": run.data.params,
                "verdict": tags["verdict"],
            }


def wandb_runs(directory: Path) -> Iterator[Stored]:
    from wandb.proto import wandb_internal_pb2

    for path in directory.glob("wandb/offline-run-*/*.wandb"):
        stored: Stored = {"metrics": {}, "curves": {}}
        for body in wandb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(body)  # type: ignore[attr-defined]
            match record.WhichOneof("record_type"):
                case "run":
                    config = {u.key: json.loads(u.value_json) for u in record.run.config.update}
                    stored["key"] = record.run.display_name.replace(" ", "/")
                    stored |= {"knobs": config.pop("knobs"), "verdict": config["verdict"]}
                    stored["texts"] = config | {"notes": record.run.notes}
                case "history":
                    row = {
                        "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                        for item in record.history.item
                    }
                    _add_row(stored["curves"], row)
                case "summary":
                    for item in record.summary.update:
                        name = "/".join(item.nested_key) or item.key
                        if "/" not in name and not name.startswith("_"):
                            stored["metrics"][name] = json.loads(item.value_json)
                case "exit":
                    stored["texts"]["status"] = str(record.exit.exit_code)
        yield stored


def _add_row(curves: dict[str, list[list[float]]], row: dict[str, float]) -> None:
    (step_name,) = [name for name in row if name.endswith("/step")]
    for name, value in row.items():
        if "/" in name and name != step_name:
            curves.setdefault(name, []).append([row[step_name], value])


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file, which has the framing of a LevelDB log.

    The library's own reader of these files is in Go and only uploads.
    """
    place, parts = WANDB_FILE_HEADER_BYTES, b""
    while place + WANDB_CHUNK_HEADER_BYTES <= len(content):
        left = WANDB_BLOCK_BYTES - place % WANDB_BLOCK_BYTES
        if left < WANDB_CHUNK_HEADER_BYTES:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        start = place + WANDB_CHUNK_HEADER_BYTES
        parts, place = parts + content[start : start + size], start + size
        if kind in (1, 4):  # whole, or the last of several
            yield parts
            parts = b""


READERS = {"tensorboard": tensorboard_runs, "mlflow": mlflow_runs, "wandb-offline": wandb_runs}

if __name__ == "__main__":
    sys.stdout.write(json.dumps(list(READERS[sys.argv[1]](Path(sys.argv[2])))))
