"""MLflow that does not answer: the job goes on, and what it was to be told is kept and sent later."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from scaling.distributed.kept_messages import kept_messages
from scaling.distributed.outbox import RETRY_SECONDS, check_answers
from scaling.distributed.tracking import Tracker, read_curves, tracking_uri, ui_command
from scaling.library.run_folder import RunFolder
from scaling.storage.addresses import masked

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # MLflow's warnings are its own to mend


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    """An empty tracking database: making one takes seconds."""
    folder = tmp_path_factory.mktemp("database")
    MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def run(database, tmp_path, monkeypatch) -> RunFolder:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(database, tmp_path / "mlflow.db")
    (tmp_path / "cars").mkdir()
    return RunFolder(tmp_path / "cars")


@pytest.fixture
def server(monkeypatch) -> Any:
    """A switch: while it is off, no batch and no end reaches the database."""

    class Switch:
        on = True

    def switched(real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if not Switch.on:
                raise MlflowException("API request failed: connection refused")
            return real(*arguments, **options)

        return call

    for name in ("log_batch", "set_terminated", "create_run", "update_run", "set_tag"):
        monkeypatch.setattr(MlflowClient, name, switched(getattr(MlflowClient, name)))
    return Switch


def status_of(run: RunFolder, tracker: Tracker) -> str:
    return MlflowClient(tracking_uri(run)).get_run(tracker.run_id).info.status


def test_a_job_outlives_the_server_and_the_next_command_sends(run, server, capfd):
    tracker = Tracker(run, "stage2")
    tracker.log_metrics({"stage2/psnr": 20.0}, 1)
    server.on = False
    for step in (2, 3):
        tracker.log_metrics({"stage2/psnr": 20.0 + step, "stage2/failed": float("nan")}, step)
    tracker.log_image("stage2/scenes", np.zeros((2, 2, 3), np.uint8), 0)
    (run.path / "metrics.json").write_text("{}")
    tracker.log_file(run.path / "metrics.json")
    tracker.end()
    told = capfd.readouterr().err
    assert told.count("does not answer") == 1 and f"kept in {run.path}/mlflow" in told
    assert status_of(run, tracker) == "RUNNING" and read_curves(run) == {"stage2/psnr": [(1, 20.0)]}
    server.on = True
    again = Tracker(run, "stage2")
    assert again.run_id == tracker.run_id
    assert read_curves(run) == {"stage2/psnr": [(1, 20.0), (2, 22.0), (3, 23.0)]}
    assert [path.path for path in again.client.list_artifacts(again.run_id)] == ["metrics.json"]
    assert len(list((run.path / "mlflow").iterdir())) == 1, "only the note of the run is left"


def test_what_waits_is_sent_when_the_server_is_back(run, server, capfd, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("scaling.distributed.outbox.time.monotonic", lambda: clock[0])
    tracker = Tracker(run, "stage1")
    server.on = False
    tracker.log_metrics({"stage1/warmup/latent": 0.5}, 1)
    server.on = True
    tracker.log_metrics({"stage1/warmup/latent": 0.4}, 2)
    assert read_curves(run) == {}, "it is not asked again at once"
    clock[0] += RETRY_SECONDS
    tracker.log_metrics({"stage1/warmup/latent": 0.3}, 3)
    assert read_curves(run) == {"stage1/warmup/latent": [(1, 0.5), (2, 0.4), (3, 0.3)]}
    assert "answers again" in capfd.readouterr().err and len(list((run.path / "mlflow").iterdir())) == 1


def test_a_trial_may_begin_while_the_server_is_away(run, server):
    parent = Tracker(run, "sweep")
    server.on = False
    trial = Tracker(run, "sweep/one", parent=parent, must_answer=False)
    trial.log_metrics({"psnr": 1.0}, 1)
    assert trial.run_id is None and trial.last_step("stage1/") == -1
    server.on = True
    trial.end()
    found = MlflowClient(tracking_uri(run)).get_run(trial.run_id)
    assert found.data.metrics == {"psnr": 1.0} and found.data.tags["mlflow.parentRunId"] == parent.run_id


def test_what_the_server_refuses_is_told_and_left_out(run, capfd):
    tracker = Tracker(run, "stage2")
    tracker.tag("x" * 5000, "a key of too many letters")
    tracker.log_metrics({"stage2/psnr": 20.0}, 1)
    assert "MLflow refuses tag of stage2" in capfd.readouterr().err
    assert read_curves(run) == {"stage2/psnr": [(1, 20.0)]}


def test_a_folder_that_is_begun_anew_has_a_run_of_its_own(run):
    first = Tracker(run, "stage1")
    first.log_metrics({"stage1/warmup/latent": 9.0}, 1)
    shutil.rmtree(run.path)
    second = Tracker(run, "stage1")
    assert second.run_id != first.run_id and read_curves(run) == {}
    assert Tracker(run, "stage1").run_id == second.run_id, "its restarts go on with it"
    other = RunFolder(run.path.parent / "elsewhere" / "cars")  # another folder of the same name, the same database
    assert Tracker(other, "stage1", uri=tracking_uri(run)).run_id not in (first.run_id, second.run_id)


def test_a_deleted_experiment_is_told_with_the_remedy(run):
    tracker = Tracker(run, "stage1")
    experiment = tracker.client.get_run(tracker.run_id).info.experiment_id
    tracker.client.delete_experiment(experiment)
    shutil.rmtree(run.path)
    with pytest.raises(RuntimeError, match=rf"mlflow experiments restore --experiment-id {experiment}`"):
        Tracker(run, "stage1")


def test_a_database_that_was_moved_writes_nothing_to_the_old_place(database, tmp_path, monkeypatch):
    """runs/ with its mlflow.db is renamed: the experiment still names the old folder, which must not come back."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    old, new = tmp_path / "a b", tmp_path / "new"
    (old / "cars").mkdir(parents=True)
    shutil.copy(database, old / "mlflow.db")
    Tracker(RunFolder(old / "cars"), "stage1").end()
    Tracker(RunFolder(old / "cars"), "stage2").end()  # at its own place it goes on
    shutil.move(old, new)
    with pytest.raises(RuntimeError, match=r"in .*/a b/mlartifacts: was its folder moved\?"):
        Tracker(RunFolder(new / "cars"), "stage2")
    assert not old.exists()
    old.symlink_to(new)  # a link at the old place leads to the files
    Tracker(RunFolder(new / "cars"), "stage2").end()


def test_a_server_that_is_not_there_is_told_at_once(run, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(RuntimeError, match=r"MLflow at http://127\.0\.0\.1:9 cannot be used"):
        Tracker(run, "stage1")
    check_answers("sqlite:///anything.db")


# ---------------------------------------------------------------------- a run folder from a stranger


def keep(run: RunFolder, name: str, *messages: Any) -> Path:
    """A file of messages as an earlier command would have kept it."""
    path = run.path / "mlflow" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}-deadbeef.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"name": name, "messages": messages}))
    return path


METRICS = {"do": "metrics", "values": {"stage2/psnr": 20.0}, "when": 1, "step": 1}


def test_kept_messages_name_no_other_files(run, tmp_path):
    (tmp_path / "id_rsa").write_text("secret")
    names = [str(tmp_path / "id_rsa"), "../id_rsa", "mlflow/../../id_rsa", "config.yaml", "trials/../metrics.json"]
    path = keep(run, "stage2", *[{"do": "file", "name": name} for name in names], METRICS)
    tracker = Tracker(run, "stage2")
    assert tracker.client.list_artifacts(tracker.run_id) == [] and not path.exists()
    assert read_curves(run) == {"stage2/psnr": [(1, 20.0)]}


def test_what_is_no_file_is_not_logged_and_nothing_hangs(run, tmp_path):
    os.mkfifo(run.path / "metrics.json")
    (tmp_path / "secret").write_text("secret")
    (run.path / "scenes.parquet").symlink_to(tmp_path / "secret")
    tracker = Tracker(run, "stage2")
    for name in ("metrics.json", "scenes.parquet"):
        tracker.log_file(run.path / name)
    assert tracker.client.list_artifacts(tracker.run_id) == []


@pytest.mark.parametrize("name", ["libraries.log", "mlflow"])
def test_links_in_the_run_folder_are_not_followed(run, tmp_path, name):
    victim = tmp_path / "victim"
    victim.mkdir() if name == "mlflow" else victim.write_text("mine")
    (run.path / name).symlink_to(victim)
    if name == "mlflow":
        with pytest.raises(ValueError, match="is a link"):
            Tracker(run, "stage1")
        assert not list(victim.iterdir())
    else:
        Tracker(run, "stage1")
        logging.getLogger("mlflow").warning("said")
        assert victim.read_text() == "mine"


def test_a_copied_run_folder_has_runs_of_its_own(run, tmp_path):
    first = Tracker(run, "stage1")
    first.log_metrics({"stage1/warmup/latent": 1.0}, 1)
    (tmp_path / "other").mkdir()
    copy = RunFolder(tmp_path / "copy")
    shutil.copytree(run.path, copy.path)
    assert Tracker(copy, "stage1").run_id != first.run_id
    assert read_curves(run) == {"stage1/warmup/latent": [(1, 1.0)]}


@pytest.mark.parametrize(
    "poison",
    [{"do": "tag", "key": "x"}, {"do": "_open"}, 7, {"do": "metrics", "values": {"a": "b"}, "when": 1, "step": 1}],
)
def test_messages_that_nobody_would_write_silence_nothing(run, poison, capfd):
    keep(run, "stage2", poison, METRICS)
    Tracker(run, "stage2")
    assert read_curves(run) == {"stage2/psnr": [(1, 20.0)]} and "does not answer" not in capfd.readouterr().err


def test_kept_curves_survive_ctrl_c(run, monkeypatch):
    path = keep(run, "stage2", METRICS, {**METRICS, "step": 2})

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("scaling.distributed.outbox.Outbox._metrics", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Tracker(run, "stage2")
    assert path.exists()
    Tracker(run, "stage2")
    assert read_curves(run) == {"stage2/psnr": [(1, 20.0), (2, 20.0)]} and not path.exists()


def test_how_an_earlier_command_ended_does_not_end_the_run_of_this_one(run, server):
    """The end was kept: while the next command is at work its run is running, and it ends as that one says."""
    first = Tracker(run, "stage2")
    server.on = False
    first.end("FAILED")
    server.on = True
    again = Tracker(run, "stage2")
    assert again.run_id == first.run_id and status_of(run, again) == "RUNNING"
    again.end()
    assert status_of(run, again) == "FINISHED"


def test_kept_files_are_in_order_whatever_the_clock_says(run, server, monkeypatch):
    """An earlier command's clock was far ahead: what the next one keeps still comes after it."""
    ahead = keep(run, "stage2", METRICS)
    ahead = ahead.rename(ahead.with_name(f"{ahead.name.split('-')[0]}-{9 * 10**19}-{'0' * 8}.json"))
    server.on = False
    tracker = Tracker(run, "stage2", must_answer=False)
    tracker.log_metrics({"stage2/psnr": 21.0}, 2)
    tracker.end()
    found = kept_messages(run, "stage2")
    assert next(path.name for path, _ in found) == ahead.name and len(found) == 2
    assert [message["step"] for _, messages in found for message in messages if message["do"] == "metrics"] == [1, 2]


@pytest.mark.parametrize("password", ["hunter2/pw", "hunter2#x", "hunter2?x", "hunter2%20x"])
def test_no_part_of_a_password_is_shown(run, monkeypatch, password):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{password}@127.0.0.1:9")
    with pytest.raises(RuntimeError) as error:
        Tracker(run, "stage1")
    assert "hunter2" not in masked(str(error.value)) and "MLFLOW_TRACKING_URI" in str(error.value)
    assert "hunter2" not in ui_command(run)


def test_a_run_that_is_a_link_is_logged(run, tmp_path):
    """RUN on another disk: runs/cars → /data/cars."""
    moved = tmp_path / "data"
    run.path.rename(moved)
    run.path.symlink_to(moved)
    (run.path / "metrics.json").write_text("{}")
    tracker = Tracker(run, "stage2")
    tracker.log_file(run.path / "metrics.json")
    tracker.end()
    assert [path.path for path in tracker.client.list_artifacts(tracker.run_id)] == ["metrics.json"]
    assert status_of(run, tracker) == "FINISHED"


def test_a_message_that_mlflow_cannot_take_holds_no_other_back(run, monkeypatch, capfd):
    """One that is out of range, and one whose artefact store fails in its own way."""
    keep(run, "stage2", {**METRICS, "step": 10**30}, METRICS)
    tracker = Tracker(run, "stage2")
    monkeypatch.setattr(MlflowClient, "log_image", lambda *_, **__: 1 / 0)
    tracker.log_image("stage2/scenes", np.zeros((2, 2, 3), np.uint8), 0)
    tracker.end()
    assert status_of(run, tracker) == "FINISHED" and read_curves(run) == {"stage2/psnr": [(1, 20.0)]}
    assert "refuses image" in capfd.readouterr().err


def test_a_note_leads_into_no_other_run(run, tmp_path):
    """A run folder from a stranger, whose note has the id of my run."""
    mine = Tracker(run, "stage1")
    mine.log_metrics({"stage1/warmup/latent": 1.0}, 1)
    foreign = RunFolder(tmp_path / "foreign")
    Tracker(foreign, "stage1")
    note = next((foreign.path / "mlflow").iterdir())
    note.write_text(json.dumps({**json.loads(note.read_text()), "run_id": mine.run_id}))
    assert read_curves(foreign) == {} and Tracker(foreign, "stage1").run_id != mine.run_id


def test_kept_messages_stay_where_the_disk_is_full_or_they_cannot_be_read(run, server, monkeypatch):
    Tracker(run, "stage2")
    path = keep(run, "stage2", METRICS)
    notes = path.with_name(path.name.replace("deadbeef", "my-notes"))
    notes.write_text("mine")
    torn = path.with_name(path.name.replace("deadbeef", "00000000"))
    torn.write_text("{")

    def away(*_: Any, **__: Any) -> None:
        raise OSError("away")

    with monkeypatch.context() as patch:
        patch.setattr("scaling.distributed.outbox.Outbox._keep", lambda _: None)
        patch.setattr("scaling.distributed.outbox.Outbox._metrics", away)
        Tracker(run, "stage2")
    assert path.exists()
    Tracker(run, "stage2")
    assert not path.exists() and notes.read_text() == "mine" and torn.exists()
