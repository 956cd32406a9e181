"""Fitters that note when they work, for scale.py and actors.py. They have a module of their own, because Ray's workers
import them by name."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from scaling.data.scene_views import SceneViews
from scaling.distributed.stage2.actors import SceneFitter
from scaling.distributed.stage2.messages import Fitted
from scaling.library.row_schema import METRICS
from scaling.library.run_folder import settings_hash
from scaling.library.scene_row import pack_scene
from scaling.training.fit_frozen import FittedScene, start_params


class TimedFitter(SceneFitter):
    """Real fits. For each batch a line `start end scenes`, times in seconds, goes to SCALING_TIMES/<pid>.txt."""

    def fit(self, batch: pa.Table, attempt: int) -> Fitted:
        """The fit of the parent class, timed from the batch's arrival to its commit."""
        start = time.time()
        fitted = super().fit(batch, attempt)
        with (Path(os.environ["SCALING_TIMES"]) / f"{os.getpid()}.txt").open("a") as file:
            file.write(f"{start} {time.time()} {len(batch)}\n")
        return fitted


class MinimalFitter(TimedFitter):
    """Decodes, packs and commits as always, but scenes stay where they start, and metrics are not measured."""

    def _ready(self, scenes: list[SceneViews]) -> list[Any]:
        return list(scenes)

    def _fit_together(self, scenes: Sequence[Any]) -> list[FittedScene]:
        params = start_params(self.shared, self.settings, [views.scene_id for views in scenes])
        return [FittedScene(views.scene_id, params[index], 0.0) for index, views in enumerate(scenes)]

    def _finished_rows(
        self, model: Any, cohort: str | None, scenes: Sequence[SceneViews], fitted: Sequence[Any]
    ) -> tuple[list[dict[str, Any]], list[Any]]:
        key = settings_hash(self.settings)
        rows = [
            {
                **vars(pack_scene(result.params, self.settings.stage2.micro_dtype)), **dict.fromkeys(METRICS, 0.0),
                "scene_id": views.scene_id, "category": views.category, "stage": 2, "shared": self.shared_hash,
                "cohort": cohort, "seconds": 0.0, "settings_hash": key, "seed": self.settings.seed,
            }
            for views, result in zip(scenes, fitted, strict=True)
        ]  # fmt: skip
        return rows, []


def read_times(folder: Path) -> list[tuple[float, float, int]]:
    """(start, end, scenes) of every batch that was noted."""
    lines = [line.split() for path in folder.glob("*.txt") for line in path.read_text().splitlines()]
    return [(float(start), float(end), int(scenes)) for start, end, scenes in lines]
