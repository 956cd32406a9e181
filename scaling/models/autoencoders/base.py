"""The interface of an image autoencoder: images in [0, 1] on one side, latents in [−1, 1] on the other."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class ImageAutoencoder(nn.Module, ABC):
    """Images [B, 3, H, W] in [0, 1] ↔ latents [B, C, h, w] in [−1, 1], where h = H / shrink.

    latent_channels: C; latent_std: rough spread of the latents; has_encoder: whether a network encodes (then encoding
    takes time and is worth caching, and latents differ over a white background); has_decoder: whether a network
    decodes (then it can be trained, adapted to rendered latents, and distilled).
    """

    def __init__(
        self,
        latent_channels: int,
        shrink: int,
        latent_std: float,
        has_encoder: bool,
        has_decoder: bool,
        precision: str = "float32",
    ) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.shrink = shrink
        self.latent_std = latent_std
        self.has_encoder = has_encoder
        self.has_decoder = has_decoder
        self.precision = precision

    @property
    def is_identity(self) -> bool:
        """Whether latents are the pixels themselves, so that measuring or showing both would be the same twice."""
        return self.shrink == 1 and not (self.has_encoder or self.has_decoder)

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → mean latents [B, C, h, w] in [−1, 1]."""

    @abstractmethod
    def encode_sample(self, images: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sample latents of images, and the KL divergence of the raw latents from N(0, 1).

        images [B, 3, H, W], noise [B, C, h, w] (standard normal; None: the mean latents) → latents [B, C, h, w],
        divergence [B] (mean over latent values; 0 for a kind that does not sample).
        """

    @abstractmethod
    def decode(self, latents: Tensor, decoder: nn.Module | None = None) -> Tensor:
        """Latents [B, C, h, w] in [−1, 1] → images [B, 3, H, W] in [0, 1], clamped.

        decoder: a copy from `copy_decoder`, trained since then; None: the autoencoder's own.
        """

    @abstractmethod
    def copy_decoder(self) -> nn.Module:
        """An independent copy of the decoder in its present state, which `decode` takes."""

    @abstractmethod
    def halves(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters of the encoder, and of the decoder; together they are all parameters."""

    @abstractmethod
    def config_json(self) -> str:
        """Text of the config.json beside the weights: `_class_name`, which tells a reader the kind, and the sizes."""

    @torch.no_grad()
    def background(self, image_size: int, device: torch.device | str, colour: Tensor | None = None) -> Tensor:
        """Colour [C] in [0, 1] of a ray that meets nothing: the latent of an image of one colour [3] in [0, 1], None:
        white, averaged over pixels."""
        images = torch.ones(1, 3, image_size, image_size, device=device)
        if colour is not None:
            images *= colour.to(device)[:, None, None]
        return ((self.encode(images) + 1) / 2).mean(dim=(0, 2, 3))
