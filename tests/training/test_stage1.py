"""Stage 1 on scenes of 16²: phases, statistics, checkpoints, one worker's gradients."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.stage1_run import make_run

from scaling.config import SettingsError, make_settings, merge
from scaling.models.shared_model import SharedModel
from scaling.training.batches import Item
from scaling.training.checkpoints.state import read_progress
from scaling.training.measure.background import measure_background
from scaling.training.phase_loop import EpochReport
from scaling.training.process_group import Workers
from scaling.training.random_streams import stream
from scaling.training.stage1 import Stage1


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
    background = measure_background(warmup, finished.run.scenes, torch.ones(3), Workers())
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
        monkeypatch.setattr(run.scene_optimiser.adams["coefs"], "step", lambda rows, grad, lr: moved.update(coefs=grad))
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
