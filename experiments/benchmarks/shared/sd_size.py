"""What an autoencoder of Stable Diffusion's size costs for each view. Weights are random, because time does not depend
on them."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from scaling.models.autoencoders.kl import KLAutoencoder

CHANNELS = (128, 256, 512, 512)


def sd_size_autoencoder(precision: str = "float32") -> KLAutoencoder:
    """An autoencoder of Stable Diffusion's shape: 84 M parameters, random weights."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=CHANNELS, layers_per_block=2, latent_channels=4, norm_num_groups=32,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    return KLAutoencoder(vae, None, precision)


def sd_seconds_per_view(image_size: int = 128, views: int = 2) -> dict[str, float]:
    """CPU seconds for each view. encode; decode: forward pass; frozen: forward pass and the gradient of the latents;
    tuned: the same and the gradient of the decoder's weights."""
    autoencoder = sd_size_autoencoder().requires_grad_(False)
    images = torch.rand(views, 3, image_size, image_size)
    with torch.no_grad():
        latents = autoencoder.encode(images)

    def backward(tuned: bool) -> None:
        autoencoder.vae.decoder.requires_grad_(tuned)
        leaf = latents.clone().requires_grad_()
        (autoencoder.decode(leaf) - images).square().mean().backward()

    measured = {"encode": _seconds(lambda: _no_grad(autoencoder.encode, images))}
    measured["decode"] = _seconds(lambda: _no_grad(autoencoder.decode, latents))
    measured["frozen"] = _seconds(lambda: backward(False))
    measured["tuned"] = _seconds(lambda: backward(True))
    return {name: seconds / views for name, seconds in measured.items()}


@torch.no_grad()
def _no_grad(function: Callable[[Tensor], Tensor], tensor: Tensor) -> None:
    function(tensor)


def _seconds(action: Callable[[], None]) -> float:
    """The median CPU time of three calls, after one call that warms up."""
    action()
    times = []
    for _ in range(3):
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    return median(times)
