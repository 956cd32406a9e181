"""Reads the files of a shared model. Nothing that they say is taken on trust: SharedModelError names the file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from scaling.config import Autoencoder as AutoencoderSettings
from scaling.models.autoencoders.base import ImageAutoencoder
from scaling.models.autoencoders.load import empty_autoencoder
from scaling.storage import tensors
from scaling.storage.atomic import MAX_FILE_BYTES, read_limited
from scaling.storage.json_yaml import parse_json
from scaling.storage.paths import AnyPath

RESTORE = "restore the file, or train the shared model again"
MAX_JSON_BYTES = 1 << 20


class SharedModelError(ValueError):
    """A shared model that cannot be used; the message names the file and what to do."""


def read_text(path: AnyPath, most: int = MAX_FILE_BYTES) -> str:
    """A text file of at most `most` bytes. Raises SharedModelError naming it where it is missing or no text."""
    try:
        return read_limited(path, most).decode("utf-8")
    except OSError as error:
        raise SharedModelError(f"{path}: {error.strerror}; {RESTORE}") from error
    except UnicodeDecodeError:
        raise SharedModelError(f"{path}: not a text file; {RESTORE}") from None
    except ValueError as error:
        raise SharedModelError(f"{path}: {error}; {RESTORE}") from None


def read_json(path: AnyPath) -> dict[str, Any]:
    """The object in a JSON file. Raises SharedModelError naming the file where there is none."""
    text = read_text(path, MAX_JSON_BYTES)
    try:
        values = parse_json(text)
    except ValueError as error:
        raise SharedModelError(f"{path}: {error}; {RESTORE}") from None
    if not isinstance(values, dict):
        raise SharedModelError(f"{path}: expected an object, found a {type(values).__name__}; {RESTORE}")
    return values


def described_autoencoder(folder: AnyPath, settings: AutoencoderSettings) -> ImageAutoencoder:
    """An autoencoder as folder/config.json describes it, its weights not read yet."""
    path = folder / "config.json"
    config = read_json(path)
    try:
        return empty_autoencoder(settings, config)
    except Exception as error:  # diffusers checks little of it: any error can come of any value
        raise SharedModelError(f"{path}: no autoencoder can be made of it ({error}); {RESTORE}") from error


def read_tensors(path: AnyPath, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A safetensors file that must hold exactly the names, types and shapes of `expected`, all numbers finite."""
    try:
        return tensors.read_tensors(path, expected)
    except ValueError as error:
        raise SharedModelError(f"{path}: {error}; {RESTORE}") from error
