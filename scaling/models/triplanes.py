"""Micro-macro tri-planes: a scene is its own micro planes plus a mixture of base planes.

T_i = concat(T_i^mic, Σ_k w_i^k B_k) along features (the paper's section on micro-macro decomposition).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from scaling.models import cpu_ops

AXES = {"x": 0, "y": 1, "z": 2}
Combine = Literal["product", "sum"]


@dataclass(frozen=True)
class SceneParams:
    """The tensors that S scenes own; everything else is shared.

    micro_planes [S, P, F_mic, K, K]; coefs [S, M] over the base planes; hull [S, CELLS³] (bool): the visual hulls, the
    cells of the box that the scenes' views do not carve away; None: there are no hulls. SharedModel.start_params and
    random_params make SceneParams; library/scene_row.py packs them.
    """

    micro_planes: Tensor
    coefs: Tensor
    hull: Tensor | None = None

    def __getitem__(self, rows: Any) -> SceneParams:
        hull = None if self.hull is None else self.hull[rows]
        return SceneParams(self.micro_planes[rows], self.coefs[rows], hull)

    def to(self, device: torch.device | str) -> SceneParams:
        """The same params on a device."""
        hull = None if self.hull is None else self.hull.to(device)
        return SceneParams(self.micro_planes.to(device), self.coefs.to(device), hull)


def hull_between(first: SceneParams, second: SceneParams, *places: float) -> Tensor | None:
    """Visual hull of a mixture of two scenes, [S, CELLS³] (bool); None where either scene has no hull.

    places in [0, 1]: 0 stands for `first`, 1 for `second`. All 0 or all 1: that scene's own hull; else the union.
    """
    if first.hull is None or second.hull is None:
        return None
    if set(places) <= {0.0} or set(places) <= {1.0}:
        return first.hull if 0.0 in places else second.hull
    return first.hull | second.hull


def mix_base_planes(coefs: Tensor, base_planes: Tensor) -> Tensor:
    """Macro planes Σ_k w_i^k B_k. coefs [S, M], base_planes [M, P, F_mac, K, K] → [S, P, F_mac, K, K].

    Raises ValueError where coefs and base planes differ in M.
    """
    num_scenes, num_base = coefs.shape
    if base_planes.shape[0] != num_base:
        raise ValueError(f"{num_base} coefs a scene, but {base_planes.shape[0]} base planes")
    return (coefs @ base_planes.reshape(num_base, -1)).reshape(num_scenes, *base_planes.shape[1:])


def fuse_planes(micro_planes: Tensor, coefs: Tensor, base_planes: Tensor) -> Tensor:
    """Tri-planes of S scenes: micro features first, then macro features.

    micro_planes [S, P, F_mic, K, K], coefs [S, M], base_planes [M, P, F_mac, K, K] → [S, P, F_mic + F_mac, K, K].
    F_mic = 0 leaves out the micro features, M = F_mac = 0 the macro features.

    >>> micro, base = torch.ones(1, 3, 1, 2, 2), torch.ones(4, 3, 1, 2, 2)
    >>> fuse_planes(micro, torch.full((1, 4), 0.5), base)[0, 0, :, 0, 0]  # a texel: its micro 1, its macro 4 · 0.5 · 1
    tensor([1., 2.])
    """
    if base_planes.numel() == 0:
        return micro_planes
    macro_planes = mix_base_planes(coefs, base_planes)
    if not micro_planes.shape[2]:
        return macro_planes
    # Sampling a point reads all features of a texel: they lie side by side in memory.
    parts = [part.permute(0, 1, 3, 4, 2) for part in (micro_planes, macro_planes)]
    return torch.cat(parts, dim=-1).permute(0, 1, 4, 2, 3)


def texels_together(planes: Tensor) -> Tensor:
    """A copy of planes [S, P, F, K, K] in which a texel's features lie side by side in memory, as sampling reads them;
    the shape stays the same."""
    return planes.permute(0, 1, 3, 4, 2).clone(memory_format=torch.contiguous_format).permute(0, 1, 4, 2, 3)


def axis_columns(plane_axes: Sequence[str]) -> list[tuple[int, int]]:
    """Indices of the coordinates along width and height of each plane: "xz" → (0, 2)."""
    return [(AXES[axes[0]], AXES[axes[1]]) for axes in plane_axes]


def project(points: Tensor, plane_axes: Sequence[str]) -> Tensor:
    """Project points onto each plane. points [S, N, 3], [−1, 1] inside the box → [S, P, N, 2].

    The first axis of a plane runs along its width, the second along its height.
    """
    columns = [AXES[axis] for axes in plane_axes for axis in axes]
    return points[..., columns].unflatten(-1, (len(plane_axes), 2)).movedim(-2, 1)


def sample_planes(planes: Tensor, points: Tensor, plane_axes: Sequence[str]) -> Tensor:
    """Sample every plane bilinearly at the points' projections; texels beyond the edge count as zero.

    planes [S, P, F, K, K], points [S, N, 3], [−1, 1] inside the box → [S, P, F, N]. A GPU runs this function; a CPU
    runs the loops of cpu_kernels.py, for which it is the reference. Raises ValueError unless every plane has its axes.
    """
    num_scenes, num_planes = planes.shape[:2]
    if num_planes != len(plane_axes):
        raise ValueError(f"{num_planes} planes, but axes for {len(plane_axes)}: {list(plane_axes)}")
    grid = project(points, plane_axes).flatten(0, 1)[:, None]
    sampled = F.grid_sample(planes.flatten(0, 1), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled[:, :, 0].unflatten(0, (num_scenes, num_planes))


def combine_planes(features: Tensor, combine: Combine) -> Tensor:
    """Combine the features of a point's P projections, [S, P, …] → [S, …]: their sum (paper) or Π (1 + f) − 1.

    In the product a feature of 0 is neutral, and −1 on one plane overrules the others: each plane can say that a point
    is empty.
    """
    if combine == "sum":
        return features.sum(1)
    product, *others = (1 + features).unbind(1)
    for other in others:
        product = product * other
    return product - 1


def point_features(planes: Tensor, points: Tensor, plane_axes: Sequence[str], combine: Combine) -> Tensor:
    """Sample planes at points, and combine. planes [S, P, F, K, K], points [S, N, 3], [−1, 1] inside the box
    → [S, N, F]."""
    if cpu_ops.takes(planes, points) and not points.requires_grad:
        return cpu_ops.plane_features(planes, points, axis_columns(plane_axes), combine == "product")
    return combine_planes(sample_planes(planes, points, plane_axes), combine).transpose(1, 2)


def total_variation(planes: Tensor) -> Tensor:
    """Total variation (‖Δh‖² + ‖Δw‖²) / (H + W), mean over the S tri-planes. planes [S, P, F, H, W] → scalar."""
    height, width = planes.shape[-2:]
    along_height = (planes[..., 1:, :] - planes[..., :-1, :]).square().sum()
    along_width = (planes[..., :, 1:] - planes[..., :, :-1]).square().sum()
    return (along_height + along_width) / ((height + width) * planes.shape[0])
