"""Run folders and libraries that hold what this program did not write."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scaling.config import SettingsError
from scaling.library.failures import FailureLog, event, read_failures
from scaling.library.ledger import open_ledger
from scaling.library.manifest import Manifest
from scaling.library.reader import Library
from scaling.library.run_folder import ids_hash
from scaling.library.summary import summarise

PLANES = "planes.safetensors"
VAE = "autoencoder/diffusion_pytorch_model.safetensors"
DECODER = "decoder/model.safetensors"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"stage1: [1", "while parsing a flow sequence"),
        (b"- 1", "should be a valid dictionary"),
        (b"stage1: {job: {}}", "stage1.settings: Field required"),
        (b"stage2: 3", "stage2: Input should be a valid dictionary"),
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
        (with_column("format_version", [1, 99]), "format version 99, this program reads up to 5: update the program"),
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
    with pytest.raises(ValueError, match=rf"{path}: not a readable part of a library \(.*\): restore it, or move it"):
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
