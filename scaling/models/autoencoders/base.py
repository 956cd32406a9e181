"""The interface of an image autoencoder: images in [0, 1] on one side, latents in [−1, 1] on the other."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class ImageAutoencoder(nn.Module, ABC):
    """images [B, 3, H, W] in [0, 1] ↔ latents [B, C, h, w] in [−1, 1], where h = H / shrink.

    latent_channels: C; latent_std: about how far latents spread; has_encoder: whether a network encodes (then encoding
    takes time, is worth caching, and an image's latent differs over its background); has_decoder: whether a network
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
        """Whether latents are the pixels themselves, so that there is nothing to measure or show beside those."""
        return self.shrink == 1 and not (self.has_encoder or self.has_decoder)

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1] → mean latents [B, C, h, w] in [−1, 1]."""

    @abstractmethod
    def encode_sample(self, images: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """images → samples of the latents, and their KL divergence from N(0, 1); 0 where nothing is sampled.

        images [B, 3, H, W], noise [B, C, h, w] (standard normal; None: the mean latents) → [B, C, h, w], [B] (mean over
        latent values).
        """

    @abstractmethod
    def decode(self, latents: Tensor, decoder: nn.Module | None = None) -> Tensor:
        """latents [B, C, h, w] in [−1, 1] → images [B, 3, H, W] in [0, 1], clamped.

        decoder: one that `copy_decoder` made, which has moved since; None: the autoencoder's own.
        """

    @abstractmethod
    def copy_decoder(self) -> nn.Module:
        """A decoder of its own for `decode` that starts where this autoencoder's stands."""

    @abstractmethod
    def halves(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters of the encoder and of the decoder; together they are all parameters."""

    @abstractmethod
    def config_json(self) -> str:
        """What config.json beside the weights says: `_class_name`, by which a reader knows the kind, and sizes."""

    @torch.no_grad()
    def background(self, image_size: int, device: torch.device | str) -> Tensor:
        """What a ray that meets nothing shows: the latent of a white image, averaged over pixels, in [0, 1]. → [C]."""
        white = self.encode(torch.ones(1, 3, image_size, image_size, device=device))
        return ((white + 1) / 2).mean(dim=(0, 2, 3))
