"""The loops of cpu_kernels.py on torch tensors, with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scaling.models import cpu_kernels


def takes(*tensors: Tensor) -> bool:
    """Whether these loops can take all of the tensors: float32 on a CPU, and not inside torch.compile."""
    plain = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
    return plain and not torch.compiler.is_compiling()


def as_numpy(tensor: Tensor) -> np.ndarray:
    """The tensor as an array, without its gradient; they share memory where the tensor is contiguous."""
    return tensor.detach().contiguous().numpy()


def surface_samples(
    origins: Tensor, directions: Tensor, bounds: Tensor, unit: float, cells: Tensor, places: Tensor,
    parts: int, blur: int, evenly: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Samples as in `sampling.samples_in`: origins and directions [S, R, 3], bounds [2, 3] and `unit` of the box, cells
    [S, side³], places [S, R, D] in the strata, in [0, 1) → depths [S, R, D], lengths [S, R, D − 1], far [S, R], hit [S,
    R] (bool).

    Raises ValueError where numbers of scenes or rays differ.
    """
    rays, samples = places.shape[:2], places.shape[2]
    if not (origins.shape == directions.shape == (*rays, 3) and len(cells) == len(origins)):
        raise ValueError(f"cells of {len(cells)} scenes for rays of shape {list(origins.shape)}")
    depths, lengths, far = torch.empty(places.shape), torch.empty(*rays, samples - 1), torch.empty(rays)
    hit = torch.empty(rays, dtype=torch.bool)
    cpu_kernels.surface_samples(
        *map(as_numpy, (origins, directions, bounds[0], bounds[1])), np.float32(unit), as_numpy(cells),
        as_numpy(places), parts, blur, np.float32(evenly),
        *(tensor.numpy() for tensor in (depths, lengths, far, hit)),
    )  # fmt: skip
    return depths, lengths, far, hit


def plane_features(planes: Tensor, points: Tensor, columns: Sequence[tuple[int, int]], product: bool) -> Tensor:
    """Sample and combine planes [S, P, F, K, K] at points [S, N, 3], [−1, 1] inside the box → features [S, N, F].

    columns: see `triplanes.axis_columns`; product: Π (1 + f) − 1 over the planes, else their sum. Gradients reach the
    planes only. Raises ValueError where numbers of scenes or planes differ, or planes are not square.
    """
    # The loops check no shapes: with a wrong one they would read beyond an array's end.
    if len(planes) != len(points) or planes.shape[1] != len(columns) or planes.shape[-1] != planes.shape[-2]:
        raise ValueError(
            f"planes of shape {list(planes.shape)} for {len(columns)} pairs of axes and points of shape "
            f"{list(points.shape)}: expected [S, P, F, K, K] and [S, N, 3]"
        )
    return _PlaneFeatures.apply(planes, points, np.array(columns), product)


class _PlaneFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, planes: Tensor, points: Tensor, columns: np.ndarray, product: bool) -> Tensor:
        texels = planes.detach().permute(0, 1, 3, 4, 2)
        keeps = ctx.needs_input_grad[0]
        features, sampled = features_of(texels.flatten(2, 3), points, columns, product, keeps)
        ctx.columns, ctx.product, ctx.shape = columns, product, texels.shape
        ctx.save_for_backward(points, sampled)
        return features

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        points, sampled = ctx.saved_tensors
        texels = torch.zeros(ctx.shape)
        cpu_kernels.scatter_gradient(
            as_numpy(gradient), as_numpy(sampled), as_numpy(points), ctx.columns, ctx.product,
            texels.flatten(2, 3).numpy(),
        )  # fmt: skip
        return texels.permute(0, 1, 4, 2, 3), None, None, None


def features_of(
    texels: Tensor, points: Tensor, columns: np.ndarray, product: bool, keeps: bool
) -> tuple[Tensor, Tensor]:
    """Texels [S, P, K², F], points [S, N, 3] → features [S, N, F], and each plane's own features, which the gradient
    of a product needs: [S, N, P, F] where `keeps` is true, else [1, 1, P, F] without meaning."""
    count, (num_planes, width) = points.shape[:2], texels.shape[1::2]
    features, sampled = torch.empty(*count, width), torch.empty(*(count if keeps else (1, 1)), num_planes, width)
    cpu_kernels.sample_and_combine(
        as_numpy(texels), as_numpy(points), columns, product, keeps, sampled.numpy(), features.numpy()
    )
    return features, sampled
