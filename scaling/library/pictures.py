"""Pictures of a run's fitted scenes, from the library as it is on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scaling.data.scene_source import EMBEDDED, SceneSource, SourceSpec
from scaling.data.scenes import SceneViews, views_from_row
from scaling.library.fitted_scenes import unpack_scene
from scaling.library.render import SMALLEST_VIDEO, enlarge, grid, overview, render_scene_pictures, save_png, scene_sheet
from scaling.library.run_folder import RunFolder
from scaling.models.shared import SceneParams, SharedModel, load_shared
from scaling.training.evaluate import render_views

LogImage = Callable[[str, np.ndarray, int], None]


def stored_params(run: RunFolder, shared: SharedModel, scene_id: str) -> SceneParams:
    """A fitted scene as readers see it, S = 1, on the shared model's device. Raises LookupError where it is missing."""
    params = unpack_scene(run.library.scene(scene_id))
    return SceneParams(params.micro_planes[None].to(shared.device), params.coefs[None].to(shared.device))


def log_scene_pictures(
    run: RunFolder, shared: SharedModel, source: SceneSource, ids: Sequence[str], stage: str, log_image: LogImage
) -> None:
    """Writes RUN/pictures/<stage>-scenes.png (a test view each, truth beside render) and <stage>-test-views.png (some
    test views of each: truth, render, autoencoder, error), and logs each scene's sheet as a step of one key."""
    if not ids:
        return
    size = shared.settings.data.image_size
    truths, renders, sheets = [], [], []
    for step, row in enumerate(source.rows(ids)):
        views = views_from_row(row, size)
        params = stored_params(run, shared, views.scene_id)
        sheet = scene_sheet(shared, params, views, num_views=4)
        sheets.append(sheet)
        log_image(f"{stage}/scenes", sheet, step)
        truths.append(views.images[views.test_views[0]])
        renders.append(first_test_view(shared, params, views))
    factor = math.ceil(SMALLEST_VIDEO / size)  # so that small images can be looked at
    save_png(run.pictures / f"{stage}-scenes.png", enlarge(overview(torch.stack(truths), torch.stack(renders)), factor))
    widest = max(sheet.shape[1] for sheet in sheets)
    padded = [np.pad(s, ((0, 0), (0, widest - s.shape[1]), (0, 0)), constant_values=255) for s in sheets]
    save_png(run.pictures / f"{stage}-test-views.png", enlarge(grid([[sheet] for sheet in padded], gutter=10), factor))


def first_test_view(shared: SharedModel, params: SceneParams, views: SceneViews) -> torch.Tensor:
    """The render [3, H, W] of a scene's first test view; params of S = 1."""
    first = list(views.test_views[:1])
    return render_views(shared, params, views.cam2world[first], views.intrinsics[first])["images"][0].cpu()


def render_stored_scenes(run: RunFolder, ids: Sequence[str], num_frames: int = 48) -> list[Path]:
    """Turntables and contact sheets of fitted scenes in RUN/pictures/<id>/. → the files written.

    Truth comes from the source that the scene's stage used, as config.yaml names it. Raises LookupError where a scene
    is not in the library, FileNotFoundError or ValueError where its source or shared model cannot be read.
    """
    config = run.read_config()
    rows = [run.library.scene(scene_id) for scene_id in ids]
    written: list[Path] = []
    for row in rows:
        noted = config[f"stage{row['stage']}"]
        shared = _shared_of(row, [run.shared_in_use(), run.shared])
        settings = shared.settings.data
        store = noted["job"]["store"]
        source = SourceSpec.of(None if store == EMBEDDED else store, settings).open()
        views = views_from_row(next(iter(source.rows([row["scene_id"]]))), settings.image_size)
        params = stored_params(run, shared, row["scene_id"])
        written += render_scene_pictures(shared, params, views, run.pictures, row["scene_id"], num_frames)
    return written


def _shared_of(row: dict[str, Any], folders: Sequence[Path]) -> SharedModel:
    """The shared model that a scene was fitted on: the first of the folders that holds the one it names."""
    for folder in folders:
        if (folder / "hash.txt").is_file() and (folder / "hash.txt").read_text().strip() == row["shared"]:
            return load_shared(folder)[0]
    looked = ", ".join(str(folder) for folder in dict.fromkeys(folders))
    raise ValueError(f"scene {row['scene_id']} was fitted on shared model {row['shared'][:12]}…, not found in {looked}")
