"""diffusers' AutoencoderTiny (TAESD, TAESDXL, TAESD3, TAEF1): 2.4 M parameters for the latents of a big autoencoder.

TAESD itself takes images in [0, 1]; the class in diffusers converts: it takes and returns images in [−1, 1], like
AutoencoderKL. Its latents are scaled and shifted already, as a diffusion model needs them (std about 1, mean about 0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from scaling.models.autoencoders.normalised import NormalisedAutoencoder
from scaling.models.precision import networks

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny


class TinyAutoencoder(NormalisedAutoencoder):
    """AutoencoderTiny with normalised latents; nothing is sampled."""

    def __init__(self, vae: AutoencoderTiny, latent_scale: float | None, precision: str = "float32") -> None:
        super().__init__(vae, 2 ** (len(vae.config.num_encoder_blocks) - 1), latent_scale, precision)

    def encode_raw(self, images: Tensor) -> tuple[Tensor, None]:
        """Images [B, 3, H, W] in [0, 1] → raw latents [B, C, h, w], without a log-variance."""
        with networks(images, self.precision):
            return self.vae.encode(2 * images - 1).latents.float(), None

    def encode_sample(self, images: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same latents as `encode`; nothing is sampled, so the divergence [B] is 0."""
        return self.encode(images), images.new_zeros(len(images))
