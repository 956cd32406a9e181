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
    """What belongs to S scenes: their micro planes [S, P, F_mic, K, K], their coefs [S, M] over the base planes, and
    their visual hulls [S, CELLS³] (bool): the box's cells that their views do not carve away. None: they have none.

    Everything else is shared. SharedModel.start_params and random_params make them; library/scene_row.py packs
    them.
    """

    micro_planes: Tensor
    coefs: Tensor
    hull: Tensor | None = None

    def __getitem__(self, rows: Any) -> SceneParams:
        hull = None if self.hull is None else self.hull[rows]
        return SceneParams(self.micro_planes[rows], self.coefs[rows], hull)

    def to(self, device: torch.device | str) -> SceneParams:
        """The same on a device."""
        hull = None if self.hull is None else self.hull.to(device)
        return SceneParams(self.micro_planes.to(device), self.coefs.to(device), hull)


def hull_between(first: SceneParams, second: SceneParams, *places: float) -> Tensor | None:
    """Where a mixture of two scenes may be, [S, CELLS³]: at the ends (all places 0, or all 1) the one's own hull,
    between them where either is; None where one has no hull."""
    if first.hull is None or second.hull is None:
        return None
    if set(places) <= {0.0} or set(places) <= {1.0}:
        return first.hull if 0.0 in places else second.hull
    return first.hull | second.hull


def mix_base_planes(coefs: Tensor, base_planes: Tensor) -> Tensor:
    """Macro planes Σ_k w_i^k B_k. coefs [S, M], base_planes [M, P, F_mac, K, K] → [S, P, F_mac, K, K].

    ValueError where the two have another M.
    """
    num_scenes, num_base = coefs.shape
    if base_planes.shape[0] != num_base:
        raise ValueError(f"{num_base} coefs a scene, but {base_planes.shape[0]} base planes")
    return (coefs @ base_planes.reshape(num_base, -1)).reshape(num_scenes, *base_planes.shape[1:])


def fuse_planes(micro_planes: Tensor, coefs: Tensor, base_planes: Tensor) -> Tensor:
    """Tri-planes of S scenes: micro features first, then macro features.

    micro_planes [S, P, F_mic, K, K], coefs [S, M], base_planes [M, P, F_mac, K, K] → [S, P, F_mic + F_mac, K, K].
    F_mic = 0 or M = F_mac = 0 leave that part out.
    """
    if base_planes.numel() == 0:
        return micro_planes
    macro_planes = mix_base_planes(coefs, base_planes)
    if not micro_planes.shape[2]:
        return macro_planes
    # A texel's features lie side by side in memory, as points are sampled.
    parts = [part.permute(0, 1, 3, 4, 2) for part in (micro_planes, macro_planes)]
    return torch.cat(parts, dim=-1).permute(0, 1, 4, 2, 3)


def texels_together(planes: Tensor) -> Tensor:
    """The same planes [S, P, F, K, K], laid out in memory so that a texel's features lie side by side, as points are
    sampled; a copy."""
    return planes.permute(0, 1, 3, 4, 2).clone(memory_format=torch.contiguous_format).permute(0, 1, 4, 2, 3)


def axis_columns(plane_axes: Sequence[str]) -> list[tuple[int, int]]:
    """The coordinates along width and height of each plane."""
    return [(AXES[axes[0]], AXES[axes[1]]) for axes in plane_axes]


def project(points: Tensor, plane_axes: Sequence[str]) -> Tensor:
    """Points on each plane. points [S, N, 3], [−1, 1] inside the box → [S, P, N, 2].

    The first axis of a plane runs along its width, the second along its height.
    """
    columns = [AXES[axis] for axes in plane_axes for axis in axes]
    return points[..., columns].unflatten(-1, (len(plane_axes), 2)).movedim(-2, 1)


def sample_planes(planes: Tensor, points: Tensor, plane_axes: Sequence[str]) -> Tensor:
    """Bilinear samples of every plane at the points' projections; zero outside the box. What a GPU computes, and the
    reference for what a CPU does (cpu_kernels.py).

    planes [S, P, F, K, K], points [S, N, 3], [−1, 1] inside the box → [S, P, F, N]. ValueError unless every plane has
    its axes.
    """
    num_scenes, num_planes = planes.shape[:2]
    if num_planes != len(plane_axes):
        raise ValueError(f"{num_planes} planes, but axes for {len(plane_axes)}: {list(plane_axes)}")
    grid = project(points, plane_axes).flatten(0, 1)[:, None]
    sampled = F.grid_sample(planes.flatten(0, 1), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled[:, :, 0].unflatten(0, (num_scenes, num_planes))


def combine_planes(features: Tensor, combine: Combine) -> Tensor:
    """A point's features from those of its projections, [S, P, …] → [S, …]: their sum over planes (paper), or
    Π (1 + f) − 1, so that zero planes are neutral and a point is something only where every plane says so."""
    if combine == "sum":
        return features.sum(1)
    product, *others = (1 + features).unbind(1)
    for other in others:
        product = product * other
    return product - 1


def point_features(planes: Tensor, points: Tensor, plane_axes: Sequence[str], combine: Combine) -> Tensor:
    """planes [S, P, F, K, K], points [S, N, 3], [−1, 1] inside the box → their features [S, N, F]."""
    if cpu_ops.takes(planes, points) and not points.requires_grad:
        return cpu_ops.plane_features(planes, points, axis_columns(plane_axes), combine == "product")
    return combine_planes(sample_planes(planes, points, plane_axes), combine).transpose(1, 2)


def total_variation(planes: Tensor) -> Tensor:
    """(‖Δh‖² + ‖Δw‖²) / (H + W), mean over the S tri-planes. planes [S, P, F, H, W] → scalar."""
    height, width = planes.shape[-2:]
    along_height = (planes[..., 1:, :] - planes[..., :-1, :]).square().sum()
    along_width = (planes[..., :, 1:] - planes[..., :, :-1]).square().sum()
    return (along_height + along_width) / ((height + width) * planes.shape[0])
