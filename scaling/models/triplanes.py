"""Micro-macro tri-planes: a scene is its own micro planes plus a mixture of base planes.

T_i = concat(T_i^mic, Σ_k w_i^k B_k) along features (the paper's section on micro-macro decomposition).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

AXES = {"x": 0, "y": 1, "z": 2}


@dataclass(frozen=True)
class SceneParams:
    """What belongs to S scenes: their micro planes [S, P, F_mic, K, K] and their coefs [S, M] over the base planes.

    Everything else is shared. SharedModel.start_params and random_params make them; library/fitted_scenes.py packs
    them.
    """

    micro_planes: Tensor
    coefs: Tensor

    def __getitem__(self, rows: Any) -> SceneParams:
        return SceneParams(self.micro_planes[rows], self.coefs[rows])

    def to(self, device: torch.device | str) -> SceneParams:
        """The same on a device."""
        return SceneParams(self.micro_planes.to(device), self.coefs.to(device))


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
    return torch.cat([micro_planes, macro_planes], dim=2) if micro_planes.shape[2] else macro_planes


def project(points: Tensor, plane_axes: Sequence[str]) -> Tensor:
    """Points on each plane. points [S, N, 3], [−1, 1] inside the box → [S, P, N, 2].

    The first axis of a plane runs along its width, the second along its height.
    """
    columns = [AXES[axis] for axes in plane_axes for axis in axes]
    return points[..., columns].unflatten(-1, (len(plane_axes), 2)).movedim(-2, 1)


def sample_planes(planes: Tensor, points: Tensor, plane_axes: Sequence[str]) -> Tensor:
    """Bilinear samples of every plane at the points' projections; zero outside the box.

    planes [S, P, F, K, K], points [S, N, 3], [−1, 1] inside the box → [S, P, F, N]. ValueError unless every plane has
    its axes.
    """
    num_scenes, num_planes = planes.shape[:2]
    if num_planes != len(plane_axes):
        raise ValueError(f"{num_planes} planes, but axes for {len(plane_axes)}: {list(plane_axes)}")
    grid = project(points, plane_axes).flatten(0, 1)[:, None]
    sampled = F.grid_sample(planes.flatten(0, 1), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled[:, :, 0].unflatten(0, (num_scenes, num_planes))


def total_variation(planes: Tensor) -> Tensor:
    """(‖Δh‖² + ‖Δw‖²) / (H + W), mean over the S tri-planes. planes [S, P, F, H, W] → scalar."""
    height, width = planes.shape[-2:]
    along_height = (planes[..., 1:, :] - planes[..., :-1, :]).square().sum()
    along_width = (planes[..., :, 1:] - planes[..., :, :-1]).square().sum()
    return (along_height + along_width) / ((height + width) * planes.shape[0])
