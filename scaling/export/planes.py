"""Fused tri-planes of a library as a data set for generative models: safetensors shards, index.json, statistics.

A scene takes 2 · P · F · K² bytes: F features of P planes of K² texels, in float16, which is far finer than the 4 bits
in which micro planes are stored. Shards are written whole or not at all, and index.json comes last. So an export that
was killed has no index, and the same command goes on from the shards that are complete.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from scaling.export.plane_index import FORMAT_VERSION, INDEX, PlaneIndex, PlaneModel, Shard, shard_name
from scaling.export.selection import chosen_scenes
from scaling.library.run_folder import RunFolder
from scaling.library.stored_models import StoredModels
from scaling.models.cells import CELLS
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import fuse_planes
from scaling.storage.atomic import replace_file
from scaling.storage.json_yaml import parse_json
from scaling.storage.limited import read_limited
from scaling.storage.own_folder import own_folder
from scaling.storage.paths import uri_of
from scaling.storage.progress import Progress
from scaling.storage.tensors import MAX_HEADER_BYTES

SHARD_BYTES = 64 << 20  # of planes: as much is held in memory, and as much is lost by a kill
ModelKey = tuple[str, str | None]  # hashes of the shared model and of the cohort, None without one
AT_ONCE = 16  # scenes whose sums are computed together, in float64


class Statistics:
    """Mean and standard deviation of each channel of each plane, over scenes and texels. Parts are merged as by Chan et
    al.: plain sums of squares would lose small deviations of large numbers."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, planes: Tensor) -> None:
        """Add the planes [S, P, F, K, K] of S scenes."""
        for part in planes.split(AT_ONCE):
            values = part.double().movedim(0, 2).flatten(2)
            count, mean = values.shape[2], values.mean(2)
            shift, total = mean - self.mean, self.count + count
            self.squares = self.squares + (values - mean[..., None]).square().sum(2)
            self.squares = self.squares + shift.square() * (self.count * count / total)
            self.mean = self.mean + shift * (count / total)
            self.count = total

    @property
    def std(self) -> Tensor:
        return (self.squares / self.count).sqrt()


def export_planes(run: RunFolder, folder: Path, wanted: Path | None = None) -> PlaneIndex:
    """Write the planes of all committed scenes, or of those that the file `wanted` names, into `folder`. → its index.

    Each scene is fused with the base planes that it was fitted on: its cohort's, if it has one. Memory is bounded by
    SHARD_BYTES, whatever the number of scenes. Raises FileNotFoundError where nothing is fitted, ValueError where a
    scene cannot be read, or its planes have another shape than the others' or exceed float16's range, FileExistsError
    where a file of somebody else's would be written over.
    """
    scenes = chosen_scenes(run, wanted)
    models = StoredModels(run)
    shared = models.of(scenes[0])
    shape = _shape(shared)
    with own_folder(folder, "planes"):
        return _write(run, folder, models, scenes, shape)


def _write(
    run: RunFolder, folder: Path, models: StoredModels, scenes: Sequence[Mapping[str, Any]], shape: tuple[int, ...]
) -> PlaneIndex:
    shared = models.of(scenes[0])
    bytes_per_scene = 2 * math.prod(shape)
    disk = f"{bytes_per_scene:,} bytes each, {len(scenes) * bytes_per_scene / 1e6:,.1f} MB in all"
    per_shard = max(1, SHARD_BYTES // bytes_per_scene)
    for number in range(math.ceil(len(scenes) / per_shard)):
        _check_own(folder / shard_name(number))
    # While shards are being written there is no index, so nobody reads a mixture of two exports.
    _remove_index(folder / INDEX)
    statistics = Statistics()
    used: dict[ModelKey, PlaneModel] = {}
    shards: list[Shard] = []
    with Progress(total=len(scenes), unit="scene", desc=f"planes, {disk}") as progress:
        for start in range(0, len(scenes), per_shard):
            part = scenes[start : start + per_shard]
            statistics.add(_write_shard(folder / shard_name(len(shards)), models, part, shape))
            shards.append(_describe(folder, models, part, used))
            progress.update(len(part))
    _tidy(folder, len(shards))
    index = PlaneIndex(
        run=uri_of(run.path), num_scenes=len(scenes), shape=list(shape), bytes_per_scene=bytes_per_scene,
        cells=CELLS if shared.settings.rendering.sampled == "hull" else None,
        mean=statistics.mean.tolist(), std=statistics.std.tolist(), models=list(used.values()), shards=shards,
    )  # fmt: skip
    replace_file(folder / INDEX, index.model_dump_json(indent=1).encode())
    return index


def _remove_index(path: Path) -> None:
    """Remove the index of an earlier export. Raises FileExistsError where the file is none."""
    if path.is_file() and b"scaling tri-planes" not in read_limited(path):
        raise FileExistsError(f"{path} is no index of exported planes, and is not written over: name another folder")
    path.unlink(missing_ok=True)


def _check_own(path: Path) -> None:
    """Raise FileExistsError where a file has a shard's name and not the stamp that this program gives to shards."""
    if path.exists() and _stamp(path) is None:
        raise FileExistsError(f"{path} is no shard of this program's; it is not written over: move it away")


def _tidy(folder: Path, num_shards: int) -> None:
    """Delete shards of an earlier, larger export, and temporary files of a killed one. Shards that this program did not
    write stay."""
    shards = [path for path in folder.glob("shard-?????.safetensors") if path.name >= shard_name(num_shards)]
    larger = [path for path in shards if _stamp(path) is not None]
    for path in [*larger, *folder.glob(".shard-?????.safetensors.*")]:
        path.unlink()


def _shape(shared: SharedModel) -> tuple[int, ...]:
    planes, micro, *sides = shared.micro_shape
    return (planes, micro + shared.base_planes.shape[2], *sides)


def _write_shard(path: Path, models: StoredModels, part: Sequence[Mapping[str, Any]], shape: tuple[int, ...]) -> Tensor:
    """Write a shard, unless the file holds the same scenes already. → its planes [S, *shape], float16."""
    stamp = hashlib.sha256(json.dumps([FORMAT_VERSION, *part]).encode()).hexdigest()
    planes = _stored(path, stamp)
    if planes is None:
        tensors = _fused(models, part, shape)
        planes = tensors["planes"]
        replace_file(path, save(tensors, {"scenes": stamp}))
    return planes


def _stored(path: Path, stamp: str) -> Tensor | None:
    """The planes of a shard that was written with this stamp; None where there is no such file."""
    if _stamp(path) != stamp:
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("planes")
    except SafetensorError:  # damaged: it is written anew
        return None


def _stamp(path: Path) -> str | None:
    """The stamp in a shard's header; None where there is no such file, or it is not of this program. A shard that was
    cut short behind its header has one."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            header = parse_json(file.read(min(int.from_bytes(file.read(8), "little"), MAX_HEADER_BYTES)))
        return header["__metadata__"]["scenes"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _fused(models: StoredModels, part: Sequence[Mapping[str, Any]], shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Fused planes [S, *shape], float16, and, where scenes have them, hulls [S, CELLS³ / 8], packed bits."""
    hulls = torch.zeros(len(part), CELLS**3 // 8, dtype=torch.uint8)
    place = {row["scene_id"]: number for number, row in enumerate(part)}
    planes = torch.empty(len(part), *shape, dtype=torch.float16)
    for row in models.run.library.scenes(list(place)):
        shared, params = models.scene(row)
        if _shape(shared) != shape:
            raise ValueError(
                f"scene {row['scene_id']}: planes {list(_shape(shared))}, the others have {list(shape)}: their shared "
                "models differ; export the scenes of one shared model at a time, with --scenes"
            )
        number = place.pop(row["scene_id"])
        planes[number] = fuse_planes(params.micro_planes, params.coefs, shared.base_planes)[0]
        if params.hull is not None:
            hulls[number] = torch.from_numpy(np.packbits(params.hull[0].cpu().numpy()))
        if not torch.isfinite(planes[number]).all():
            raise ValueError(f"scene {row['scene_id']}: planes beyond float16's range; leave it out, with --scenes")
    if place:
        raise ValueError(f"{models.run.library.folder}: scene {min(place)} vanished during the export; export again")
    return {"planes": planes, "hulls": hulls} if hulls.any() else {"planes": planes}


def _describe(
    folder: Path,
    models: StoredModels,
    part: Sequence[Mapping[str, Any]],
    used: dict[tuple[str, str | None], PlaneModel],
) -> Shard:
    """A shard's entry in the index. Adds new models to `used`, and writes what renders their planes."""
    for row in part:
        key = (row["shared"], row["cohort"])
        if key not in used:
            used[key] = _write_model(folder, row, models.of(row))
    numbers = {key: number for number, key in enumerate(used)}
    return Shard(
        scene_ids=[row["scene_id"] for row in part],
        categories=[row["category"] for row in part],
        models=[numbers[row["shared"], row["cohort"]] for row in part],
    )


def _write_model(folder: Path, row: Mapping[str, Any], shared: SharedModel) -> PlaneModel:
    """Write the field, background and box of a row's model. → the model's entry in the index."""
    parts = ("field.", "background", "renderer.")
    tensors = {name: tensor.contiguous() for name, tensor in shared.state_dict().items() if name.startswith(parts)}
    path = folder / f"renderer-{row['cohort'] or row['shared']}.safetensors"
    replace_file(path, save(tensors))
    representation, renderer = shared.settings.representation, shared.renderer
    return PlaneModel(
        shared=row["shared"], cohort=row["cohort"], renderer=path.name,
        space="rgb" if shared.autoencoder.is_identity else "latent",
        plane_axes=list(representation.plane_axes), micro_features=representation.micro_features,
        macro_features=representation.macro_features, combine=representation.combine,
        field_layers=representation.field_layers,
        field_activation=representation.field_activation, sampled=shared.settings.rendering.sampled,
        box=renderer.box.bounds.tolist(), unit=float(renderer.box.unit), samples=renderer.samples,
        importance_samples=renderer.importance_samples, near=renderer.near, far=renderer.far,
        latent_size=shared.latent_size, image_size=shared.settings.data.image_size,
    )  # fmt: skip
