"""The cuboid that planes span: around the visual hulls of all train scenes of a store, measured when the store is made.

For a store that was made without it, the cuboid is measured when stage 1 starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from scaling.data.scene_views import SceneViews, views_from_row
from scaling.data.stores import SceneSource
from scaling.models.box import WIDEST, Box
from scaling.training import watchdog
from scaling.training.measure.visual_hull import silhouettes, visual_hull
from scaling.training.process_group import Workers

SEARCHED = torch.tensor(WIDEST)
CELLS = 64  # cells a side of the searched cube
IMAGE_SIZE = 128  # pixels a side of the views that bounds are measured on
MOST_MEASURED = 20_000  # scenes; there are 100,000 embedded cars
MOST_VIEWS = 64  # training views that are used: with few views a hull has long tails where none of them looks
SPECK = 0.01  # fraction of a hull's largest part: smaller parts are dropped, as too few views look there
# Fraction of the searched cube; a cube of side 1 fills 0.25, a scene without a white background all that its views see.
LARGEST_HULL = 0.4


def scene_bounds(views: SceneViews) -> Tensor | None:
    """Low and high corner [2, 3], world units, of a scene's visual hull.

    None where its views do not tell: they show no object, or no white background, so that nothing is carved.
    """
    shown = silhouettes(views)
    hull = visual_hull(SEARCHED, CELLS, views, shown, margin=1.0, whole=False, most_views=MOST_VIEWS).view(
        CELLS, CELLS, CELLS
    )
    if not shown.any() or not hull.any() or hull.float().mean() > LARGEST_HULL:
        return None
    labels, _ = ndimage.label(hull.numpy())
    sizes = np.bincount(labels.ravel())[1:]
    at = torch.from_numpy(np.isin(labels, 1 + np.flatnonzero(sizes >= SPECK * sizes.max()))).nonzero()
    side = (SEARCHED[1] - SEARCHED[0]) / CELLS
    return torch.stack([SEARCHED[0] + at.amin(0) * side, SEARCHED[0] + (at.amax(0) + 1) * side])


def row_bounds(row: Mapping[str, Any]) -> Tensor | None:
    """As `scene_bounds`, of a store's row; only the views that are used are decoded.

    Raises SceneError where they are damaged.
    """
    tests = set(row["test_views"])
    train = [view for view in range(len(row["views"])) if view not in tests]
    chosen = [train[i] for i in torch.linspace(0, len(train) - 1, min(len(train), MOST_VIEWS)).round().long().tolist()]
    few = {
        **row,
        "views": [row["views"][view] for view in (chosen[0], *chosen)],  # the first, twice: a row needs a test view
        "cam2world": np.reshape(row["cam2world"], (-1, 16))[[chosen[0], *chosen]].ravel(),
        "intrinsics": np.reshape(row["intrinsics"], (-1, 9))[[chosen[0], *chosen]].ravel(),
        "test_views": [0],
        "latents": None,
    }
    return scene_bounds(views_from_row(few, IMAGE_SIZE))


def source_bounds(source: SceneSource, workers: Workers) -> Tensor | None:
    """The cuboid [2, 3] around all scenes of a source: as the store says, else measured by all workers together.

    None where no scene's views tell where it is, or there are more than MOST_MEASURED scenes. Every worker must call
    this function.
    """
    known = source.bounds()
    if known is not None:
        return torch.tensor(known)
    ids = source.ids()
    if len(ids) > MOST_MEASURED:
        return None
    return of_all_workers(_readable_bounds(source, ids[workers.rank :: workers.size]), workers)


def of_all_workers(bounds: Iterable[Tensor | None], workers: Workers) -> Tensor | None:
    """The corners [2, 3] around the bounds of all workers' scenes; None where all bounds are None.

    bounds: those of this worker's scenes. Every worker must call this function.
    """
    known = [corners for corners in bounds if corners is not None]
    found = torch.stack(known) if known else None
    # One minimum over the workers finds both corners: high corners travel with their sign changed.
    nowhere = torch.full((2, 3), torch.inf)
    low_high = nowhere if found is None else torch.stack([found[:, 0].amin(0), -found[:, 1].amax(0)])
    low_high = workers.smallest(low_high.to(workers.device)).cpu()
    return low_high * torch.tensor([[1.0], [-1.0]]) if low_high.isfinite().all() else None


def _readable_bounds(source: SceneSource, ids: Sequence[str]) -> Iterator[Tensor | None]:
    for scene_id in ids:
        try:
            yield row_bounds(next(iter(source.rows([scene_id]))))
        except (OSError, ValueError):
            yield None  # stage 2 will report what is wrong with the scene
        watchdog.beat()


def set_box(box: Box, bounds: Tensor | None, scenes: Sequence[SceneViews], latent_size: int, workers: Workers) -> None:
    """Set the corners of `box`, in place: the bounds [2, 3] and a margin of one latent pixel.

    The margin is there because a pixel also shows what lies beside its centre. bounds None: measured on `scenes`, those
    of this worker, by all workers together. The box stays as it is where it has a fixed side, or where no scene's views
    tell where it is. Every worker must call this function.
    """
    if box.side is not None:
        return
    if bounds is None:
        bounds = of_all_workers(map(scene_bounds, scenes), workers)
    # Width of the world that an image shows at the distance of the origin.
    widths = [views.cam2world[:, :3, 3].norm(dim=1) / views.intrinsics[:, 0, 0] for views in scenes]
    every = torch.cat([torch.zeros(0), *widths])
    total, count = workers.sum(torch.tensor([every.sum().item(), len(every)], device=workers.device)).tolist()
    if bounds is not None:
        margin = total / count / latent_size
        box.corners.copy_(bounds + torch.tensor([[-margin], [margin]]))
