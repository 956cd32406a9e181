"""Where a scene is, its own views say: its visual hull, the part of space that no silhouette carves away.

What a view shows as background is empty all along its rays. A hull is found from coarse to fine: a cell whose whole
surroundings are background in enough views needs no closer look.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import pad

from scaling.data.scenes import SceneViews

WHITE = 254  # of 255: what files that were compressed or resized still show
LEVELS = (4, 2, 1)  # cells a side that are looked at together, coarse to fine
MOST_VIEWS = 24  # evenly spread ones of a scene's training views; more carve hardly more
VIEWS_AT_ONCE = 8  # after so many views the cells that they carve are dropped
WRONG = 0.3  # a view that alone carves more than this part of what all leave is not believed: its mask or pose is wrong
IN_ONE_VIEW = ndimage.generate_binary_structure(3, 1) & np.array([0, 1, 0], bool)[:, None, None]


def silhouettes(views: SceneViews) -> Tensor:
    """Pixels [V, H, W] (bool) of the training views that show an object.

    Not so is what is transparent where the source says so (alpha), else what is white and connected to the image's
    border through white: a white roof is surrounded by what is not, so it belongs to the object.
    """
    train = list(views.train_views)
    if views.alpha is not None:
        return views.alpha[train] > 0
    white = (views.images[train].amin(1) >= WHITE / 255).numpy()
    labels, _ = ndimage.label(white, structure=IN_ONE_VIEW)
    border = np.concatenate([labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]], axis=None)
    background = np.zeros(labels.max() + 1, bool)
    background[border] = True
    background[0] = False  # what is not white
    return torch.from_numpy(~background[labels])


@torch.no_grad()
def visual_hull(
    corners: Tensor,
    cells: int,
    views: SceneViews,
    shown: Tensor,
    margin: float,
    whole: bool = True,
    most_views: int = MOST_VIEWS,
) -> Tensor:
    """Cells [cells³] (bool, the last axis fastest) between the corners [2, 3] that the training views do not carve.

    shown: their `silhouettes`, on the device to work on; margin: pixels around them that count, too. A cell stays where
    at least half of the views see its middle and none of them shows background all over it (`whole`), or in its middle.
    All stay where the views show no object at all. At most `most_views` of them are asked, and a view that contradicts
    the others is not.
    """
    everywhere = torch.ones(cells**3, dtype=torch.bool)
    if not shown.any():
        return everywhere.to(shown.device)
    spread = torch.linspace(0, len(shown) - 1, min(len(shown), most_views)).round().long().tolist()
    shown, train = shown[spread], [views.train_views[view] for view in spread]
    cameras = _projections(views.cam2world[train], views.intrinsics[train]).to(shown.device)
    distance = views.cam2world[train][:, :3, 3].norm(dim=1)
    focal = views.intrinsics[train][:, [0, 1], [0, 1]].amax(1) * max(shown.shape[1:])
    candidates: Tensor | None = None
    for coarse in LEVELS:
        side = (corners[1] - corners[0]) / (cells // coarse)
        reach = side.norm() / 2
        # Pixels that half a cell's diagonal takes, a quarter nearer to the camera than the origin.
        radius = (reach * focal / (0.75 * distance)).median().item() + margin
        if coarse == LEVELS[-1] and not whole:
            radius = margin
        points = _middles(candidates, cells // coarse, shown.device)
        masks = _Masks(cameras, *_widened(shown, radius), shown.shape[1:])
        in_world = corners[0].to(shown.device) + (points + 0.5) * side.to(shown.device)
        if candidates is None:
            believed = masks.believed(in_world)
            cameras, shown = cameras[believed], shown[believed]
            masks = _Masks(cameras, *_widened(shown, radius), shown.shape[1:])
        candidates = points[masks.leave(in_world)]
    assert candidates is not None
    number = (candidates[:, 0] * cells + candidates[:, 1]) * cells + candidates[:, 2]
    return torch.zeros_like(everywhere, device=shown.device).index_fill_(0, number, True)


def _projections(cam2world: Tensor, intrinsics: Tensor) -> Tensor:
    """World → fractions of the image, homogeneous: [V, 3, 4]."""
    return intrinsics @ torch.linalg.inv(cam2world)[:, :3]


def _middles(candidates: Tensor | None, count: int, device: torch.device) -> Tensor:
    """The eight parts of each cell [N, 3] that was kept one level before; at the first level all count³."""
    if candidates is None:
        axis = torch.arange(count, device=device)
        return torch.cartesian_prod(axis, axis, axis)
    eight = torch.cartesian_prod(*[torch.arange(2, device=device)] * 3)
    return (2 * candidates[:, None] + eight).view(-1, 3)


def _widened(shown: Tensor, radius: float) -> tuple[Tensor, int]:
    """Silhouettes [V, h, w] with all within `radius` pixels of them, and how many pixels a side one number holds."""
    pool = max(1, int(radius / 2))
    return dilated(pooled(shown, pool), int(np.ceil(radius / pool))), pool


def pooled(mask: Tensor, side: int) -> Tensor:
    """Which squares of side × side pixels hold any of a mask [V, H, W] (bool); the last ones may be cut. [V, h, w]"""
    if side == 1:
        return mask
    height, width = mask.shape[1:]
    padded = pad(mask, (0, -width % side, 0, -height % side))
    return padded.unflatten(2, (-1, side)).any(3).unflatten(1, (-1, side)).any(2)


def dilated(mask: Tensor, reach: int) -> Tensor:
    """A mask [V, H, W] (bool) with all pixels within `reach` of it along each axis. Bytes are shifted and joined, which
    is ten times faster on a CPU than to pool floats."""
    for dim in (1, 2):
        left = reach
        while left > 0:  # what is within n and what is within n beyond that
            step = min(left, reach - left + 1)
            wide = mask.clone()
            size = mask.shape[dim] - step
            if size > 0:
                wide.narrow(dim, step, size).logical_or_(mask.narrow(dim, 0, size))
                wide.narrow(dim, 0, size).logical_or_(mask.narrow(dim, step, size))
            mask, left = wide, left - step
    return mask


@dataclass(frozen=True)
class _Masks:
    """Cameras [V, 3, 4], what they show, widened [V, h, w], one number for `pool` pixels a side, and an image's
    size."""

    cameras: Tensor
    wide: Tensor
    pool: int
    size: tuple[int, ...]

    def leave(self, points: Tensor) -> Tensor:
        """Which points [N, 3] no view carves, and at least half of them see. [N]"""
        num_views = len(self.cameras)
        alive = torch.arange(len(points), device=points.device)
        seen = torch.zeros(len(points), dtype=torch.int16, device=points.device)
        chunks = max(1, round(num_views / VIEWS_AT_ONCE))
        for start in range(chunks):  # views far apart come together: neighbours carve the same cells
            inside, empty = self.look(points[alive], torch.arange(start, num_views, chunks, device=points.device))
            seen[alive] += inside.sum(0).to(torch.int16)
            alive = alive[~empty.any(0)]
        keep = torch.zeros(len(points), dtype=torch.bool, device=points.device)
        keep[alive] = seen[alive] >= num_views / 2
        return keep

    def believed(self, points: Tensor) -> Tensor:
        """Which views [V] agree with the others; all of them, where most do not."""
        inside, empty = self.look(points, torch.arange(len(self.cameras), device=points.device))
        often_seen = inside.sum(0) >= len(self.cameras) / 2
        carved = empty.sum(0)
        alone = (empty & (carved == 1) & often_seen).sum(1)
        wrong = alone > WRONG * ((carved == 0) & often_seen).sum()
        return ~wrong if wrong.sum() < len(wrong) / 4 else torch.ones_like(wrong)

    def look(self, points: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the chosen views [W] see each of the points [N, 3], and show background there: both [W, N]."""
        _, height, width = self.wide.shape
        cameras = self.cameras[chosen]
        projected = torch.einsum("vij,nj->vin", cameras[..., :3], points) + cameras[..., 3:]
        depth = projected[:, 2]
        safe = torch.where(depth > 0, depth, torch.ones_like(depth))
        column, row = projected[:, 0] / safe, projected[:, 1] / safe
        inside = (depth > 0) & (column >= 0) & (column < 1) & (row >= 0) & (row < 1)
        x = (column * (self.size[1] / self.pool)).long().clamp(0, width - 1)
        y = (row * (self.size[0] / self.pool)).long().clamp(0, height - 1)
        found = self.wide.flatten()[(chosen[:, None] * height + y) * width + x]
        return inside, inside & ~found
