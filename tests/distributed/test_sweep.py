"""Sweeps: what a space may say, which trials are on the Pareto front, and a small sweep that is stopped and goes on."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.tiny_run import train_shared
from mlflow import MlflowClient

from scaling.cli import run_command
from scaling.config import SettingsError, make_settings
from scaling.data.embedded.scenes import embedded_ids
from scaling.distributed.sweep.pareto import fronts, pareto_front
from scaling.distributed.sweep.results import read_record, sweep_table
from scaling.distributed.sweep.space import Plan, read_space, short
from scaling.distributed.sweep.trial import TrialFailed, TrialJob, run_trial
from scaling.distributed.sweep.tune_space import is_whole
from scaling.distributed.tracking import tracking_uri
from scaling.library.run_folder import RunFolder

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def write_space(folder: Path, **values: Any) -> Path:
    """A space file; by default a grid over two numbers of base planes."""
    path = folder / "space.yaml"
    vary = {"representation.num_base_planes": {"values": [1, 2]}}
    path.write_text(yaml.safe_dump({"vary": vary, **values}, sort_keys=False))
    return path


# ---------------------------------------------------------------------- the space


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vary": {"representation.num_base_plane": {"values": [1]}}}, "did you mean representation.num_base_planes"),
        ({"vary": {"seed": {"low": 1, "high": 3}}}, "vary.seed: a grid, .* need values"),
        ({"vary": {"seed": {"values": [1, 1]}}}, "vary.seed: a value is there twice"),
        ({"vary": {"seed": {"values": [1], "low": 0, "high": 3}}}, "low, high and log do not go with values"),
        ({"vary": {"seed": {"low": 3, "high": 1}}, "search": "random", "num_trials": 2}, "low .3.* must be below high"),
        ({"vary": {"seed": {"low": 0, "high": 1, "log": True}}, "search": "random"}, "above 0 where log is true"),
        ({"vary": {"seed": {"value": [1]}}}, "vary.seed.value: unknown key; allowed here: values, low, high, log"),
        ({"vary": {"seed, precision": {"values": [1]}}}, "vary.seed, precision: 1 must be a list of 2 values"),
        ({"vary": {"seed": {"values": [1]}, "seed, precision": {"values": [[1, "float32"]]}}}, "seed is there twice"),
        ({"vary": {}}, "vary: Dictionary should have at least 1 item"),
        ({"trials": 3}, "trials: unknown key; allowed here: preset, settings"),
        ({"num_trials": 3}, "num_trials: needed by search random and optuna"),
        ({"search": "optuna"}, "num_trials: needed by search random and optuna"),
        ({"gpus_per_trial": 2}, "gpus_per_trial: .*less than or equal to 1"),
        ({"scheduler": "asha", "metric": "ssim"}, "metric must be psnr"),
        ({"scheduler": "asha", "vary": {"stage1_scenes": {"values": [1, 2]}}}, "nothing where vary has stage1_scenes"),
        ({"shared": "x", "vary": {"stage1_scenes": {"values": [1, 2]}}}, "no stage 1 where shared names a model"),
    ],
)  # fmt: skip
def test_a_wrong_space_is_told(tmp_path, values, message):
    with pytest.raises(SettingsError, match=message) as told:
        read_space(write_space(tmp_path, **values))
    assert str(tmp_path) in str(told.value)


@pytest.mark.parametrize(
    ("values", "given", "message"),
    [
        ({"vary": {"representation.num_base_planes": {"values": [1, 0]}}}, {}, "num_base_planes = 0: .*must both be 0"),
        ({"vary": {"preset": {"values": ["quick", "paper2"]}}}, {}, "preset = paper2: --preset: no preset 'paper2'"),
        ({"settings": {"stage3": {}}}, {}, "stage3: unknown key"),
        ({"vary": {"stage1_scenes": {"values": [0.5]}}}, {}, "stage1_scenes: must be a whole number"),
        ({}, {"representation.num_base_planes": 3}, "the space varies it; leave out the flag"),
    ],
)
def test_a_trial_that_cannot_be_is_told_before_the_first_starts(tmp_path, values, given, message):
    with pytest.raises(SettingsError, match=message):
        Plan(read_space(write_space(tmp_path, **values)), "default", given).check()


def test_a_grid_has_all_combinations_and_keys_can_change_together(tmp_path):
    vary = {
        "stage1_scenes": {"values": [4, 8]},
        "representation.micro_features, representation.macro_features": {"values": [[0, 16], [4, 12]]},
    }
    plan = Plan(read_space(write_space(tmp_path, vary=vary)), "quick", {"seed": 7})
    trials = plan.check()
    split = [(t.stage1_scenes, t.settings.representation.micro_features, t.settings.representation.macro_features)
             for t in trials]  # fmt: skip
    assert split == [(4, 0, 16), (4, 4, 12), (8, 0, 16), (8, 4, 12)]
    assert plan.num_trials == 4 and plan.most_stage1_scenes == 8
    assert {t.settings.seed for t in trials} == {7} and {t.settings.data.image_size for t in trials} == {128}
    assert plan.name(3, list(plan.configs())[3]) == "003_stage1_scenes=8_micro_features=4_macro_features=12"
    epochs = {"stage1.joint.num_epochs": 1, "stage1.adapt.num_epochs": 0.123456, "autoencoder.pretrained": "/a/b"}
    assert short(epochs) == {"joint.num_epochs": 1, "adapt.num_epochs": "0.1235", "pretrained": "b"}


@pytest.mark.parametrize("path", sorted((EXPERIMENTS / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_ready_spaces_hold(path):
    space = read_space(path)
    trials = Plan(space, space.preset).check()
    assert len(trials) == {"quick": 8, "ablation": 6, "missing": 13, "sizes": 5, "latents": 6}[path.stem]


# ---------------------------------------------------------------------- the Pareto front


def test_the_front_by_pencil():
    """(cost, quality): b costs more than a and is better; c costs more than b and is worse; d is as good as b, dearer;
    e is as cheap as a and worse; f is b again."""
    points = {"a": (1, 20), "b": (2, 25), "c": (3, 24), "d": (4, 25), "e": (1, 19), "f": (2, 25)}
    front = pareto_front([cost for cost, _ in points.values()], [quality for _, quality in points.values()])
    assert [list(points)[i] for i in front] == ["a", "b", "f"]
    rows = [{"trial": "x", "psnr": 20, "seconds_per_scene": 1, "bytes_per_scene": 9},
            {"trial": "y", "psnr": 25, "seconds_per_scene": 2, "bytes_per_scene": 9}]  # fmt: skip
    assert fronts(rows) == {"seconds_per_scene": ["x", "y"], "bytes_per_scene": ["y"]}


# ---------------------------------------------------------------------- trials


def trial_job(tmp_path: Path, values: dict[str, Any], name: str) -> TrialJob:
    data = values["data"]
    spec = (None, data["image_size"], data["embedded_views"], None)
    ids = embedded_ids(4)
    settings = make_settings(values).model_dump()
    return TrialJob(str(tmp_path), name, "quick", {"seed": 0}, settings, spec, ids[:2], ids[2:], shared=None)


def test_trials_with_one_stage_1_train_it_once_and_a_stopped_one_leaves_its_epochs(tmp_path, tiny_values):
    def stop(report: dict[str, Any]) -> None:
        if report.get("step") == 3:
            raise SystemExit  # what Tune raises in a trial that a scheduler ends

    with pytest.raises(SystemExit):
        run_trial(trial_job(tmp_path, tiny_values, "000"), stop)
    assert read_record(tmp_path / "trials" / "000") is None
    [stage1] = (tmp_path / "stage1").iterdir()
    assert len(json.loads((stage1 / "reports.json").read_text())) == 3

    reports: list[dict[str, Any]] = []
    run_trial(trial_job(tmp_path, tiny_values, "001"), reports.append)
    steps = [report["step"] for report in reports if "step" in report]
    assert steps == [1, 2, 3, 4, 5, 6, 7], "the first three are told again, not trained again"
    progress = [report["progress"] for report in reports if "progress" in report]
    assert progress == pytest.approx([80 * k / 6 for k in range(1, 7)] + [100])
    trained = (stage1 / "shared" / "hash.txt").stat().st_mtime_ns
    record = read_record(tmp_path / "trials" / "001")
    assert record and record["status"] == "finished" and record["num_scenes"] == 2 and record["psnr"] > 5

    other = {**tiny_values, "stage2": {**tiny_values["stage2"], "micro_dtype": "float32"}}
    run_trial(trial_job(tmp_path, other, "002"), reports.append)
    assert (stage1 / "shared" / "hash.txt").stat().st_mtime_ns == trained
    wider = read_record(tmp_path / "trials" / "002")
    assert wider and wider["bytes_per_scene"] > record["bytes_per_scene"]
    assert wider["stage1_seconds"] == record["stage1_seconds"] > 0


def test_a_failed_trial_is_recorded_and_not_run_again(tmp_path, tiny_values):
    rates = {"warmup": {**tiny_values["stage1"]["warmup"], "lr": {"field": 1e30, "base_planes": 1e30}}}
    job = trial_job(tmp_path, {**tiny_values, "stage1": {**tiny_values["stage1"], **rates}}, "000")
    with pytest.raises(Exception, match="numbers are not finite"):
        run_trial(job, lambda report: None)
    record = read_record(job.folder)
    assert record and record["status"] == "failed" and "Diverged: warmup" in record["error"]
    with pytest.raises(TrialFailed, match="numbers are not finite"):
        run_trial(job, lambda report: pytest.fail("it ran again"))


# ---------------------------------------------------------------------- end to end


@pytest.mark.filterwarnings("default")  # Ray's and MLflow's own warnings are theirs to mend
def test_a_sweep_end_to_end(ray_6_cpus_4_gpus, tmp_path, tiny_values, tiny_scenes, monkeypatch, capfd):
    """Three trials on one shared model, two on each GPU of those in Ray's books, one of which cannot succeed; again,
    when nothing is left to do; and with another space, which is refused."""
    train_shared(make_settings(tiny_values), tiny_scenes[:2], tmp_path / "shared")
    vary = {
        "stage2.latent.lr.micro_planes, stage2.latent.lr.coefs": {"values": [[0.01, 0.01], [0.02, 0.02], [9e37, 9e37]]}
    }
    fixed = {"settings": {"stage2": tiny_values["stage2"]}, "shared": "shared", "gpus_per_trial": 0.5}

    def sweep(num_scenes: int) -> int:
        space = write_space(tmp_path, vary=vary, stage2_scenes=num_scenes, **fixed)
        monkeypatch.setattr(sys, "argv", ["sweep", "--space", str(space), "--run", "runs/sweep"])
        return run_command(runpy.run_path(str(EXPERIMENTS / "sweep.py"))["main"])

    monkeypatch.chdir(tmp_path)
    assert sweep(2) == 0
    run = RunFolder(tmp_path / "runs" / "sweep")
    result = json.loads((run.path / "sweep.json").read_text())
    trials = result["trials"]
    assert [trial["status"] for trial in trials] == ["finished", "finished", "failed"]
    assert trials[2]["trial"] == "002_micro_planes=9e-37_coefs=9e-37" and "diverged" in trials[2]["error"]
    assert result["best"] == trials[0]["trial"] and trials[0]["psnr"] > 5 and trials[0]["num_scenes"] == 2
    assert (run.pictures / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    told = capfd.readouterr().out
    assert sweep_table(result) in told and "[3/3]" in told

    state = next((run.path / "tune").glob("experiment_state-*.json"))
    assert is_whole(state.parent)
    whole = state.read_bytes()
    state.write_bytes(whole[:-1])
    assert not is_whole(state.parent), "a torn state is told from a whole one"
    state.write_bytes(whole)
    times = {path: path.stat().st_mtime_ns for path in run.path.glob("trials/*/library/parts/*.parquet")}
    assert len(times) == 2
    assert sweep(2) == 0
    assert "3 trials, 3 of them done before" in capfd.readouterr().out
    assert json.loads((run.path / "sweep.json").read_text()) == result
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert sweep(1) == 2
    assert "space.stage2_scenes = 1 (was 2)" in capfd.readouterr().err

    client = MlflowClient(tracking_uri(run))
    runs = {r.info.run_name: r for r in client.search_runs([client.get_experiment_by_name("sweep").experiment_id])}
    assert len(runs) == 4
    best = runs[f"sweep/{result['best']}"]
    assert best.data.tags["mlflow.parentRunId"] == runs["sweep"].info.run_id
    assert (best.data.tags["stage"], best.data.tags["status"]) == ("trial", "finished")
    assert best.data.metrics["test/psnr"] == pytest.approx(trials[0]["psnr"])
    assert best.data.params["stage2.latent.lr.coefs"] == str(trials[0]["values"]["stage2.latent.lr.coefs"])
