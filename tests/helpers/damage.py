"""Ways to damage files."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

# YAML whose aliases stand for 2^10 texts
LAUGHS = "a: &a [x, x]\n" + "".join(f"{n}: &{n} [*{p}, *{p}]\n" for p, n in zip("abcdefghi", "bcdefghij"))


def edit_tensors(file: str, **changes: torch.Tensor | None) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        tensors = {**load_file(folder / file), **{k.replace("__", "."): v for k, v in changes.items()}}
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / file)

    return edit


def edit_json(file: str, edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        edit(values)
        (folder / file).write_text(json.dumps(values))

    return write


def write(file: str, data: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_bytes(data)


def header(size: int, text: bytes) -> bytes:
    return struct.pack("<Q", size) + text
