"""Read safetensors files of unknown origin: names, types and shapes are compared before any tensor takes memory.

Errors are ValueError and give only the reason: the caller knows the file and what to do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from scaling.storage.json_yaml import parse_json
from scaling.storage.paths import AnyPath

MAX_HEADER_BYTES = 8 << 20  # some 80,000 tensors
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def tensor_kinds(path: AnyPath) -> dict[str, str]:
    """Read only the header of a file → type and shape of each tensor: {"field.head.bias": "float32 [9]"}.

    Raises ValueError where there is no such file, or where its header is not valid.
    """
    return {name: _kind(name, described) for name, described in _header(path)[1].items()}


def _header(path: AnyPath) -> tuple[int, dict[str, Any]]:
    """Read the header of a file → its length in bytes, and what it says of each tensor. Raises ValueError as
    `tensor_kinds` does."""
    if not path.is_file():
        raise ValueError("no such file (weights are read from safetensors alone)")
    try:
        with path.open("rb") if isinstance(path, Path) else path.open_input() as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
            header = parse_json(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("the header is not a JSON object")
        tensors = {name: described for name, described in header.items() if name != "__metadata__"}
        for name, described in tensors.items():
            _kind(name, described)
        return length, tensors
    except (OSError, ValueError) as error:
        raise ValueError(f"not readable as safetensors ({error})") from error


def read_tensors(path: AnyPath, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the tensors of a file that must hold exactly the names, types and shapes of `expected`, all finite.

    Raises ValueError naming the first tensor that is missing, unexpected, of another type or shape, or not finite; or
    saying what is wrong with the file: cut short, too large, or with offsets that overlap or leave holes.
    """
    found = tensor_kinds(path)
    for kind, names in (("is missing", expected.keys() - found), ("is unexpected", found.keys() - expected)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(f"tensor {min(names):.200}{more} {kind}")
    for name, tensor in expected.items():
        wanted = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        if found[name] != wanted:
            raise ValueError(f"{name} is {found[name]:.200}, expected {wanted}")
    # Reading takes memory for the whole file: more bytes than the tensors and a header need are refused first.
    needed = sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
    if path.stat().st_size > needed + 8 + MAX_HEADER_BYTES:
        raise ValueError(f"has {path.stat().st_size} bytes, its tensors have {needed}")
    tensors = load_tensors(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds numbers that are not finite")
    return tensors


def load_tensors(path: AnyPath) -> dict[str, Tensor]:
    """Read all tensors of a file, whatever their names, types and shapes.

    Raises ValueError where there is no such file, or where it is damaged.
    """
    length, header = _header(path)
    try:
        _check_length(path, 8 + length + max((each["data_offsets"][1] for each in header.values()), default=0))
        return load(path.read_bytes())
    except (ValueError, TypeError, SafetensorError, RuntimeError, LookupError, MemoryError) as error:
        raise ValueError(f"not readable as safetensors ({error})") from error


def _check_length(path: AnyPath, expected: int) -> None:
    """Raise ValueError where a file has not as many bytes as its header says, before all of it is read."""
    if path.stat().st_size != expected:
        raise ValueError(f"has {path.stat().st_size} bytes, its header says {expected}")


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, over the sorted (name, dtype, shape, bytes) of the tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _kind(name: str, described: Any) -> str:
    """Describe a tensor of a header: "float32 [2, 3]"."""
    dtype, shape = (described.get("dtype"), described.get("shape")) if isinstance(described, dict) else (None, None)
    if not isinstance(dtype, str) or not isinstance(shape, list) or not all(isinstance(side, int) for side in shape):
        raise ValueError(f"tensor {name:.200} without a type and a shape")
    return f"{_DTYPES.get(dtype, dtype)} {shape}"
