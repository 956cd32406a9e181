"""What bad input is told: what is wrong, where, and what to do; and that it leaves nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import runpy
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.actors import Books, FullDiskActor
from helpers.damage import edit_json, edit_tensors, header, write
from helpers.tiny_run import make_run

from scaling.cli import run_command
from scaling.config import SettingsError
from scaling.data.choose_scenes import choose_ids
from scaling.data.embedded.scenes import embedded_car
from scaling.data.scene_store import SceneStore, StoreWriter
from scaling.data.stores import EmbeddedCars
from scaling.distributed.cluster import Resources, connect, share
from scaling.distributed.stage2 import actors, driver
from scaling.distributed.stage2.dispatcher import Dispatcher
from scaling.distributed.tracking import Tracker
from scaling.library.failures import FailureLog, event, read_failures
from scaling.library.ledger import open_ledger
from scaling.library.manifest import Manifest
from scaling.library.parts import commit_part
from scaling.library.reader import Library
from scaling.library.run_folder import RunFolder, ids_hash
from scaling.library.summary import summarise
from scaling.models.shared_files import SharedModelError, load_shared, read_scene_ids, save_shared
from scaling.storage.atomic import replace_file

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
PLANES = "planes.safetensors"
VAE = "autoencoder/diffusion_pytorch_model.safetensors"
DECODER = "decoder/model.safetensors"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(tiny_settings, tiny_scenes, tmp_path_factory) -> RunFolder:
    """Cars 0 and 1 in the shared model, cars 2 and 3 in one part."""
    run = make_run(tmp_path_factory.mktemp("bad") / "cars", tiny_settings, tiny_scenes)
    run.write_config(
        "stage1", tiny_settings, {"scenes_hash": ids_hash(["car-00000", "car-00001"]), "store": "embedded"}
    )
    return run


@pytest.fixture
def run(whole, tmp_path) -> RunFolder:
    """A copy to damage."""
    return RunFolder(Path(shutil.copytree(whole.path, tmp_path / "cars")))


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """Runs an experiment in this process. → its status and what it said on stderr."""

    def run_experiment(name: str, *argv: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        main = runpy.run_path(str(EXPERIMENTS / f"{name}.py"))["main"]
        try:
            status = run_command(main)
        except SystemExit as ended:
            status = int(ended.code or 0)
        return status, capsys.readouterr().err

    return run_experiment


# ---------------------------------------------------------------------- a shared model


ENORMOUS = {"resolution": 2**30}


@pytest.mark.parametrize(
    ("damage", "file", "words"),
    [
        (
            edit_tensors(PLANES, base_planes=torch.zeros(2, 3, 3, 8, 8)),
            PLANES,
            "base_planes is float32 [2, 3, 3, 8, 8], expected float32 [2, 3, 3, 4, 4]",
        ),
        (edit_tensors(PLANES, field__head__bias=torch.zeros(9)), PLANES, "field.head.bias is float32 [9]"),
        (edit_tensors(PLANES, background=torch.ones(4, dtype=torch.float16)), PLANES, "background is float16 [4]"),
        (edit_tensors(PLANES, base_planes=None), PLANES, "tensor base_planes is missing"),
        (edit_tensors(VAE, encoder__conv_in__bias=None), VAE, "tensor encoder.conv_in.bias is missing"),
        (edit_tensors(VAE, more=torch.ones(1)), VAE, "tensor more is unexpected"),
        (edit_tensors(DECODER, more=torch.ones(1)), DECODER, "tensor more is unexpected"),
        (write(PLANES, header(2**60, b"x" * 64)), PLANES, "not readable as safetensors"),
        (write(DECODER, header(50, b"\x80" * 64)), DECODER, "not readable as safetensors"),
        (write(VAE, pickle.dumps({"encoder.conv_in.bias": [0.0] * 8})), VAE, "not readable as safetensors"),
        (lambda folder: (folder / PLANES).rename(folder / "planes.pt"), PLANES, "read from safetensors alone"),
        (lambda folder: shutil.rmtree(folder / "autoencoder"), "autoencoder/config.json", "No such file"),
        (write("autoencoder/config.json", b"[1]"), "autoencoder/config.json", "expected an object, found a list"),
        (
            edit_json("autoencoder/config.json", lambda config: config.update(latent_channels="four")),
            "autoencoder/config.json",
            "no autoencoder can be made of it",
        ),
        (edit_json("config.json", lambda config: config["settings"].update(new=1)), "config.json", "new: unknown key"),
        (edit_json("config.json", lambda config: config.update(settings=[1])), "config.json", "settings are missing"),
        (edit_json("config.json", lambda config: config.update(format_version="one")), "config.json", "format_version"),
        (edit_json("config.json", lambda config: config["settings"]["representation"].update(ENORMOUS)), "config.json",
         "representation.resolution: Input should be less than or equal to 4096"),
        (write("config.json", b"\xff\xfe"), "config.json", "not a text file"),
        (write("hash.txt", b""), "", "hash.txt says nothing"),
    ],
)  # fmt: skip
def test_a_shared_model_that_is_none(run, damage, file, words):
    damage(run.shared)
    with pytest.raises(SharedModelError, match=re.escape(words)) as error:
        load_shared(run.shared)
    assert str(error.value).startswith(str(run.shared / file)) and "\n" not in str(error.value)


def test_sizes_that_fit_no_memory_are_refused_before_they_take_it(run):
    grow = {"resolution": 2**12, "num_base_planes": 2**12}  # 2.5 TB
    edit_json("config.json", lambda config: config["settings"]["representation"].update(grow))(run.shared)
    with pytest.raises(SharedModelError, match=r"expected float32 \[4096, 3, 3, 4096, 4096\]"):
        load_shared(run.shared)


@pytest.mark.parametrize(("text", "told"), [(None, "No such file"), (b"", "names none"), (b"\xff", "not a text file")])
def test_a_shared_model_without_the_names_of_its_scenes(run, command, text, told):
    path = run.shared / "scenes.txt"
    path.unlink() if text is None else path.write_bytes(text)
    with pytest.raises(SharedModelError, match=told):
        read_scene_ids(run.shared)
    status, error = command("stage2", "--run", run.path, "--num-scenes", 4)
    assert status == 1 and error.startswith(f"error: {path}: ") and error.count("\n") == 1


# ---------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("name", "flag", "value", "told"),
    [
        ("stage1", "--num-workers", "0", "must be at least 1, not 0"),
        ("stage1", "--num-scenes", "-3", "must be at least 1, not -3"),
        ("stage2", "--num-actors", "two", "'two' is not a whole number"),
        ("stage2", "--skip-scenes", "-1", "must be at least 0, not -1"),
        ("stage2", "--cohort-size", "0", "must be at least 1, not 0"),
        ("stage2", "--mode", "warm", "invalid choice: 'warm'"),
        ("render", "--frames", "1.5", "'1.5' is not a whole number"),
    ],
)
def test_counts_that_are_none(command, tmp_path, name, flag, value, told):
    needed = ["--scene", "a"] if name == "render" else ["--num-scenes", "4"]
    status, error = command(name, "--run", tmp_path / "run", *needed, flag, value)
    assert status == 2 and f"{flag}: {told}" in error and not (tmp_path / "run").exists()


def test_the_number_of_scenes_must_be_said(command, tmp_path):
    status, error = command("stage1", "--run", tmp_path / "run")
    assert status == 2 and "required: --num-scenes" in error


def test_a_seed_that_no_generator_takes_is_refused(command, tmp_path):
    status, error = command("stage1", "--run", tmp_path / "run", "--num-scenes", 4, "--seed", 2**63)
    assert status == 2 and "seed: Input should be less than" in error


def test_more_workers_than_the_cluster_can_hold(run, tiny_settings):
    before = sorted(run.path.rglob("*"))
    with pytest.raises(SettingsError, match=r"5 workers need a GPU each, but the cluster has 2: lower --num-workers"):
        cluster = Resources(6, 2)
        job = driver.Stage2Job(run, tiny_settings, None, ["car-00004"], cluster, shared_folder=run.shared, num_actors=5)
        driver.fit_stage2(job)
    assert sorted(run.path.rglob("*")) == before, "nothing is written before"
    with pytest.raises(SettingsError, match="9 workers need a CPU each, but the cluster has 8"):
        share(Resources(8, 0), 9, reserve_cpu=False)


def test_a_cluster_that_does_not_answer(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(
            ConnectionError, match=rf"no Ray cluster answers at {address} \(.*refused\): start one with"
        ):
            connect(address)


@pytest.mark.parametrize("name", ["stage2", "evaluate", "render"])
@pytest.mark.parametrize("kind", ["missing", "empty", "a file"])
def test_run_folders_that_hold_nothing(command, tmp_path, name, kind):
    path = tmp_path / "run"
    path.touch() if kind == "a file" else path.mkdir() if kind == "empty" else None
    flags = {"stage2": ["--num-scenes", 4], "evaluate": [], "render": ["--scene", "car-00002"]}[name]
    status, error = command(name, "--run", path, *flags)
    told = {"stage2": "no shared model here", "evaluate": "no fitted scenes", "render": "no scenes are fitted there"}
    assert status == 1 and f"error: {path}" in error and told[name] in error and error.count("\n") == 1


def test_a_folder_below_a_file_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run_command(lambda: replace_file(tmp_path / "file" / "run" / "metrics.json", b"") or 0) == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error and "Not a directory; a file is where a folder is needed" in error


# ---------------------------------------------------------------------- run folders


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"stage1: [1", "while parsing a flow sequence"),
        (b"- 1", "expected stages, found a list"),
        (b"stage1: {job: {}}", "stage1 has no settings"),
        (b"stage2: 3", "stage2 has no settings"),
        (b"stage1: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        (b"\xff\xfe\x01", "unacceptable character"),
    ],
)
def test_a_damaged_config_is_named(run, command, text, told):
    (run.path / "config.yaml").write_bytes(text)
    status, error = command("evaluate", "--run", run.path)
    assert status == 1 and error.startswith(f"error: {run.path}/config.yaml: ") and told in error
    assert "choose another --run" in error and error.count("\n") == 1


def test_a_run_of_other_scenes_is_refused(run, tiny_settings):
    job = {"scenes_hash": ids_hash(["car-00000"])}
    with pytest.raises(SettingsError, match=r"started with something else: the scenes; choose another --run"):
        run.check_same_job("stage1", tiny_settings, job, ignore={"stage2"})


def test_a_library_of_another_shared_model_is_refused(run):
    told = r"fitted on shared model .*…, not on 000000000000…: .* another --run"
    with open_ledger(run) as ledger, pytest.raises(SettingsError, match=told):
        ledger.check_shared("0" * 64)


def test_a_scene_whose_store_is_not_noted(run, command):
    status, error = command("render", "--run", run.path, "--scene", "car-00002")
    assert status == 1 and "config.yaml: does not say which store stage 2 used" in error


def test_a_scene_that_is_not_in_the_library(run, command):
    status, error = command("render", "--run", run.path, "--scene", "bus")
    assert status == 1 and "holds no scene 'bus'; it has car-00002, car-00003\n" in error


def with_column(name: str, values: list[Any]) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.column_names.index(name), name, pa.array(values))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda table: table.drop_columns(["psnr"]), "psnr"),
        (lambda table: table.drop_columns(["format_version"]), "format_version"),
        (with_column("psnr", ["high", "low"]), "as a scalar of type float)"),
        (with_column("scene_id", ["car-00002", None]), "column scene_id holds nulls"),
        (with_column("format_version", [1, 99]), "format version 99, this program reads up to 5: update it"),
    ],
)
def test_parts_that_this_program_did_not_write(run, command, change, told):
    [path] = run.library.parts()
    pq.write_table(change(pq.read_table(path)), path)
    status, error = command("evaluate", "--run", run.path)
    assert status == 1 and error.startswith(f"error: {path}: ") and told in error and error.count("\n") == 1


@pytest.mark.parametrize("data", [b"", b"hello, this is no table"])
def test_files_that_are_no_parts(run, data):
    [path] = run.library.parts()
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{path}: not a readable part of a library \(.*\): restore it, or remove it"):
        Library(path.parent.parent).ids()


def test_a_column_more_does_no_harm(run):
    [path] = run.library.parts()
    pq.write_table(pq.read_table(path).append_column("mine", pa.array([1, 2])), path)
    assert run.library.ids() == ["car-00002", "car-00003"] and summarise(run)["num_scenes"] == 2


def test_lines_that_are_no_events_are_passed_over(tmp_path):
    FailureLog(tmp_path).add([event("a", 1, "diverged", "not finite")])
    other = {"scene_id": "b", "attempt": 1, "kind": "retry", "message": "m", "when": "2"}
    wrong = [b"\xff\xfe", b"[1]", b"3", b'{"scene_id": "b"}', json.dumps(other | {"when": None}).encode()]
    wrong.append(json.dumps(other | {"scene_id": ["b"]}).encode())
    (tmp_path / "events-000000-000000-00000000.jsonl").write_bytes(b"\n".join(wrong))
    assert list(read_failures(tmp_path, Manifest())) == ["a"]


# ---------------------------------------------------------------------- disks


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
