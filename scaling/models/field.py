"""The field: a small network, shared by all scenes, from a point's features to density and colours."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from scaling.models.precision import networks


class Field(nn.Module):
    """`num_layers` hidden layers of `width` with an activation, then Linear width → 1 + C; no view direction (paper,
    section 2). The paper has one hidden layer, with softplus."""

    def __init__(
        self,
        num_features: int,
        width: int,
        num_colours: int,
        num_layers: int = 1,
        activation: Literal["relu", "softplus"] = "softplus",
        precision: str = "float32",
    ) -> None:
        super().__init__()
        self.precision = precision
        self.activation = getattr(functional, activation)
        self.hidden = nn.Linear(num_features, width)
        self.more = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers - 1))
        self.head = nn.Linear(width, 1 + num_colours)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features [S, N, F] of N points (combined over planes) → raw densities [S, N], colours [S, N, C] in
        (−0.001, 1.001).

        Colours are sigmoid(·) · 1.002 − 0.001, so that finite values reach 0 and 1.
        """
        with networks(features, self.precision):
            for layer in (self.hidden, *self.more):
                features = self.activation(layer(features))
            raw = self.head(features)
        raw = raw.float()
        return raw[..., 0], raw[..., 1:].sigmoid() * 1.002 - 0.001
