"""What the parts of gpu_run.py have in common: settings, drawn cars, a model that was hardly trained."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from scaling.cli import read_preset
from scaling.config import Settings, make_settings, merge
from scaling.data.embedded.scenes import embedded_car, embedded_ids
from scaling.data.scene_views import SceneViews, views_from_row
from scaling.models.shared_model import SharedModel
from scaling.training.process_group import Workers
from scaling.training.stage1 import Stage1

PRESET = "compact"
# At the end of a phase its rate has fallen, so a run is as good as its length allows only if it gets to the end.
FEW_STEPS = {"stage1": {"warmup": {"num_epochs": 2, "steps_per_epoch": 20}}}


@dataclass(frozen=True)
class Plan:
    """Sizes and times of a run. seconds_*: that the stages of the real run may take; steps: of 2a, None: the preset's;
    processes: that draw cars."""

    device: torch.device
    out: Path
    image_size: int
    num_views: int
    stage1_scenes: int
    stage2_scenes: int
    scenes_per_batch: Sequence[int]
    seconds_stage1: float
    seconds_stage2: float
    steps: int | None
    processes: int

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def settings(self, over: dict[str, Any] | None = None) -> Settings:
        values = merge(read_preset(PRESET), {"data": {"image_size": self.image_size, "embedded_views": self.num_views}})
        if self.steps:
            values = merge(values, {"stage2": {"latent": {"steps_per_epoch": self.steps}}})
        return make_settings(merge(values, over or {}))


def cars(plan: Plan, count: int) -> list[SceneViews]:
    """The first `count` embedded cars, drawn by processes of their own."""
    ids = embedded_ids(count)
    draw = partial(embedded_car, image_size=plan.image_size, num_views=plan.num_views)
    if plan.processes < 2:
        rows = [draw(scene_id) for scene_id in ids]
    else:
        # A process that was forked could not use the GPU of its parent.
        with ProcessPoolExecutor(plan.processes, mp_context=get_context("spawn")) as pool:
            rows = list(pool.map(draw, ids, chunksize=4))
    return [views_from_row(row, plan.image_size) for row in rows]


def train(settings: Settings, scenes: Sequence[SceneViews], device: torch.device) -> tuple[SharedModel, list[float]]:
    """Stage 1. → the frozen shared model, and the seconds of each epoch."""
    seconds: list[float] = []
    last = time.perf_counter()

    def note(_: Any) -> None:
        nonlocal last
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        seconds.append(now - last)
        last = now

    stage1 = Stage1(settings, [scene.scene_id for scene in scenes], scenes, Workers(device=device))
    stage1.run(note)
    return stage1.shared.requires_grad_(False).eval(), seconds
