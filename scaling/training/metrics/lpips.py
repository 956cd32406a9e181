"""LPIPS (Zhang et al., 2018) over VGG16, built from a file of weights that the user names; nothing is downloaded.

Two images are close where a recognition network gives them similar features.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.nn import functional

from scaling.storage.limited import read_limited
from scaling.storage.paths import AnyPath
from scaling.storage.tensors import read_tensors

NETWORK = "vgg"
# The 3 × 3 convolutions, by their index among VGG16's layers; the features after each group are compared.
GROUPS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
WIDTHS = (64, 128, 256, 512, 512)  # channels of each group
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [−1, 1], as the weights expect
CHUNK = 8  # views at a time
MAX_WEIGHTS_BYTES = 1 << 30


class Lpips(nn.Module):
    """The network. Its parameters are named as in the package `lpips`: net.slice1.0.weight [64, 3, 3, 3] … for VGG16,
    and lin0.model.1.weight [1, 64, 1, 1] … for the weights of channels. widths: channels of the five groups."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.net, channels = nn.ModuleDict(), 3
        for number, (places, width) in enumerate(zip(GROUPS, widths, strict=True)):
            convolutions = {}
            for place in places:
                convolutions[str(place)] = nn.Conv2d(channels, width, 3, padding=1)
                channels = width
            self.net[f"slice{number + 1}"] = nn.ModuleDict(convolutions)
            weighing = nn.ModuleDict({"1": nn.Conv2d(width, 1, 1, bias=False)})
            self.add_module(f"lin{number}", nn.ModuleDict({"model": weighing}))

    def forward(self, images: Tensor, truth: Tensor) -> Tensor:
        """LPIPS of each image; 0: equal. [B, 3, H, W] twice, in [0, 1], at least 16 pixels a side → [B]."""
        shift, scale = (torch.tensor(values).view(3, 1, 1).to(images) for values in (SHIFT, SCALE))
        features = (2 * torch.cat([images, truth]) - 1 - shift) / scale
        total = images.new_zeros(len(images))
        for number, layers in enumerate(self.net.values()):
            if number > 0:
                features = functional.max_pool2d(features, 2)
            assert isinstance(layers, nn.ModuleDict)
            for layer in layers.values():
                features = layer(features).relu()
            units = features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)
            weighing = self.get_parameter(f"lin{number}.model.1.weight")
            differences = functional.conv2d((units[: len(images)] - units[len(images) :]).square(), weighing)
            total = total + differences.mean((1, 2, 3))
        return total

    @torch.no_grad()
    def mean(self, images: Tensor, truth: Tensor) -> float:
        """Mean LPIPS over a scene's views. [V, 3, H, W] twice, in [0, 1], on the network's device."""
        parts = [self(*pair) for pair in zip(images.split(CHUNK), truth.split(CHUNK))]
        return torch.cat(parts).mean().item()


def read_lpips(path: AnyPath) -> tuple[Lpips, str]:
    """The network with the weights of a safetensors file (see experiments/README.md), and the file's SHA-256.

    Raises ValueError naming the file and the first tensor that is missing, unexpected or of another type or shape.
    """
    with torch.device("meta"):
        network = Lpips()
    try:
        tensors = read_tensors(path, network.state_dict())
    except ValueError as error:
        raise ValueError(
            f"{path}: not weights of LPIPS over VGG16: {error}; experiments/README.md says how to convert them"
        ) from None
    network.load_state_dict(tensors, assign=True)
    return network.requires_grad_(False).eval(), hashlib.sha256(read_limited(path, MAX_WEIGHTS_BYTES)).hexdigest()
