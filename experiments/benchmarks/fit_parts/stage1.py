"""For fit.py: the scenes that all methods share, and stage 1s on them, kept in folders named by what shapes them."""

from __future__ import annotations

import hashlib
import json
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
    """What all methods get: the store (None: embedded cars), stage 1's scenes and stage 2's, and the cuboid around all
    scenes of the store, low and high corner, world units (None: around stage 1's). Stage 1s are kept under `out`."""

    store: str | None
    train: list[str]
    fit: list[str]
    bounds: list[list[float]] | None
    out: Path

    def spec(self, settings: Settings) -> SourceSpec:
        """The store; embedded cars are made as large as the settings say."""
        return SourceSpec.of(self.store, settings.data)

    def views(self, ids: Sequence[str], settings: Settings) -> list[SceneViews]:
        """Scenes decoded at the settings' image size."""
        return [views_from_row(row, settings.data.image_size) for row in self.spec(settings).open().rows(ids)]


def measured_bounds(spec: SourceSpec) -> list[list[float]] | None:
    """The cuboid around all scenes of a store, as the product's stage 1 takes it. None for embedded cars, which have no
    end: stage 1 measures around its own."""
    from scaling.training.measure.box import source_bounds
    from scaling.training.process_group import Workers

    bounds = source_bounds(spec.open(), Workers())
    return None if bounds is None else bounds.tolist()


def stage1_folder(settings: Settings, job: Job) -> Path:
    """Where the stage 1 of these settings is kept: named by the settings without stage 2's, the store, the scenes and
    the cuboid."""
    shaping = settings.model_dump(exclude={"stage2"})
    bounds = job.bounds if settings.representation.box_side is None else None
    return kept_folder(job.out, [shaping, asdict(job.spec(settings)), job.train, bounds])


def kept_folder(out: Path, shaping: list[Any]) -> Path:
    """A folder under `out`, absolute, named by what shapes its content."""
    text = json.dumps(shaping, sort_keys=True)
    return (out / hashlib.sha256(text.encode()).hexdigest()[:12]).absolute()


def train_stage1(settings: Settings, job: Job) -> None:
    """Stage 1 by one thread of this process, unless it is there."""
    import torch
    from variants import train

    torch.set_num_threads(1)
    bounds = None if job.bounds is None else torch.tensor(job.bounds)
    train(settings, job.spec(settings), job.train, stage1_folder(settings, job), bounds)


def train_all(settings: dict[str, Settings], job: Job) -> dict[str, Path]:
    """The folder of each method's stage 1, trained two at a time: CPU time is what counts."""
    folders = {method: stage1_folder(each, job) for method, each in settings.items()}
    missing = {folders[m]: each for m, each in settings.items() if not (folders[m] / "seconds.json").is_file()}
    if missing:  # several methods may share a folder
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            list(pool.map(partial(train_stage1, job=job), missing.values()))
    return folders


def stage1_seconds(folder: Path) -> float:
    """CPU seconds that the stage 1 in `folder` took."""
    return float(parse_json((folder / "seconds.json").read_bytes()))
