"""diffusers' AutoencoderKL: Stable Diffusion's (4 channels), SD3's and FLUX.1's (16), or a small one from scratch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from scaling.models.autoencoders.normalised import NormalisedAutoencoder
from scaling.models.precision import networks

if TYPE_CHECKING:  # importing it takes two seconds
    from diffusers import AutoencoderKL


class KLAutoencoder(NormalisedAutoencoder):
    """AutoencoderKL with normalised latents; its encoder returns a distribution."""

    def __init__(self, vae: AutoencoderKL, latent_scale: float | None, precision: str = "float32") -> None:
        super().__init__(vae, 2 ** (len(vae.config.block_out_channels) - 1), latent_scale, precision)

    def encode_raw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] in [0, 1] → mean and log-variance of the raw latents, each [B, C, h, w]."""
        with networks(images, self.precision):
            distribution = self.vae.encode(2 * images - 1).latent_dist
        return distribution.mean.float(), distribution.logvar.float()

    def encode_sample(self, images: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sample normalised latents of images, and the KL divergence of the raw latents from N(0, 1).

        images [B, 3, H, W], noise [B, C, h, w] (standard normal; None: the mean latents) → latents [B, C, h, w],
        divergence [B] (mean over latent values).
        """
        mean, log_variance = self.encode_raw(images)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).mean(1)
        sample = mean if noise is None else mean + (0.5 * log_variance).exp() * noise
        return self.normalise(sample), divergence
