"""The cuboid that planes span: around the visual hulls of all train scenes of a store, measured while it is made.

Of a store that was made before, it is measured when stage 1 starts.
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
CELLS = 64  # a side of what is searched
IMAGE_SIZE = 128  # of the views that bounds are measured on
MOST_MEASURED = 20_000  # scenes; embedded cars have no end
MOST_VIEWS = 64  # training views that are asked: with few of them a hull has long tails where none looks
SPECK = 0.01  # of the largest part of a hull: smaller ones are where too few views look
LARGEST_HULL = 0.4  # of what is searched; a cube of side 1 fills 0.25, a scene without a white background all it shows


def scene_bounds(views: SceneViews) -> Tensor | None:
    """Low and high corner [2, 3], world units, of a scene's visual hull. None where its views say nothing: they show no
    object, or no white background (then nothing is carved)."""
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
    """As `scene_bounds`, of a store's row; no more of its views are decoded than are asked. SceneError where they are
    damaged."""
    tests = set(row["test_views"])
    train = [view for view in range(len(row["views"])) if view not in tests]
    chosen = [train[i] for i in torch.linspace(0, len(train) - 1, min(len(train), MOST_VIEWS)).round().long().tolist()]
    few = {
        **row,
        "views": [row["views"][view] for view in (chosen[0], *chosen)],  # the first one as a test view: rows have one
        "cam2world": np.reshape(row["cam2world"], (-1, 16))[[chosen[0], *chosen]].ravel(),
        "intrinsics": np.reshape(row["intrinsics"], (-1, 9))[[chosen[0], *chosen]].ravel(),
        "test_views": [0],
        "latents": None,
    }
    return scene_bounds(views_from_row(few, IMAGE_SIZE))


def source_bounds(source: SceneSource, workers: Workers) -> Tensor | None:
    """The cuboid around all scenes of a source: as the store says, else measured, by all workers together. [2, 3], None
    where no scene says where it is, and of sources without an end. Every worker must call it."""
    known = source.bounds()
    if known is not None:
        return torch.tensor(known)
    ids = source.ids()
    if len(ids) > MOST_MEASURED:
        return None
    return of_all_workers(_readable_bounds(source, ids[workers.rank :: workers.size]), workers)


def of_all_workers(bounds: Iterable[Tensor | None], workers: Workers) -> Tensor | None:
    """The corners [2, 3] around those of all workers' scenes; None where no scene says where it is. Every worker must
    call it."""
    known = [corners for corners in bounds if corners is not None]
    found = torch.stack(known) if known else None
    nowhere = torch.full((2, 3), torch.inf)
    low_high = nowhere if found is None else torch.stack([found[:, 0].amin(0), -found[:, 1].amax(0)])
    low_high = workers.smallest(low_high.to(workers.device)).cpu()
    return low_high * torch.tensor([[1.0], [-1.0]]) if low_high.isfinite().all() else None


def _readable_bounds(source: SceneSource, ids: Sequence[str]) -> Iterator[Tensor | None]:
    for scene_id in ids:
        try:
            yield row_bounds(next(iter(source.rows([scene_id]))))
        except (OSError, ValueError):
            yield None  # stage 2 will say what is wrong with it
        watchdog.beat()


def set_box(box: Box, bounds: Tensor | None, scenes: Sequence[SceneViews], latent_size: int, workers: Workers) -> None:
    """Sets the corners of a `box` that is to be measured to the bounds [2, 3] and a latent pixel around them, as a
    pixel shows what lies beside its centre, too; in place. bounds None: around the workers' own scenes. Any other box,
    and all where nothing says where scenes are, stay as they are. Every worker must call it."""
    if box.side is not None:
        return
    if bounds is None:
        bounds = of_all_workers(map(scene_bounds, scenes), workers)
    # How much of the world an image shows from side to side at the origin's distance.
    widths = [views.cam2world[:, :3, 3].norm(dim=1) / views.intrinsics[:, 0, 0] for views in scenes]
    every = torch.cat([torch.zeros(0), *widths])
    total, count = workers.sum(torch.tensor([every.sum().item(), len(every)], device=workers.device)).tolist()
    if bounds is not None:
        margin = total / count / latent_size
        box.corners.copy_(bounds + torch.tensor([[-margin], [margin]]))
