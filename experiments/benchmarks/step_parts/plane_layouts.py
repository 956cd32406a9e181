"""For step.py: ways to sample planes, each a layout of the planes in memory and a function that reads it.

All ways take the planes of S scenes and points on them. They give the same features, summed over planes, and the same
gradient of the planes, which is checked. What is timed includes the field's first layer, because a layout that suits
the sampler may not suit what follows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from shared.stopwatch import median_ms
from torch import Tensor

from scaling.models.triplanes import project, sample_planes

CLOSE = 1e-3  # largest difference from F.grid_sample, relative to the largest value


@dataclass(frozen=True)
class Points:
    """Where planes are sampled. points: [S, N, 3], [−1, 1] inside the box; size: texels along a plane's side."""

    points: Tensor
    plane_axes: tuple[str, ...]
    size: int

    def grid(self) -> Tensor:
        """The points' projections [S · P, 1, N, 2], as F.grid_sample takes them."""
        return project(self.points, self.plane_axes).flatten(0, 1)[:, None]

    def corners(self) -> tuple[Tensor, Tensor]:
        """The four texels around each projection: indices into a plane's K · K texels, and bilinear weights, 0 outside
        the plane. Both [S, P, N, 4]."""
        place = ((project(self.points, self.plane_axes) + 1) * self.size - 1) / 2
        low = place.floor()
        part, low = place - low, low.long()
        index, weight = [], []
        for down in (0, 1):
            for right in (0, 1):
                x, y = low[..., 0] + right, low[..., 1] + down
                inside = (x >= 0) & (x < self.size) & (y >= 0) & (y < self.size)
                across = part[..., 0] if right else 1 - part[..., 0]
                along = part[..., 1] if down else 1 - part[..., 1]
                index.append(y.clamp(0, self.size - 1) * self.size + x.clamp(0, self.size - 1))
                weight.append(across * along * inside)
        return torch.stack(index, -1), torch.stack(weight, -1)

    def rows(self) -> tuple[Tensor, Tensor]:
        """As `corners`, with indices into a table of all texels [S · P · K · K, F]. Both [S · N, P · 4], with the
        corners of one point together."""
        index, weight = self.corners()
        planes = torch.arange(index.shape[0] * index.shape[1], device=index.device)
        index = index + planes.view(*index.shape[:2], 1, 1) * self.size**2
        return tuple(t.transpose(1, 2).flatten(2).flatten(0, 1) for t in (index, weight))  # type: ignore[return-value]


def _as_now(planes: Tensor, at: Points) -> Tensor:
    """[S, F, N]: features stay first."""
    return sample_planes(planes, at.points, at.plane_axes).sum(1)


def _turned_first(planes: Tensor, at: Points) -> Tensor:
    return sample_planes(planes, at.points, at.plane_axes).transpose(2, 3).sum(1)


def _grid_sample(planes: Tensor, at: Points) -> Tensor:
    return F.grid_sample(planes, at.grid(), mode="bilinear", padding_mode="zeros", align_corners=False)[:, :, 0]


def _channels_last_copy(planes: Tensor, at: Points) -> Tensor:
    texels = planes.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return _grid_sample(texels, at).unflatten(0, planes.shape[:2]).sum(1).transpose(1, 2)


def _channels_last(table: Tensor, at: Points) -> Tensor:
    """Read a table [S, P, K · K, F] as channels-last images."""
    texels = table.flatten(0, 1).unflatten(1, (at.size, at.size)).permute(0, 3, 1, 2)
    return _grid_sample(texels, at).unflatten(0, table.shape[:2]).sum(1).transpose(1, 2)


def _gather_features_first(planes: Tensor, at: Points) -> Tensor:
    index, weight = at.corners()
    flat = planes.flatten(3)
    wide = (-1, -1, flat.shape[2], -1)
    parts = [flat.gather(3, i[:, :, None].expand(wide)) * w[:, :, None] for i, w in _each(index, weight)]
    return torch.stack(parts).sum(0).sum(1).transpose(1, 2)


def _gather_rows(table: Tensor, at: Points) -> Tensor:
    index, weight = at.rows()
    flat = table.flatten(0, 2)
    features = sum(flat.index_select(0, i) * w[:, None] for i, w in _each(index, weight))
    return features.unflatten(0, at.points.shape[:2])  # type: ignore[union-attr]


def _bag(table: Tensor, at: Points) -> Tensor:
    index, weight = at.rows()
    features = F.embedding_bag(index, table.flatten(0, 2), per_sample_weights=weight, mode="sum")
    return features.unflatten(0, at.points.shape[:2])


def _sparse(table: Tensor, at: Points) -> Tensor:
    index, weight = at.rows()
    flat = table.flatten(0, 2)
    starts = torch.arange(0, index.numel() + 1, index.shape[1], device=index.device)
    shape = (len(index), len(flat))
    with warnings.catch_warnings(action="ignore"):  # torch warns that sparse tensors are in beta
        matrix = torch.sparse_csr_tensor(starts, index.flatten(), weight.flatten(), shape, check_invariants=False)
    return (matrix @ flat).unflatten(0, at.points.shape[:2])


def _each(index: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(index.unbind(-1), weight.unbind(-1)))


FIRST, LAST = "[P, F, K, K]", "[P, K*K, F]"
WAYS: dict[str, tuple[str, Callable[[Tensor, Points], Tensor]]] = {
    "sample_planes, as the renderer does": (FIRST, _as_now),
    "grid_sample, planes summed first": (FIRST, lambda planes, at: _as_now(planes, at).transpose(1, 2)),
    "grid_sample, features last, then summed": (FIRST, _turned_first),
    "grid_sample, copied channels-last": (FIRST, _channels_last_copy),
    "grid_sample, kept channels-last": (LAST, _channels_last),
    "gather and lerp": (FIRST, _gather_features_first),
    "index_select and lerp": (LAST, _gather_rows),
    "embedding_bag": (LAST, _bag),
    "sparse matrix": (LAST, _sparse),
}
NOW = next(iter(WAYS))


def compare_layouts(
    num_scenes: int, points_each: int, num_features: int, at: dict[str, Any], repeats: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Time every way on the same random planes and points. at: plane_axes and size of `Points`.

    → name → layout; ms of the forward pass without gradients; ms of both passes; how many times faster both passes are
    than those of the renderer's way. Raises RuntimeError where a way finds other features or gradients.
    """
    torch.manual_seed(0)
    points = 2 * torch.rand(num_scenes, points_each, 3, device=device) - 1
    where = Points(points, **at)
    planes = torch.randn(num_scenes, len(where.plane_axes), num_features, where.size, where.size, device=device)
    layer = torch.nn.Linear(num_features, 64, device=device).requires_grad_(False)
    push = torch.randn(num_scenes, points_each, layer.out_features, device=device)
    found: dict[str, dict[str, Any]] = {}
    wanted: tuple[Tensor, Tensor] | None = None
    # The first way is the reference for the values of the others.
    for name, (layout, way) in WAYS.items():
        held = planes if layout == FIRST else planes.flatten(3).transpose(2, 3)
        leaf = held.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        both = _passes(way, leaf, where, layer, push)
        grad = leaf.grad if layout == FIRST else leaf.grad.transpose(2, 3).unflatten(3, (where.size, where.size))
        wanted = wanted or (both, grad)
        _check(name, (both, grad), wanted)
        with torch.no_grad():
            forward = median_ms(lambda: _hidden(way(leaf, where), layer), device, repeats)  # noqa: B023
        total = median_ms(lambda: _passes(way, leaf, where, layer, push), device, repeats)  # noqa: B023
        found[name] = {"layout": layout, "forward_ms": forward, "both_ms": total}
    for row in found.values():
        row["speed"] = found[NOW]["both_ms"] / row["both_ms"]
    return found


def _hidden(features: Tensor, layer: torch.nn.Linear) -> Tensor:
    """[S, N, F] or [S, F, N] → [S, N, width] or [S, width, N]: the field's first layer."""
    if features.shape[2] == layer.in_features:
        return layer(features)
    return torch.baddbmm(layer.bias[:, None], layer.weight.expand(len(features), -1, -1), features)


def _passes(way: Any, leaf: Tensor, where: Points, layer: torch.nn.Linear, push: Tensor) -> Tensor:
    leaf.grad = None
    out = _hidden(way(leaf, where), layer)
    out = out if out.shape == push.shape else out.transpose(1, 2)
    out.backward(push)
    return out.detach()


def _check(name: str, found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for mine, theirs in zip(found, wanted):
        if (mine - theirs).abs().max() > CLOSE * theirs.abs().max():
            raise RuntimeError(f"{name}: its features or gradients differ from those of F.grid_sample")
