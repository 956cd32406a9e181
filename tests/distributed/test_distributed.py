"""Ray Data, Ray Train, Ray actors and MLflow together, on a local Ray with two GPUs that exist in its books only."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import threading
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from scaling.config import SettingsError, make_settings, merge
from scaling.data.choose_scenes import choose_ids
from scaling.data.embedded.scenes import embedded_car, embedded_ids, embedded_scene
from scaling.data.scene_store import SceneStore
from scaling.data.scene_views import views_from_row
from scaling.data.store_writer import StoreWriter
from scaling.data.stores import SourceSpec
from scaling.distributed.cluster import Resources, share
from scaling.distributed.job import Job
from scaling.distributed.prepare import prepare
from scaling.distributed.stage1.driver import train_stage1
from scaling.distributed.stage2.driver import Stage2Job, fit_stage2, settled_scenes
from scaling.distributed.tracking import tracking_uri
from scaling.library.run_folder import RunFolder, ids_hash
from scaling.library.scene_row import pack_scene
from scaling.library.stored_models import StoredModels
from scaling.models.shared_files import load_shared, read_scene_ids, save_shared
from scaling.storage.paths import to_path
from scaling.training.evaluate import evaluate_scene
from scaling.training.fit_frozen import fit_scenes
from scaling.training.measure.box import source_bounds
from scaling.training.process_group import Workers
from scaling.training.stage1 import Stage1

pytestmark = pytest.mark.filterwarnings("default")  # Ray's and MLflow's own warnings are theirs to mend


def test_shares_of_a_cluster():
    gpus = share(Resources(cpus=16, gpus=4), None, reserve_cpu=True)
    assert (gpus.workers, gpus.gpus, gpus.cpus, gpus.threads) == (4, 1, 0, 4)
    cpus = share(Resources(cpus=2, gpus=0), 2, reserve_cpu=True)
    assert (cpus.workers, cpus.gpus, cpus.cpus, cpus.threads) == (2, 0, 0.5, 1)
    machines = Resources(cpus=11, gpus=0, node_cpus=(3, 4, 4))  # 3, 3 and 4 without the reader's
    assert [share(machines, workers, reserve_cpu=True).cpus for workers in (1, 2, 3, 4, 10, 11)] == [4, 3, 3, 2, 1, 0.5]
    assert share(machines, 1, reserve_cpu=True).threads == 4
    with pytest.raises(ValueError, match="5 workers need a GPU each, but the cluster has 4"):
        share(Resources(cpus=16, gpus=4), 5, reserve_cpu=True)


def write_srn_scene(folder: Path, image_size: int) -> None:
    row = embedded_car(folder.name, image_size, 4)
    for name in ("rgb", "pose"):
        (folder / name).mkdir(parents=True)
    for index, png in enumerate(row["views"]):
        (folder / "rgb" / f"{index:06d}.png").write_bytes(png)
        pose = row["cam2world"].reshape(-1, 16)[index]
        (folder / "pose" / f"{index:06d}.txt").write_text(" ".join(str(v) for v in pose))
    focal = row["intrinsics"][0] * image_size
    centre = image_size / 2
    (folder / "intrinsics.txt").write_text(f"{focal} {centre} {centre} 0.\n0. 0. 0.\n1.\n{image_size} {image_size}\n")


def test_prepare_keeps_order_and_rejects_with_a_reason(ray_6_cpus_4_gpus, tmp_path):
    for name in ("b", "a", "d", "c"):
        write_srn_scene(tmp_path / "source" / name, 16)
    image = tmp_path / "source" / "c" / "rgb" / "000001.png"
    image.write_bytes(image.read_bytes()[:60])
    assert prepare(str(tmp_path / "source"), str(tmp_path / "store")) == (3, 1)
    store = SceneStore(tmp_path / "store")
    assert store.ids() == ["a", "b", "d"]
    [reject] = store.rejects()
    assert reject["scene_id"] == "c" and "000001.png" in reject["file"] and reject["reason"]


def kill_a_train_worker(log: Path) -> None:
    """Kills one of this process's Ray Train workers as soon as `log` tells of the second epoch."""
    while "epoch 2/" not in log.read_text():
        time.sleep(0.1)
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    processes = [line.split(maxsplit=2) for line in listed.splitlines()]
    children = {pid for pid, parent, _ in processes if int(parent) == os.getpid()}  # Ray's raylet among them
    os.kill(next(int(pid) for pid, parent, title in processes if parent in children and "RayTrainWorker" in title), 9)


def leave_torn_checkpoint(run: RunFolder) -> None:
    """What a driver leaves that is killed in its first upload, and the empty list of Ray's that a full disk leaves."""
    torn = run.checkpoints / "stage1" / "00001-autoencoder-torn"
    torn.mkdir(parents=True)
    (torn / "shared.safetensors").write_bytes(b"half")
    (torn.parent / "checkpoint_manager_snapshot.json").touch()


def test_both_stages_end_to_end(ray_6_cpus_4_gpus, tmp_path, tiny_values):
    """Stage 1 with two workers, of which one is killed, beside a torn checkpoint; stage 2 with two actors, which fit
    what this process fits, and a scene that cannot be decoded; and both again."""
    settings = make_settings(tiny_values)
    image_size, num_views = settings.data.image_size, settings.data.embedded_views
    with StoreWriter(tmp_path / "store", "test") as writer:
        for scene_id in embedded_ids(8):
            row = embedded_car(scene_id, image_size, num_views)
            if scene_id == "car-00006":
                row["views"][2] = row["views"][2][:50]
            writer.add(row)
    spec = SourceSpec.of(str(tmp_path / "store"), settings.data)
    run = RunFolder(tmp_path / "runs" / "tiny")
    first = choose_ids(spec.open(), None, count=4)
    noted = {"num_scenes": 4, "scenes_hash": ids_hash(first), "store": spec.store}
    run.write_config("stage1", settings, noted)
    leave_torn_checkpoint(run)
    log = tmp_path / "log"
    with log.open("w") as file, redirect_stdout(file):
        threading.Thread(target=kill_a_train_worker, args=(log,), daemon=True).start()
        metrics = train_stage1(Job(run, settings, spec, first, ray_6_cpus_4_gpus), num_workers=2)
    told = log.read_text()
    assert "removed checkpoint 00001-autoencoder-torn, which is not whole: it has no seal" in told
    assert re.search(r"worker \d: its process or node is gone; goes on from the last checkpoint\n", told)
    assert re.search(r"worker group of 2 restarts at epoch \d", told)
    kept = sorted(path.name for path in (run.checkpoints / "stage1").glob("*-*"))
    assert [name[:5] for name in kept] == ["00007", "done-"]
    views = [embedded_scene(scene_id, settings.data.image_size, num_views) for scene_id in first]
    stage1 = Stage1(settings, first, views, bounds=source_bounds(spec.open(), Workers()))
    stage1.run(lambda report: None)
    faulted = load_shared(run.shared)[0].state_dict()
    for name, tensor in stage1.shared.state_dict().items():
        torch.testing.assert_close(faulted[name], tensor, rtol=1e-3, atol=1e-3, msg=name)
    assert metrics["stage1"]["num_scenes"] == 4 and metrics["stage1"]["test"]["psnr"] > 5
    assert read_scene_ids(run.shared) == first

    rest = choose_ids(spec.open(), None, leave_out=first)
    job = Stage2Job(run, settings, spec, rest, ray_6_cpus_4_gpus, shared_folder=run.shared, num_actors=2)
    metrics = fit_stage2(job)
    assert (metrics["num_scenes"], metrics["num_failed"]) == (3, 1)
    assert list(run.given_up()) == ["car-00006"]
    shared, content_hash = load_shared(run.shared)
    rows = {row["scene_id"]: row for row in run.library.scenes()}
    assert {row["shared"] for row in rows.values()} == {content_hash}
    for batch in (["car-00004", "car-00005"], ["car-00007"]):  # car-00006 was to be fitted with the last one
        views = [views_from_row(row, image_size) for row in spec.open().rows(batch)]
        for fitted in fit_scenes(shared, views, settings):
            packed, row = pack_scene(fitted.params, settings.stage2.micro_dtype), rows[fitted.scene_id]
            assert (row["micro_planes"], row["coefs"]) == (packed.micro_planes, packed.coefs)
    assert json.loads(run.metrics.read_text()) == metrics
    assert (run.pictures / "stage2-scenes.png").is_file()

    parts = {path: path.stat().st_mtime_ns for path in run.library.parts()}
    again = fit_stage2(job)
    assert again == metrics and {p: p.stat().st_mtime_ns for p in run.library.parts()} == parts
    train_stage1(Job(run, settings, spec, first, ray_6_cpus_4_gpus), num_workers=2)
    with pytest.raises(SettingsError, match=r"representation.box_side = 2.0 \(was None\)"):
        other = make_settings(merge(tiny_values, {"representation": {"box_side": 2.0}}))
        train_stage1(Job(run, other, spec, first, ray_6_cpus_4_gpus), num_workers=2)

    client = MlflowClient(tracking_uri(run))
    experiment = client.get_experiment_by_name("tiny")
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["stage1", "stage2"], "one run a stage, whatever the restarts"
    assert runs["stage1"].data.params["representation.resolution"] == "4"
    assert "stage1/warmup/latent" in runs["stage1"].data.metrics
    assert runs["stage2"].data.metrics["test/psnr"] == pytest.approx(metrics["test"]["psnr"])


def test_cohorts_end_to_end_in_an_object_store(ray_6_cpus_4_gpus, s3_server, tmp_path, tiny_values, monkeypatch):
    """Two cohorts of fixed chunks; a damaged member is left out and recorded; each cohort's copy is stored once."""
    rates = {"decoder": 1e-2, "field": 1e-2, "base_planes": 1e-2, "micro_planes": 1e-2, "coefs": 1e-2}
    stage2 = {"mode": "cohort", "cohort_size": 3, "rgb": {"num_epochs": 1, "items_per_step": 3, "lr": rates}}
    settings = make_settings(merge(tiny_values, {"stage2": stage2}))
    monkeypatch.chdir(tmp_path)  # where the tracking database goes
    run = RunFolder(to_path(f"s3://runs/{tmp_path.name}/cohorts{s3_server}"))
    ids = embedded_ids(10)
    train = Stage1(settings, ids[:4], [embedded_scene(i, settings.data.image_size, 5) for i in ids[:4]])
    train.run(lambda report: None)
    content_hash = save_shared(train.shared, run.shared, ids[:4])
    with StoreWriter(tmp_path / "store", "test") as writer:
        for scene_id in ids[4:]:
            row = embedded_car(scene_id, settings.data.image_size, 5)
            if scene_id == ids[5]:
                row["views"][2] = row["views"][2][:50]
            writer.add(row)
    spec = SourceSpec.of(str(tmp_path / "store"), settings.data)
    job = Stage2Job(run, settings, spec, ids[4:], ray_6_cpus_4_gpus, shared_folder=run.shared, num_actors=2)
    metrics = fit_stage2(job)
    assert (metrics["num_scenes"], metrics["num_failed"]) == (5, 1)
    assert run.given_up()[ids[5]].kind == "bad input"
    assert settled_scenes(job) == set(ids[4:])
    assert settled_scenes(dataclasses.replace(job, retry_failed=True)) == set(ids[4:]) - {ids[5]}
    rows = list(run.library.scenes())
    members: dict[str, set[str]] = {}
    for row in rows:
        members.setdefault(row["cohort"], set()).add(row["scene_id"])
    assert sorted(map(sorted, members.values())) == [[ids[4], ids[6]], ids[7:10]]
    folders = {path.name for path in (run.library.folder / "cohorts").iterdir()}
    assert folders == set(members)
    assert not list((run.checkpoints / "cohorts").iterdir()), "a committed cohort needs no checkpoint"
    cohort_bytes = sum(path.stat().st_size for path in (run.library.folder / "cohorts").rglob("*.*"))
    assert metrics["bytes_per_scene"] > cohort_bytes / 5

    # A reader gets the pixels that the row's metrics were measured on.
    row = rows[0]
    model, params = StoredModels(run).scene(row)
    views = views_from_row(next(iter(spec.open().rows([row["scene_id"]]))), settings.data.image_size)
    assert evaluate_scene(model, params, views)["psnr"] == pytest.approx(row["psnr"], abs=1e-4)
    assert evaluate_scene(train.shared, params, views)["psnr"] != pytest.approx(row["psnr"], abs=1e-4)
    assert row["shared"] == content_hash
