"""Tracks runs with MLflow: one MLflow run per stage, which restarts find again; the driver owns it."""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME, MLFLOW_RUN_NOTE
from sqlalchemy import URL, make_url

from scaling.config import Settings, flatten
from scaling.distributed.outbox import UNUSABLE, Outbox, check_answers, finite, is_of, log_file, read_run_id
from scaling.library.run_folder import RunFolder
from scaling.storage.addresses import masked
from scaling.storage.paths import AnyPath, to_path
from scaling.storage.progress import waiting_for
from scaling.storage.text import shown
from scaling.training.stage1 import PHASES

LONGEST_PARAM = 500
UNFIT = re.compile(r"[^\w\-. :/]+")  # characters that MLflow refuses in the key of a param or a metric


def tracking_uri(run: RunFolder) -> str:
    """MLFLOW_TRACKING_URI, else a database beside the run folder: runs/mlflow.db for runs/<name> and for s3://…."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _local_uri(run)


def _local_uri(run: RunFolder) -> str:
    return str(URL.create("sqlite", database=str(_home(run) / "mlflow.db")))


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
    """An MLflow run named `name` in the experiment named like the run folder; a restart of the same folder goes on with
    it.

    uri: the driver's tracking URI, for another process that may not share the driver's environment; parent: the run
    whose child this one is; tags: for the UI's filters and groups, beside `stage`, the name up to its first slash.
    Raises RuntimeError where the database or server cannot be used, unless must_answer is false. Later nothing raises:
    what cannot be sent is kept (see outbox.py).
    """

    def __init__(
        self,
        run: RunFolder,
        name: str,
        uri: str | None = None,
        parent: Tracker | None = None,
        tags: Mapping[str, str] | None = None,
        must_answer: bool = True,
    ) -> None:
        self.name, self.uri = name, uri or tracking_uri(run)
        _chatter_to_file(run)
        _home(run).mkdir(parents=True, exist_ok=True)
        self._box = Outbox(run, name, self.uri, lambda client: _experiment(client, run, self.uri))
        every, above = {"stage": name.split("/")[0], **(tags or {})}, parent.name if parent else None
        if must_answer:
            try:
                with waiting_for(f"MLflow at {masked(self.uri)}"):
                    self._box.connect(every, above)
            except UNUSABLE as error:
                raise RuntimeError(_unusable(self.uri, error)) from error
        else:
            self._box.put("open", tags=every, parent=above)

    @property
    def client(self) -> MlflowClient:
        return self._box.client

    @property
    def run_id(self) -> str | None:
        return self._box.run_id

    def log_settings(self, settings: Settings, job: Mapping[str, Any]) -> None:
        """Log the flattened settings and the job's own values as params."""
        self.log_params({**flatten(settings.model_dump()), **job})

    def log_params(self, given: Mapping[str, Any]) -> None:
        """Log params. Characters that MLflow refuses in keys become spaces."""
        self._box.put("params", values={UNFIT.sub(" ", k): str(v)[:LONGEST_PARAM] for k, v in given.items()})

    def tag(self, key: str, value: str) -> None:
        """Set a tag: the UI filters and groups runs by tags."""
        self._box.put("tag", key=key, value=value)

    def note(self, text: str) -> None:
        """Set the run's description, in Markdown."""
        self.tag(MLFLOW_RUN_NOTE, text)

    def last_step(self, prefix: str) -> int:
        """The last step at which a metric with this prefix was logged; -1 where there is none or MLflow does not
        answer."""
        if self.run_id is None:
            return -1
        try:
            keys = [key for key in self.client.get_run(self.run_id).data.metrics if key.startswith(prefix)]
            return max((m.step for key in keys for m in self.client.get_metric_history(self.run_id, key)), default=-1)
        except UNUSABLE:
            return -1

    def log_metrics(self, values: Mapping[str, float | None], step: int) -> None:
        """Log numbers at a step; values that are None or not finite are left out."""
        self._box.put("metrics", values=finite(values), when=int(time.time() * 1000), step=step)

    def log_image(self, key: str, image: np.ndarray, step: int) -> None:
        """Log a picture, uint8 [H, W, 3]. The UI shows the pictures of a key with a step slider."""
        self._box.put("image", image=image, key=key, step=step)

    def log_summary(self, metrics: Mapping[str, Any]) -> None:
        """Log the numbers of metrics.json, with / for dots, and _ for what MLflow refuses in a category's name."""
        flat = flatten(dict(metrics)).items()
        numbers = {UNFIT.sub("_", k.replace(".", "/")): v for k, v in flat if isinstance(v, int | float)}
        self.log_metrics(numbers, step=0)

    def log_file(self, path: AnyPath) -> None:
        """Log a file of the run folder as an artefact under its own name."""
        self._box.put("file", name=str(path).removeprefix(f"{self._box.run.path}/"))

    def end(self, status: str = "FINISHED") -> None:
        """End the run with a status, and try once more to send what waits."""
        self._box.put("end", status=status)
        self._box.send(at_once=True)


def _chatter_to_file(run: RunFolder) -> None:
    """Send what MLflow and its database say to RUN/libraries.log, away from the progress on the screen. Where there is
    no such file (in an object store, or something else has its name) their warnings alone are shown."""
    for name in ("mlflow", "alembic"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = False
        log = run.path / "libraries.log"
        if isinstance(log, Path) and not log.is_symlink() and (log.is_file() or not log.exists()):
            log.parent.mkdir(parents=True, exist_ok=True)
            logger.addHandler(logging.FileHandler(log, delay=True))
        else:
            logger.addHandler(logging.StreamHandler())
            logger.setLevel(logging.WARNING)


def _experiment(client: MlflowClient, run: RunFolder, uri: str) -> str:
    """The id of the experiment that is named like the run folder. Raises RuntimeError where it was deleted, or where
    its files would go to the place that the folder was moved from."""
    known, artefacts = client.get_experiment_by_name(run.name), _home(run) / "mlartifacts"
    if known is None:
        return client.create_experiment(
            run.name, artifact_location=artefacts.as_uri() if uri.startswith("sqlite") else None
        )
    ours = uri == _local_uri(run) and known.artifact_location.startswith("file://")
    named = to_path(known.artifact_location) if ours else artefacts
    if isinstance(named, Path) and named.resolve() != artefacts.resolve():
        raise RuntimeError(
            f"{_home(run) / 'mlflow.db'} keeps the files of {run.name!r} in {shown(str(named))}: was its folder moved? "
            "Move it back, or rename mlflow.db (runs then begin anew in MLflow), or set MLFLOW_TRACKING_URI"
        )
    if known.lifecycle_stage != "active":
        command = f"mlflow experiments restore --experiment-id {known.experiment_id}"
        raise RuntimeError(
            f"the experiment {run.name!r} was deleted in MLflow: restore it by "
            f"`MLFLOW_TRACKING_URI={shlex.quote(masked(uri))} {command}`, or give the run folder another name"
        )
    return known.experiment_id


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
                log_file(*known, path)
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
    check_answers(uri)
    client = MlflowClient(tracking_uri=uri)
    noted = read_run_id(run, name, uri)
    if noted or (run.path / "mlflow").is_dir():
        return (client, noted) if noted and is_of(client, noted, run.name, name) else None
    # Run folders of older programs note no run: theirs is the one of its name.
    experiment = client.get_experiment_by_name(run.name)
    query = f"tags.`{MLFLOW_RUN_NAME}` = '{name}'"
    found = client.search_runs([experiment.experiment_id], filter_string=query) if experiment else []
    return (client, found[0].info.run_id) if found else None


@contextmanager
def _usable(run: RunFolder) -> Iterator[None]:
    try:
        yield
    except UNUSABLE as error:
        raise RuntimeError(_unusable(tracking_uri(run), error)) from error


def _unusable(uri: str, error: Exception) -> str:
    return masked(f"MLflow at {uri} cannot be used: {error}; see MLFLOW_TRACKING_URI")
