"""Safetensors files of unknown origin: names, types and shapes are compared before memory is taken for any tensor.

Errors are ValueError and give the reason only: who asked knows the file and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def tensor_kinds(path: Path) -> dict[str, str]:
    """What a file's header names: {"field.head.bias": "float32 [9]"}. ValueError where it is no sound safetensors file:
    cut short, a header of absurd length, offsets that overlap or leave holes."""
    if not path.is_file():
        raise ValueError("no such file (weights are read from safetensors alone)")
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return {name: f"{_dtype(part.get_dtype())} {list(part.get_shape())}" for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"not readable as safetensors ({error})") from error


def read_tensors(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file that must hold exactly the names, types and shapes of `expected`, all numbers finite.

    ValueError names the first tensor that is missing, unexpected, of another type or shape, or not finite.
    """
    found = tensor_kinds(path)
    for kind, names in (("is missing", expected.keys() - found), ("is unexpected", found.keys() - expected)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(f"tensor {min(names):.200}{more} {kind}")
    for name, tensor in expected.items():
        wanted = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        if found[name] != wanted:
            raise ValueError(f"{name} is {found[name]}, expected {wanted}")
    tensors = load_tensors(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds numbers that are not finite")
    return tensors


def load_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of a file, whatever they are. ValueError as `tensor_kinds` raises it."""
    names = tensor_kinds(path)
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"not readable as safetensors ({error})") from error


def _dtype(code: str) -> str:
    return _DTYPES.get(code, code)
