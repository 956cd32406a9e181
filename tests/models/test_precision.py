"""bfloat16 in the autoencoder and the field, against float32. CPUs have it too, so both are compared here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scaling.config import make_settings, merge
from scaling.data.embedded.scenes import embedded_ids, embedded_scene
from scaling.models import precision
from scaling.models.shared_model import SharedModel
from scaling.training.batches import Item, make_batch
from scaling.training.evaluate import evaluate_scene
from scaling.training.fit_frozen import fit_scenes
from scaling.training.losses import item_losses
from scaling.training.metrics.images import psnr
from scaling.training.process_group import Workers
from scaling.training.random_streams import stream
from scaling.training.stage1 import Stage1
from scaling.training.training_scene import encode_scene, prepare_scene


@pytest.fixture(autouse=True)
def bf16_on_this_cpu(monkeypatch) -> None:
    monkeypatch.setattr(precision, "BF16_DEVICES", ("cpu",))


def both(tiny_values: dict[str, Any]) -> list[SharedModel]:
    """The same model in both precisions."""
    models = []
    for name in ("float32", "bfloat16"):
        torch.manual_seed(0)
        models.append(SharedModel(make_settings(merge(tiny_values, {"precision": name}))))
    return models


def test_autoencoder_and_field_agree_and_speak_float32(tiny_values, tiny_scenes):
    full, half = both(tiny_values)
    images = tiny_scenes[0].images
    latents, lower = full.autoencoder.encode(images), half.autoencoder.encode(images)
    decoded, decoded_lower = full.decode(latents), half.decode(latents)
    features = torch.randn(3, 40, 5, generator=torch.Generator().manual_seed(0))
    outputs, outputs_lower = full.field(features), half.field(features)
    for one, two in [(latents, lower), (decoded, decoded_lower), *zip(outputs, outputs_lower, strict=True)]:
        assert one.dtype == two.dtype == torch.float32
        assert not torch.equal(one, two), "bfloat16 was not in use"
        assert (one - two).abs().max() < 0.05 * max(1.0, one.abs().max().item())
    assert psnr(decoded_lower, decoded).min() > 45, "far above what an autoencoder loses"


def test_gradients_point_the_same_way(tiny_values, tiny_scenes):
    gradients = []
    for model in both(tiny_values):
        scene = encode_scene(model, prepare_scene(model, tiny_scenes[0]))
        phase = model.settings.stage1.joint
        batch = make_batch(model, phase, [Item(scene, 0, stream("noise"))])
        params = model.random_params([stream("start")])
        params.micro_planes.requires_grad_()
        sum(loss.sum() for loss in item_losses(model, phase.loss, batch, params).values()).backward()
        parts = [params.micro_planes.grad, model.base_planes.grad, *[p.grad for p in model.autoencoder.parameters()]]
        gradients.append(torch.cat([part.flatten() for part in parts if part is not None]))
    one, two = gradients
    assert one.dtype == two.dtype == torch.float32
    assert torch.cosine_similarity(one, two, dim=0) > 0.999
    assert two.norm().item() == pytest.approx(one.norm().item(), rel=0.02)


def train_and_fit(values: dict[str, Any], device: str) -> float:
    settings = make_settings(values)
    size, num_views = settings.data.image_size, settings.data.embedded_views
    scenes = [embedded_scene(scene_id, size, num_views) for scene_id in embedded_ids(5)]

    stage1 = Stage1(settings, [s.scene_id for s in scenes[:4]], scenes[:4], Workers(device=torch.device(device)))
    stage1.run(lambda report: None)
    [fitted] = fit_scenes(stage1.shared.requires_grad_(False).eval(), scenes[4:], settings)
    value = evaluate_scene(stage1.shared, fitted.params[None], scenes[4])["psnr"]
    assert value is not None
    return value


@pytest.mark.slow
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_both_stages_end_alike(tiny_values, monkeypatch, device):
    monkeypatch.setattr(precision, "BF16_DEVICES", (device,))
    longer = {
        "stage1": {"autoencoder": {"steps_per_epoch": 60}, "warmup": {"steps_per_epoch": 20}},
        "stage2": {"latent": {"steps_per_epoch": 40}},
    }
    values = merge(tiny_values, longer)
    full = train_and_fit(merge(values, {"precision": "float32"}), device)
    half = train_and_fit(merge(values, {"precision": "bfloat16"}), device)
    assert half == pytest.approx(full, abs=0.3)
