"""Command lines that ask for what cannot be."""

from __future__ import annotations

import socket

import pytest

from scaling.cli import run_command
from scaling.config import SettingsError
from scaling.distributed.cluster import Resources, connect, share
from scaling.distributed.stage2 import driver
from scaling.storage.atomic import replace_file

PLANES = "planes.safetensors"
VAE = "autoencoder/diffusion_pytorch_model.safetensors"
DECODER = "decoder/model.safetensors"


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
