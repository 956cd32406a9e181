"""The student: a small decoder of rendered latents, distilled in stage 1, through which stage 2 fits scenes.

The real decoder spends nearly all of its work at growing resolutions. The student stays at the latents' resolution and
turns features into pixels at the very end, so a step through it costs next to nothing. It does not replace the decoder
where pictures are made: it only provides the direction in which an image's error moves its latents.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from scaling.models.autoencoders.super_resolution import ResidualBlock
from scaling.models.precision import networks


class Student(nn.Module):
    """A residual network at the latents' resolution, then a pixel shuffle.

    channels: of the latents; shrink: pixels a side of one latent; latent_std: rough spread of the latents, which are
    divided by it; width: features; num_blocks: residual blocks.
    """

    def __init__(
        self, channels: int, shrink: int, latent_std: float, width: int, num_blocks: int, precision: str
    ) -> None:
        super().__init__()
        self.latent_std = latent_std
        self.shrink = shrink
        self.precision = precision
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(num_blocks))
        self.head = nn.Conv2d(width, 3 * shrink**2, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, h, w] → images [B, 3, h · shrink, w · shrink] in [0, 1], clamped."""
        with networks(latents, self.precision):
            features = self.stem(latents / self.latent_std)
            for block in self.blocks:
                features = block(features)
            pixels = self.head(functional.silu(features))
        return ((functional.pixel_shuffle(pixels.float(), self.shrink) + 1) / 2).clamp(0, 1)
