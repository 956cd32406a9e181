"""The kinds of autoencoders, on numbers that a pencil can check and on small folders of the real classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch.nn import functional

from scaling.config import Autoencoder as AutoencoderSettings
from scaling.config import as_noted, flatten, make_settings, merge
from scaling.models import precision
from scaling.models.autoencoders.base import ImageAutoencoder
from scaling.models.autoencoders.checks import check_config
from scaling.models.autoencoders.load import build_autoencoder
from scaling.models.autoencoders.super_resolution import SuperResolutionAutoencoder
from scaling.models.shared_files import SharedModelError, load_shared, save_shared
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.pictures.draw import latent_colours, shown_range
from scaling.training.evaluate import evaluate_scene, render_views
from scaling.training.fit_frozen import fit_scenes
from scaling.training.stage1 import Stage1, active_phases

OLD = Path(__file__).parent / "old_shared_models"
SUPER_RESOLUTION: dict[str, Any] = {
    "autoencoder": {"kind": "super_resolution", "shrink": 2, "decoder_width": 4, "decoder_blocks": 1},
    "stage1": {"autoencoder": {"lr": {"encoder": 0.0}}, "joint": {"num_epochs": 0}},
}


# ---------------------------------------------------------------------- super_resolution


def test_the_area_filter_by_hand():
    """Squares of 2 · 2 of a checkerboard are grey, whatever their colours; a half that is white stays white."""
    board = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0]] * 2).expand(1, 3, 4, 4)
    latents = SuperResolutionAutoencoder(2, 4, 1).encode(board)
    assert latents[0, 0].tolist() == [[0.0, 1.0], [0.0, 1.0]]
    sample, divergence = SuperResolutionAutoencoder(2, 4, 1).encode_sample(board, torch.randn(1, 3, 2, 2))
    assert torch.equal(sample, latents) and divergence.tolist() == [0.0]


@pytest.mark.parametrize("num_blocks", [0, 2])
def test_an_untrained_decoder_is_bilinear_upsampling(num_blocks):
    latents = torch.rand(2, 3, 4, 4) * 2 - 1
    images = SuperResolutionAutoencoder(3, 8, num_blocks).decode(latents)
    by_torch = functional.interpolate(latents, scale_factor=3, mode="bilinear", align_corners=False)
    torch.testing.assert_close(images, (by_torch + 1) / 2)
    between = SuperResolutionAutoencoder(2, 8, num_blocks).decode(torch.tensor([-1.0, 1.0]).expand(1, 3, 1, 2))
    torch.testing.assert_close(between[0, 0], torch.tensor([0.0, 0.25, 0.75, 1.0]).expand(2, 4))


def test_pixels_are_its_simplest_case():
    autoencoder = SuperResolutionAutoencoder(1, 48, 0)
    images = torch.rand(2, 3, 5, 5)
    assert autoencoder.is_identity and not (autoencoder.has_encoder or autoencoder.has_decoder)
    assert torch.equal(autoencoder.encode(images), 2 * images - 1)
    torch.testing.assert_close(autoencoder.decode(autoencoder.encode(images)), images)
    assert autoencoder.halves() == ([], []) and not autoencoder.state_dict()


@pytest.mark.parametrize(("shrink", "size"), [(1, 4), (2, 8), (3, 9), (8, 8)])
def test_its_background_is_white(shrink, size):
    assert SuperResolutionAutoencoder(shrink, 4, 1).background(size, "cpu").tolist() == [1.0, 1.0, 1.0]


def test_gradients_reach_the_decoder_and_the_latents():
    autoencoder = SuperResolutionAutoencoder(2, 4, 1)
    torch.nn.init.normal_(autoencoder.decoder.head.weight, std=0.1)
    encoder, decoder = autoencoder.halves()
    assert encoder == [] and len(decoder) == len(list(autoencoder.parameters()))
    latents = (torch.rand(1, 3, 4, 4) - 0.5).requires_grad_()
    autoencoder.decode(latents).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in [*decoder, latents])


def test_a_copy_of_the_decoder_is_its_own():
    autoencoder = SuperResolutionAutoencoder(2, 4, 1)
    latents, copied = torch.rand(1, 3, 4, 4), autoencoder.copy_decoder()
    before = autoencoder.decode(latents)
    torch.nn.init.ones_(copied.head.bias)
    assert torch.equal(autoencoder.decode(latents), before)
    assert autoencoder.decode(latents, copied).mean() > before.mean()


def test_bfloat16_stays_inside(monkeypatch):
    autoencoder = SuperResolutionAutoencoder(2, 8, 2)
    torch.nn.init.normal_(autoencoder.decoder.head.weight, std=0.05)
    latents = torch.rand(1, 3, 8, 8) - 0.5
    full = autoencoder.decode(latents)
    monkeypatch.setattr(precision, "BF16_DEVICES", ("cpu",))
    same = SuperResolutionAutoencoder(2, 8, 2, "bfloat16")
    same.load_state_dict(autoencoder.state_dict())
    lower = same.decode(latents)
    assert lower.dtype == torch.float32 and 0 < (lower - full).abs().max() < 0.01


def test_its_latents_are_shown_as_the_colours_they_are(tiny_values):
    latents = torch.tensor([-1.0, 0.0, 0.2, 1.0]).expand(1, 3, 1, 4)
    small = SharedModel(make_settings(merge(tiny_values, SUPER_RESOLUTION)))
    assert latent_colours(latents[..., 1:3], shown_range(small))[0, 0, :, 0].tolist() == [128, 153]
    learned = SharedModel(make_settings(tiny_values))
    assert latent_colours(latents[..., 1:3], shown_range(learned))[0, 0, :, 0].tolist() == [0, 255]


@pytest.mark.slow
def test_it_learns_in_both_stages_and_is_read_again(tiny_values, tiny_scenes, tmp_path):
    settings = make_settings(merge(tiny_values, SUPER_RESOLUTION))
    assert active_phases(settings) == ["autoencoder", "warmup", "adapt", "distil"]
    ids = [views.scene_id for views in tiny_scenes[:2]]
    stage1 = Stage1(settings, ids, tiny_scenes[:2])
    heads = []
    stage1.run(lambda report: heads.append(stage1.shared.autoencoder.halves()[1][-2].abs().sum().item()))
    assert heads[0] > 0 and len(set(heads)) == 1, "phase 0 trains the decoder; 1c moves a copy of it"
    shared = stage1.shared
    assert shared.background.tolist() == [1.0, 1.0, 1.0]
    save_shared(shared, tmp_path, ids)
    config = json.loads((tmp_path / "autoencoder" / "config.json").read_text())
    assert config["_class_name"] == "SuperResolutionAutoencoder"
    loaded, _ = load_shared(tmp_path)
    fitted = fit_scenes(loaded, tiny_scenes[2:3], settings)[0]
    metrics = evaluate_scene(loaded, fitted.params[None], tiny_scenes[2])
    assert metrics["autoencoder_psnr"] is not None and metrics["latent_psnr"] is not None
    # Its autoencoder's folder serves another run, with the same sizes only.
    again = settings.autoencoder.model_copy(update={"pretrained": str(tmp_path / "autoencoder")})
    latents = torch.rand(1, 3, 8, 8) * 2 - 1
    assert torch.equal(build_autoencoder(again, 16).decode(latents), loaded.autoencoder.decode(latents))
    with pytest.raises(ValueError, match=r"shrink is 2, autoencoder.shrink is 4"):
        build_autoencoder(again.model_copy(update={"shrink": 4}), 16)
    (tmp_path / "autoencoder" / "config.json").write_text(json.dumps({**config, "decoder_width": 4096}))
    with pytest.raises(SharedModelError, match=r"decoder_width is 4096, autoencoder.decoder_width is 4"):
        load_shared(tmp_path)


# ---------------------------------------------------------------------- kl and tiny


def save_kl(folder: Path, channels: int, **config: Any) -> None:
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4), norm_num_groups=2, latent_channels=channels, mid_block_add_attention=False, **config,
    ).save_pretrained(folder)  # fmt: skip


def save_tiny(folder: Path, channels: int, **config: Any) -> None:
    AutoencoderTiny(
        encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=channels, **config,
    ).save_pretrained(folder)  # fmt: skip


def load(kind: Any, folder: Path, scale: float | None = 0.2) -> Any:
    settings = AutoencoderSettings(kind=kind, pretrained=str(folder), latent_scale=scale)
    return build_autoencoder(settings, 16).requires_grad_(False)


FLUX = {"shift_factor": 0.1159, "scaling_factor": 0.3611, "use_quant_conv": False, "use_post_quant_conv": False}


@pytest.mark.parametrize(("channels", "config"), [(4, {"scaling_factor": 0.18215}), (16, FLUX), (16, {})])
def test_kl_takes_a_published_shift_off(tmp_path, channels, config):
    save_kl(tmp_path, channels, **config)
    autoencoder, images = load("kl", tmp_path), torch.rand(2, 3, 16, 16)
    raw = AutoencoderKL.from_pretrained(tmp_path).requires_grad_(False).encode(2 * images - 1).latent_dist.mean
    shift = config.get("shift_factor", 0.0)
    torch.testing.assert_close(autoencoder.encode(images), torch.tanh(0.2 * (raw - shift)))
    mean, log_variance = autoencoder.encode_raw(images)
    noise = torch.randn(mean.shape)
    drawn = torch.tanh(0.2 * (mean + (log_variance / 2).exp() * noise - shift))
    torch.testing.assert_close(autoencoder.encode_sample(images, noise)[0], drawn)
    check_interface(autoencoder, channels, raw)


@pytest.mark.parametrize("channels", [4, 16])
def test_tiny_speaks_the_range_of_its_class(tmp_path, channels):
    """diffusers' class takes [−1, 1] and itself turns it into TAESD's [0, 1]."""
    save_tiny(tmp_path, channels)
    autoencoder, images = load("tiny", tmp_path), torch.rand(2, 3, 16, 16)
    raw = autoencoder.vae.encoder.layers(images)
    torch.testing.assert_close(autoencoder.encode(images), torch.tanh(0.2 * raw))
    sample, divergence = autoencoder.encode_sample(images, torch.randn(raw.shape))
    assert torch.equal(sample, autoencoder.encode(images)) and divergence.tolist() == [0.0, 0.0]
    decoded = autoencoder.vae.decoder.layers(torch.tanh(raw / 3) * 3).clamp(0, 1)
    torch.testing.assert_close(autoencoder.decode(autoencoder.encode(images)), decoded, rtol=1e-3, atol=1e-4)
    check_interface(autoencoder, channels, raw)


def check_interface(autoencoder: ImageAutoencoder, channels: int, raw: torch.Tensor) -> None:
    """Sizes, decoding of what was encoded, a decoder of its own, the halves, and the background."""
    assert (autoencoder.latent_channels, autoencoder.shrink) == (channels, 2)
    assert autoencoder.has_encoder and autoencoder.has_decoder and not autoencoder.is_identity
    latents = torch.tanh(0.2 * (raw - autoencoder.shift))
    by_class = (autoencoder.vae.decode(raw).sample + 1) / 2
    torch.testing.assert_close(autoencoder.decode(latents), by_class.clamp(0, 1), rtol=1e-3, atol=1e-4)
    copied = autoencoder.copy_decoder()
    assert torch.equal(autoencoder.decode(latents, copied), autoencoder.decode(latents))
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in autoencoder.parameters()}
    encoder, decoder = autoencoder.halves()
    assert len(encoder) + len(decoder) == len(list(autoencoder.vae.parameters())) and encoder and decoder
    background = autoencoder.background(16, "cpu")
    assert background.shape == (channels,) and background.min() >= 0 and background.max() <= 1


def test_the_measured_scale_does_not_depend_on_the_shift(tiny_values, tiny_scenes, tmp_path):
    save_kl(tmp_path / "kl", 4, shift_factor=0.5)
    save_tiny(tmp_path / "tiny", 4)
    for kind in ("kl", "tiny"):
        values = {"autoencoder": {"kind": kind, "pretrained": str(tmp_path / kind)}, "stage1": {"num_buckets": 1}}
        stage1 = Stage1(make_settings(merge(tiny_values, values)), ["a"], tiny_scenes[:1])
        stage1._derive_scale()
        images = stage1.scenes[0].float_images(slice(0, 8))
        raw = stage1.shared.autoencoder.encode_raw(images)[0]
        by_hand = 0.11 / raw.std(correction=0).item()
        assert stage1.shared.autoencoder.latent_scale.item() == pytest.approx(by_hand, rel=1e-4)
        # A shared model of this kind is read again as it was.
        stage1.shared.adapt_decoder()
        save_shared(stage1.shared, tmp_path / f"shared-{kind}", ["a"])
        loaded = load_shared(tmp_path / f"shared-{kind}")[0]
        assert torch.equal(loaded.autoencoder.encode(images), stage1.shared.autoencoder.encode(images))


@pytest.mark.parametrize(
    ("config", "kind", "told"),
    [
        ({"_class_name": "AutoencoderTiny"}, "kl", "autoencoder.kind must be tiny"),
        ({"_class_name": "AutoencoderKL"}, "tiny", "autoencoder.kind must be kl"),
        ({"_class_name": "SuperResolutionAutoencoder"}, "kl", "autoencoder.kind must be super_resolution"),
        ({"_class_name": "VQModel"}, "kl", "kinds are kl, tiny, super_resolution"),
        ([1], "kl", "expected an object, found a list"),
        ({"shift_factor": 1e30}, "kl", "shift_factor: Input should be less than"),
        ({"latent_channels": 10**9}, "tiny", "latent_channels: Input should be less than"),
        ({"num_encoder_blocks": [10**9]}, "tiny", "num_encoder_blocks.0: Input should be less than"),
        ({"num_encoder_blocks": [1, 1]}, "tiny", "shrinks images 2 times, the decoder enlarges latents 8 times"),
        ({"shrink": 2, "decoder_width": 10**6, "decoder_blocks": 1}, "super_resolution", "decoder_width: Input should"),
    ],
)
def test_what_config_json_may_not_say(config, kind, told):
    with pytest.raises(ValueError, match=told):
        check_config(config, kind)


def test_a_folder_says_which_kind_it_is(tmp_path):
    save_tiny(tmp_path, 4)
    with pytest.raises(ValueError, match=r"cannot load .*AutoencoderTiny.*autoencoder.kind must be tiny"):
        load("kl", tmp_path)
    with pytest.raises(ValueError, match=r"autoencoder.kind must be tiny"):
        load("super_resolution", tmp_path, None)


# ---------------------------------------------------------------------- shared models of 30 November 2026 and before


@pytest.mark.parametrize("name", ["latent", "rgb"])
def test_an_old_shared_model_reads_and_renders_as_it_did(name, tiny_scenes):
    """The folders and rendered.json were written by the program as it was then."""
    noted = json.loads((OLD / name / "rendered.json").read_text())
    shared, content_hash = load_shared(OLD / name)
    assert content_hash == noted["hash"]
    settings = shared.settings.autoencoder
    assert (settings.kind == "kl") == (name == "latent") and settings.is_identity == (name == "rgb")
    views = tiny_scenes[0]
    out = render_views(shared, old_params(shared), views.cam2world[:1], views.intrinsics[:1])
    found = {
        "images_mean": out["images"].mean().item(),
        "images_std": out["images"].std().item(),
        "latents_std": out["latents"].std().item(),
        "pixel": out["images"][0, :, 8, 8].tolist(),
        "encoded_std": shared.autoencoder.encode(views.images[:1]).std().item(),
        "encoded": shared.autoencoder.encode(views.images[:1])[0, :, 4, 4].tolist(),
        "background": shared.background.flatten()[:3].tolist(),
    }
    for key, value in found.items():
        assert value == pytest.approx(noted[key], abs=1e-5), key


def old_params(shared: SharedModel) -> SceneParams:
    params = shared.start_params(1)
    noise = torch.randn(params.micro_planes.shape, generator=torch.Generator().manual_seed(0))
    return SceneParams(0.3 * noise, params.coefs)


def test_an_old_shared_model_saved_again_is_the_same(tmp_path):
    for name in ("latent", "rgb"):
        shared, content_hash = load_shared(OLD / name)
        assert save_shared(shared, tmp_path / name, ["a"]) == content_hash == load_shared(tmp_path / name)[1]
        assert (tmp_path / name / "autoencoder").exists() == (name == "latent")


@pytest.mark.parametrize("name", ["latent", "rgb"])
def test_old_settings_are_those_of_the_same_run_today(name, tiny_values):
    """So that an old run folder goes on: what the noted settings say is what the same settings say now."""
    noted = json.loads((OLD / name / "config.json").read_text())["settings"]
    noted["stage2"]["latent"].pop("check_every")
    read = make_settings(as_noted(noted))
    assert make_settings(as_noted(read.model_dump())) == read
    pixels = {"kind": "super_resolution", "shrink": 1, "decoder_blocks": 0, "pretrained": None}
    kl = {"kind": "kl", "block_out_channels": [2, 2], "norm_num_groups": 1, "latent_channels": 2, "pretrained": None}
    today = flatten(make_settings(merge(tiny_values, {"autoencoder": kl})).model_dump())
    found = flatten(read.model_dump())
    for key in (key for key in today if key.startswith("autoencoder.") and name == "latent"):
        assert found[key] == today[key], key
    assert name == "latent" or all(found[f"autoencoder.{key}"] == value for key, value in pixels.items())
