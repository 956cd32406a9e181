"""Save and load shared models. Their files are not trusted: all are checked, and SharedModelError names the file."""

from __future__ import annotations

import json
import shlex
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
from scaling.storage.atomic import replace_file
from scaling.storage.formats import check_format
from scaling.storage.json_yaml import parse_json
from scaling.storage.limited import MAX_FILE_BYTES, read_limited
from scaling.storage.paths import AnyPath

# Older formats. 1: one background for all pixels, a cube as the box, no student; 2: a point's features are summed over
# planes, no hulls; 3: softplus in the field; 4: densities are per world unit, the background is white.
FORMAT_VERSION = 5
FILES = {  # prefix of a tensor's name → the file that stores it without the prefix; all others: planes.safetensors
    "autoencoder.vae.": f"autoencoder/{WEIGHTS}",
    "autoencoder.decoder.": f"autoencoder/{WEIGHTS}",
    "decoder.": "decoder/model.safetensors",
    "student.": "student/model.safetensors",
}
RESTORE = "restore the file, or train the shared model again"
MAX_JSON_BYTES = 1 << 20


class SharedModelError(ValueError):
    """A shared model cannot be used; the message names the file and what to do."""


def save_shared(model: SharedModel, folder: AnyPath, scene_ids: list[str]) -> str:
    """Write the shared model to `folder`, with the ids of the scenes that it was trained on. → its hash.

    hash.txt is removed first and written last: where it exists, the model is complete.
    """
    (folder / "hash.txt").unlink(missing_ok=True)
    config = {"format_version": FORMAT_VERSION, "settings": model.settings.model_dump()}
    replace_file(folder / "config.json", json.dumps(config, indent=1).encode())
    if model.autoencoder.has_decoder:  # without one there are no tensors, and the settings describe it fully
        replace_file(folder / "autoencoder" / "config.json", model.autoencoder.config_json().encode())
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    for file, (_, part) in _by_file(tensors).items():
        replace_file(folder / file, save(part, metadata={"format": "pt"}))
    replace_file(folder / "scenes.txt", "".join(f"{scene_id}\n" for scene_id in scene_ids).encode())
    content_hash = model.content_hash()
    replace_file(folder / "hash.txt", f"{content_hash}\n".encode())
    return content_hash


def shared_bytes(folder: AnyPath) -> int:
    """Bytes on disk of the shared model in `folder`. Other files that may lie there do not count."""
    folders = (folder, folder / "autoencoder", folder / "decoder", folder / "student")
    suffixes = (".txt", ".json", ".safetensors")
    return sum(
        p.stat().st_size for each in folders for p in each.glob("*") if p.name.endswith(suffixes) and p.is_file()
    )


def load_shared(folder: AnyPath, device: torch.device | str = "cpu") -> tuple[SharedModel, str]:
    """Load the shared model in `folder`, frozen. → the model and its hash.

    Raises SharedModelError naming the file that is missing, has a newer format, or was changed since it was saved.
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
    """Settings of a stage-2 run: `stage2` and `seed` from `settings`, all others from the shared model in `folder`.

    given: the settings that the user named, by dotted key. Raises SettingsError where one contradicts the shared model,
    SharedModelError where `folder` holds no complete shared model.
    """
    fixed = read_config(folder).model_dump(exclude={"stage2", "seed"})
    known, asked = flatten(fixed), flatten(settings.model_dump())
    wrong = {key: asked[key] for key in given if key in known and known[key] != asked[key]}
    if wrong:
        said = ", ".join(f"{key} = {value} (shared model: {known[key]})" for key, value in wrong.items())
        raise SettingsError(f"{said}: {folder} fixes these; leave them out, or train another shared model")
    return make_settings({**settings.model_dump(include={"stage2", "seed"}), **fixed})


def read_config(folder: AnyPath) -> Settings:
    """The settings that a shared model was trained with.

    Raises SharedModelError where `folder` holds no complete shared model or its config.json cannot be used.
    """
    if not (folder / "hash.txt").is_file():
        raise SharedModelError(
            f"{folder}: no shared model here (no hash.txt); make one with "
            f"`python experiments/stage1.py --run {shlex.quote(str(folder.parent))} --num-scenes N`, or name another "
            "with --shared"
        )
    path = folder / "config.json"
    config = read_json(path)
    version, values = config.get("format_version"), config.get("settings")
    if not isinstance(version, int) or not isinstance(values, dict):
        raise SharedModelError(f"{path}: no shared model's config: format_version or settings are missing; {RESTORE}")
    check_format(path, version, FORMAT_VERSION, SharedModelError)
    try:
        return make_settings(as_noted(values))
    except SettingsError as error:
        raise SharedModelError(f"{path}: {error}; {RESTORE}") from error


def read_hash(folder: AnyPath) -> str:
    """The hash in the hash.txt of `folder`, written by stage 1; `load_shared` compares the tensors with it."""
    return read_text(folder / "hash.txt").strip()


def read_scene_ids(folder: AnyPath) -> list[str]:
    """Ids of the scenes that the shared model in `folder` was trained on.

    Raises SharedModelError where scenes.txt is missing or empty.
    """
    ids = read_text(folder / "scenes.txt").split()
    if not ids:
        raise SharedModelError(f"{folder}/scenes.txt: names none of the scenes of stage 1; {RESTORE}")
    return ids


def _read(folder: AnyPath, settings: Settings) -> SharedModel:
    """The model that `settings` and the files describe, with its tensors.

    It is built on the meta device, so that sizes are compared before memory is taken for what config.json asks for.
    """
    with torch.device("meta"):
        model = _described(folder, settings)
    tensors: dict[str, Tensor] = {}
    for file, (prefix, expected) in _by_file(model.state_dict()).items():
        tensors.update({f"{prefix}{name}": t for name, t in read_tensors(folder / file, expected).items()})
    model.to_empty(device="cpu").load_state_dict(tensors)
    return model


def _described(folder: AnyPath, settings: Settings) -> SharedModel:
    """The model without its tensors; it has an adapted decoder and a student where their folders exist."""
    autoencoder = None
    if settings.autoencoder.has_decoder:
        autoencoder = described_autoencoder(folder / "autoencoder", settings.autoencoder, settings.precision)
    try:
        model = SharedModel(settings, autoencoder)
    except (SettingsError, RuntimeError, TypeError) as error:  # torch's messages go on with a C++ trace
        why = str(error).splitlines()[0]
        raise SharedModelError(f"{folder}/config.json: no model can be made of it ({why}); {RESTORE}") from error
    if (folder / "decoder").is_dir():
        model.adapt_decoder()
    if (folder / "student").is_dir():
        model.add_student()
    return model


def _by_file(tensors: dict[str, Tensor]) -> dict[str, tuple[str, dict[str, Tensor]]]:
    """Sort a state's tensors by file: file → the prefix that it leaves out of names, and its tensors by shortened name.
    A file without tensors is left out."""
    files: dict[str, tuple[str, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        file, prefix = next(((f, p) for p, f in FILES.items() if name.startswith(p)), ("planes.safetensors", ""))
        files.setdefault(file, (prefix, {}))[1][name.removeprefix(prefix)] = tensor
    return files


def read_text(path: AnyPath, most: int = MAX_FILE_BYTES) -> str:
    """Read a text file. Raises SharedModelError naming it where it is missing, over `most` bytes, or not UTF-8."""
    try:
        return read_limited(path, most).decode("utf-8")
    except OSError as error:
        raise SharedModelError(f"{path}: {error.strerror}; {RESTORE}") from error
    except UnicodeDecodeError:
        raise SharedModelError(f"{path}: not a text file; {RESTORE}") from None
    except ValueError as error:
        raise SharedModelError(f"{path}: {error}; {RESTORE}") from None


def read_json(path: AnyPath) -> dict[str, Any]:
    """Read the object in a JSON file. Raises SharedModelError naming the file where it holds no object."""
    text = read_text(path, MAX_JSON_BYTES)
    try:
        values = parse_json(text)
    except ValueError as error:
        raise SharedModelError(f"{path}: {error}; {RESTORE}") from None
    if not isinstance(values, dict):
        raise SharedModelError(f"{path}: expected an object, found a {type(values).__name__}; {RESTORE}")
    return values


def described_autoencoder(folder: AnyPath, settings: AutoencoderSettings, precision: str) -> ImageAutoencoder:
    """An autoencoder as folder/config.json describes it, without its weights.

    Raises SharedModelError naming config.json where no autoencoder can be made of it.
    """
    path = folder / "config.json"
    config = read_json(path)
    try:
        return empty_autoencoder(settings, config, precision)
    except Exception as error:  # diffusers checks little: any value can raise any error
        raise SharedModelError(f"{path}: no autoencoder can be made of it ({error}); {RESTORE}") from error


def read_tensors(path: AnyPath, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read a safetensors file, which must hold exactly the names, types and shapes of `expected`, all numbers finite.

    Raises SharedModelError naming the file where it does not.
    """
    try:
        return tensors.read_tensors(path, expected)
    except ValueError as error:
        raise SharedModelError(f"{path}: {error}; {RESTORE}") from error
