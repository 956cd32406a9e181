"""The cuboid that planes span: around the visual hulls of all train scenes of a store, measured when the store is made.

Each scene is searched where its cameras look (see region.py), at any scale and place of the world. For a store that was
made without the cuboid, it is measured when stage 1 starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from scaling.config import Settings, SettingsError
from scaling.data.scene_views import SceneViews, views_from_row
from scaling.data.stores import SceneSource
from scaling.models.box import Box
from scaling.training import watchdog
from scaling.training.measure.agreement import agreement
from scaling.training.measure.region import looked_at
from scaling.training.measure.visual_hull import silhouettes, visual_hull
from scaling.training.process_group import Workers

CELLS = 64  # cells a side of the searched cube
SEARCHES = 4  # at most, of a scene: each in a smaller cube, while the hull takes less than
SMALL = 0.3  # of the cube's side
AROUND = 2  # cells around a small hull that the next cube takes, too
IMAGE_SIZE = 128  # pixels a side of the views that bounds are measured on
MOST_MEASURED = 20_000  # scenes; there are 100,000 embedded cars
MOST_VIEWS = 64  # training views that are used: with few views a hull has long tails where none of them looks
SPECK = 0.01  # fraction of a hull's largest part: smaller parts are dropped, as too few views look there
# Fraction of the images: silhouettes that cover more leave no background to carve with.
MOST_COVERED = 0.95
NO_OBJECT = "its views show nothing but background"
NO_BACKGROUND = "its views have no background of one colour at their borders"
NO_MIDDLE = "its cameras look at no point together"
NO_HULL = "no part of space is inside the silhouettes of all views"
DISAGREE = "the silhouettes of its views contradict each other under its cameras"
DISAGREES = 0.5  # part of the silhouettes that their hull must fill


class NoBounds(ValueError):
    """A scene's views do not tell where it is; the message says why: one of the texts above."""


def scene_bounds(views: SceneViews, shown: Tensor | None = None) -> Tensor:
    """Low and high corner [2, 3], world units, of a scene's visual hull.

    shown [V, H, W]: the silhouettes of its training views, if they are known already. Raises NoBounds where its views
    do not tell: they show no object, or no background, so that nothing is carved; or cameras or silhouettes contradict
    each other.
    """
    shown = silhouettes(views) if shown is None else shown
    covered = shown.float().mean().item()
    if not covered or covered > MOST_COVERED:
        raise NoBounds(NO_BACKGROUND if covered else NO_OBJECT)
    train = list(views.train_views)
    region = looked_at(views.cam2world[train], views.intrinsics[train])
    if region is None:
        raise NoBounds(NO_MIDDLE)
    for _ in range(SEARCHES):
        hull = visual_hull(region, CELLS, views, shown, margin=1.0, whole=False, most_views=MOST_VIEWS)
        if not hull.any():
            raise NoBounds(NO_HULL)
        low, high = _corners(hull.view(CELLS, CELLS, CELLS))
        bounds = region[0] + torch.stack([low, high]) * (region[1] - region[0]) / CELLS
        if (high - low).max() >= SMALL * CELLS:
            break
        region = _cube(bounds, 1 + 2 * AROUND / (high - low).max().item())
    if agreement(views, shown, views.cam2world) < DISAGREES:
        raise NoBounds(DISAGREE)
    return bounds


def _corners(hull: Tensor) -> tuple[Tensor, Tensor]:
    """The first cells of a hull [CELLS, CELLS, CELLS] along each axis [3], and those behind its last ones; specks
    apart."""
    labels, _ = ndimage.label(hull.numpy())
    sizes = np.bincount(labels.ravel())[1:]
    at = torch.from_numpy(np.isin(labels, 1 + np.flatnonzero(sizes >= SPECK * sizes.max()))).nonzero()
    return at.amin(0), at.amax(0) + 1


def _cube(bounds: Tensor, factor: float) -> Tensor:
    """The cube [2, 3] around the middle of `bounds`, its side `factor` times their longest."""
    half = (bounds[1] - bounds[0]).max() / 2 * factor
    return bounds.mean(0) + half * torch.tensor([[-1.0], [1.0]])


def row_bounds(row: Mapping[str, Any]) -> Tensor:
    """As `scene_bounds`, of a store's row; only the views that are used are decoded.

    Raises NoBounds as it does, SceneError where views are damaged.
    """
    return scene_bounds(few_views(row, MOST_VIEWS))


def few_views(row: Mapping[str, Any], most: int) -> SceneViews:
    """At most `most` training views of a store's row, evenly spread, behind one of them that counts as a test view.

    Raises SceneError where they are damaged.
    """
    tests = set(row["test_views"])
    train = [view for view in range(len(row["views"])) if view not in tests]
    chosen = [train[i] for i in torch.linspace(0, len(train) - 1, min(len(train), most)).round().long().tolist()]
    few = {
        **row,
        "views": [row["views"][view] for view in (chosen[0], *chosen)],  # the first, twice: a row needs a test view
        "cam2world": np.reshape(row["cam2world"], (-1, 16))[[chosen[0], *chosen]].ravel(),
        "intrinsics": np.reshape(row["intrinsics"], (-1, 9))[[chosen[0], *chosen]].ravel(),
        "test_views": [0],
        "latents": None,
    }
    return views_from_row(few, IMAGE_SIZE)


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


def check_bounds(source: SceneSource, settings: Settings) -> None:
    """Raise SettingsError where the box is to be measured and prepare.py found no scene that tells where it is."""
    why = source.no_bounds()
    if settings.representation.box_side is None and source.bounds() is None and why:
        raise SettingsError(f"{source.name}: {nowhere(why)}")


def of_all_workers(bounds: Iterable[Tensor], workers: Workers) -> Tensor | None:
    """The corners [2, 3] around the bounds of all workers' scenes; None where there are none.

    bounds: those of this worker's scenes. Every worker must call this function.
    """
    known = list(bounds)
    found = torch.stack(known) if known else None
    # One minimum over the workers finds both corners: high corners travel with their sign changed.
    nowhere = torch.full((2, 3), torch.inf)
    low_high = nowhere if found is None else torch.stack([found[:, 0].amin(0), -found[:, 1].amax(0)])
    low_high = workers.smallest(low_high.to(workers.device)).cpu()
    return low_high * torch.tensor([[1.0], [-1.0]]) if low_high.isfinite().all() else None


def _readable_bounds(source: SceneSource, ids: Sequence[str]) -> Iterator[Tensor]:
    for scene_id in ids:
        with suppress(OSError, ValueError):  # stage 2 will report what is wrong with the scene
            yield row_bounds(next(iter(source.rows([scene_id]))))
        watchdog.beat()


def _measured(scenes: Sequence[SceneViews], why: dict[str, list[str]]) -> Iterator[Tensor]:
    """Yield the bounds of scenes; of those without, note the ids in `why`, by reason."""
    for views in scenes:
        try:
            yield scene_bounds(views)
        except NoBounds as error:
            why.setdefault(str(error), []).append(views.scene_id)
        watchdog.beat()


def nowhere(why: Mapping[str, Sequence[str]]) -> str:
    """The message where no scene tells where it is. why: reason → ids of scenes."""
    reasons = "; ".join(f"{_some(ids)}: {reason}" for reason, ids in why.items()) or "no scene could be read"
    return (
        f"where the objects are cannot be told from the views: {reasons}. Likely causes: poses that are "
        "world-to-camera, or have other axes (prepare.py --poses, --axes), images of other poses, a background of many "
        "colours. Prepare the store again, or say where the objects are: --representation.box_side SIDE (a cube around "
        "the origin, world units)"
    )


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")


def set_box(box: Box, bounds: Tensor | None, scenes: Sequence[SceneViews], latent_size: int, workers: Workers) -> None:
    """Set the corners of `box`, in place: the bounds [2, 3] and a margin of one latent pixel.

    The margin is there because a pixel also shows what lies beside its centre. bounds None: measured on `scenes`, those
    of this worker, by all workers together. The box stays as it is where it has a fixed side. Raises NoBounds where no
    scene's views tell where it is. Every worker must call this function.
    """
    if box.side is not None:
        return
    if bounds is None:
        why: dict[str, list[str]] = {}
        bounds = of_all_workers(_measured(scenes, why), workers)
        if bounds is None:
            raise NoBounds(nowhere(why))
    # Width of the world that an image shows at the distance of the box's middle.
    middle = bounds.mean(0)
    widths = [(views.cam2world[:, :3, 3] - middle).norm(dim=1) / views.intrinsics[:, 0, 0] for views in scenes]
    every = torch.cat([torch.zeros(0), *widths])
    total, count = workers.sum(torch.tensor([every.sum().item(), len(every)], device=workers.device)).tolist()
    margin = total / count / latent_size
    box.corners.copy_(bounds + torch.tensor([[-margin], [margin]]))
