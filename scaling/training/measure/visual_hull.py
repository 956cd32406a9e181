"""The visual hull, which shows where a scene is: the part of space that no silhouette of its views carves away.

Where a view shows background, space is empty all along the rays. A hull is found from coarse to fine: a cell whose
whole surroundings are background in one view needs no closer look.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import pad

from scaling.data.background import TOLERANCE, most_frequent
from scaling.data.scene_views import SceneViews

STRIDES = (4, 2, 1)  # cells a side that are tested together, coarse to fine
MOST_VIEWS = 24  # of a scene's training views, evenly spread; more views carve hardly more
FINEST = 128  # silhouettes are pooled to this many pixels a side, or up to twice as many
VIEWS_AT_ONCE = 8  # after about so many views, the cells that they carve are dropped
# A view that alone carves more than this fraction of what all views leave is not believed: its mask or pose is wrong.
# None of a dozen good views carves a third of this fraction alone. Each of a few views carves much alone, so with V
# views the fraction is at least WRONG_OF_FEW / V.
WRONG, WRONG_OF_FEW = 0.15, 2.0
IN_ONE_VIEW = ndimage.generate_binary_structure(3, 1) & np.array([0, 1, 0], bool)[:, None, None]


def silhouettes(views: SceneViews) -> Tensor:
    """Pixels [V, H, W] (bool) of the training views that show an object.

    Background is what is transparent, where the source has alpha; else what has the background's colour (see
    `most_frequent`) and is connected to the image's border through it. So a white roof before white, which other
    colours surround, belongs to the object.
    """
    train = list(views.train_views)
    if views.alpha is not None:
        return views.alpha[train] > 0
    labels, _ = ndimage.label(of_background(views.images[train], background_of(views)).numpy(), structure=IN_ONE_VIEW)
    border = np.concatenate([labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]], axis=None)
    background = np.zeros(labels.max() + 1, bool)
    background[border] = True
    background[0] = False  # the label of pixels that have another colour
    return torch.from_numpy(~background[labels])


def background_of(views: SceneViews) -> Tensor | None:
    """The colour [3] in [0, 1] of a scene's background, as its training views show it. None where they show none."""
    train = views.images[list(views.train_views)].permute(0, 2, 3, 1)
    # The border alone: all pixels as bytes would take longer than the rest, for every scene of stage 2.
    sides = train[:, 0], train[:, -1], train[:, :, 0], train[:, :, -1]
    border = torch.cat([side.reshape(-1, 3) for side in sides])
    colour = most_frequent((border * 255).round().to(torch.uint8).numpy())
    return None if colour is None else torch.tensor(colour) / 255


def of_background(images: Tensor, colour: Tensor | None) -> Tensor:
    """Which pixels of images [V, 3, H, W] in [0, 1] have the background's colour [3]: none without one. → [V, H, W]."""
    if colour is None:
        return torch.zeros_like(images[:, 0], dtype=torch.bool)
    return ((images - colour.to(images.device)[:, None, None]).abs() <= (TOLERANCE + 0.01) / 255).all(1)


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

    shown: their `silhouettes`, on the device to work on; margin: pixels around silhouettes that count as object too. A
    cell stays where at least half of the views see its middle, and none of them shows background all over the cell
    (`whole`) or at its middle (not `whole`); beside a view that shows the whole object all counts as background. All
    cells stay where no view shows an object. At most `most_views` views are used, evenly spread; a view that
    contradicts the others is not used.
    """
    everywhere = torch.ones(cells**3, dtype=torch.bool)
    if not shown.any():
        return everywhere.to(shown.device)
    spread = torch.linspace(0, len(shown) - 1, min(len(shown), most_views)).round().long().tolist()
    train = [views.train_views[view] for view in spread]
    looks = _Looks.of(views.cam2world[train], views.intrinsics[train], shown[spread], margin)
    candidates: Tensor | None = None
    for coarse in STRIDES:
        side = ((corners[1] - corners[0]) / (cells // coarse)).to(shown.device)
        points = _middles(candidates, cells // coarse, shown.device)
        in_world, reach = corners[0].to(shown.device) + (points + 0.5) * side, side.norm() / 2
        # One more pixel at coarse levels: a cell's middle and its parts' middles are rounded to pixels separately.
        looks = replace(looks, margin=margin + (coarse > 1))
        if candidates is None:  # at the coarsest level, where it is cheap
            looks = looks[looks.believed(in_world, reach)]
        if coarse == STRIDES[-1] and not whole:
            reach = torch.zeros_like(reach)
        candidates = points[looks.leave(in_world, reach)]
    assert candidates is not None
    number = (candidates[:, 0] * cells + candidates[:, 1]) * cells + candidates[:, 2]
    return torch.zeros_like(everywhere, device=shown.device).index_fill_(0, number, True)


def _middles(candidates: Tensor | None, count: int, device: torch.device) -> Tensor:
    """Indices of the cells to test, [N, 3]: the eight parts of each cell kept one level before; at first all count³."""
    if candidates is None:
        axis = torch.arange(count, device=device)
        return torch.cartesian_prod(axis, axis, axis)
    eight = torch.cartesian_prod(*[torch.arange(2, device=device)] * 3)
    return (2 * candidates[:, None] + eight).view(-1, 3)


def pooled(mask: Tensor, side: int) -> Tensor:
    """Which squares of side × side pixels touch a mask [V, H, W] (bool); the last ones may be cut. → [V, h, w]."""
    if side == 1:
        return mask
    height, width = mask.shape[1:]
    padded = pad(mask, (0, -width % side, 0, -height % side))
    return padded.unflatten(2, (-1, side)).any(3).unflatten(1, (-1, side)).any(2)


def dilated(mask: Tensor, reach: int) -> Tensor:
    """A mask [V, H, W] (bool) together with all pixels within `reach` of it along each axis.

    Shifting and joining bytes is ten times faster on a CPU than pooling floats.
    """
    for dim in (1, 2):
        left = reach
        while left > 0:  # a mask that has grown by n may be shifted by up to n + 1 without gaps
            step = min(left, reach - left + 1)
            wide = mask.clone()
            size = mask.shape[dim] - step
            if size > 0:
                wide.narrow(dim, step, size).logical_or_(mask.narrow(dim, 0, size))
                wide.narrow(dim, 0, size).logical_or_(mask.narrow(dim, step, size))
            mask, left = wide, left - step
    return mask


@dataclass(frozen=True)
class _Looks:
    """What V views show at points.

    cameras [V, 3, 4]: world → homogeneous fractions of the image; focal [V]: focal lengths in pixels; distance
    [V, h, w]: pixels from here to the nearest pixel that shows an object, along the farther axis (chessboard distance);
    whole [V]: whether a view shows the whole object, as none of it touches the border: then all beside the view is
    empty; size: an image's height and width; margin: pixels around silhouettes that count as object too.
    """

    cameras: Tensor
    focal: Tensor
    distance: Tensor
    whole: Tensor
    size: tuple[int, ...]
    margin: float

    @classmethod
    def of(cls, cam2world: Tensor, intrinsics: Tensor, shown: Tensor, margin: float) -> _Looks:
        """From cameras [V, 4, 4], intrinsics [V, 3, 3] and silhouettes [V, H, W]."""
        device, size = shown.device, tuple(shown.shape[1:])
        focal = (intrinsics[:, [0, 1], [0, 1]] * intrinsics.new_tensor(size[::-1])).amax(1)
        pool = max(1, min(size) // FINEST)
        none = (~pooled(shown, pool)).cpu().numpy()
        squares = np.stack([ndimage.distance_transform_cdt(view, "chessboard") for view in none])
        squares[none.all((1, 2))] = max(size)  # a view without an object
        # From a pixel to the square that is n squares away there are at least (n - 1) · pool + 1 pixels.
        distance = torch.from_numpy(np.where(squares, (squares - 1) * pool + 1, 0).astype(np.float32))
        cameras = intrinsics @ torch.linalg.inv(cam2world)[:, :3]
        cut = shown[:, [0, -1]].any((1, 2)) | shown[:, :, [0, -1]].any((1, 2)) | ~shown.any((1, 2))
        return cls(cameras.to(device), focal.to(device), distance.to(device), ~cut, size, margin)

    def __getitem__(self, chosen: Tensor) -> _Looks:
        cameras, focal, distance = self.cameras[chosen], self.focal[chosen], self.distance[chosen]
        return replace(self, cameras=cameras, focal=focal, distance=distance, whole=self.whole[chosen])

    def leave(self, points: Tensor, reach: Tensor) -> Tensor:
        """Which points [N, 3] stay: at least half of the views see them, and none shows only background within `reach`
        of them. → [N] (bool)."""
        num_views = len(self.cameras)
        alive = torch.arange(len(points), device=points.device)
        seen = torch.zeros(len(points), dtype=torch.int16, device=points.device)
        chunks = max(1, round(num_views / VIEWS_AT_ONCE))
        for start in range(chunks):  # a chunk has views far apart: neighbours carve the same cells
            some = self[torch.arange(start, num_views, chunks, device=points.device)]
            inside, empty = some.look(points[alive], reach)
            seen[alive] += inside.sum(0).to(torch.int16)
            alive = alive[~empty.any(0)]
        keep = torch.zeros(len(points), dtype=torch.bool, device=points.device)
        keep[alive] = seen[alive] >= num_views / 2
        return keep

    def believed(self, points: Tensor, reach: Tensor) -> Tensor:
        """Which views [V] agree with the others; all of them, where a quarter or more do not."""
        inside, empty = self.look(points, reach)
        often_seen = inside.sum(0) >= len(self.cameras) / 2
        carved = empty.sum(0)
        alone = (empty & (carved == 1) & often_seen).sum(1)
        wrong = alone > max(WRONG, WRONG_OF_FEW / len(self.cameras)) * ((carved == 0) & often_seen).sum()
        return ~wrong if wrong.sum() < len(wrong) / 4 else torch.ones_like(wrong)

    def look(self, points: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
        """Whether views see each of the points [N, 3], and whether they show only background within `reach` of it, or
        show the whole object and nothing within `reach` of it. → both [V, N] (bool).
        """
        _, height, width = self.distance.shape
        projected = torch.einsum("vij,nj->vin", self.cameras[..., :3], points) + self.cameras[..., 3:]
        depth = projected[:, 2]
        safe = torch.where(depth > 0, depth, torch.ones_like(depth))
        column, row = projected[:, 0] / safe, projected[:, 1] / safe
        inside = (depth > 0) & (column >= 0) & (column < 1) & (row >= 0) & (row < 1)
        x, y = (column * width).long().clamp(0, width - 1), (row * height).long().clamp(0, height - 1)
        view = torch.arange(len(self.cameras), device=points.device)[:, None]
        # Pixels that the cell takes around its middle; its nearest corner is nearer to the camera than its middle.
        around = self.focal[:, None] * reach / (depth - reach).clamp(min=reach) + self.margin
        empty = inside & (self.distance.flatten()[(view * height + y) * width + x] > around)
        # Pixels from the image to a point in front of the camera that falls beside it.
        beside = torch.maximum((column - column.clamp(0, 1)).abs() * width, (row - row.clamp(0, 1)).abs() * height)
        return inside, empty | (self.whole[:, None] & (depth > reach) & (beside > around))
