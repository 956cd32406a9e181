"""Rows of a library, of random planes."""

from __future__ import annotations

import torch

from scaling.library.row_schema import METRICS
from scaling.library.scene_row import pack_scene
from scaling.models.triplanes import SceneParams


def params(seed: int = 0) -> SceneParams:
    generator = torch.Generator().manual_seed(seed)
    return SceneParams(torch.randn(3, 2, 4, 4, generator=generator), torch.randn(5, generator=generator))


def row(scene_id: str, stage: int = 2, psnr: float = 20.0) -> dict:
    """Of scene_id, with metrics of 1."""
    metrics = dict.fromkeys(METRICS, 1.0) | {"psnr": psnr, "lpips": None}
    described = {"category": "car", "stage": stage, "shared": "abc", "cohort": None, "seconds": 2.0}
    rest = {"scene_id": scene_id, "settings_hash": "h", "seed": 0}
    return {**vars(pack_scene(params(), "float16")), **metrics, **described, **rest}
