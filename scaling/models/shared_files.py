"""Reads the files of a shared model. Nothing that they say is taken on trust: SharedModelError names the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from scaling.storage import AnyPath

RESTORE = "restore the file, or train the shared model again"


class SharedModelError(ValueError):
    """A shared model that cannot be used; the message names the file and what to do."""


def read_text(path: AnyPath) -> str:
    """A text file. Raises SharedModelError naming it where it is missing or no text."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SharedModelError(f"{path}: {error.strerror}; {RESTORE}") from error
    except UnicodeDecodeError:
        raise SharedModelError(f"{path}: not a text file; {RESTORE}") from None


def read_json(path: AnyPath) -> dict[str, Any]:
    """The object in a JSON file. Raises SharedModelError naming the file where there is none."""
    try:
        values = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise SharedModelError(f"{path}: not valid JSON ({error}); {RESTORE}") from None
    if not isinstance(values, dict):
        raise SharedModelError(f"{path}: expected an object, found a {type(values).__name__}; {RESTORE}")
    return values


def empty_vae(folder: AnyPath) -> AutoencoderKL:
    """An autoencoder as folder/config.json describes it, its weights not read yet."""
    path = folder / "config.json"
    config = read_json(path)
    try:
        return AutoencoderKL.from_config(config)
    except Exception as error:  # diffusers checks none of it: any error can come of any value
        raise SharedModelError(f"{path}: no autoencoder can be made of it ({error}); {RESTORE}") from error


def read_tensors(path: AnyPath, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A safetensors file that must hold exactly the names, types and shapes of `expected`."""
    if not path.is_file():
        raise SharedModelError(f"{path}: no such file (weights are read from safetensors alone); {RESTORE}")
    try:
        tensors = load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise SharedModelError(f"{path}: not readable as safetensors ({error}); {RESTORE}") from error
    for kind, names in (("is missing", expected.keys() - tensors), ("is unexpected", tensors.keys() - expected)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise SharedModelError(f"{path}: tensor {min(names)}{more} {kind}; {RESTORE}")
    for name, tensor in tensors.items():
        if _kind(tensor) != _kind(expected[name]):
            found, wanted = _kind(tensor), _kind(expected[name])
            raise SharedModelError(f"{path}: {name} is {found}, config.json asks for {wanted}; {RESTORE}")
    return tensors


def _kind(tensor: Tensor) -> str:
    """float32 [2, 3]"""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
