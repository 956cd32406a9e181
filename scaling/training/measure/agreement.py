"""Whether the silhouettes of a scene's views agree with each other under given cameras: the visual hull tells.

A hull lies inside every silhouette; under right cameras it fills them. Under wrong ones views carve away what other
views show, and most of the silhouettes stay empty.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from scaling.data.scene_views import SceneViews
from scaling.training.measure.region import looked_at
from scaling.training.measure.visual_hull import dilated, pooled, visual_hull

CELLS = 48  # a side of the searched cube
VIEWS = 24  # that are compared
SIDE = 48  # pixels a side of the silhouettes that are compared, or up to twice as many


def agreement(views: SceneViews, shown: Tensor, cam2world: Tensor) -> float:
    """The part of the silhouettes `shown` [V, H, W] of the training views that the hull fills, from 0 to 1.

    cam2world [N, 4, 4]: of all views, in place of their own. 0 where cameras look at nothing together.
    """
    train = list(views.train_views)
    region = looked_at(cam2world[train], views.intrinsics[train])
    if region is None or not shown.any():
        return 0.0
    moved = replace(views, cam2world=cam2world)
    hull = visual_hull(region, CELLS, moved, shown, margin=1.0, whole=False, most_views=VIEWS)
    cells = hull.nonzero()[:, 0]
    if not len(cells):
        return 0.0
    side = (region[1] - region[0]) / CELLS
    index = torch.stack([cells // CELLS**2, cells // CELLS % CELLS, cells % CELLS], 1)
    points = region[0] + (index + 0.5) * side
    spread = torch.linspace(0, len(train) - 1, min(len(train), VIEWS)).round().long().tolist()
    small = pooled(shown[spread], max(1, min(shown.shape[1:]) // SIDE))
    filled = torch.zeros_like(small)
    for number, view in enumerate(spread):
        seen = views.intrinsics[train[view]] @ torch.linalg.inv(cam2world[train[view]])[:3]
        projected = points @ seen[:, :3].T + seen[:, 3]
        place = projected[:, :2] / projected[:, 2:].clamp(min=1e-9)
        inside = (projected[:, 2] > 0) & (place >= 0).all(1) & (place < 1).all(1)
        column, row = (place[inside] * torch.tensor(small.shape[:0:-1])).long().unbind(1)
        filled[number, row, column] = True
    # Between the middles of neighbouring cells lies about a pixel.
    return ((dilated(filled, 1) & small).sum() / small.sum()).item()
