"""The command that measures this machine: calibrate."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from agent.attempt.lab import hashes_of, sha_of
from agent.candidate.own_files import files_of
from agent.cli import flags
from agent.cli.logs import operational_log
from agent.cli.shared import (
    err,
    open_observer,
    out,
    print_event,
    print_table,
    progress,
    say,
    sweep_now,
)
from agent.machine.calibrate import MOST_REPEATS, Bench, calibrate, seconds_left
from agent.machine.calibration import Calibration
from agent.machine.runtime import calibration_path, find_runtime
from agent.machine.setup import own_workspace
from agent.night.session import Runtime
from agent.program import load_program
from agent.settings import Settings
from agent.text import one_line
from sandbox.contract.errors import UsageError
from sandbox.contract.reading import MAX_SCRIPT_BYTES, read_named
from sandbox.engine.host import exclusive
from sandbox.machine import state_directory

MAX_BUDGETS = 6


def calibrate_(
    program: flags.Program = flags.PROGRAM,
    base_image: flags.BaseImage = None,
    budgets: Annotated[
        str, typer.Option("--budgets", help="seconds of a training, commas between")
    ] = "20,60",
    repeats: Annotated[
        int, typer.Option("--repeats", min=2, max=MOST_REPEATS, help="seeds at each budget")
    ] = 3,
    as_json: flags.Json = False,
    verbose: flags.Verbose = False,
) -> None:
    """Measure this machine; propose budget, batch and repeats.

    Ctrl-C loses nothing: the same command goes on with what is not measured yet.
    """
    content = load_program(program)
    settings = content.settings.with_overrides(base_image=base_image)
    wanted = _budgets(budgets)
    runtime = find_runtime(settings, program.parent, os.environ, progress(as_json=as_json))
    source = own_workspace(settings, program.parent)
    path = calibration_path(state_directory(os.environ), runtime.image, settings)
    show = progress(as_json=as_json)
    bench = Bench(
        root=path.with_suffix("") / _digits(source, settings, runtime),
        program=content,
        settings=settings,
        source=source,
        runtime=runtime,
        watched=partial(open_observer, as_json=as_json),
        say=show,
    )
    bench.root.mkdir(parents=True, exist_ok=True)
    with (
        exclusive(bench.root / "lock"),  # a second one would measure the first as a disturbance
        operational_log(bench.root, "calibrate", os.environ, is_verbose=verbose),
    ):
        sweep_now()
        minutes = seconds_left(bench, wanted, repeats) / 60
        trainings = f"{repeats} trainings at {' and '.join(f'{b:g} s' for b in wanted)}"
        show(f"{trainings}, then batches: about {minutes:.0f} minutes")
        try:
            found = calibrate(bench, wanted, repeats)
        except KeyboardInterrupt:
            err.print("stopped; the same command goes on where this was", style="yellow")
            raise
        path.write_text(found.model_dump_json(indent=1), encoding="utf-8")
    if as_json:
        print_event("calibration", **found.model_dump(mode="json"))
    else:
        _show(found)


def _digits(source: Path, settings: Settings, runtime: Runtime) -> str:
    """Of what is trained and scored: another baseline, scorer or data is measured anew.

    And by a nightlab whose settings are others: it could not read what this one wrote.
    """
    files = hashes_of({name: (source / name).read_bytes() for name in files_of(source)})
    scorer = source / "evaluate.py"
    fixed = sha_of(read_named(scorer, MAX_SCRIPT_BYTES)) if scorer.is_file() else None
    form = Settings.model_json_schema()
    facts = [files, runtime.data, settings.workspace.model_dump(), fixed, form]
    return sha_of(json.dumps(facts, sort_keys=True).encode())[:16]


def _budgets(text: str) -> list[float]:
    try:
        budgets = sorted({float(part) for part in text.split(",")})
    except ValueError:
        budgets = []
    if not 1 <= len(budgets) <= MAX_BUDGETS or not all(1 <= b <= 86_400 for b in budgets):
        raise UsageError(
            f"--budgets {text[:60]}: not one to {MAX_BUDGETS} numbers of seconds",
            "write it like --budgets 20,60,300",
        )
    return budgets


def _show(found: Calibration) -> None:
    rates = found.rates
    if rates is not None:
        moved = rates.memory_bytes_per_second / 1e9
        device, dtype = one_line(rates.device, 80), one_line(rates.dtype, 20)
        products = f"{rates.matmul_flops / 1e9:,.0f} GFLOP/s in {dtype} products"
        say(f"{device}: {products}, {moved:,.1f} GB/s in copies")
    if found.rate_share is not None:
        say(f"the baseline says that it uses {100 * found.rate_share:.1f} % of that product rate")
    table = Table("batch", "", "memory", "tokens a second", box=None, pad_edge=False)
    for tried in found.batches.tried:
        memory = f"{(tried.peak_memory_bytes or 0) / 2**20:,.0f} MiB"
        rate = f"{tried.tokens_per_second:,.0f}" if tried.tokens_per_second else ""
        table.add_row(str(tried.batch), tried.outcome.value, memory, rate)
    print_table(out, table)
    say(found.batches.ended)
    say("\nproposed, for you to decide:")
    for proposal in found.proposals:
        say(f"  {proposal.setting} = {proposal.value}: {proposal.reason}")
