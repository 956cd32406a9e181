"""A run folder as both stages leave it, made in this process, without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scaling.config import Settings
from scaling.data.scene_views import SceneViews
from scaling.library.parts import commit_part
from scaling.library.run_folder import RunFolder, settings_hash
from scaling.library.scene_row import pack_scene, unpack_scene
from scaling.models.shared_files import load_shared, save_shared
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.training.evaluate import evaluate_scene
from scaling.training.fit_frozen import fit_scenes
from scaling.training.stage1 import Stage1


def train_shared(settings: Settings, scenes: Sequence[SceneViews], folder: Path) -> tuple[SharedModel, str]:
    """Stage 1 on the scenes, saved in `folder`. → the shared model as readers load it, and its hash."""
    ids = [views.scene_id for views in scenes]
    stage1 = Stage1(settings, ids, scenes)
    stage1.run(lambda report: None)
    save_shared(stage1.shared, folder, ids)
    return load_shared(folder)


def make_run(path: Path, settings: Settings, scenes: Sequence[SceneViews], per_part: int = 2) -> RunFolder:
    """Stage 1 on the first two scenes, stage 2 on the rest; parts of `per_part` scenes."""
    run = RunFolder(path)
    shared, shared_hash = train_shared(settings, scenes[:2], run.shared)
    for start in range(2, len(scenes), per_part):
        batch = scenes[start : start + per_part]
        rows = []
        for views, fitted in zip(batch, fit_scenes(shared, batch, settings)):
            packed = vars(pack_scene(fitted.params, settings.stage2.micro_dtype))
            stored: SceneParams = unpack_scene(packed)[None]
            rows.append({
                **packed, **evaluate_scene(shared, stored, views), "scene_id": views.scene_id, "cohort": None,
                "category": views.category, "stage": 2, "shared": shared_hash, "seconds": fitted.seconds,
                "settings_hash": settings_hash(settings), "seed": settings.seed,
            })  # fmt: skip
        commit_part(run.library.folder, rows)
    return run
