"""Where the objects of stage 1's scenes are: the box that planes span, and its cells that any of them fills.

What a view shows as white is empty all along its rays; what no view carves away may be filled (the visual hull). Planes
that span nothing else spend no texel on empty space, and rays are sampled where something can be.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, max_pool3d

from scaling.data.scenes import SceneViews
from scaling.models.box import CELLS, WIDEST, Box
from scaling.training.background import WHITE
from scaling.training.workers import Workers

SEARCHED = torch.tensor(WIDEST)
MARGIN = 1.0  # latent pixels around the hulls, as an encoder shows an edge in the pixels beside it, too
LARGEST_HULL = 0.4  # of what is searched; a cube of side 1 fills 0.25, a scene without a white background all it shows


@torch.no_grad()
def measure_box(box: Box, scenes: Sequence[SceneViews], latent_size: int, workers: Workers) -> None:
    """Sets the corners and cells of a `box` that is to be measured, in place; any other stays as it is. latent_size:
    pixels a side of a latent image.

    Twice the same: over all that is searched, for the corners, then inside of them. Scenes whose background
    is not white say nothing; without others the box stays what it is. Every worker must call it.
    """
    if box.side is not None:
        return
    margin = MARGIN * _view_width(scenes, workers) / latent_size
    filled, scenes = _filled(SEARCHED, scenes, workers, LARGEST_HULL)
    if filled.any():
        cell = (SEARCHED[1] - SEARCHED[0]) / CELLS
        at = filled.nonzero()
        low, high = at.amin(0), at.amax(0) + 1
        corners = torch.stack([SEARCHED[0] + low * cell - margin, SEARCHED[0] + high * cell + margin])
        box.corners.copy_(corners)
        filled, _ = _filled(corners, scenes, workers, torch.inf)
        box.filled.copy_(_widened(filled, margin * CELLS / (corners[1] - corners[0])))


def _view_width(scenes: Sequence[SceneViews], workers: Workers) -> float:
    """How much of the world an image shows from side to side at the origin's distance, world units; mean over views."""
    widths = [views.cam2world[:, :3, 3].norm(dim=1) / views.intrinsics[:, 0, 0] for views in scenes]
    every = torch.cat([torch.zeros(0), *widths])
    total, count = workers.sum(torch.tensor([every.sum().item(), len(every)], device=workers.device)).tolist()
    return total / count


def _filled(
    corners: Tensor, scenes: Sequence[SceneViews], workers: Workers, most: float
) -> tuple[Tensor, list[SceneViews]]:
    """Cells [CELLS, CELLS, CELLS] between the corners that some scene's hull fills, and the worker's scenes that count:
    those whose hulls fill less than `most` of them."""
    axes = [low + (high - low) * (torch.arange(CELLS) + 0.5) / CELLS for low, high in corners.T.tolist()]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)
    counts, kept = torch.zeros(len(points)), []
    for views in scenes:
        hull = _hull(points, views)
        if hull.mean() < most:
            counts += hull
            kept.append(views)
    counts = workers.sum(counts.to(workers.device)).cpu()
    return (counts > 0).view(CELLS, CELLS, CELLS), kept


def _hull(points: Tensor, views: SceneViews) -> Tensor:
    """Which points [N, 3] every training view that sees them shows as something, where at least half of them do. [N]"""
    train = list(views.train_views)
    seen = torch.zeros(len(points))
    shown = torch.zeros(len(points))
    shades = (views.images[train].amin(1) < WHITE / 255).float()
    shades = max_pool2d(shades, 3, stride=1, padding=1)  # an edge may fall between two pixels
    height, width = shades.shape[1:]
    for view, shade in zip(train, shades):
        world2cam = torch.linalg.inv(views.cam2world[view])
        in_camera = points @ world2cam[:3, :3].T + world2cam[:3, 3]
        projected = in_camera @ views.intrinsics[view].T
        place = projected[:, :2] / projected[:, 2:]
        inside = (in_camera[:, 2] > 0) & (place >= 0).all(1) & (place < 1).all(1)
        column, row = (place[inside] * torch.tensor([width, height])).long().T
        seen += inside
        shown[inside] += shade[row, column]
    return ((seen >= len(train) / 2) & (shown == seen)).float()


def _widened(filled: Tensor, cells: Tensor) -> Tensor:
    """The filled cells and those up to `cells` [3] from them along each axis."""
    reach = cells.ceil().int().tolist()
    wide = max_pool3d(filled.float()[None], tuple(2 * r + 1 for r in reach), stride=1, padding=tuple(reach))
    return wide[0] > 0
