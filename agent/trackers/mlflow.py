"""An MLflow store in one SQLite file.

A run gets its fingerprint last of all: one that lacks it was cut off, and is written anew.
"""

from pathlib import Path

from mlflow.entities import Metric, Param, Run
from mlflow.tracking import MlflowClient
from sqlalchemy import URL

from agent.text import for_markdown
from agent.trackers.attempts import MAX_TEXT_CHARACTERS, Content, TrackedRun

STORE_NAME = "mlflow.db"
KEY, FINGERPRINT = "nightlab.key", "nightlab.fingerprint"

_MOST_METRICS_AT_A_TIME = 1000  # MLflow refuses more in one call


class MlflowStore:
    """A store for `mlflow ui --backend-store-uri sqlite:///…`."""

    def __init__(self, directory: Path) -> None:
        url = URL.create("sqlite", database=str(directory / STORE_NAME))
        self._client = MlflowClient(url.render_as_string())
        self._artifacts = directory / "artifacts"
        self._known: dict[str, dict[str, list[Run]]] = {}

    def holds(self, run: TrackedRun) -> bool:
        found = self._runs(run.group).get(run.key, [])
        return [run.fingerprint] == [stored.data.tags.get(FINGERPRINT) for stored in found]

    def put(self, run: TrackedRun, content: Content) -> None:
        for stored in self._runs(run.group).pop(run.key, []):
            self._client.delete_run(stored.info.run_id)
        began, ended = int(1000 * run.started_at.timestamp()), int(1000 * run.finished_seconds)
        tags = {**run.facts, "hypothesis": run.hypothesis, KEY: run.key}
        tags["mlflow.note.content"] = for_markdown(run.hypothesis, 2 * MAX_TEXT_CHARACTERS)
        experiment = self._experiment(run.group)
        # the key is there from the first moment on: what is cut off after it can be found again
        made = self._client.create_run(experiment, began, tags, run.name).info.run_id
        metrics = [Metric(name, number, ended, 0) for name, number in run.metrics.items()]
        for curve in content.curves:
            for step, time, row in curve.rows():
                metrics += [Metric(n, x, int(1000 * time), step) for n, x in row.items()]
        for first in range(0, len(metrics), _MOST_METRICS_AT_A_TIME):
            self._client.log_batch(made, metrics[first : first + _MOST_METRICS_AT_A_TIME])
        knobs = [Param(name, str(value)) for name, value in content.knobs.items()]
        self._client.log_batch(made, params=knobs)
        self._client.set_terminated(made, "FINISHED" if run.has_score else "FAILED", ended)
        self._client.set_tag(made, FINGERPRINT, run.fingerprint)

    def close(self) -> None:
        """Nothing runs beside it; connections to the file go with the process."""

    def _runs(self, group: str) -> dict[str, list[Run]]:
        """The runs of a session by key; what this process writes itself is not among them."""
        if group not in self._known:
            known: dict[str, list[Run]] = {}
            experiment, page = self._experiment(group), None
            while page is None or page.token:
                page = self._client.search_runs(
                    [experiment], page_token=None if page is None else page.token
                )
                for stored in page:
                    known.setdefault(stored.data.tags.get(KEY, ""), []).append(stored)
            self._known[group] = known
        return self._known[group]

    def _experiment(self, group: str) -> str:
        found = self._client.get_experiment_by_name(group)
        if found is not None:
            return str(found.experiment_id)
        location = (self._artifacts / group).as_uri()
        return str(self._client.create_experiment(group, artifact_location=location))
