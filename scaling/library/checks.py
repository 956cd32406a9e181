"""Checks of a library's rows before anything is made of them: nothing that a part says is trusted.

Errors are ValueError and name the scene; the reader of the part adds the file's name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaling.data.scene_id import check_scene_id
from scaling.library.coding.packed import SCALED, decode_levels, unpack_hull

ITEM_BITS = {"float32": 32, "float16": 16, "int8": 8, "int4": 4, "coded": 0}  # of a number; coded: they vary
_HASH = re.compile(r"[0-9A-Za-z]{1,64}")


def check_ids(rows: Sequence[Mapping[str, Any]]) -> None:
    """Check the columns that name other files or become names of files. rows: with any of scene_id, stage, shared and
    cohort. Raises ValueError."""
    for row in rows:
        name = check_scene_id(row["scene_id"]) if "scene_id" in row else "?"
        if row.get("stage", 2) not in (1, 2):
            raise ValueError(f"scene {name}: stage {row['stage']} is neither 1 nor 2")
        for key in ("shared", "cohort"):
            if row.get(key) is not None and not _HASH.fullmatch(row[key]):
                raise ValueError(f"scene {name}: {key} {row[key]!r:.80} is no hash")


def check_planes(row: Mapping[str, Any]) -> None:
    """Check that the sizes of a row's micro planes, scales and hull fit together and that its numbers, coefs included,
    are finite. Raises ValueError saying what is wrong."""
    name, dtype, shape = row.get("scene_id", "?"), row["micro_dtype"], tuple(row["micro_shape"])
    if dtype not in ITEM_BITS:
        raise ValueError(f"scene {name}: unknown type of micro planes {dtype!r:.80}")
    if len(shape) != 4 or min(shape) < 0:
        raise ValueError(f"scene {name}: micro planes of shape {shape!s:.80}, expected [P, F_mic, K, K]")
    # Coded bytes have no fixed size: only decoding shows whether they fit.
    try:
        if dtype == "coded":
            decode_levels(row["micro_planes"], shape)
        if row.get("hull") is not None:
            unpack_hull(row["hull"])
    except ValueError as error:
        raise ValueError(f"scene {name}: micro planes of shape {shape} or hull: {error}") from None
    # math.prod on Python integers is exact: no shape can make it overflow.
    found, needed = len(row["micro_planes"]), (math.prod(shape) * ITEM_BITS[dtype] + 7) // 8
    if dtype != "coded" and found != needed:
        raise ValueError(f"scene {name}: {found} bytes of micro planes, shape {shape} needs {needed}")
    scale = np.asarray(row["micro_scale"], dtype=np.float64)
    if dtype in SCALED and len(scale) != shape[0] * shape[1]:
        raise ValueError(f"scene {name}: {len(scale)} scales for {shape[0]} planes of {shape[1]} channels")
    numbers = {"micro_scale": scale, "coefs": np.asarray(row["coefs"], dtype=np.float64)}
    if dtype not in SCALED:
        numbers["micro_planes"] = np.frombuffer(row["micro_planes"], dtype=dtype)
    for key, values in numbers.items():
        if not np.isfinite(values).all():
            raise ValueError(f"scene {name}: {key} holds numbers that are not finite")
