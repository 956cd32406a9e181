"""Disks that are full or may not be written: nothing is left half-written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from helpers.actors import Books, FullDiskActor

from scaling.cli import run_command
from scaling.data.choose_scenes import choose_ids
from scaling.data.embedded.scenes import embedded_car
from scaling.data.scene_store import SceneStore
from scaling.data.store_writer import StoreWriter
from scaling.data.stores import EmbeddedCars
from scaling.distributed.stage2 import actors
from scaling.distributed.stage2.dispatcher import Dispatcher
from scaling.distributed.tracking import Tracker
from scaling.library.failures import FailureLog, event
from scaling.library.parts import commit_part
from scaling.library.run_folder import RunFolder
from scaling.library.summary import summarise
from scaling.models.shared_files import SharedModelError, load_shared, save_shared
from scaling.storage.atomic import replace_file

PLANES = "planes.safetensors"
VAE = "autoencoder/diffusion_pytorch_model.safetensors"
DECODER = "decoder/model.safetensors"


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def rows_of(run: RunFolder) -> list[dict[str, Any]]:
    return [{**row, "scene_id": f"again-{row['scene_id']}"} for row in run.library.scenes()]


@pytest.mark.parametrize(
    ("work", "file"),
    [
        (lambda run: commit_part(run.library.folder, rows_of(run)), "library/parts/part-"),
        (lambda run: summarise(run), "metrics.json"),
        (
            lambda run: save_shared(load_shared(run.shared)[0], run.path / "new", ["a"]),
            "",
        ),  # the folder's own name comes first
        (lambda run: FailureLog(run.failures).add([event("a", 1, "raised", "m")]), ""),
    ],
)
def test_a_full_disk_is_told_and_leaves_nothing_half_written(run, capsys, monkeypatch, work, file):
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    monkeypatch.setattr(os, "fsync", no_space)
    assert run_command(lambda: work(run)) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {run.path / file}") and error.count("\n") == 1
    assert "No space left on device; make room there, then the same command goes on" in error
    after = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert {p: data for p, data in after.items() if p.parent != run.failures} == before
    monkeypatch.undo()
    work(run)
    assert not [path for path in run.path.rglob(".*") if path.is_file()], "no temporary file stays"


def test_a_shared_model_that_could_not_be_saved_is_none(run, monkeypatch):
    shared = load_shared(run.shared)[0]
    sync, calls = os.fsync, iter(range(100))
    monkeypatch.setattr(os, "fsync", lambda handle: no_space() if next(calls) == 9 else sync(handle))
    with pytest.raises(OSError, match="No space left"):
        save_shared(shared, run.shared, ["a"])
    assert next(calls) == 10, "the disk was full half-way"
    with pytest.raises(SharedModelError, match="no shared model here"):
        load_shared(run.shared)


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch, capsys):
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "temporary")

    monkeypatch.setattr(Path, "open", denied)
    assert run_command(lambda: replace_file(tmp_path / "config.yaml", b"") or 0) == 1
    error = capsys.readouterr().err
    assert f"error: {tmp_path}/config.yaml: Permission denied; give yourself the right" in error


@pytest.mark.filterwarnings("default")  # Ray's own warnings are theirs to mend
def test_a_full_disk_is_no_failure_of_a_scene(ray_6_cpus_4_gpus):
    """The job ends with the actor's own error: nothing is recorded, and nothing tried again."""
    accounts = Books()
    dispatcher = Dispatcher(FullDiskActor.remote, lambda: 1, max_attempts=3, deadline=60, accounts=accounts)
    with pytest.raises(OSError, match="No space left") as error:
        list(dispatcher.run(iter([pa.table({"scene_id": ["a", "b"]})]), total=2))
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, "RUN/library/parts/part-1.parquet")
    assert accounts.events == []
    with pytest.raises(OSError, match="No space left"):
        actors._attempt(no_space)
    assert isinstance(actors._attempt(lambda: 1 / 0), ZeroDivisionError), "that one is the scene's"


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"\xff\xfe car", "not a text file"),
        (b"car-00000\n../car", "line 2: bad scene id '../car'"),
        (b"car-00000\ncar-00000\n", "named twice: car-00000"),
        (b"bus-00000\n", "holds no scene bus-00000"),
        (b"# none\n", "no scene is left"),
    ],
)
def test_a_list_of_scenes_that_is_none(tmp_path, data, told):
    path = tmp_path / "scenes.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        choose_ids(EmbeddedCars(16, 5), path)
    assert told in str(error.value) and (data == b"# none\n" or str(path) in str(error.value))


def test_a_full_disk_leaves_a_store_that_is_none(tmp_path, monkeypatch):
    """Preparing it again, with room, replaces what is there."""

    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "store"))

    def prepare() -> None:
        with StoreWriter(tmp_path / "store", "test") as writer:
            writer.add(embedded_car("car-00000", 16, 5))

    with monkeypatch.context() as patch:
        patch.setattr("pyarrow.parquet.ParquetWriter.write_table", full)
        with pytest.raises(OSError, match="No space left"):
            prepare()
    with pytest.raises(FileNotFoundError, match="no complete scene store"):
        SceneStore(tmp_path / "store")
    prepare()
    assert SceneStore(tmp_path / "store").ids() == ["car-00000"]


@pytest.mark.filterwarnings("default")  # MLflow's own warnings are theirs to mend
def test_a_tracking_database_that_cannot_be_used_is_named(tmp_path, monkeypatch):
    (tmp_path / "mlflow.db").write_bytes(b"no database at all" * 100)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(RuntimeError, match=r"MLflow at sqlite:.*mlflow.db cannot be used"):
        Tracker(RunFolder(tmp_path / "run"), "stage1")
