"""Latents that agree between views by construction: the image itself, made smaller; a decoder adds the detail.

The encoder E is the area filter, so an object's latent is its colour in every view, and planes can explain that;
learned channels differ from view to view. The decoder D is bilinear upsampling plus a residual network at the latents'
resolution. With `shrink` 1 and no network, both are the identity, and planes hold pixels.
"""

from __future__ import annotations

import copy
import json

from torch import Tensor, nn
from torch.nn import functional

from scaling.models.autoencoders.base import ImageAutoencoder
from scaling.models.precision import networks


class ResidualBlock(nn.Module):
    """f + conv(SiLU(conv(SiLU(f)))) for features f [B, width, h, w]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """[B, width, h, w] → the same shape."""
        inner = self.first(functional.silu(features))
        return features + self.second(functional.silu(inner))


class SuperResolution(nn.Module):
    """The decoder D(n) = bilinear(n) + pixel_shuffle(network(n)).

    shrink: pixels a side of one latent; width: features of the network; num_blocks: residual blocks, 0: bilinear(n)
    alone.
    """

    def __init__(self, shrink: int, width: int, num_blocks: int) -> None:
        super().__init__()
        self.shrink = shrink
        self.num_blocks = num_blocks
        if num_blocks:
            self.stem = nn.Conv2d(3, width, 3, padding=1)
            self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(num_blocks))
            self.head = nn.Conv2d(width, 3 * shrink**2, 3, padding=1)
            # A head of zeros: training starts from bilinear upsampling, without noise on top of it.
            for parameter in self.head.parameters():
                nn.init.zeros_(parameter)

    def forward(self, latents: Tensor, precision: str) -> Tensor:
        """Latents [B, 3, h, w] in [−1, 1] → images [B, 3, h · shrink, w · shrink] in [0, 1], clamped; precision:
        settings.precision."""
        images = latents
        if self.shrink > 1:
            images = functional.interpolate(latents, scale_factor=float(self.shrink), mode="bilinear")
        if self.num_blocks:
            images = images + functional.pixel_shuffle(self._details(latents, precision), self.shrink)
        return ((images + 1) / 2).clamp(0, 1)

    def _details(self, latents: Tensor, precision: str) -> Tensor:
        """What bilinear upsampling lacks, before the pixel shuffle: [B, 3 · shrink², h, w]."""
        with networks(latents, precision):
            features = self.stem(latents)
            for block in self.blocks:
                features = block(features)
            return self.head(functional.silu(features)).float()


class SuperResolutionAutoencoder(ImageAutoencoder):
    """Smaller images as latents. shrink: pixels a side of one latent; decoder_width, decoder_blocks: width and
    num_blocks of the decoder (see `SuperResolution`)."""

    def __init__(self, shrink: int, decoder_width: int, decoder_blocks: int, precision: str = "float32") -> None:
        super().__init__(3, shrink, 1.0, has_encoder=False, has_decoder=decoder_blocks > 0, precision=precision)
        self.sizes = {"shrink": shrink, "decoder_width": decoder_width, "decoder_blocks": decoder_blocks}
        self.decoder = SuperResolution(shrink, decoder_width, decoder_blocks)

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → their means over squares of shrink × shrink pixels, [B, 3, h, w] in
        [−1, 1]."""
        return 2 * (images if self.shrink == 1 else functional.avg_pool2d(images, self.shrink)) - 1

    def encode_sample(self, images: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same latents as `encode`; nothing is sampled, so the divergence [B] is 0."""
        return self.encode(images), images.new_zeros(len(images))

    def decode(self, latents: Tensor, decoder: nn.Module | None = None) -> Tensor:
        """Latents [B, 3, h, w] in [−1, 1] → images [B, 3, H, W] in [0, 1], clamped."""
        return (decoder or self.decoder)(latents, self.precision)

    def copy_decoder(self) -> SuperResolution:
        return copy.deepcopy(self.decoder)

    def halves(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """No encoder parameters; those of the decoder, none where it has no blocks."""
        return [], list(self.decoder.parameters())

    def config_json(self) -> str:
        return json.dumps({"_class_name": type(self).__name__, **self.sizes}, indent=1)
