"""A fitted scene as one row of the library: its planes and hull as bytes, its coefs, its metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scaling.library.checks import check_planes
from scaling.library.coding.packed import SCALED, decode_levels, encode_levels, pack_hull, unpack_hull, unpack_int4
from scaling.models.rounding import LEVELS, best_scale, to_levels
from scaling.models.triplanes import SceneParams

COEF_BITS = 12  # significant bits of a stored coef, one more than float16 has


@dataclass(frozen=True)
class PackedScene:
    """One scene's parameters as bytes.

    micro_dtype: "float32" and "float16" hold the numbers themselves; "coded" holds whole numbers (see packed.py), to be
    multiplied by one scale per plane and channel, micro_scale [P · F_mic]. Rows of format 3 and before hold "int8" or
    "int4" (two numbers in a byte) instead. hull: see `pack_hull`; None: the scene has no hull.
    """

    micro_planes: bytes
    micro_dtype: str
    micro_shape: tuple[int, ...]
    micro_scale: list[float]
    coefs: list[float]
    hull: bytes | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of a scene without its id and metrics."""
        return len(self.micro_planes) + 4 * len(self.micro_scale) + 4 * len(self.coefs) + len(self.hull or b"")


class NotFinite(ValueError):
    """A fit diverged: its numbers are not finite, or too large to be stored."""


def pack_scene(params: SceneParams, micro_dtype: str) -> PackedScene:
    """Pack the parameters of one scene: micro_planes [P, F_mic, K, K], coefs [M], hull [CELLS³] or None.

    micro_dtype: a value of setting stage2.micro_dtype. Coefs keep COEF_BITS significant bits; with "float32" all bits.
    Raises NotFinite where the fit diverged, ValueError for another micro_dtype.
    """
    micro, coefs = params.micro_planes.detach().cpu().float(), params.coefs.detach().cpu().float().numpy()
    if not (torch.isfinite(micro).all() and np.isfinite(coefs).all()):
        raise NotFinite("the fit diverged: planes or coefs are not finite")
    scale: list[float] = []
    if micro_dtype in LEVELS:
        scales = best_scale(micro, micro_dtype)
        data, scale = (
            encode_levels(to_levels(micro, scales, micro_dtype).numpy(), int(micro_dtype.removeprefix("int"))),
            scales.flatten().tolist(),
        )
    elif micro_dtype in ("float16", "float32"):
        with np.errstate(over="ignore"):  # an overflow to infinity raises NotFinite below
            array = micro.numpy().astype(micro_dtype)
        data = array.tobytes()
        if not np.isfinite(array).all():
            raise NotFinite("the fit diverged: micro planes exceed the range of what they are stored as")
    else:
        raise ValueError(f"micro planes are stored as float32, float16 or {', '.join(LEVELS)}, not {micro_dtype!r}")
    # Rounding may carry a coef beyond float32's range, so coefs are checked again.
    if micro_dtype != "float32":
        coefs = _rounded(coefs)
    if not np.isfinite(coefs).all():
        raise NotFinite("the fit diverged: coefs exceed the range of what they are stored as")
    stored_as = "coded" if micro_dtype in LEVELS else micro_dtype
    hull = None if params.hull is None else pack_hull(params.hull.cpu().numpy())
    return PackedScene(data, stored_as, tuple(micro.shape), scale, coefs.tolist(), hull)


def _rounded(numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """Numbers rounded to COEF_BITS significant bits, whatever their magnitude. The lower bits are 0 in every number, so
    they take no room when compressed."""
    mantissa, exponent = np.frexp(numbers)
    with np.errstate(over="ignore"):
        return np.ldexp((mantissa * 2**COEF_BITS).round() / 2**COEF_BITS, exponent)


def unpack_scene(row: Mapping[str, Any]) -> SceneParams:
    """Parameters from a library row (or from a PackedScene's fields): micro_planes [P, F_mic, K, K] and coefs [M],
    float32; hull [CELLS³], bool, or None.

    Raises ValueError naming the scene where bytes, shape and type do not fit together, or numbers are not finite.
    """
    check_planes(row)
    shape, dtype = tuple(row["micro_shape"]), row["micro_dtype"]
    if dtype == "coded":
        array = decode_levels(row["micro_planes"], shape)
    elif dtype == "int4":
        array = unpack_int4(row["micro_planes"], math.prod(shape))
    else:
        array = np.frombuffer(row["micro_planes"], dtype=dtype)
    micro = torch.from_numpy(array.reshape(shape).astype(np.float32))
    if dtype in SCALED:
        micro = micro * torch.tensor(row["micro_scale"], dtype=torch.float32).view(*shape[:2], 1, 1)
    hull = None if row.get("hull") is None else torch.from_numpy(unpack_hull(row["hull"]))
    return SceneParams(micro, torch.tensor(row["coefs"], dtype=torch.float32), hull)
