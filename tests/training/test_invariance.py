"""The same result however it is run: workers, kills, actors, order, seeds."""

from __future__ import annotations

import dataclasses
import multiprocessing
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from scaling.config import make_settings, merge
from scaling.data.scene_views import SceneViews
from scaling.models.shared_model import SharedModel
from scaling.training.checkpoints.state import load_scenes, read_progress
from scaling.training.evaluate import evaluate_scene
from scaling.training.fit_frozen import FittedScene, fit_scenes
from scaling.training.phase_loop import EpochReport
from scaling.training.process_group import Workers
from scaling.training.stage1 import Stage1

pytestmark = pytest.mark.slow

# Epochs of one step, so that reports are of steps: 20 in all, through all five phases. Four buckets, so that three
# workers have unequal shares.
STEPS = {
    "stage1": {
        "num_buckets": 4,
        "autoencoder": {"num_epochs": 4, "steps_per_epoch": 1},
        "warmup": {"num_epochs": 8, "steps_per_epoch": 1},
        "joint": {"num_epochs": 4, "steps_per_epoch": 1},
        "adapt": {"num_epochs": 2, "steps_per_epoch": 1},
        "distil": {"num_epochs": 2, "steps_per_epoch": 1},
    }
}
NUM_STEPS = 20


@dataclasses.dataclass
class Run:
    """A run of stage 1, its reports, and the folder that holds a checkpoint of every epoch."""

    stage1: Stage1
    reports: list[EpochReport]
    folder: Path

    @property
    def losses(self) -> list[dict[str, float]]:
        return [report.losses for report in self.reports]


class Killed(Exception):
    """Stands for a process that is gone in the middle of a step."""


def train(
    values: dict[str, Any],
    scenes: list[SceneViews],
    folder: Path,
    workers: Workers | None = None,
    resume: Path | None = None,
) -> Run:
    """The scenes that the worker owns, with a checkpoint after every epoch."""
    settings, workers = make_settings(values), workers or Workers()
    owned = [scene for index, scene in enumerate(scenes) if workers.owns(index % settings.stage1.num_buckets)]
    done = Run(Stage1(settings, [scene.scene_id for scene in scenes], owned, workers), [], folder)

    def on_epoch(report: EpochReport) -> None:
        done.reports.append(report)
        done.stage1.save(folder / f"{report.epochs_done:05d}")

    done.stage1.run(on_epoch, resume)
    return done


def one_of(size: int, rank: int, values: dict[str, Any], scenes: list[SceneViews], folder: Path) -> Run:
    """One of `size` workers."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    try:
        done = train(values, scenes, folder, Workers(rank, size, wrap=nn.parallel.DistributedDataParallel))
        dist.barrier()  # all shards are on disk
        return done
    finally:
        dist.destroy_process_group()


def together(size: int, *arguments: Any) -> Run:
    """The run of `size` processes, seen from rank 0, which is this process."""
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=one_of, args=(size, rank, *arguments), daemon=True) for rank in range(1, size)]
    for other in others:
        other.start()
    try:
        return one_of(size, 0, *arguments)
    finally:
        for other in others:
            other.join(30)
            other.kill()
        assert not any(other.exitcode for other in others)


@pytest.fixture(scope="module")
def values(tiny_values) -> dict[str, Any]:
    return merge(tiny_values, STEPS)


@pytest.fixture(scope="module")
def one_worker(values, tiny_scenes, tmp_path_factory) -> Run:
    return train(values, tiny_scenes, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def three_workers(values, tiny_scenes, tmp_path_factory) -> Run:
    """The same run by three processes, of which the first has two of the four buckets."""
    return together(3, values, tiny_scenes, tmp_path_factory.mktemp("three"))


def test_three_workers_have_the_losses_of_one(one_worker, three_workers):
    assert len(one_worker.losses) == NUM_STEPS
    for one, theirs in zip(one_worker.losses, three_workers.losses, strict=True):
        assert theirs == pytest.approx(one, rel=1e-3)
    mean = one_worker.stage1.shared.coefs_mean
    torch.testing.assert_close(three_workers.stage1.shared.coefs_mean, mean, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("epoch", [2, 7, 14, 17])
def test_one_worker_goes_on_where_three_stopped(three_workers, values, tiny_scenes, tmp_path, epoch):
    """A kill in each phase; the final losses of both runs are within 1 %."""
    checkpoint = three_workers.folder / f"{epoch:05d}"
    assert read_progress(checkpoint)["num_shards"] == 3
    assert {name.split("/")[0] for name in load_scenes(checkpoint)} == {scene.scene_id for scene in tiny_scenes}
    again = train(values, tiny_scenes, tmp_path, resume=checkpoint)
    assert [report.epochs_done for report in again.reports] == list(range(epoch + 1, NUM_STEPS + 1))
    assert again.losses[-1] == pytest.approx(three_workers.losses[-1], rel=1e-2)


@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_at_a_random_step_ends_as_the_whole_one(
    tiny_values, tiny_scenes, tmp_path, monkeypatch, seed, whole
):
    """Its last checkpoint may be some steps old; the steps since then are taken again, exactly."""
    steps_left = random.Random(seed).randrange(1, 3 + 2 * 3 + 2 * 2 + 2)
    step = Stage1._step

    def killed(self: Stage1, *arguments: Any) -> Any:
        nonlocal steps_left
        steps_left -= 1
        if steps_left == 0:
            raise Killed
        return step(self, *arguments)

    monkeypatch.setattr(Stage1, "_step", killed)
    with pytest.raises(Killed):
        train(tiny_values, tiny_scenes, tmp_path)
    last = max(tmp_path.iterdir(), default=None)
    again = train(tiny_values, tiny_scenes, tmp_path, resume=last)
    assert again.stage1.shared.content_hash() == whole.stage1.shared.content_hash()
    assert again.losses[-1] == whole.losses[-1]


@pytest.fixture(scope="module")
def whole(tiny_values, tiny_scenes, tmp_path_factory) -> Run:
    return train(tiny_values, tiny_scenes, tmp_path_factory.mktemp("whole"))


def test_the_same_seed_is_the_same_model_and_another_is_not(whole, tiny_values, tiny_scenes, tmp_path):
    again = train(tiny_values, tiny_scenes, tmp_path / "again")
    other = train(merge(tiny_values, {"seed": 1}), tiny_scenes, tmp_path / "other")
    assert again.stage1.shared.content_hash() == whole.stage1.shared.content_hash()
    assert torch.equal(again.stage1.table.micro_planes, whole.stage1.table.micro_planes)
    assert other.stage1.shared.content_hash() != whole.stage1.shared.content_hash()


# ---------------------------------------------------------------------- stage 2


def fit_in_batches(shared: SharedModel, batches: list[list[SceneViews]], seed: int = 0) -> dict[str, FittedScene]:
    settings = make_settings(merge(shared.settings.model_dump(), {"seed": seed}))
    return {scene.scene_id: scene for batch in batches for scene in fit_scenes(shared, batch, settings)}


def test_a_fit_depends_on_its_scene_and_seed_alone(whole, tiny_scenes):
    shared = whole.stage1.shared.requires_grad_(False).eval()
    a, b, c, d = tiny_scenes
    first = fit_in_batches(shared, [[a, b], [c, d]])
    for same in ([[c, d], [a, b]], [[a, b], [c, d]]):
        for scene_id, fitted in fit_in_batches(shared, same).items():
            assert torch.equal(fitted.params.micro_planes, first[scene_id].params.micro_planes), "equal batches"
            assert torch.equal(fitted.params.coefs, first[scene_id].params.coefs)
    for other in ([[d, a], [b, c]], [[a], [b], [c], [d]], [[c, b, d, a]]):
        for scene_id, fitted in fit_in_batches(shared, other).items():
            views = next(views for views in tiny_scenes if views.scene_id == scene_id)
            psnrs = [evaluate_scene(shared, f.params[None], views)["psnr"] for f in (fitted, first[scene_id])]
            assert psnrs[0] == pytest.approx(psnrs[1], abs=0.05)
    reseeded = fit_in_batches(shared, [[a, b]], seed=1)
    assert not torch.equal(reseeded[a.scene_id].params.micro_planes, first[a.scene_id].params.micro_planes)
