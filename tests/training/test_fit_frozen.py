"""Frozen fits on scenes of 16² pixels."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from helpers.stage1_run import make_run
from torch import nn

from scaling.config import LossWeights, Rates, Stage1Phase, make_settings, merge
from scaling.data.embedded.scenes import embedded_scene
from scaling.library.row_schema import METRICS
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.training.batches import Item, make_batch
from scaling.training.evaluate import evaluate_scene, render_views
from scaling.training.fit_frozen import fit_scenes
from scaling.training.metrics.images import psnr
from scaling.training.phase_loop import EpochReport
from scaling.training.random_streams import stream
from scaling.training.training_scene import encode_scene, prepare_scene


@pytest.mark.parametrize("start", ["mean", "random"])
def test_scenes_do_not_touch_each_other(shared, tiny_values, tiny_scenes, start):
    settings = make_settings(merge(tiny_values, {"stage2": {"start": start}}))
    before = shared.content_hash()
    together = fit_scenes(shared, tiny_scenes[:2], settings)
    for index, fitted in enumerate(together):
        alone = fit_scenes(shared, [tiny_scenes[index]], settings)[0]
        torch.testing.assert_close(fitted.params.micro_planes, alone.params.micro_planes, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fitted.params.coefs, alone.params.coefs, rtol=1e-4, atol=1e-4)
    assert shared.content_hash() == before, "the shared model stands still"
    assert all(parameter.grad is None for parameter in shared.parameters())
    assert not torch.equal(together[0].params.micro_planes, together[1].params.micro_planes)


def test_results_come_in_the_order_of_the_scenes(shared, tiny_settings, tiny_scenes):
    first, second = tiny_scenes[:2]
    longer = dataclasses.replace(second, test_views=(0, 1))  # fewer training views: fitted apart
    fitted = fit_scenes(shared, [first, longer, tiny_scenes[2]], tiny_settings)
    assert [scene.scene_id for scene in fitted] == ["car-00000", "car-00001", "car-00002"]
    alone = fit_scenes(shared, [longer], tiny_settings)[0]
    torch.testing.assert_close(fitted[1].params.coefs, alone.params.coefs, rtol=1e-4, atol=1e-4)
    assert all(scene.seconds > 0 for scene in fitted)


def test_both_phases_of_a_fit_take_their_steps(shared, tiny_values, tiny_scenes):
    def fit(num_epochs: int) -> tuple[SceneParams, list[tuple[str, int]]]:
        values = merge(tiny_values, {"stage2": {"rgb": {"num_epochs": num_epochs}}})
        steps: list[tuple[str, int]] = []
        fitted = fit_scenes(
            shared, tiny_scenes[:2], make_settings(values), lambda phase, step, loss: steps.append((phase, step))
        )
        return fitted[0].params, steps

    latent_only, first_steps = fit(0)
    both, steps = fit(2)
    assert first_steps == [("latent", step) for step in range(6)]
    assert steps == first_steps + [("rgb", step) for step in range(2 * 4)], "an epoch of 2b is one pass over the views"
    assert not torch.equal(latent_only.micro_planes, both.micro_planes)
    assert not torch.equal(latent_only.coefs, both.coefs)


@pytest.mark.parametrize("through", ["student", "decoder"])
def test_scenes_move_through_the_student_or_the_decoder(shared, tiny_values, tiny_scenes, through):
    """And never through the other; without a student through the decoder."""
    shared = copy.deepcopy(shared)
    settings = make_settings(merge(tiny_values, {"stage2": {"rgb": {"through": through}}}))
    called: list[str] = []
    for name in ("student", "decoder"):
        getattr(shared, name).register_forward_pre_hook(lambda module, args, name=name: called.append(name))
    fit_scenes(shared, tiny_scenes[:1], settings)
    assert called == [through] * 4, "one view of the scene a step"
    shared.student = None
    fit_scenes(shared, tiny_scenes[:1], settings)
    assert called[4:] == ["decoder"] * 4


class KnownDecoder(nn.Module):
    """Stands for an adapted decoder; of a kind that a student can learn in seconds."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(12, 4, 3, 3, generator=torch.Generator().manual_seed(0))
        self.register_buffer("weight", weight)

    def forward(self, latents: torch.Tensor, latent_scale: torch.Tensor) -> torch.Tensor:
        pixels = nn.functional.conv2d(latents, self.weight, padding=1)
        return torch.sigmoid(nn.functional.pixel_shuffle(pixels, 2))


@pytest.mark.slow
def test_a_student_learns_the_decoder_and_its_gradient(tiny_values, tiny_scenes):
    """What it is for: an image's error must move rendered latents as it would through the decoder."""
    short = {name: {"num_epochs": 1} for name in ("warmup", "joint")}
    distil = {"num_epochs": 2, "steps_per_epoch": 100, "lr": {"student": 1e-2}}
    values = merge(tiny_values, {"stage1": {**short, "adapt": {"num_epochs": 0}, "distil": distil}})
    run = make_run(values, tiny_scenes)
    run.shared.decoder = KnownDecoder()
    reports: list[EpochReport] = []
    run.run(reports.append)
    losses = [report.losses["student"] for report in reports if report.phase == "distil"]
    assert losses[1] < 0.3 * losses[0]
    scene = tiny_scenes[0]
    latents = render_views(run.shared, run.table[:1], scene.cam2world, scene.intrinsics)["latents"].requires_grad_()
    wanted, found = (
        torch.autograd.grad((decode(latents) - scene.images).square().mean(), latents)[0].flatten()
        for decode in (run.shared.decode, run.shared.student)
    )
    assert nn.functional.cosine_similarity(wanted, found, dim=0) > 0.9


def test_metrics_of_a_fitted_scene(shared, tiny_scenes):
    views = tiny_scenes[0]
    metrics = evaluate_scene(shared, shared.start_params(1), views)
    test, train = list(views.test_views), list(views.train_views)
    mean_image = views.images[train].mean(0, keepdim=True).expand(len(test), -1, -1, -1)
    assert metrics["mean_image_psnr"] == pytest.approx(psnr(mean_image, views.images[test]).mean().item(), abs=1e-4)
    decoded = shared.autoencoder.decode(shared.autoencoder.encode(views.images[test]))
    assert metrics["autoencoder_psnr"] == pytest.approx(psnr(decoded, views.images[test]).mean().item(), abs=1e-4)
    assert set(metrics) == set(METRICS)


def test_a_crop_is_that_square_of_its_view(tiny_values):
    """Images of 16², latents of 8²: squares of 4², whose rays and pixels are those of the whole view there, around
    what it shows."""
    values = {"autoencoder": {"kind": "super_resolution", "shrink": 2}, "rendering": {"sampled": "hull"}}
    shared = SharedModel(make_settings(merge(tiny_values, values)))
    scene = encode_scene(shared, prepare_scene(shared, embedded_scene("car-00001", 16, 6)))
    phase = Stage1Phase(crop=4, loss=LossWeights(rgb=1.0, latent=1.0), lr=Rates(decoder=1e-3))
    items = [Item(scene, view, stream("crop", str(view))) for view in (0, 3, 3, 4)]
    cropped = make_batch(shared, phase, items)
    whole = make_batch(shared, phase.model_copy(update={"crop": None}), items)
    assert whole.pixels is None and cropped.images.shape == (4, 3, 8, 8)
    corners = set()
    for row, pixels in enumerate(cropped.pixels):
        assert torch.equal(cropped.rays.directions[row], whole.rays.directions[row, pixels])
        assert torch.equal(cropped.latents[row], whole.latents[row, pixels])
        top, left = divmod(int(pixels[0]), 8)
        corners.add((top, left))
        assert torch.equal(cropped.images[row], whole.images[row, :, 2 * top : 2 * top + 8, 2 * left : 2 * left + 8])
        shown = scene.drawn[scene.drawn // 64 == items[row].view] % 64
        assert torch.isin(pixels, shown).any()
    assert len(corners) > 1
    colours = torch.arange(16.0).view(1, 16, 1)
    assert torch.equal(shared.as_latents(colours)[0, 0], torch.arange(16.0).view(4, 4))


def test_rgb_space_learns_in_both_stages(tiny_values, tiny_scenes):
    values = {
        "representation": {"resolution": 8, "micro_features": 4, "field_width": 32},  # 8 of ReLU may be dead
        "autoencoder": {"kind": "super_resolution", "shrink": 1, "decoder_blocks": 0},
        "rendering": {"samples": 12},
        "stage1": {
            "warmup": {"num_epochs": 4, "steps_per_epoch": 25, "rays_per_item": 64},
            "joint": {"num_epochs": 0},
            "adapt": {"num_epochs": 0},
            "distil": {"num_epochs": 0},
        },
        "stage2": {"latent": {"steps_per_epoch": 150, "rays_per_item": 64}, "rgb": {"num_epochs": 0}},
    }
    run = make_run(merge(tiny_values, values), tiny_scenes)
    reports: list[EpochReport] = []
    run.run(reports.append)
    assert [report.phase for report in reports] == ["warmup"] * 4
    assert reports[-1].losses["latent"] < 0.7 * reports[0].losses["latent"]
    run.shared.requires_grad_(False)
    losses: list[float] = []
    fitted = fit_scenes(run.shared, tiny_scenes[:1], run.settings, lambda phase, step, loss: losses.append(loss))[0]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    params = fitted.params[None]
    metrics = evaluate_scene(run.shared, params, tiny_scenes[0])
    start = evaluate_scene(run.shared, run.shared.start_params(1), tiny_scenes[0])
    assert metrics["psnr"] > start["psnr"] + 1 and metrics["train_psnr"] > start["train_psnr"] + 1
    assert {name for name, value in metrics.items() if value is None} == {
        "autoencoder_psnr", "autoencoder_ssim", "autoencoder_ms_ssim", "autoencoder_flip", "latent_psnr", "lpips",
    }  # fmt: skip
