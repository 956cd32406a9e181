"""On a GPU the autoencoder and the field compute in bfloat16. All else, and everything on a CPU, stays in float32.

Weights and sums of these two networks tolerate eight bits of mantissa. Depths, transmittance, plane texels, losses and
optimisers do not: training learns from their small differences.
"""

from __future__ import annotations

import torch
from torch import Tensor

BF16_DEVICES = ("cuda",)  # not "cpu": without bfloat16 units bfloat16 is slower than float32


def networks(like: Tensor, precision: str) -> torch.autocast:
    """Context manager in which a network runs on tensors like `like`; precision: settings.precision.

    The network's results may be bfloat16: the caller converts them back to float32.
    """
    lower = precision == "bfloat16" and like.device.type in BF16_DEVICES
    return torch.autocast(like.device.type, torch.bfloat16, enabled=lower)


def set_precision(precision: str) -> None:
    """Forbid TF32 in GPU convolutions where `precision` is float32; PyTorch allows it by default.

    This holds for the whole process, backward passes included: the model that was made last decides.
    """
    torch.backends.cudnn.allow_tf32 = precision != "float32"
