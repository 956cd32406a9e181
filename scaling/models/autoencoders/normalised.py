"""Learned latents normalised to [−1, 1]: what the diffusers kinds `kl` and `tiny` have in common.

`raw_latents` z are the network's own output; normalised latents are n = tanh(s (z − shift)). The shift is the published
`shift_factor` (SD3, FLUX.1), the mean of z over many images: without it tanh would not be near-linear on both sides.
The scale s is 0.11 / std(z), measured on the training images, or `autoencoder.latent_scale`. A published
`scaling_factor` is 1 / std(z), which s contains already: z is never multiplied by `scaling_factor`.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from scaling.models.autoencoders.base import ImageAutoencoder
from scaling.models.precision import networks

MARGIN = 1e-4  # keeps atanh finite
TARGET_STD = 0.11  # of s · z: s = 0.11 / std(z) keeps tanh near-linear over the latents' range


def normalise(raw_latents: Tensor, latent_scale: Tensor | float) -> Tensor:
    """n = tanh(s z), in [−1, 1]; any shape."""
    return torch.tanh(latent_scale * raw_latents)


def denormalise(latents: Tensor, latent_scale: Tensor | float) -> Tensor:
    """z = atanh(clamp(n, ±(1 − 1e-4))) / s, the inverse of `normalise`; any shape."""
    return torch.atanh(latents.clamp(-1 + MARGIN, 1 - MARGIN)) / latent_scale


class RawDecoder(nn.Module):
    """The decoding half of a diffusers autoencoder: raw latents [B, C, h, w] → images [B, 3, H, W] in [0, 1]."""

    def __init__(self, post_quant_conv: nn.Module | None, decoder: nn.Module) -> None:
        super().__init__()
        self.post_quant_conv = post_quant_conv
        self.decoder = decoder

    def forward(self, raw_latents: Tensor, precision: str) -> Tensor:
        """Raw latents [B, C, h, w] → images [B, 3, H, W] in [0, 1], clamped; precision: settings.precision."""
        with networks(raw_latents, precision):
            if self.post_quant_conv is not None:
                raw_latents = self.post_quant_conv(raw_latents)
            images = self.decoder(raw_latents)
        return ((images.float() + 1) / 2).clamp(0, 1)


class NormalisedAutoencoder(ImageAutoencoder):
    """A diffusers autoencoder with normalised latents.

    vae: the diffusers model, for images in [−1, 1]; latent_scale: s; None: to be measured by stage 1, and until then
    the scale for raw latents of std 1.
    """

    latent_scale: Tensor

    def __init__(self, vae: Any, shrink: int, latent_scale: float | None, precision: str = "float32") -> None:
        super().__init__(vae.config.latent_channels, shrink, TARGET_STD, True, True, precision)
        self.vae = vae
        self.shift = float(vae.config.get("shift_factor") or 0.0)
        self.register_buffer("latent_scale", torch.tensor(latent_scale or TARGET_STD))

    @abstractmethod
    def encode_raw(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images [B, 3, H, W] in [0, 1] → mean and log-variance of the raw latents, each [B, C, h, w]; the log-variance
        is None for a kind that does not sample."""

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → mean latents [B, C, h, w], normalised."""
        return self.normalise(self.encode_raw(images)[0])

    def normalise(self, raw_latents: Tensor) -> Tensor:
        """tanh(s (z − shift)), any shape."""
        return normalise(raw_latents - self.shift, self.latent_scale)

    def decode(self, latents: Tensor, decoder: nn.Module | None = None) -> Tensor:
        """Normalised latents [B, C, h, w] → images [B, 3, H, W] in [0, 1], clamped."""
        raw_latents = denormalise(latents, self.latent_scale) + self.shift
        return (decoder or self.decoder())(raw_latents, self.precision)

    def decoder(self) -> RawDecoder:
        """The decoding half, which shares its parameters with this autoencoder."""
        return RawDecoder(getattr(self.vae, "post_quant_conv", None), self.vae.decoder)

    def copy_decoder(self) -> RawDecoder:
        return copy.deepcopy(self.decoder())

    def halves(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters of the encoder, and of the decoder, each with its quantisation convolution."""
        encoder = [p for name, p in self.vae.named_parameters() if name.startswith(("encoder.", "quant_conv."))]
        decoder = [p for name, p in self.vae.named_parameters() if name.startswith(("decoder.", "post_quant_conv."))]
        return encoder, decoder

    def config_json(self) -> str:
        return self.vae.to_json_string()
