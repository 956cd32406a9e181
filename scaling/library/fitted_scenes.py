"""A fitted scene as one row of the library: its planes as bytes, its coefs, its metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from scaling.library.checks import check_planes
from scaling.library.quantised import RANGE, pack_int4, quantise, unpack_int4
from scaling.models.triplanes import SceneParams

# 1: parts without the epoch and attempt in their names, no manifest; 2: nothing compressed, float64 metrics, no int4
FORMAT_VERSION = 3
METRICS = (
    "psnr", "ssim", "lpips", "train_psnr", "train_ssim", "autoencoder_psnr", "autoencoder_ssim", "mean_image_psnr",
    "latent_psnr", "ms_ssim", "flip", "train_ms_ssim", "train_flip", "autoencoder_ms_ssim", "autoencoder_flip",
)  # fmt: skip
LATER_METRICS = METRICS[METRICS.index("ms_ssim") :]  # older parts have no such columns
COEF_BITS = 12  # one more than float16 has
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
        *[(name, pa.float32()) for name in METRICS],
        ("seconds", pa.float32()),
        ("settings_hash", pa.string()),
        ("seed", pa.int64()),
        ("format_version", pa.int32()),
    ]
)


@dataclass(frozen=True)
class PackedScene:
    """One scene's parameters as bytes. float32, float16: the numbers themselves; int8, int4 (two in a byte): numbers /
    scale, one scale per plane and channel, scale [P · F_mic]."""

    micro_planes: bytes
    micro_dtype: str
    micro_shape: tuple[int, ...]
    micro_scale: list[float]
    coefs: list[float]


class NotFinite(ValueError):
    """A fit diverged: it left numbers that cannot be stored."""


def pack_scene(params: SceneParams, micro_dtype: str) -> PackedScene:
    """params of one scene: micro_planes [P, F_mic, K, K], coefs [M]. Coefs keep COEF_BITS significant bits, all of them
    beside float32 planes. Raises NotFinite, or ValueError for another type than float32, float16, int8 and int4."""
    micro, coefs = params.micro_planes.detach().cpu().float(), params.coefs.detach().cpu().float().numpy()
    if not (torch.isfinite(micro).all() and np.isfinite(coefs).all()):
        raise NotFinite("the fit diverged: planes or coefs are not finite")
    scale: list[float] = []
    if micro_dtype in RANGE:
        array, scale = quantise(micro, micro_dtype)
    elif micro_dtype in ("float16", "float32"):
        with np.errstate(over="ignore"):  # told below
            array = micro.numpy().astype(micro_dtype)
    else:
        raise ValueError(f"micro planes are stored as float32, float16, int8 or int4, not {micro_dtype!r}")
    if micro_dtype != "float32":
        coefs = _rounded(coefs)
    if not (np.isfinite(array).all() and np.isfinite(coefs).all()):
        raise NotFinite("the fit diverged: micro planes or coefs exceed the range of what they are stored as")
    data = pack_int4(array) if micro_dtype == "int4" else array.tobytes()
    return PackedScene(data, micro_dtype, tuple(array.shape), scale, coefs.tolist())


def _rounded(numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """To COEF_BITS significant bits, whatever the size: what is 0 in every number takes no room when compressed."""
    mantissa, exponent = np.frexp(numbers)
    with np.errstate(over="ignore"):
        return np.ldexp((mantissa * 2**COEF_BITS).round() / 2**COEF_BITS, exponent)


def unpack_scene(row: Mapping[str, Any]) -> SceneParams:
    """The parameters of a row (or of a PackedScene's fields): micro_planes [P, F_mic, K, K], coefs [M], float32.

    Raises ValueError naming the scene where bytes, shape and type do not fit together, or numbers are not finite.
    """
    check_planes(row)
    shape = tuple(row["micro_shape"])
    if row["micro_dtype"] == "int4":
        array = unpack_int4(row["micro_planes"], math.prod(shape))
    else:
        array = np.frombuffer(row["micro_planes"], dtype=row["micro_dtype"])
    micro = torch.from_numpy(array.reshape(shape).astype(np.float32))
    if row["micro_dtype"] in RANGE:
        micro = micro * torch.tensor(row["micro_scale"], dtype=torch.float32).view(*shape[:2], 1, 1)
    return SceneParams(micro, torch.tensor(row["coefs"], dtype=torch.float32))
