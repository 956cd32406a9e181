"""Tracks runs with MLflow: one MLflow run per stage, which restarts find again; the driver owns it."""

from __future__ import annotations

import math
import os
import re
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_RUN_NOTE
from sqlalchemy import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from scaling.config import Settings, flatten
from scaling.library.run_folder import RunFolder
from scaling.storage.addresses import masked
from scaling.storage.paths import AnyPath
from scaling.training.stage1 import PHASES

# What MLflow raises where a database or server cannot be used; ImportError: the database's driver is not installed.
UNUSABLE = (MlflowException, SQLAlchemyError, ImportError)
LONGEST_PARAM = 500
UNFIT = re.compile(r"[^\w\-. :/]+")  # characters that MLflow refuses in the key of a param or a metric


def tracking_uri(run: RunFolder) -> str:
    """MLFLOW_TRACKING_URI, else a database beside the run folder: runs/mlflow.db for runs/<name> and for s3://…."""
    return os.environ.get("MLFLOW_TRACKING_URI") or str(URL.create("sqlite", database=str(_home(run) / "mlflow.db")))


def _home(run: RunFolder) -> Path:
    """The folder of the local database: beside a run folder on a disk, ./runs for a run in an object store."""
    return run.path.absolute().parent if isinstance(run.path, Path) else Path("runs").absolute()


def ui_command(run: RunFolder) -> str:
    """The command that shows the run in a browser."""
    uri = masked(tracking_uri(run))
    if uri.startswith("http"):
        return f"open {shlex.quote(uri)}"
    shown = uri.replace(f"{Path.cwd()}/", "")
    return f"mlflow ui --backend-store-uri {shlex.quote(shown)}"


class Tracker:
    """An MLflow run named `name` in the experiment named like the run folder; a restart finds it again.

    uri: the driver's tracking URI, for another process that may not share the driver's environment; parent: the run
    whose child this one is; tags: for the UI's filters and groups, beside `stage`, the name up to its first slash.
    Raises RuntimeError where the database or server cannot be used.
    """

    def __init__(
        self,
        run: RunFolder,
        name: str,
        uri: str | None = None,
        parent: Tracker | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self.uri = uri or tracking_uri(run)
        _home(run).mkdir(parents=True, exist_ok=True)
        try:
            self.client = MlflowClient(tracking_uri=self.uri)
            experiment = self._experiment(run)
            self.run_id = self._find(experiment, name) or self._create(experiment, name)
            self.client.update_run(self.run_id, status="RUNNING")
            relation = {MLFLOW_PARENT_RUN_ID: parent.run_id} if parent else {}
            for key, value in {"stage": name.split("/")[0], **(tags or {}), **relation}.items():
                self.client.set_tag(self.run_id, key, value)
        except UNUSABLE as error:
            raise RuntimeError(_unusable(self.uri, error)) from error

    def _experiment(self, run: RunFolder) -> str:
        known = self.client.get_experiment_by_name(run.name)
        if known is not None:
            return known.experiment_id
        local = self.uri.startswith("sqlite")
        artefacts = (_home(run) / "mlartifacts").as_uri() if local else None
        return self.client.create_experiment(run.name, artifact_location=artefacts)

    def _find(self, experiment: str, name: str) -> str | None:
        return _find_run(self.client, experiment, name)

    def _create(self, experiment: str, name: str) -> str:
        return self.client.create_run(experiment, run_name=name).info.run_id

    def log_settings(self, settings: Settings, job: Mapping[str, Any]) -> None:
        """Log the flattened settings and the job's own values as params."""
        self.log_params({**flatten(settings.model_dump()), **job})

    def log_params(self, given: Mapping[str, Any]) -> None:
        """Log params. Characters that MLflow refuses in keys become spaces. MLflow keeps the first value of a param, so
        a value that a restart changed becomes a tag `changed.KEY`."""
        known = self.client.get_run(self.run_id).data.params
        values = {UNFIT.sub(" ", k): str(v)[:LONGEST_PARAM] for k, v in given.items()}
        new = [Param(key, value) for key, value in values.items() if key not in known]
        for start in range(0, len(new), 100):
            self.client.log_batch(self.run_id, params=new[start : start + 100])
        for key, value in values.items():
            if known.get(key, value) != value:
                self.client.set_tag(self.run_id, f"changed.{key}", value)

    def tag(self, key: str, value: str) -> None:
        """Set a tag: the UI filters and groups runs by tags."""
        self.client.set_tag(self.run_id, key, value)

    def note(self, text: str) -> None:
        """Set the run's description, in Markdown."""
        self.client.set_tag(self.run_id, MLFLOW_RUN_NOTE, text)

    def last_step(self, prefix: str) -> int:
        """The last step at which a metric with this prefix was logged; -1 where there is none."""
        keys = [key for key in self.client.get_run(self.run_id).data.metrics if key.startswith(prefix)]
        return max((m.step for key in keys for m in self.client.get_metric_history(self.run_id, key)), default=-1)

    def log_metrics(self, values: Mapping[str, float | None], step: int) -> None:
        """Log numbers at a step; values of None are left out."""
        now = int(time.time() * 1000)
        metrics = [Metric(key, float(value), now, step) for key, value in values.items() if value is not None]
        self.client.log_batch(self.run_id, metrics=metrics)

    def log_image(self, key: str, image: np.ndarray, step: int) -> None:
        """Log a picture, uint8 [H, W, 3]. The UI shows the pictures of a key with a step slider."""
        self.client.log_image(self.run_id, image, key=key, step=step)

    def log_summary(self, metrics: Mapping[str, Any]) -> None:
        """Log the numbers of metrics.json, with / for dots, and _ for what MLflow refuses in a category's name."""
        flat = flatten(dict(metrics)).items()
        numbers = {UNFIT.sub("_", k.replace(".", "/")): v for k, v in flat if isinstance(v, int | float)}
        self.log_metrics(numbers, step=0)

    def log_file(self, path: AnyPath) -> None:
        """Log the file as an artefact under its own name."""
        _log_file(self.client, self.run_id, path)

    def end(self, status: str = "FINISHED") -> None:
        self.client.set_terminated(self.run_id, status=status)


def read_curves(run: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """The curves that were logged during a run: metric → (step, value), with the last value of each step.

    `stage1/<phase>/<loss>` comes from the run that trained the shared model, `stage2/…` from this run. Empty where
    MLflow knows neither; nothing is created. Raises RuntimeError where the database or server cannot be used.
    """
    stage1 = {
        key: points
        for key, points in _curves(run.stage1_run(), "stage1").items()
        if key.split("/")[1:2] and key.split("/")[1] in PHASES
    }
    return stage1 | _curves(run, "stage2")


def log_report(run: RunFolder, path: AnyPath) -> str | None:
    """Log the file as an artefact of the run's stage 2 in MLflow, else of its stage 1. → `stage2` or `stage1`, None
    where MLflow knows neither. Raises RuntimeError where the database or server cannot be used."""
    for name in ("stage2", "stage1"):
        with _usable(run):
            known = _known(run, name)
            if known is not None:
                _log_file(*known, path)
                return name
    return None


def _curves(run: RunFolder, name: str) -> dict[str, list[tuple[int, float]]]:
    with _usable(run):
        known = _known(run, name)
        if known is None:
            return {}
        client, run_id = known
        keys = [key for key in client.get_run(run_id).data.metrics if key.startswith(f"{name}/")]
        curves = {}
        for key in sorted(keys):
            history = sorted(client.get_metric_history(run_id, key), key=lambda metric: metric.timestamp)
            # Step 0 holds the numbers of metrics.json, which are logged at the end.
            points = {
                metric.step: metric.value for metric in history if metric.step > 0 and math.isfinite(metric.value)
            }
            if points:
                curves[key] = sorted(points.items())
        return curves


def _known(run: RunFolder, name: str) -> tuple[MlflowClient, str] | None:
    """A client and the id of a run that exists already. No database is created just to look."""
    uri = tracking_uri(run)
    if uri.startswith("sqlite:///") and not Path(make_url(uri).database or "").is_file():
        return None
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(run.name)
    found = experiment and _find_run(client, experiment.experiment_id, name)
    return (client, found) if found else None


def _find_run(client: MlflowClient, experiment: str, name: str) -> str | None:
    found = client.search_runs([experiment], filter_string=f"tags.`{MLFLOW_RUN_NAME}` = '{name}'")
    return found[0].info.run_id if found else None


def _log_file(client: MlflowClient, run_id: str, path: AnyPath) -> None:
    with tempfile.TemporaryDirectory() as folder:  # MLflow reads from a disk; `path` may be in an object store
        copy = Path(folder) / path.name
        copy.write_bytes(path.read_bytes())
        client.log_artifact(run_id, str(copy))


@contextmanager
def _usable(run: RunFolder) -> Iterator[None]:
    try:
        yield
    except UNUSABLE as error:
        raise RuntimeError(_unusable(tracking_uri(run), error)) from error


def _unusable(uri: str, error: Exception) -> str:
    return masked(f"MLflow at {uri} cannot be used: {error}; see MLFLOW_TRACKING_URI")
