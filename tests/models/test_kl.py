"""The KL autoencoder, the adapted decoder and the student."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from scaling.config import Autoencoder as AutoencoderSettings
from scaling.config import SettingsError
from scaling.models.autoencoders.kl import KLAutoencoder
from scaling.models.autoencoders.load import build_autoencoder
from scaling.models.autoencoders.normalised import denormalise, normalise
from scaling.models.shared_model import SharedModel
from scaling.models.student import Student


def close(ours: Tensor, by_hand) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(by_hand, dtype=ours.dtype), rtol=1e-5, atol=1e-5)


def test_normalisation_and_back():
    raw_latents = torch.linspace(-40, 40, 17)
    close(normalise(torch.tensor([0.0, 25.0]), 0.02), [0.0, math.tanh(0.5)])
    torch.testing.assert_close(denormalise(normalise(raw_latents, 0.02), 0.02), raw_latents, rtol=1e-4, atol=1e-4)
    assert denormalise(torch.tensor([-1.0, 1.0, 3.0]), 0.02).isfinite().all()


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(3)
    settings = AutoencoderSettings(kind="kl", block_out_channels=[8, 8, 8], norm_num_groups=4, latent_channels=2)
    return build_autoencoder(settings, 16).vae.requires_grad_(False)


@pytest.fixture
def offline(monkeypatch):
    """No look-ups on the hub; the variable is read when the library is imported, hence the attribute."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_sizes_of_an_autoencoder(vae):
    autoencoder = KLAutoencoder(vae, 0.1)
    assert (autoencoder.latent_channels, autoencoder.shrink) == (2, 4)
    latents = autoencoder.encode(torch.rand(3, 3, 16, 16))
    assert latents.shape == (3, 2, 4, 4) and latents.abs().max() < 1
    images = autoencoder.decode(latents)
    assert images.shape == (3, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
    encoder, decoder = autoencoder.halves()
    assert len(encoder) + len(decoder) == len(list(vae.parameters())), "every parameter is in one half"


def test_samples_and_their_divergence(vae):
    autoencoder = KLAutoencoder(vae, 0.1)
    images = torch.rand(2, 3, 16, 16)
    mean, log_variance = autoencoder.encode_raw(images)
    sample, divergence = autoencoder.encode_sample(images, torch.zeros_like(mean))
    close(sample, autoencoder.encode(images))
    normal = torch.distributions.Normal
    by_hand = torch.distributions.kl_divergence(normal(mean, (log_variance / 2).exp()), normal(0.0, 1.0))
    close(divergence, by_hand.mean((1, 2, 3)))
    close(
        autoencoder.encode_sample(images, torch.ones_like(mean))[0], torch.tanh(0.1 * (mean + (log_variance / 2).exp()))
    )


def test_the_background_is_the_latent_of_white(vae):
    scale = 0.3
    white = vae.encode(torch.ones(1, 3, 16, 16)).latent_dist.mean  # 1 is white in [−1, 1]
    by_hand = (torch.tanh(scale * white) + 1).mean((0, 2, 3)) / 2
    close(KLAutoencoder(vae, scale).background(16, "cpu"), by_hand)


@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_a_local_autoencoder_loads(vae, tmp_path, subfolder, offline):
    vae.save_pretrained(tmp_path / subfolder, safe_serialization=True)
    settings = AutoencoderSettings(kind="kl", pretrained=str(tmp_path), subfolder="vae", latent_scale=0.5)
    loaded = build_autoencoder(settings, 16)
    images = torch.rand(1, 3, 16, 16)
    close(loaded.encode(images), KLAutoencoder(vae, 0.5).encode(images))


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # diffusers passes it on
@pytest.mark.parametrize("name", ["/no/such/folder", "no-such-owner/no-such-autoencoder"])
def test_a_missing_autoencoder_is_named(name, offline):
    with pytest.raises(ValueError) as error:
        build_autoencoder(AutoencoderSettings(kind="kl", pretrained=name), 16)
    assert "autoencoder.pretrained: cannot load" in str(error.value) and name in str(error.value)
    assert "set autoencoder.pretrained to null" in str(error.value)


def test_pickled_weights_are_refused(vae, tmp_path, offline):
    vae.save_pretrained(tmp_path, safe_serialization=False)
    assert list(tmp_path.glob("*.bin"))
    with pytest.raises(ValueError, match=r"no file named diffusion_pytorch_model\.safetensors"):
        build_autoencoder(AutoencoderSettings(kind="kl", pretrained=str(tmp_path)), 16)


def test_an_adapted_decoder_is_a_copy(tiny_settings):
    torch.manual_seed(0)
    shared = SharedModel(tiny_settings).requires_grad_(False)
    latents = torch.rand(1, 4, 8, 8) - 0.5
    before = shared.decode(latents)
    adapted = shared.adapt_decoder()
    assert shared.adapt_decoder() is adapted, "made once"
    close(shared.decode(latents), before)
    next(adapted.decoder.parameters()).add_(0.5)
    assert not torch.equal(shared.decode(latents), before), "renders are decoded with the adapted decoder"
    close(shared.autoencoder.decode(latents), before)


def test_a_student_keeps_the_place_of_every_pixel():
    """Pixels change only around a latent that changes, and come out where the decoder puts them."""
    torch.manual_seed(0)
    student = Student(channels=4, shrink=4, latent_std=0.11, width=8, num_blocks=1, precision="float32").requires_grad_(
        False
    )
    latents = torch.zeros(2, 4, 16, 16)
    latents[1, :, 2, 12] = 1.0
    first, second = student(latents)
    assert first.shape == (3, 64, 64) and first.min() >= 0 and first.max() <= 1
    moved = (first != second).any(0).nonzero()
    low, high = moved.min(0).values.tolist(), moved.max(0).values.tolist()
    # Four convolutions of 3 x 3: four latents to each side of row 2, column 12, as far as the image goes.
    assert low == [0, 32] and high == [27, 63]


def test_images_that_the_autoencoder_cannot_halve_are_refused(vae, tiny_settings):
    settings = tiny_settings.model_copy(update={"data": tiny_settings.data.model_copy(update={"image_size": 18})})
    with pytest.raises(SettingsError, match=r"data\.image_size \(18\) must be a multiple of 4"):
        SharedModel(settings, KLAutoencoder(vae, 0.1))
