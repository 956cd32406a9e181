"""What MLflow is to be told of a run, in order; kept in the run folder while MLflow does not answer.

A database that is locked or a server that is down must not end a job of hours. So nothing here raises but the first
connection of a command. What could not be sent is written to RUN/mlflow/, and sent when MLflow answers again, at the
latest by the next command of the run.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from sqlalchemy.exc import SQLAlchemyError

from scaling.distributed.kept_messages import (
    LOGGED,
    MESSAGES,
    MOST_WAITING,
    hash_of,
    kept_messages,
    new_file,
    read_note,
    slug,
)
from scaling.library.run_folder import RunFolder
from scaling.storage.addresses import masked
from scaling.storage.atomic import replace_file
from scaling.storage.limited import read_limited
from scaling.storage.links import refuse_links
from scaling.storage.paths import AnyPath, uri_of
from scaling.storage.text import shown

# What MLflow raises where a database or server cannot be used; ImportError: the database's driver is not installed.
UNUSABLE = (MlflowException, SQLAlchemyError, ImportError, OSError)
RETRY_SECONDS = 30.0  # between tries while MLflow does not answer
ANSWER_SECONDS = 5.0  # in which a server must take a connection
TRIES = 3
MAX_LOGGED_BYTES = 1 << 30
MOST_IMAGES = 32  # that wait: some megabytes
KEEP_SECONDS = 5.0  # between writes of what waits
# MLflow's own defaults are 7 tries with growing pauses, and 120 s each: minutes in which a job would stand still.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")


def check_answers(uri: str) -> None:
    """Raise ConnectionError where no server takes a connection at an http address: MLflow itself would try for long."""
    try:
        parts = urlsplit(uri)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:  # its message may show a part of a password
        raise ConnectionError("that is no address; write what is special in a password as %XX") from None
    if parts.scheme in ("http", "https") and parts.hostname:
        socket.create_connection((parts.hostname, port), timeout=ANSWER_SECONDS).close()


class Outbox:
    """The messages about one run of MLflow, `name`, that belongs to a run folder.

    experiment: makes or finds the experiment of the run folder → its id; it may raise UNUSABLE. run_id: None before
    MLflow has answered for the first time. The run that a run folder has in MLflow is noted there by its id: another
    folder of the same name, or one that was begun anew, has another run.
    """

    def __init__(self, run: RunFolder, name: str, uri: str, experiment: Callable[[MlflowClient], str]) -> None:
        self.run, self.name, self.uri, self.experiment = run, name, uri, experiment
        self.folder = run.path / "mlflow"
        self.run_id: str | None = None
        self._client: MlflowClient | None = None
        self._waiting: list[dict[str, Any]] = []
        self._kept = new_file(run, name)
        self._kept_at = -KEEP_SECONDS
        self._tries = 0  # of the first message that waits
        self._silent_until: float | None = None  # None: MLflow answers

    @property
    def client(self) -> MlflowClient:
        if self._client is None:
            check_answers(self.uri)
            self._client = MlflowClient(tracking_uri=self.uri)
        return self._client

    def connect(self, tags: Mapping[str, str], parent: str | None) -> None:
        """Open the run, and send what earlier commands have kept. Raises UNUSABLE where MLflow does not answer."""
        refuse_links(self.folder)
        self._open(dict(tags), parent)
        earlier = kept_messages(self.run, self.name)
        for _, messages in earlier:
            # How an earlier command ended does not end the run while this one is at work: it says its own end.
            self._waiting += [message for message in messages if message["do"] != "end"]
        self._waiting = self._waiting[-MOST_WAITING:]
        self.send(at_once=True)
        # Only now, and only if what could not be sent is in this command's own file.
        if not self._waiting or self._kept.is_file():
            for path, _ in earlier:
                path.unlink(missing_ok=True)

    def put(self, do: str, **values: Any) -> None:
        """Send a message, or keep it. do: the name of a method below, without its underscore; values: its arguments."""
        self._waiting.append({"do": do, **values})
        if len(self._waiting) > MOST_WAITING:  # the oldest curves go, but not the message that opens the run
            self._waiting[1:2] = []
        images = [place for place, message in enumerate(self._waiting) if message["do"] == "image"]
        if len(images) > MOST_IMAGES:
            self._waiting.pop(images[0])
        self.send()

    def send(self, at_once: bool = False) -> None:
        """Send what waits. While MLflow does not answer it is asked again every RETRY_SECONDS; at_once: now."""
        silent = self._silent_until
        if silent is None or at_once or time.monotonic() >= silent:
            try:
                while self._waiting:
                    self._carry_out(self._waiting[0])
                    self._waiting.pop(0)
                    self._tries = 0
            except Exception as error:  # a run that cannot be opened, whatever the reason, must not end the job
                self._fell_silent(error)
            else:
                self._answers_again()
                return
        if at_once or time.monotonic() - self._kept_at >= KEEP_SECONDS:
            self._kept_at = time.monotonic()
            self._keep()

    def _carry_out(self, message: Mapping[str, Any]) -> None:
        """Send one message. Raises UNUSABLE where MLflow does not answer; a message that it does not take is told and
        left out, so that the others are sent."""
        values = {key: value for key, value in message.items() if key != "do"}
        try:
            getattr(self, f"_{message['do']}")(**values)
        except Exception as error:  # artefact stores raise what they like, and none of it may end the job
            self._tries += 1
            if message["do"] == "open" or (isinstance(error, UNUSABLE) and not self._is_refused(error)):
                raise
            print(f"warning: MLflow refuses {message['do']} of {self.name}: {_line(error)}", file=sys.stderr)

    def _is_refused(self, error: Exception) -> bool:
        """Whether MLflow answers, but does not take a message: by its status, or as it failed TRIES times while MLflow
        answered another question."""
        if isinstance(error, MlflowException) and 400 <= error.get_http_status_code() < 500:
            return True
        if self._tries < TRIES:
            return False
        try:
            self.client.get_run(self._id)
        except UNUSABLE:
            return False
        return True

    def _fell_silent(self, error: Exception) -> None:
        if self._silent_until is None:
            print(
                f"warning: MLflow at {masked(self.uri)} does not answer ({_line(error)}); the job goes on. Its curves "
                f"are kept in {self.folder}, and sent when MLflow answers again or by the next command",
                file=sys.stderr,
            )
        self._silent_until = time.monotonic() + RETRY_SECONDS

    def _answers_again(self) -> None:
        if self._silent_until is not None:
            print(f"MLflow at {masked(self.uri)} answers again; what was kept is sent", file=sys.stderr)
            self._silent_until = None
            with suppress(OSError):
                self._kept.unlink(missing_ok=True)

    def _keep(self) -> None:
        """Write what waits to the run folder; pictures are left out, as they lie in RUN/pictures."""
        messages = [message for message in self._waiting if message["do"] in MESSAGES]
        with suppress(OSError):  # a full disk has its own warning elsewhere
            data = json.dumps({"name": self.name, "messages": messages}, allow_nan=False).encode()
            replace_file(self._kept, data)

    # ------------------------------------------------------------------ messages

    def _open(self, tags: dict[str, str], parent: str | None) -> None:
        """Find the run that the run folder notes, else make one, and note it."""
        noted = read_run_id(self.run, self.name, self.uri, here=True)
        self.run_id = noted if noted and is_of(self.client, noted, self.run.name, self.name) else None
        if self.run_id is None:
            self.run_id = self.client.create_run(self.experiment(self.client), run_name=self.name).info.run_id
            note = {"name": self.name, "address": hash_of(masked(self.uri)), "place": _place(self.run)}
            note["run_id"] = self.run_id
            replace_file(self.folder / f"{slug(self.name)}.json", json.dumps(note).encode())
        self.client.update_run(self.run_id, status="RUNNING")
        above = read_run_id(self.run, parent, self.uri) if parent else None
        if above and not is_of(self.client, above, self.run.name, str(parent)):
            above = None
        every = {**tags, MLFLOW_PARENT_RUN_ID: above} if above else tags
        self.client.log_batch(self._id, tags=[RunTag(key, value) for key, value in every.items()])

    @property
    def _id(self) -> str:
        if self.run_id is None:
            raise ConnectionError("the run was not opened yet")
        return self.run_id

    def _params(self, values: Mapping[str, str]) -> None:
        """Log params. MLflow keeps the first value of a param, so a value that a restart changed becomes a tag
        `changed.KEY`."""
        known = self.client.get_run(self._id).data.params
        new = [Param(key, value) for key, value in values.items() if key not in known]
        for start in range(0, len(new), 100):
            self.client.log_batch(self._id, params=new[start : start + 100])
        for key, value in values.items():
            if known.get(key, value) != value:
                self._tag(f"changed.{key}", value)

    def _tag(self, key: str, value: str) -> None:
        self.client.set_tag(self._id, key, value)

    def _metrics(self, values: Mapping[str, float], when: int, step: int) -> None:
        self.client.log_batch(self._id, [Metric(key, value, when, step) for key, value in values.items()])

    def _image(self, image: np.ndarray, key: str, step: int) -> None:
        self.client.log_image(self._id, image, key=key, step=step)

    def _file(self, name: str) -> None:
        """Log a file of the run folder, which may have changed or gone since."""
        if not LOGGED.fullmatch(name):
            raise ValueError(f"{name!r:.200} is no file that is logged")
        path = self.run.path / name
        refuse_links(path, *([path.parent] if path.parent != self.run.path else []))  # the run itself may be a link
        with suppress(FileNotFoundError):
            log_file(self.client, self._id, path)

    def _end(self, status: str) -> None:
        self.client.set_terminated(self._id, status=status)


def log_file(client: MlflowClient, run_id: str, path: AnyPath) -> None:
    """Log a file as an artefact under its own name. Raises FileNotFoundError."""
    with tempfile.TemporaryDirectory() as folder:  # MLflow reads from a disk; `path` may be in an object store
        copy = Path(folder) / path.name
        copy.write_bytes(read_limited(path, MAX_LOGGED_BYTES))
        client.log_artifact(run_id, str(copy))


def read_run_id(run: RunFolder, name: str, uri: str, here: bool = False) -> str | None:
    """The id of the run `name` of a run folder in MLflow at `uri`; None where the folder notes none.

    here: only if it was noted at this place: a copy of the folder has runs of its own.
    """
    noted = read_note(run.path / "mlflow" / f"{slug(name)}.json")
    run_id = noted.get("run_id")
    if noted.get("address") != hash_of(masked(uri)) or (here and noted.get("place") != _place(run)):
        return None
    return run_id if isinstance(run_id, str) else None


def finite(values: Mapping[str, float | None]) -> dict[str, float]:
    """The numbers that are finite: neither JSON nor a chart shows the others."""
    return {key: float(value) for key, value in values.items() if value is not None and math.isfinite(value)}


def is_of(client: MlflowClient, run_id: str, experiment: str, name: str) -> bool:
    """Whether a run is there, and has this name in the experiment of this name."""
    try:
        run = client.get_run(run_id)
        found = client.get_experiment(run.info.experiment_id).name
    except MlflowException as error:
        if 400 <= error.get_http_status_code() < 500:  # it was deleted for good, or the database is another one
            return False
        raise
    return run.info.lifecycle_stage == "active" and (found, run.info.run_name) == (experiment, name)


def _place(run: RunFolder) -> str:
    return hash_of(uri_of(run.path))


def _line(error: Exception) -> str:
    return shown(masked(next(iter(str(error).splitlines()), type(error).__name__)))[:300]
