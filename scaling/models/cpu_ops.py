"""The loops of cpu_kernels.py on torch tensors, with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scaling.models.cpu_kernels import sample_and_combine, scatter_gradient, surface_samples


def takes(*tensors: Tensor) -> bool:
    """Whether these loops take all of the tensors: single precision on a CPU, and nothing that is being compiled."""
    plain = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
    return plain and not torch.compiler.is_compiling()


def fill_samples(
    origins: Tensor, directions: Tensor, corners: Tensor, cells: Tensor, samples: int, jitter: Tensor | None,
    num_cells: int, num_parts: int, blur: int, evenly: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `sampling.samples_in`: rays [S, R, 3], corners [2, 3], cells [S, num_cells³], jitter [S, R, samples] or None
    → depths [S, R, samples], lengths [S, R, samples − 1], far [S, R], hit [S, R] (bool)."""
    rays = origins.shape[:2]
    depths, lengths, ends = torch.empty(*rays, samples), torch.empty(*rays, samples - 1), torch.empty(*rays, 3)
    middle = jitter is None
    places = torch.full((1, 1, samples), 0.5) if jitter is None else jitter
    surface_samples(
        *(_numpy(tensor) for tensor in (origins, directions, corners[0], corners[1], cells, places)),
        middle, num_cells, num_parts, blur, np.float32(evenly), depths.numpy(), lengths.numpy(), ends.numpy(),
    )  # fmt: skip
    return depths, lengths, ends[..., 1], ends[..., 2] > 0


def plane_features(planes: Tensor, points: Tensor, columns: Sequence[tuple[int, int]], product: bool) -> Tensor:
    """planes [S, P, F, K, K], points [S, N, 3], [−1, 1] inside the box; columns: the coordinates along width and height
    of each plane → [S, N, F]; the gradient reaches the planes alone."""
    return _PlaneFeatures.apply(planes, points, np.array(columns), product)


class _PlaneFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, planes: Tensor, points: Tensor, columns: np.ndarray, product: bool) -> Tensor:
        scenes, count, num_planes, width = *points.shape[:2], *planes.shape[1:3]
        keeps = ctx.needs_input_grad[0]
        sampled = torch.empty(*((scenes, count) if keeps else (1, 1)), num_planes, width)
        features = torch.empty(scenes, count, width)
        texels = planes.detach().permute(0, 1, 3, 4, 2).reshape(scenes, num_planes, -1, width)
        sample_and_combine(
            _numpy(texels), _numpy(points), columns, product, keeps, sampled.numpy(), features.numpy()
        )  # fmt: skip
        ctx.columns, ctx.product, ctx.shape = columns, product, planes.shape
        ctx.save_for_backward(points, sampled)
        return features

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        points, sampled = ctx.saved_tensors
        scenes, num_planes, width, height, across = ctx.shape
        texels = torch.zeros(scenes, num_planes, height * across, width)
        scatter_gradient(
            _numpy(gradient), sampled.numpy(), _numpy(points), ctx.columns, ctx.product, texels.numpy()
        )  # fmt: skip
        planes = texels.view(scenes, num_planes, height, across, width).permute(0, 1, 4, 2, 3)
        return planes, None, None, None


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()
