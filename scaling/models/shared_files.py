"""A shared model on disk. Nothing that its files say is taken on trust: SharedModelError names the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from scaling.config import Autoencoder as AutoencoderSettings
from scaling.config import Settings, SettingsError, as_noted, flatten, make_settings
from scaling.models.autoencoders.base import ImageAutoencoder
from scaling.models.autoencoders.load import WEIGHTS, empty_autoencoder
from scaling.models.shared_model import SharedModel
from scaling.storage import tensors
from scaling.storage.atomic import MAX_FILE_BYTES, read_limited, replace_file
from scaling.storage.formats import check_format
from scaling.storage.json_yaml import parse_json
from scaling.storage.paths import AnyPath

# 1: one background for all pixels, a cube, no student; 2: sums of features, no hulls; 3: fields of softplus
FORMAT_VERSION = 4
FILES = {  # where tensors of these names are stored, without the prefix; all others are in planes.safetensors
    "autoencoder.vae.": f"autoencoder/{WEIGHTS}",
    "autoencoder.decoder.": f"autoencoder/{WEIGHTS}",
    "decoder.": "decoder/model.safetensors",
    "student.": "student/model.safetensors",
}
RESTORE = "restore the file, or train the shared model again"
MAX_JSON_BYTES = 1 << 20


class SharedModelError(ValueError):
    """A shared model that cannot be used; the message names the file and what to do."""


def save_shared(model: SharedModel, folder: AnyPath, scene_ids: list[str]) -> str:
    """Writes the shared model; hash.txt comes last and marks it whole. → its hash."""
    (folder / "hash.txt").unlink(missing_ok=True)
    config = {"format_version": FORMAT_VERSION, "settings": model.settings.model_dump()}
    replace_file(folder / "config.json", json.dumps(config, indent=1).encode())
    if model.autoencoder.has_decoder:  # without one it has no tensors, and the settings say all of it
        replace_file(folder / "autoencoder" / "config.json", model.autoencoder.config_json().encode())
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    for file, (_, part) in _by_file(tensors).items():
        replace_file(folder / file, save(part, metadata={"format": "pt"}))
    replace_file(folder / "scenes.txt", "".join(f"{scene_id}\n" for scene_id in scene_ids).encode())
    content_hash = model.content_hash()
    replace_file(folder / "hash.txt", f"{content_hash}\n".encode())
    return content_hash


def load_shared(folder: AnyPath, device: torch.device | str = "cpu") -> tuple[SharedModel, str]:
    """The shared model in `folder`, frozen, and its hash.

    Raises SharedModelError naming the file where one is missing, of a newer format, or changed since it was saved.
    """
    model = _read(folder, read_config(folder))
    saved = read_hash(folder)
    found = model.content_hash()
    if saved != found:
        raise SharedModelError(
            f"{folder}: tensors hash to {found[:12]}…, hash.txt says {saved[:12] or 'nothing'}…: "
            "the files were changed since stage 1 saved them; restore them or train again"
        )
    return model.to(device).requires_grad_(False).eval(), found


def settings_on(folder: AnyPath, settings: Settings, given: dict[str, Any]) -> Settings:
    """Settings of a stage-2 run: what the shared model in `folder` fixes comes from it, stage 2's own from `settings`.

    given: dotted keys that the user named. Raises SettingsError where one contradicts the shared model, and
    SharedModelError where there is none.
    """
    fixed = read_config(folder).model_dump(exclude={"stage2", "seed"})
    known, asked = flatten(fixed), flatten(settings.model_dump())
    wrong = {key: asked[key] for key in given if key in known and known[key] != asked[key]}
    if wrong:
        said = ", ".join(f"{key} = {value} (shared model: {known[key]})" for key, value in wrong.items())
        raise SettingsError(f"{said}: {folder} fixes these; leave them out, or train another shared model")
    return make_settings({**settings.model_dump(include={"stage2", "seed"}), **fixed})


def read_config(folder: AnyPath) -> Settings:
    """The settings that a shared model was trained with. Raises SharedModelError where there is no whole model."""
    if not (folder / "hash.txt").is_file():
        raise SharedModelError(
            f"{folder}: no shared model here (no hash.txt); make one with "
            f"`python experiments/stage1.py --run {folder.parent} --num-scenes N`, or name another with --shared"
        )
    path = folder / "config.json"
    config = read_json(path)
    version, values = config.get("format_version"), config.get("settings")
    if not isinstance(version, int) or not isinstance(values, dict):
        raise SharedModelError(f"{path}: not a shared model's: format_version or settings are missing; {RESTORE}")
    check_format(path, version, FORMAT_VERSION, SharedModelError)
    try:
        return make_settings(as_noted(values))
    except SettingsError as error:
        raise SharedModelError(f"{path}: {error}; {RESTORE}") from error


def read_hash(folder: AnyPath) -> str:
    """The hash that stage 1 gave the shared model in `folder`; `load_shared` holds its tensors against it."""
    return read_text(folder / "hash.txt").strip()


def read_scene_ids(folder: AnyPath) -> list[str]:
    """Ids of the scenes that the shared model in `folder` was trained on. SharedModelError where it names none."""
    ids = read_text(folder / "scenes.txt").split()
    if not ids:
        raise SharedModelError(f"{folder}/scenes.txt: names none of the scenes of stage 1; {RESTORE}")
    return ids


def _read(folder: AnyPath, settings: Settings) -> SharedModel:
    """Built on the meta device first: sizes are compared before memory is taken for what config.json says."""
    with torch.device("meta"):
        model = _described(folder, settings)
    tensors: dict[str, Tensor] = {}
    for file, (prefix, expected) in _by_file(model.state_dict()).items():
        tensors.update({f"{prefix}{name}": t for name, t in read_tensors(folder / file, expected).items()})
    model.to_empty(device="cpu").load_state_dict(tensors)
    return model


def _described(folder: AnyPath, settings: Settings) -> SharedModel:
    autoencoder = None
    if settings.autoencoder.has_decoder:
        autoencoder = described_autoencoder(folder / "autoencoder", settings.autoencoder, settings.precision)
    try:
        model = SharedModel(settings, autoencoder)
    except (SettingsError, RuntimeError, TypeError) as error:  # torch's own say where in C++ they come from
        why = str(error).splitlines()[0]
        raise SharedModelError(f"{folder}/config.json: no model can be made of it ({why}); {RESTORE}") from error
    if (folder / "decoder").is_dir():
        model.adapt_decoder()
    if (folder / "student").is_dir():
        model.add_student()
    return model


def _by_file(tensors: dict[str, Tensor]) -> dict[str, tuple[str, dict[str, Tensor]]]:
    """Where a state is stored: file → what it leaves out of the names, and its tensors. Every file holds some."""
    files: dict[str, tuple[str, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        file, prefix = next(((f, p) for p, f in FILES.items() if name.startswith(p)), ("planes.safetensors", ""))
        files.setdefault(file, (prefix, {}))[1][name.removeprefix(prefix)] = tensor
    return files


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


def described_autoencoder(folder: AnyPath, settings: AutoencoderSettings, precision: str) -> ImageAutoencoder:
    """An autoencoder as folder/config.json describes it, its weights not read yet."""
    path = folder / "config.json"
    config = read_json(path)
    try:
        return empty_autoencoder(settings, config, precision)
    except Exception as error:  # diffusers checks little of it: any error can come of any value
        raise SharedModelError(f"{path}: no autoencoder can be made of it ({error}); {RESTORE}") from error


def read_tensors(path: AnyPath, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A safetensors file that must hold exactly the names, types and shapes of `expected`, all numbers finite."""
    try:
        return tensors.read_tensors(path, expected)
    except ValueError as error:
        raise SharedModelError(f"{path}: {error}; {RESTORE}") from error
