"""Measures what a score costs, and how far honest models are from a false alarm.

`python -m tests.bench.bench_score [--budget-seconds S] [--scores N] [--checks K] [--plans N]`:
trains the shipped workload once, then scores its checkpoint N times in real boxes; a score takes
from before its first box is made until all are gone. Then the same model's nats are computed in
bfloat16 and in float32, each in several ways (attention by hand or in one kernel, products by
oneDNN or without it), which round differently everywhere, and held against fresh secret plans:
every row of either box gets its answer from a way drawn at random. Two boxes of one score differ by
less, since both compute alike. Last, what a cheat risks that looks ahead only where it gains the
most.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from agent.attempt.boxes import model_names, model_spec, scorer_spec
from agent.attempt.lab import Lab, fresh_directory, make_readable
from agent.attempt.sheet import parse_sheet
from agent.machine.setup import make_data
from agent.program import load_program
from agent.settings import Settings
from sandbox import DockerExecutor, Outcome
from sandbox.engine.find import find_engine
from sandbox.image.copies import ensure_copies
from sandbox.image.image import find_image
from sandbox.image.profiles import find_profile
from sandbox.machine import state_directory
from tests.support.boxes import box_spec, shipped_recipe
from tests.support.labs import score_in_boxes, scoring_lab
from tests.support.scorer import load_evaluate

ROOT = Path(__file__).parents[2]
WORKSPACE = ROOT / "workspace"
WAYS = ("by-hand", "one-kernel", "without-onednn")
"""How an honest model may compute; see `ANSWERS`."""
GAINS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1)
MEANS = ("mean_at_cut", "mean_before_cut", "learnt")

ANSWERS = """
import sys
from pathlib import Path
sys.path[:0] = ["/workspace", "/evaluate"]
import evaluate, numpy as np, torch, train
split = evaluate.read_split(Path("/data"))
SIZE = 16
for dtype in (torch.bfloat16, torch.float32):
    for way in sys.argv[1:]:
        fused, plain_products = way == "one-kernel", way == "without-onednn"
        train.way_of = lambda device: train.Way(device, dtype, fused=fused, compiled=False)
        predict = train.load_model("/checkpoint", "cpu")
        nats = np.empty(split.inputs.shape, "<f4")
        for start in range(0, len(nats), SIZE):
            ids = torch.from_numpy(split.inputs[start : start + SIZE].astype(np.int64))
            with torch.inference_mode(), torch.backends.mkldnn.flags(enabled=not plain_products):
                answers = predict(ids).float().numpy()
            for row, logits in enumerate(answers, start):
                nats[row] = evaluate.nats_of(logits, split.targets[row])
        np.save(f"/out/{str(dtype)[6:]}-{way}.npy", nats)
"""
"""Runs in a box: the honest model's nats, in each precision and each of the ways."""


def make_lab(place: Path) -> Lab:
    """The shipped workload, on the engine, image and data that set-up chose."""
    state_dir = state_directory(os.environ)
    engine = find_engine(state_dir, environ=os.environ)
    settings: Settings = load_program(ROOT / "program.md").settings
    executor = DockerExecutor(engine.base_url, engine.api_version, place / "runs")
    fixed = fresh_directory(place / "fixed")
    shutil.copy(WORKSPACE / "evaluate.py", fixed)
    shutil.copy(WORKSPACE / "train.py", fresh_directory(place / "files"))
    make_readable(place)
    image = find_image(engine, shipped_recipe(), state_dir=state_dir)
    copies = ensure_copies(engine, image, state_dir=state_dir, say=print)
    return scoring_lab(
        place,
        settings,
        executor,
        session=f"score-{os.getpid()}",
        image_id=image.image_id,
        copies={"model": copies.model, "check": copies.check},
        environment=find_profile("cpu").environment,
        data_dir=make_data(settings, WORKSPACE, state_dir, lambda _: None),
    )


def split_of(lab: Lab, name: str) -> Path:
    """Where a split's tokens lie."""
    assert lab.worker.data_dir is not None
    return lab.worker.data_dir / name


def in_a_box(lab: Lab, output: Path, mounts: dict[Path, str], *argv: str, **env: str) -> None:
    """Run something with the train box's limits, and keep what it leaves."""
    limits = lab.settings.train_limits().model_dump()
    spec = box_spec(*argv, image=lab.worker.image_id, mounts=mounts, **limits)
    changes = {"run_id": f"{lab.session}-{output.name}", "working_directory": "/workspace"}
    spec = spec.model_copy(update=changes | {"environment": lab.worker.environment | env})
    result = lab.worker.executor.run(spec, output_dir=fresh_directory(output))
    assert Outcome.OK == result.outcome, result.log.tail
    make_readable(output)


def train(lab: Lab, budget_seconds: float) -> Path:
    """A checkpoint of the shipped train.py."""
    checkpoint = lab.worker.directory / "checkpoint"
    env = {"NIGHTLAB_SEED": "1", "NIGHTLAB_BUDGET_SECONDS": f"{budget_seconds:g}"}
    env |= {"NIGHTLAB_DATA": "/data", "NIGHTLAB_OUTPUT": "/out"}
    mounts = {lab.worker.directory / "files": "/workspace", split_of(lab, "train"): "/data"}
    in_a_box(lab, checkpoint, mounts, "python3", "train.py", **env)
    return checkpoint


def score_seconds(
    lab: Lab, checkpoint: Path, number: int, checks: int
) -> tuple[float, dict[str, Any]]:
    """How long one score takes, and its details."""
    began = time.monotonic()
    run_id, files = f"{lab.session}-{number}", lab.worker.directory / "files"
    names = model_names(run_id, checks)
    models = [model_spec(lab.worker, name, files, checkpoint) for name in names]
    scorer = scorer_spec(lab.worker, f"{run_id}-scorer", seed=1, split="val", checks=checks)
    sheet_folder = fresh_directory(lab.worker.directory / "sheet")
    found = score_in_boxes(lab.worker.run, models, scorer, sheet_folder)
    seconds = time.monotonic() - began
    assert found.sheet is not None
    sheet = parse_sheet(found.sheet)
    assert sheet.valid, sheet.explanation
    return seconds, sheet.details


def honest_nats(lab: Lab, checkpoint: Path) -> dict[str, list[np.ndarray[Any, Any]]]:
    """For each precision the nats of all rows, once for each way."""
    mounts = {lab.worker.directory / "files": "/workspace", lab.worker.fixed_dir: "/evaluate"}
    mounts |= {checkpoint: "/checkpoint", split_of(lab, "val"): "/data"}
    output = lab.worker.directory / "nats"
    in_a_box(lab, output, mounts, "python3", "-c", ANSWERS, *WAYS)
    found = {
        dtype: [np.load(output / f"{dtype}-{way}.npy").astype(float) for way in WAYS]
        for dtype in ("bfloat16", "float32")
    }
    for dtype, tables in found.items():
        if all((table == tables[0]).all() for table in tables):
            sys.exit(f"all ways round alike in {dtype}: nothing was varied, so nothing is measured")
    return found


def false_alarms(
    lab: Lab, tables: list[np.ndarray[Any, Any]], plans: int
) -> dict[str, float | dict[str, float]]:
    """Hold honest answers, each row rounded in a way drawn at random, against fresh plans."""
    evaluate = load_evaluate()
    split = evaluate.read_split(split_of(lab, "val"))
    stacked = np.stack(tables)
    found: list[dict[str, float]] = []
    alarms = 0
    for secret in range(plans):
        random = np.random.default_rng(secret)
        true = evaluate.make_true_plan(split, random)
        both = true, evaluate.make_check_plan(split, true, random)
        rows = np.arange(len(split.inputs))
        nats = stacked[random.integers(len(tables), size=len(rows)), rows]
        asked = both[1].rows
        probe_nats = stacked[random.integers(len(tables), size=len(asked)), asked]
        found.append(evaluate.compare(split, both, nats, probe_nats))
        try:
            evaluate.refuse_cheating(found[-1])
        except evaluate.InvalidError:
            alarms += 1
    return {
        "plans": plans,
        "alarms": alarms,
        "largest_difference": max(
            max(f["largest_difference_of_same_rows"], f["largest_difference_before_cut"])
            for f in found
        ),
        "largest_noise": max(f["noise"] for f in found),
        **{name: spread(found, name, evaluate) for name in MEANS},
    }


def spread(found: list[dict[str, float]], name: str, evaluate: Any) -> dict[str, float]:
    """How a mean is spread, in its standard errors, and how near it comes to its tolerance."""
    errors = [f[name] / f[name + "_error"] for f in found if f[name + "_error"]]
    tolerances = [evaluate.MEAN_ERRORS * f[name + "_error"] + evaluate.MEAN_FLOOR for f in found]
    near = [abs(f[name]) / t for f, t in zip(found, tolerances, strict=True)]
    deviation = statistics.pstdev(errors) if errors else 0.0
    room = (evaluate.MEAN_ERRORS / deviation) if deviation else math.inf
    return {
        "deviation_in_errors": deviation,
        "largest_in_errors": max(map(abs, errors), default=0.0),
        "nearest_to_tolerance": max(near),
        "fitted_false_alarm": math.erfc(room / math.sqrt(2)),
    }


def bound(lab: Lab, nats: np.ndarray[Any, Any]) -> dict[str, dict[str, float]]:
    """What a cheat risks that knows the next token where that gains the most, and nowhere else."""
    evaluate = load_evaluate()
    split = evaluate.read_split(split_of(lab, "val"))
    losses = np.sort(nats[split.counted])[::-1]
    gains = losses.cumsum() / math.log(2) / split.total_bytes
    found = {}
    for gain in GAINS:
        share = float(np.searchsorted(gains, gain) + 1) / len(losses)
        found[f"{gain:g} bpb"] = {
            "share_of_positions": share,
            "caught": 1 - (1 - share) ** evaluate.PROBES,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--budget-seconds", type=float, default=60.0)
    parser.add_argument("--scores", type=int, default=9)
    parser.add_argument("--checks", type=int, default=0, help="check boxes of each score")
    parser.add_argument("--plans", type=int, default=1000)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        lab = make_lab(Path(directory))
        checkpoint = train(lab, options.budget_seconds)
        scores = [
            score_seconds(lab, checkpoint, number, options.checks)
            for number in range(options.scores)
        ]
        seconds = [one for one, _ in scores]
        found: dict[str, Any] = {
            "budget_seconds": options.budget_seconds,
            "median_seconds": statistics.median(seconds),
            "seconds": [round(one, 2) for one in seconds],
            "share_of_budget": statistics.median(seconds) / options.budget_seconds,
        }
        said = ("load_seconds", "model_seconds", "probes", "hidden_gain")
        found |= {name: scores[-1][1][name] for name in said if name in scores[-1][1]}
        if options.plans:
            nats = honest_nats(lab, checkpoint)
            found["bound"] = bound(lab, nats["bfloat16"][0])
            for dtype, tables in nats.items():
                found[dtype] = false_alarms(lab, tables, options.plans)
    shown = json.dumps(found, indent=1) if options.json else "\n".join(lines_of(found))
    sys.stdout.write(shown + "\n")


def lines_of(found: dict[str, Any], indent: str = "") -> list[str]:
    """The figures for a reader."""
    lines = []
    for name, value in found.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", *lines_of(value, indent + "  ")]
        else:
            shown = f"{value:.3g}" if isinstance(value, float) else str(value)
            lines.append(f"{indent}{name:<24} {shown}")
    return lines


if __name__ == "__main__":
    main()
