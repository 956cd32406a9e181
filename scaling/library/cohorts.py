"""Cohorts: the fine-tuned tensors of mode cohort, stored once per cohort and named by their content hash.

LIBRARY/cohorts/<hash>/ holds cohort.safetensors, the tensors that differ from the shared model, and config.json.
config.json is written last and marks the folder as complete.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors.torch import save
from torch import Tensor

from scaling.models.shared_model import SharedModel
from scaling.storage.commit import commit_file
from scaling.storage.formats import check_format, is_sha256
from scaling.storage.json_yaml import parse_json
from scaling.storage.limited import read_limited
from scaling.storage.paths import AnyPath
from scaling.storage.tensors import read_tensors, tensor_kinds, tensors_hash

FORMAT_VERSION = 1


def cohort_folder(library: AnyPath, cohort_hash: str) -> AnyPath:
    """Folder of a cohort. Raises ValueError where the hash is not one, so that no text from a file becomes a path."""
    if not is_sha256(cohort_hash):
        raise ValueError(f"{library}: bad cohort hash {cohort_hash!r:.80}: expected 64 hexadecimal digits")
    return library / "cohorts" / cohort_hash


def commit_cohort(library: AnyPath, tuned: Mapping[str, Tensor], shared_hash: str, scene_ids: Sequence[str]) -> str:
    """Write a cohort's tensors (names and shapes as in the shared model). → the cohort's hash.

    Call it before committing the part that names the hash. If the same tensors exist already, nothing is changed.
    Raises OSError naming the file where it cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tuned.items()}
    cohort_hash = tensors_hash(tensors)
    folder = cohort_folder(library, cohort_hash)
    commit_file(folder / "cohort.safetensors", save(tensors))
    config = {"format_version": FORMAT_VERSION, "shared": shared_hash, "scene_ids": list(scene_ids)}
    commit_file(folder / "config.json", json.dumps(config, indent=1).encode())
    return cohort_hash


def load_cohort(library: AnyPath, cohort_hash: str, shared: SharedModel, shared_hash: str) -> SharedModel:
    """The cohort's own model: a copy of the shared model with the cohort's tensors in it, frozen.

    Raises ValueError naming a file that is missing, was changed since it was written, is of a newer format, or was made
    for another shared model.
    """
    folder = cohort_folder(library, cohort_hash)
    config = _read_config(folder / "config.json")
    if config.get("shared") != shared_hash:
        raise ValueError(
            f"{folder} was made for shared model {str(config.get('shared'))[:12]}…, not {shared_hash[:12]}…: restore it"
        )
    path = folder / "cohort.safetensors"
    own = copy.deepcopy(shared)
    try:
        names = tensor_kinds(path)
        # A decoder that was tuned is a copy beside the autoencoder: the model needs room for it first.
        if any(name.startswith("decoder.") for name in names):
            own.adapt_decoder()
        state = own.state_dict()
        tensors = read_tensors(path, {name: state[name] for name in names if name in state})
    except ValueError as error:
        raise ValueError(f"{path}: {error}: restore the file") from error
    if tensors_hash(tensors) != cohort_hash:
        raise ValueError(f"{path}: its tensors were changed since they were written: restore the file")
    own.load_tensors(state | tensors)
    return own.requires_grad_(False).eval()


def _read_config(path: AnyPath) -> dict[str, Any]:
    try:
        config = parse_json(read_limited(path))
        version = int(config["format_version"])
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): the cohort is missing or incomplete") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not readable as a cohort's config ({error!r}): restore the file") from error
    check_format(path, version, FORMAT_VERSION)
    return config
