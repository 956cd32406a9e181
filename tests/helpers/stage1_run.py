"""A tiny stage 1 with all that it leaves on the way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from scaling.config import make_settings
from scaling.data.scene_views import SceneViews
from scaling.training.phase_loop import EpochReport
from scaling.training.process_group import Workers
from scaling.training.stage1 import Stage1


def make_run(values: dict[str, Any], scenes: list[SceneViews], workers: Workers | None = None) -> Stage1:
    workers = workers or Workers()
    owned = [scene for index, scene in enumerate(scenes) if workers.owns(index % values["stage1"]["num_buckets"])]
    return Stage1(make_settings(values), [scene.scene_id for scene in scenes], owned, workers)


@dataclasses.dataclass
class Finished:
    """A whole run: its reports, and after every epoch a checkpoint folder and a copy of all tensors."""

    run: Stage1
    reports: list[EpochReport]
    folders: list[Path]
    tensors: list[dict[str, torch.Tensor]]

    @property
    def losses(self) -> list[dict[str, float]]:
        return [report.losses for report in self.reports]


def all_tensors(run: Stage1) -> dict[str, torch.Tensor]:
    tables = {"micro_planes": run.table.micro_planes, "coefs": run.table.coefs}
    return {name: tensor.detach().clone() for name, tensor in (run.shared.state_dict() | tables).items()}
