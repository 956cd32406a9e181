"""Pictures of a run's fitted scenes, drawn from the library on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from scaling.data.scene_views import SceneViews, views_from_row
from scaling.data.stores import SceneSource
from scaling.library.run_folder import RunFolder
from scaling.library.stored_models import StoredModels
from scaling.library.true_views import stored_views
from scaling.library.viewpoints import note_viewpoints
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.pictures.draw import SMALLEST_VIDEO, enlarge, grid, overview, render_scene_pictures, save_png, scene_sheet
from scaling.storage.links import refuse_links
from scaling.storage.paths import AnyPath
from scaling.training.evaluate import render_views

LogImage = Callable[[str, np.ndarray, int], None]


def log_scene_pictures(
    run: RunFolder, source: SceneSource, ids: Sequence[str], stage: str, log_image: LogImage, models: StoredModels
) -> None:
    """Draw fitted scenes beside their true views from `source`, and log each scene's sheet as a step of one key.

    Writes RUN/pictures/<stage>-scenes.png (one test view of each scene, truth beside render) and <stage>-test-views.png
    (up to four test views of each: truth, render, autoencoder, error).
    """
    if not ids:
        return
    truths, renders, sheets = [], [], []
    for step, (row, stored) in enumerate(zip(source.rows(ids), map(run.library.scene, ids))):
        shared, params = models.scene(stored)
        size = shared.settings.data.image_size
        views = views_from_row(row, size)
        if step == 0:
            note_viewpoints(run, views)  # for exports, which may find the store gone
        sheet = scene_sheet(shared, params, views, num_views=4)
        sheets.append(sheet)
        log_image(f"{stage}/scenes", sheet, step)
        truths.append(views.images[views.test_views[0]])
        renders.append(first_test_view(shared, params, views))
    factor = math.ceil(SMALLEST_VIDEO / size)  # small images are enlarged
    save_png(run.pictures / f"{stage}-scenes.png", enlarge(overview(torch.stack(truths), torch.stack(renders)), factor))
    # Scenes may have different numbers of test views, so narrower sheets are padded with white.
    widest = max(sheet.shape[1] for sheet in sheets)
    padded = [np.pad(s, ((0, 0), (0, widest - s.shape[1]), (0, 0)), constant_values=255) for s in sheets]
    save_png(run.pictures / f"{stage}-test-views.png", enlarge(grid([[sheet] for sheet in padded], gutter=10), factor))


def first_test_view(shared: SharedModel, params: SceneParams, views: SceneViews) -> torch.Tensor:
    """The render [3, H, W] of a scene's first test view; params of S = 1."""
    first = list(views.test_views[:1])
    return render_views(shared, params, views.cam2world[first], views.intrinsics[first])["images"][0].cpu()


def render_stored_scenes(
    run: RunFolder, ids: Sequence[str], num_frames: int = 48, store: str | None = None
) -> list[AnyPath]:
    """Write turntables and contact sheets of fitted scenes into RUN/pictures/<id>/. → the files written.

    The true views come from `store`; None: from the source that the scene's stage used, as config.yaml names it. Raises
    LookupError where a scene is not in the library, FileNotFoundError or ValueError where its source or shared model
    cannot be read.
    """
    rows = [run.library.scene(scene_id) for scene_id in ids]
    refuse_links(run.pictures, *(run.pictures / row["scene_id"] for row in rows))
    written: list[AnyPath] = []
    models = StoredModels(run)
    for row in rows:
        shared, params = models.scene(row)
        views = stored_views(run, row["scene_id"], row["stage"], shared.settings.data, store)
        written += render_scene_pictures(shared, params, views, run.pictures, row["scene_id"], num_frames)
    return written
