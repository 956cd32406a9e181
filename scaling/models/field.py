"""The field: a small network, shared by all scenes, from a point's features to density and colours."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from scaling.models.precision import networks


class Field(nn.Module):
    """Linear F → width, softplus, Linear width → 1 + C. No view direction (paper, section 2)."""

    def __init__(self, num_features: int, width: int, num_colours: int) -> None:
        super().__init__()
        self.precision = "float32"  # the shared model sets it from its settings
        self.hidden = nn.Linear(num_features, width)
        self.head = nn.Linear(width, 1 + num_colours)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """features [S, F, N] of N points (summed over planes) → raw densities [S, N], colours [S, N, C] in
        (−0.001, 1.001).

        The colour head is sigmoid(·) · 1.002 − 0.001, so that 0 and 1 are reached at finite values. Features come
        first, as planes are sampled: turning them round would cost a tenth of a step.
        """
        with networks(features, self.precision):
            raw = _features_first(self.head, softplus(_features_first(self.hidden, features)))
        raw = raw.float()
        return raw[:, 0], (raw[:, 1:].sigmoid() * 1.002 - 0.001).transpose(1, 2)


def _features_first(layer: nn.Linear, features: Tensor) -> Tensor:
    """[S, F, N] → [S, layer.out_features, N]."""
    return torch.baddbmm(layer.bias[:, None], layer.weight.expand(len(features), -1, -1), features)
