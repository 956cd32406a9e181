"""A fitted scene as one row of the library: its planes as bytes, its coefs, its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from scaling.library.checks import check_planes
from scaling.models.triplanes import SceneParams

FORMAT_VERSION = 2  # 1: parts without the epoch and attempt in their names, no manifest
METRICS = (
    "psnr", "ssim", "lpips", "train_psnr", "train_ssim", "autoencoder_psnr", "autoencoder_ssim", "mean_image_psnr",
    "latent_psnr",
)  # fmt: skip
PLANES = ("micro_planes", "micro_dtype", "micro_shape", "micro_scale", "coefs")
SCHEMA = pa.schema(
    [
        ("scene_id", pa.string()),
        ("category", pa.string()),
        ("stage", pa.int8()),
        ("shared", pa.string()),
        ("cohort", pa.string()),
        ("micro_planes", pa.large_binary()),
        ("micro_dtype", pa.string()),
        ("micro_shape", pa.list_(pa.int32())),
        ("micro_scale", pa.list_(pa.float32())),
        ("coefs", pa.list_(pa.float32())),
        *[(name, pa.float64()) for name in METRICS],
        ("seconds", pa.float64()),
        ("settings_hash", pa.string()),
        ("seed", pa.int64()),
        ("format_version", pa.int32()),
    ]
)


@dataclass(frozen=True)
class PackedScene:
    """One scene's parameters as bytes. float32, float16: the numbers themselves; int8: numbers / scale, one scale per
    plane and channel, scale [P · F_mic]."""

    micro_planes: bytes
    micro_dtype: str
    micro_shape: tuple[int, ...]
    micro_scale: list[float]
    coefs: list[float]


class NotFinite(ValueError):
    """A fit diverged: it left numbers that cannot be stored."""


def pack_scene(params: SceneParams, micro_dtype: str) -> PackedScene:
    """params of one scene: micro_planes [P, F_mic, K, K], coefs [M]. Raises NotFinite, or ValueError for another
    type than float32, float16 and int8."""
    micro, coefs = params.micro_planes.detach().cpu().float(), params.coefs.detach().cpu().float()
    if not (torch.isfinite(micro).all() and torch.isfinite(coefs).all()):
        raise NotFinite("the fit diverged: planes or coefs are not finite")
    scale: list[float] = []
    if micro_dtype == "int8":
        peak = micro.flatten(2).abs().amax(2) if micro.numel() else micro.new_zeros(micro.shape[:2])
        step = (peak / 127).clamp(min=1e-12)
        micro = (micro / step[..., None, None]).round()
        scale = step.flatten().tolist()
    elif micro_dtype not in ("float16", "float32"):
        raise ValueError(f"micro planes are stored as float32, float16 or int8, not {micro_dtype!r}")
    with np.errstate(over="ignore"):  # told below
        array = micro.numpy().astype(micro_dtype)
    if not np.isfinite(array).all():
        raise NotFinite("the fit diverged: micro planes exceed the range of float16")
    return PackedScene(array.tobytes(), micro_dtype, tuple(array.shape), scale, coefs.tolist())


def unpack_scene(row: Mapping[str, Any]) -> SceneParams:
    """The parameters of a row (or of a PackedScene's fields): micro_planes [P, F_mic, K, K], coefs [M], float32.

    Raises ValueError naming the scene where bytes, shape and type do not fit together, or numbers are not finite.
    """
    check_planes(row)
    shape = tuple(row["micro_shape"])
    array = np.frombuffer(row["micro_planes"], dtype=row["micro_dtype"])
    micro = torch.from_numpy(array.reshape(shape).astype(np.float32))
    if row["micro_dtype"] == "int8":
        micro = micro * torch.tensor(row["micro_scale"], dtype=torch.float32).view(*shape[:2], 1, 1)
    return SceneParams(micro, torch.tensor(row["coefs"], dtype=torch.float32))
