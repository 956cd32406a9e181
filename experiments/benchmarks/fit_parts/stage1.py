"""For fit.py: the scenes that all methods share, and stage 1s on them, in folders named by what shapes them."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from scaling.config import Settings
from scaling.data.scene_views import SceneViews, views_from_row
from scaling.data.stores import SourceSpec
from scaling.storage.json_yaml import parse_json


@dataclass(frozen=True)
class Job:
    """What all methods get.

    store: None for embedded cars; train, fit: ids of the scenes of stage 1 and of stage 2; bounds: low and high corner
    of the cuboid around all scenes of the store, world units, None for the cuboid around those of stage 1; out: the
    folder that keeps stage 1s.
    """

    store: str | None
    train: list[str]
    fit: list[str]
    bounds: list[list[float]] | None
    out: Path

    def spec(self, settings: Settings) -> SourceSpec:
        """The store, or embedded cars with the image size and the number of views of the settings."""
        return SourceSpec.of(self.store, settings.data)

    def views(self, ids: Sequence[str], settings: Settings) -> list[SceneViews]:
        """The scenes' views, decoded at the image size of the settings."""
        return [views_from_row(row, settings.data.image_size) for row in self.spec(settings).open().rows(ids)]


def measured_bounds(spec: SourceSpec) -> list[list[float]] | None:
    """The cuboid around all scenes of a store, as experiments/stage1.py takes it: low and high corner, world units.

    None for embedded cars, which have no end: stage 1 then measures the cuboid around its own scenes.
    """
    from scaling.training.measure.box import source_bounds
    from scaling.training.process_group import Workers

    bounds = source_bounds(spec.open(), Workers())
    return None if bounds is None else bounds.tolist()


def stage1_folder(settings: Settings, job: Job) -> Path:
    """The folder that keeps stage 1 with these settings. It is named by the settings (without those of stage 2), the
    store, the scenes and the cuboid."""
    shaping = settings.model_dump(exclude={"stage2"})
    bounds = job.bounds if settings.representation.box_side is None else None
    return kept_folder(job.out, [shaping, asdict(job.spec(settings)), job.train, bounds])


def kept_folder(out: Path, shaping: list[Any]) -> Path:
    """The absolute path of a folder under `out` that is named by a hash of what shapes its content."""
    text = json.dumps(shaping, sort_keys=True)
    return (out / hashlib.sha256(text.encode()).hexdigest()[:12]).absolute()


def train_stage1(settings: Settings, job: Job) -> None:
    """Run stage 1 by one thread of this process, unless it is done."""
    import torch
    from variants import train

    torch.set_num_threads(1)
    bounds = None if job.bounds is None else torch.tensor(job.bounds)
    train(settings, job.spec(settings), job.train, stage1_folder(settings, job), bounds)


def end_with_parent(parent: int) -> None:
    """End this process when its parent is gone: a killed benchmark leaves no stage 1 behind that trains on."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def train_all(settings: dict[str, Settings], job: Job) -> dict[str, Path]:
    """Train stage 1 of each method where it is missing, two at a time: only CPU time is compared. → method → folder."""
    folders = {method: stage1_folder(each, job) for method, each in settings.items()}
    missing = {folders[m]: each for m, each in settings.items() if not (folders[m] / "seconds.json").is_file()}
    if missing:  # several methods may share a folder
        context = get_context("spawn")
        with ProcessPoolExecutor(2, context, initializer=end_with_parent, initargs=(os.getpid(),)) as pool:
            list(pool.map(partial(train_stage1, job=job), missing.values()))
    return folders


def stage1_seconds(folder: Path) -> float:
    """CPU seconds that stage 1 in `folder` took."""
    return float(parse_json((folder / "seconds.json").read_bytes()))
