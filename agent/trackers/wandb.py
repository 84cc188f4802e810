"""W&B offline runs for `wandb sync`, one folder an attempt.

A folder gets its fingerprint when its run was closed: one that lacks it was cut off, and is
written anew under the same id.
"""

import shutil
from pathlib import Path

import wandb

from agent.text import for_markdown
from agent.trackers.attempts import MAX_TEXT_CHARACTERS, Content, TrackedRun


class WandbFolders:
    """A folder that holds `wandb/offline-run-…`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def holds(self, run: TrackedRun) -> bool:
        return [_mark(folder, run).exists() for folder in self._folders(run)] == [True]

    def put(self, run: TrackedRun, content: Content) -> None:
        for folder in self._folders(run):
            shutil.rmtree(folder)
        writing = wandb.init(
            project="nightlab",
            id=run.key,
            name=f"{run.group} {run.name}",
            group=run.group,
            job_type=run.kind,
            tags=[run.verdict],
            notes=for_markdown(run.hypothesis, 2 * MAX_TEXT_CHARACTERS),
            config={**run.facts, "hypothesis": run.hypothesis, "knobs": content.knobs},
            settings=_settings(self._directory),
        )
        for curve in content.curves:
            writing.define_metric(f"{curve.name}/*", step_metric=f"{curve.name}/step")
            for step, _, row in curve.rows():
                writing.log({**row, f"{curve.name}/step": step})
        writing.summary.update(run.metrics)
        writing.finish(exit_code=0 if run.has_score else 1)
        (folder,) = self._folders(run)  # W&B puts the time of day into its name
        _mark(folder, run).touch()

    def close(self) -> None:
        """End the service that W&B started beside us: it would hold our output open."""
        wandb.teardown()

    def _folders(self, run: TrackedRun) -> list[Path]:
        return list((self._directory / "wandb").glob(f"offline-run-*-{run.key}"))


def _mark(folder: Path, run: TrackedRun) -> Path:
    return folder / f"nightlab-{run.fingerprint}"


def _settings(directory: Path) -> wandb.Settings:
    """Nothing but what is logged: no network, no machine, no code, no console, no git."""
    return wandb.Settings(
        mode="offline",
        root_dir=str(directory),
        silent=True,
        console="off",
        symlink=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        save_code=False,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
