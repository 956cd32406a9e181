"""Optimisers, sampling, stage 1 with its checkpoints and workers, and fitting: on scenes of 16² pixels."""

from __future__ import annotations

import copy
import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scaling.config import LossWeights, Phase, Rates, SettingsError, Stage1Phase, make_settings, merge
from scaling.data.embedded.scenes import embedded_scene
from scaling.data.scene_views import SceneViews
from scaling.library.scene_row import METRICS
from scaling.models.shared_files import load_shared, save_shared
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.training.batches import Item, make_batch
from scaling.training.checkpoints.state import read_progress
from scaling.training.evaluate import evaluate_scene, render_views
from scaling.training.fit_frozen import fit_scenes
from scaling.training.losses import pixel_error, weighted
from scaling.training.measure.background import measure_background
from scaling.training.metrics.images import psnr, ssim
from scaling.training.optim import RowAdam, check_ownership, lr_factor, shared_optimiser
from scaling.training.phase_loop import EpochReport
from scaling.training.process_group import Workers
from scaling.training.random_streams import stream
from scaling.training.sampler import bucket_of, epoch_batches
from scaling.training.scene_step import SceneOptimiser, by_autograd
from scaling.training.stage1 import Stage1, check_workers
from scaling.training.training_scene import encode_scene, prepare_scene

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def without_lpips(monkeypatch):
    """Where torchvision is installed, LPIPS would fetch its weights from the network."""
    monkeypatch.setattr("scaling.training.evaluate.lpips", lambda images, truth: None)


# ---------------------------------------------------------------------- losses and metrics


def test_pixel_error_is_taken_in_minus_one_to_one():
    images = torch.stack([torch.full((3, 2, 2), 0.5), torch.ones(3, 2, 2)])
    truth = torch.stack([torch.full((3, 2, 2), 0.25), torch.zeros(3, 2, 2)])
    assert pixel_error(images, truth).tolist() == [0.25, 4.0]


def test_losses_are_weighed_item_by_item():
    losses = {"latent": torch.tensor([1.0, 2.0]), "rgb": torch.tensor([10.0, 0.0]), "kl": torch.tensor([5.0, 5.0])}
    weights = LossWeights(latent=2.0, rgb=0.5)
    assert weighted(losses, weights).tolist() == [7.0, 4.0]
    assert weighted(losses, weights, kl_weight=0.2).tolist() == [8.0, 5.0]


def test_psnr_and_ssim():
    truth = torch.rand(2, 3, 16, 16, generator=stream("truth")) * 0.5
    assert psnr(truth + 0.1, truth).tolist() == pytest.approx([20.0, 20.0], abs=1e-3)
    assert psnr(truth, truth).tolist() == [100.0, 100.0], "capped"
    assert ssim(truth, truth).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert (ssim(1 - truth, truth) < 0.5).all()


# ---------------------------------------------------------------------- optimisers and schedules


def gradients(num_steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Steps of a table of 3 rows: the rows of the batch, and their gradients [R, 2, 2]."""
    rows = [[0, 1], [1], [0, 2], [1, 2], [1]]
    return [
        (torch.tensor(rows[step % 5]), torch.randn(len(rows[step % 5]), 2, 2, generator=stream("gradient", step)))
        for step in range(num_steps)
    ]


def test_a_row_moves_as_under_an_adam_of_its_own():
    start = torch.randn(3, 2, 2, generator=stream("table"))
    table = start.clone()
    ours = RowAdam(table)
    alone = [nn.Parameter(row.clone()) for row in start]
    theirs = [torch.optim.Adam([row], lr=0.1) for row in alone]
    for rows, grad in gradients(12):
        ours.step(rows, grad, 0.1)
        for row, row_grad in zip(rows.tolist(), grad):
            alone[row].grad = row_grad
            theirs[row].step()
        torch.testing.assert_close(table, torch.stack([row.detach() for row in alone]), rtol=1e-6, atol=1e-6)
    assert ours.steps.tolist() == [5, 10, 4]


def test_dense_rows_move_as_under_one_adam():
    start = torch.randn(3, 2, 2, generator=stream("table"))
    table, whole = start.clone(), nn.Parameter(start.clone())
    ours, theirs = RowAdam(table, dense=True), torch.optim.Adam([whole], lr=0.1)
    for rows, grad in gradients(12):
        ours.step(rows, grad, 0.1)
        whole.grad = torch.zeros_like(start).index_copy(0, rows, grad)
        theirs.step()
        torch.testing.assert_close(table, whole.detach(), rtol=1e-6, atol=1e-6)
    rows, grad = torch.tensor([1]), torch.zeros(1, 2, 2)
    before = table.clone()
    ours.step(rows, grad, 0.1)
    assert (table != before).flatten(1).any(1).all(), "rows outside of the batch drift on"


def test_one_step_of_scenes():
    """Of rows 2 and 0 of 3, by a loss that only coefs are in: Adam's first step is the rate, against the gradient."""
    table = SceneParams(torch.zeros(3, 1, 1, 2, 2), torch.tensor([[1.0], [1.0], [1.0]]))
    optimiser = SceneOptimiser(table, Rates(micro_planes=0.5, coefs=0.25))

    def loss_of(params: SceneParams) -> tuple[torch.Tensor, str]:
        assert params.micro_planes[0, 0, 0, 0, 0] == 7.0, "seen otherwise than they are"
        return (params.coefs * torch.tensor([[1.0], [-2.0]])).sum(), "told"

    rows = torch.tensor([0, 2])
    told, gradients = optimiser.step(rows, partial(by_autograd, loss_of=loss_of), 1.0, lambda micro: micro + 7)
    assert told == "told" and gradients["coefs"].tolist() == [[1.0], [-2.0]]
    torch.testing.assert_close(table.coefs, torch.tensor([[0.75], [1.0], [1.25]]))
    assert "micro_planes" not in gradients and not table.micro_planes.any() and not table.coefs.requires_grad


def test_ownership_is_exact():
    module = nn.Linear(2, 2)
    check_ownership(module, torch.optim.Adam(module.parameters()))
    with pytest.raises(RuntimeError, match=r"no optimiser owns \['bias'\]"):
        check_ownership(module, torch.optim.Adam([module.weight]))
    with pytest.raises(RuntimeError, match=r"no optimiser owns \['bias', 'weight'\]"):
        check_ownership(module, None)
    stranger = nn.Parameter(torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"owned but frozen \['not of this model'\]"):
        check_ownership(module, torch.optim.Adam([*module.parameters(), stranger]))
    module.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"owned but frozen \['bias'\]"):
        check_ownership(module, torch.optim.Adam(module.parameters()))


def test_rates_choose_what_is_trained(tiny_settings):
    shared = SharedModel(tiny_settings)
    optimiser = shared_optimiser(shared, Rates(field=0.1, base_planes=0.2, micro_planes=0.3))
    trained = {name.split(".")[0] for name, parameter in shared.named_parameters() if parameter.requires_grad}
    assert trained == {"field", "base_planes"}
    assert [group["lr"] for group in optimiser.param_groups] == [0.1, 0.2]
    assert shared_optimiser(shared, Rates()) is None
    adapted = shared.adapt_decoder()
    shared_optimiser(shared, Rates(decoder=0.1))
    trained = [parameter for parameter in shared.parameters() if parameter.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in adapted.parameters()}, "the adapted decoder, not the other"


@pytest.mark.parametrize(
    ("phase", "epoch", "progress", "by_hand"),
    [
        (Phase(), 7, 0.9, 1.0),
        (Phase(lr_decay=0.5), 2, 0.0, 0.25),
        (Phase(lr_milestones=[2, 4]), 1, 0.0, 1.0),
        (Phase(lr_milestones=[2, 4]), 2, 0.0, 0.3),
        (Phase(lr_milestones=[2, 4], lr_milestone_factor=0.1), 5, 0.0, 0.01),
        (Phase(lr_cosine_to=0.1), 0, 0.0, 1.0),
        (Phase(lr_cosine_to=0.1), 3, 0.5, 0.55),
        (Phase(lr_cosine_to=0.1), 3, 1 / 3, 0.1 + 0.9 * 0.75),
        (Phase(lr_cosine_to=0.1, lr_decay=0.5), 1, 0.5, 0.275),
    ],
)
def test_learning_rate_factors(phase, epoch, progress, by_hand):
    assert lr_factor(phase, epoch, progress) == pytest.approx(by_hand)


# ---------------------------------------------------------------------- streams and batches


def test_streams_depend_on_names_alone():
    assert stream(0, "warmup", "car").initial_seed() == 927826806844409801, "a checkpoint's run must not draw anew"
    draws = {torch.rand((), generator=stream(*names)).item() for names in [("a",), ("b",), ("a", 1), ("a", 2), ("a1",)]}
    assert len(draws) == 5


def test_buckets_differ_by_one_scene_at_most():
    assert bucket_of(list("abcde"), 2) == {"a": 0, "b": 1, "c": 0, "d": 1, "e": 0}
    with pytest.raises(SettingsError, match=r"1 scenes for stage1\.num_buckets = 2"):
        bucket_of(["a"], 2)


@pytest.mark.parametrize("num_workers", [2, 4])
def test_a_global_batch_does_not_depend_on_the_workers(num_workers):
    entries = {bucket: [(f"{bucket}-{scene}", view) for scene in range(2) for view in range(3)] for bucket in range(4)}
    alone = list(epoch_batches(entries, 5, 4, 0, "warmup", 3))
    together: list[list[Any]] = [[] for _ in alone]
    for rank in range(num_workers):
        owned = {bucket: entries[bucket] for bucket in entries if Workers(rank, num_workers).owns(bucket)}
        for batch, part in zip(together, epoch_batches(owned, 5, 4, 0, "warmup", 3)):
            batch.extend(part)
    assert [sorted(batch) for batch in together] == [sorted(batch) for batch in alone]
    for batch in alone:
        assert sorted(place for place, _ in batch) == list(range(20))
        assert all(entry in entries[place // 5] for place, entry in batch)


def test_a_bucket_is_dealt_out_whole_before_it_is_shuffled_again():
    entries = [(name, None) for name in "abcde"]
    dealt = [entry for batch in epoch_batches({0: entries}, 2, 5, "seed") for _, entry in batch]
    assert sorted(dealt[:5]) == sorted(dealt[5:]) == entries and dealt[:5] != dealt[5:]


def test_every_worker_needs_a_bucket(tiny_settings):
    check_workers(tiny_settings, 2)
    with pytest.raises(SettingsError, match=r"3 workers for stage1\.num_buckets = 2"):
        check_workers(tiny_settings, 3)


def test_a_scene_beside_the_box_is_named(tiny_settings, tiny_scenes):
    away = tiny_scenes[0].cam2world.clone()
    away[:, :3, 2] *= -1  # every camera looks outwards
    scene = dataclasses.replace(tiny_scenes[0], cam2world=away)
    with pytest.raises(ValueError, match=r"scene car-00000: no ray .* check the poses"):
        prepare_scene(SharedModel(tiny_settings), scene)


# ---------------------------------------------------------------------- stage 1


def make_run(values: dict[str, Any], scenes: list[SceneViews], workers: Workers | None = None) -> Stage1:
    workers = workers or Workers()
    owned = [scene for index, scene in enumerate(scenes) if workers.owns(index % values["stage1"]["num_buckets"])]
    return Stage1(make_settings(values), [scene.scene_id for scene in scenes], owned, workers)


@dataclasses.dataclass
class Finished:
    """A whole run: its reports, and after every epoch a checkpoint folder and a copy of all tensors."""

    run: Stage1
    reports: list[EpochReport]
    folders: list[Path]
    tensors: list[dict[str, torch.Tensor]]

    @property
    def losses(self) -> list[dict[str, float]]:
        return [report.losses for report in self.reports]


def all_tensors(run: Stage1) -> dict[str, torch.Tensor]:
    tables = {"micro_planes": run.table.micro_planes, "coefs": run.table.coefs}
    return {name: tensor.detach().clone() for name, tensor in (run.shared.state_dict() | tables).items()}


@pytest.fixture(scope="module")
def finished(tiny_values, tiny_scenes, tmp_path_factory) -> Finished:
    run = make_run(tiny_values, tiny_scenes)
    done = Finished(run, [], [], [all_tensors(run)])

    def on_epoch(report: EpochReport) -> None:
        done.reports.append(report)
        done.folders.append(tmp_path_factory.mktemp("checkpoint"))
        done.tensors.append(all_tensors(run))
        run.save(done.folders[-1])

    run.run(on_epoch)
    return done


def test_all_phases_run_and_report(finished):
    assert [(report.phase, report.epoch) for report in finished.reports] == [
        ("autoencoder", 1), ("warmup", 1), ("warmup", 2), ("joint", 1), ("joint", 2), ("adapt", 1),
        ("distil", 1),
    ]  # fmt: skip
    assert [report.epochs_done for report in finished.reports] == [1, 2, 3, 4, 5, 6, 7]
    assert {report.epochs_total for report in finished.reports} == {7}
    kinds = {report.phase: set(report.losses) for report in finished.reports}
    assert kinds == {
        "autoencoder": {"autoencoder", "kl"},
        "warmup": {"latent"},
        "joint": {"autoencoder", "kl", "latent", "rgb"},
        "adapt": {"rgb"},
        "distil": {"student"},
    }
    assert all(math.isfinite(loss) for losses in finished.losses for loss in losses.values())


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (1, {"encoder", "decoder"}),
        (3, {"field", "base_planes", "micro_planes", "coefs"}),
        (4, {"encoder", "decoder", "field", "base_planes", "micro_planes", "coefs"}),
        (6, {"adapted decoder"}),
        (7, {"student"}),
    ],
)
def test_a_phase_moves_what_its_rates_name(finished, epoch, expected):
    def part(name: str) -> str:
        if name.startswith("decoder."):
            return "adapted decoder"
        if name.startswith("autoencoder.vae."):
            return "encoder" if name.split(".")[2] in ("encoder", "quant_conv") else "decoder"
        return name.split(".")[0]

    after, before = finished.tensors[epoch], finished.tensors[epoch - 1]
    # Phase 1c's decoder starts as the autoencoder's, which stands at its place before the phase.
    before = before | dict.fromkeys((name for name in after if name.startswith("student.")), torch.zeros(()))
    before = before | {f"decoder.{k.removeprefix('autoencoder.vae.')}": v for k, v in before.items()} | before
    names = set(dict(finished.run.shared.named_parameters())) | {"micro_planes", "coefs"}
    moved = {part(name) for name in names & set(after) if not torch.equal(after[name], before[name])}
    assert moved == expected


def test_the_scale_and_the_background_follow_the_autoencoder(finished, tiny_scenes):
    measured = finished.tensors[2]  # after the first epoch of 1a
    assert finished.tensors[1]["autoencoder.latent_scale"] == pytest.approx(0.11)
    warmup = SharedModel(finished.run.settings)
    warmup.load_state_dict({k: v for k, v in measured.items() if k not in ("micro_planes", "coefs")})
    with torch.no_grad():
        images = torch.cat([scene.images[list(scene.train_views)] for scene in tiny_scenes])
        std = warmup.autoencoder.encode_raw(images)[0].std(correction=0)
    assert measured["autoencoder.latent_scale"].item() == pytest.approx(0.11 / std.item(), rel=1e-4)
    background = measure_background(warmup, finished.run.scenes, Workers())
    torch.testing.assert_close(background, measured["background"])
    assert torch.equal(finished.tensors[4]["background"], measured["background"]), "kept through 1b"
    assert not torch.equal(finished.tensors[6]["background"], measured["background"]), "derived again for stage 2"


def test_the_statistics_are_those_of_the_scenes(finished):
    shared, table = finished.run.shared, finished.run.table
    torch.testing.assert_close(shared.coefs_mean, table.coefs.mean(0))
    torch.testing.assert_close(shared.coefs_std, table.coefs.std(0, correction=0))
    torch.testing.assert_close(shared.micro_mean, table.micro_planes.mean())
    torch.testing.assert_close(shared.micro_std, table.micro_planes.std(correction=0))


def test_evaluation_of_stage_1(finished):
    metrics = finished.run.evaluate()
    assert list(metrics) == finished.run.scene_ids
    assert all(math.isfinite(scene[name]) for scene in metrics.values() for name in scene.keys() - {"lpips"})


@pytest.mark.parametrize("epoch", range(7))
def test_a_resumed_run_ends_where_the_whole_one_did(finished, tiny_values, tiny_scenes, epoch):
    again = make_run(tiny_values, tiny_scenes)
    reports: list[EpochReport] = []
    again.run(reports.append, resume=finished.folders[epoch])
    assert [report.losses for report in reports] == finished.losses[epoch + 1 :]
    assert again.shared.content_hash() == finished.run.shared.content_hash()
    assert torch.equal(again.table.micro_planes, finished.run.table.micro_planes)
    assert torch.equal(again.table.coefs, finished.run.table.coefs)


def test_a_checkpoint_is_safetensors_and_json(finished):
    assert {path.suffix for folder in finished.folders for path in folder.iterdir()} == {".safetensors", ".json"}
    progress = read_progress(finished.folders[2])
    assert (progress["phase_index"], progress["epoch"], progress["num_shards"]) == (1, 2, 1)


def test_a_checkpoint_of_another_job_is_refused(finished, tiny_values, tiny_scenes):
    folder = finished.folders[0]
    other_scenes = make_run(tiny_values, tiny_scenes[:2])
    other_settings = make_run(merge(tiny_values, {"seed": 1}), tiny_scenes)
    for run in (other_scenes, other_settings):
        with pytest.raises(SettingsError, match="other scenes or settings") as error:
            run.run(lambda report: None, resume=folder)
        assert str(folder) in str(error.value)
    # Stage 2's settings do not matter here.
    make_run(merge(tiny_values, {"stage2": {"scenes_per_batch": 3}}), tiny_scenes).run(lambda report: None, folder)


# ---------------------------------------------------------------------- stage 2


@pytest.fixture(scope="module")
def shared(finished, tmp_path_factory) -> SharedModel:
    folder = tmp_path_factory.mktemp("shared")
    save_shared(finished.run.shared, folder, finished.run.scene_ids)
    return load_shared(folder)[0]


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


# ---------------------------------------------------------------------- what one worker's gradients are


def test_gradients_of_a_part_of_the_global_batch(tiny_values, tiny_scenes, monkeypatch):
    """A worker of two that sees the same items: its shared gradient is doubled, for data-parallel to average, and its
    scenes' own gradients are those of one worker."""
    settings = make_settings(merge(tiny_values, {"stage1": {"warmup": {"tv_weight": 0.5}}}))

    def gradients(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        run = Stage1(settings, [views.scene_id for views in tiny_scenes], tiny_scenes, Workers(size=size))
        phase = settings.stage1.warmup
        step = run._with_optimisers(run._enter("warmup", phase))
        items = [Item(scene, 0, stream(scene.scene_id)) for scene in run.scenes[:2]]
        moved: dict[str, torch.Tensor] = {}
        monkeypatch.setattr(
            run.scene_optimiser.moving["coefs"], "step", lambda rows, grad, lr: moved.update(coefs=grad)
        )
        monkeypatch.setattr(run.optimiser, "step", lambda: moved.update(base=run.shared.base_planes.grad.clone()))
        run._step(phase, step, items, phase.items_per_step, 1.0)
        return moved["base"], moved["coefs"]

    monkeypatch.setattr(Workers, "sum", lambda self, tensor: tensor)
    monkeypatch.setattr(Workers, "smallest", lambda self, tensor: tensor)
    one, two = gradients(1), gradients(2)
    torch.testing.assert_close(two[0], 2 * one[0])
    torch.testing.assert_close(two[1], one[1])


def test_the_field_stands_still_from_its_epoch(tiny_values, tiny_scenes):
    frozen = {"num_epochs": 2, "field_frozen_from_epoch": 1}
    settings = make_settings(merge(tiny_values, {"stage1": {"warmup": frozen, "joint": {"num_epochs": 0}}}))
    fields: list[torch.Tensor] = []
    run = Stage1(settings, [views.scene_id for views in tiny_scenes], tiny_scenes)
    run.run(lambda report: fields.append(run.shared.field.head.weight.detach().clone()))
    before, first, second = fields[:3]
    assert not torch.equal(before, first)
    assert torch.equal(first, second)


def test_a_joint_phase_without_autoencoder_loss_still_moves_the_encoder(tiny_values, tiny_scenes):
    """The latent loss reaches the encoder through its target."""
    loss = {"latent": 1.0, "rgb": 0.0, "autoencoder": 0.0}
    joint = {"num_epochs": 1, "loss": loss, "lr": {"decoder": 0.0}}
    left_out = {name: {"num_epochs": 0} for name in ("adapt", "distil")}
    settings = make_settings(merge(tiny_values, {"stage1": {"joint": joint, **left_out}}))
    encoders: list[torch.Tensor] = []
    run = Stage1(settings, [views.scene_id for views in tiny_scenes], tiny_scenes)
    run.run(lambda report: encoders.append(run.shared.autoencoder.halves()[0][0].detach().clone()))
    assert not torch.equal(encoders[-2], encoders[-1])
