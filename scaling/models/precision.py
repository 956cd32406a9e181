"""What is computed in bfloat16 on a GPU: the autoencoder and the field. Everything else, and a CPU, keeps float32.

Both are networks whose weights and sums tolerate eight bits of mantissa. Depths, transmittance, plane texels, losses
and optimisers do not: their small differences are what is learned.
"""

from __future__ import annotations

import torch
from torch import Tensor

BF16_DEVICES = ("cuda",)  # on CPUs without bfloat16 units it is slower than float32


def networks(like: Tensor, precision: str) -> torch.autocast:
    """The context in which a network runs on tensors such as `like`; precision: settings.precision.

    Its results may be bfloat16: the caller turns them back into float32.
    """
    lower = precision == "bfloat16" and like.device.type in BF16_DEVICES
    return torch.autocast(like.device.type, torch.bfloat16, enabled=lower)


def set_precision(precision: str) -> None:
    """float32 means float32: convolutions on a GPU then leave TF32 alone, which PyTorch allows by default.

    It holds for the whole process, backward passes included: the model that was made last decides.
    """
    torch.backends.cudnn.allow_tf32 = precision != "float32"
