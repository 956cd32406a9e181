"""index.json of exported tri-planes: what the shards hold, and all that is needed to read and render it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from scaling.data.scene_id import SceneId
from scaling.models.box import STEPS
from scaling.storage.formats import check_format
from scaling.storage.json_yaml import first_fault
from scaling.storage.limited import read_limited

INDEX = "index.json"
# Older formats. 1: features summed over planes, one hidden layer, no hulls; 2: softplus in the field; 3: no unit.
FORMAT_VERSION = 4
NOTES = [
    "planes[plane, feature, row, column]: micro features first (0 to micro_features - 1), then macro features, which "
    "are the scene's mixture of the base planes.",
    "plane_axes: in 'xz' the column is x and the row is z, from the box's low to its high corner; values lie in the "
    "middles of texels (grid_sample from -1 to 1, align_corners=False, padding_mode='zeros').",
    "At a point, combine the samples of all planes: their sum, or product (1 + sample) - 1 over the planes. Then apply "
    "field.hidden and each of field.more, all followed by field_activation, then field.head: head[0] is a raw density, "
    "sigmoid(head[1:]) * 1.002 - 0.001 are the colours (of latents, if space is latent).",
    "If sampled is hull, a scene is empty outside of its hull, and its planes mean nothing there. Shards hold `hulls` "
    "[scene, cells^3 / 8]: one bit for each cell of the box (the highest bit first; x slowest, z fastest). A ray looks "
    f"its cells up in the middles of {STEPS} equal parts of its way through the box.",
    "Along a ray: an interval's density is softplus(m - 1), where m is the mean of the raw densities at its ends. "
    "Times the interval's length in world units, divided by `unit`, it is the optical depth. Composite colours c over "
    "`background` (one for each latent pixel, or one for all); 2 c - 1 are the latents, which the shared model decodes "
    "to images.",
    "Shards hold planes that are not normalised; mean and std [plane][feature] are over scenes and texels.",
]

Hash = Annotated[str, Field(pattern=r"^[0-9A-Za-z]{1,64}$")]
Count = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class PlaneModel(BaseModel):
    """What renders planes. shared, cohort: hashes (a cohort's scenes have a field of their own); renderer: a
    safetensors file with field.*, background and, where boxes are measured, their cells; box: low and high corner."""

    model_config = ConfigDict(extra="forbid")

    shared: Hash
    cohort: Hash | None
    renderer: Annotated[str, Field(pattern=r"^renderer-[0-9A-Za-z]{1,64}\.safetensors$")]
    space: Literal["latent", "rgb"]
    plane_axes: list[str]
    micro_features: int
    macro_features: int
    combine: Literal["product", "sum"] = "sum"
    field_layers: int = 1
    field_activation: Literal["relu", "softplus"] = "softplus"
    sampled: Literal["hull", "cuboid"] = "cuboid"
    box: list[list[Finite]]
    unit: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    samples: int
    importance_samples: int
    near: Finite | None
    far: Finite | None
    latent_size: int
    image_size: int


class Shard(BaseModel):
    """A safetensors file with `planes` [len(scene_ids), *shape] and, where scenes have them, `hulls`. models: for each
    scene, the position of its model in `PlaneIndex.models`."""

    model_config = ConfigDict(extra="forbid")

    scene_ids: list[SceneId]
    categories: list[str]
    models: list[Count]

    @model_validator(mode="after")
    def _as_many(self) -> Shard:
        if not len(self.scene_ids) == len(self.categories) == len(self.models):
            raise ValueError("scene_ids, categories and models must have the same length")
        return self


class PlaneIndex(BaseModel):
    """shape: [P, F, K, K], of a scene's planes; cells: of a hull, along a side, null without hulls; mean, std: [P][F];
    shards: in order, named by `shard_name`."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["scaling tri-planes"] = "scaling tri-planes"
    format_version: int = FORMAT_VERSION
    notes: list[str] = NOTES
    run: str
    num_scenes: int
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=4, max_length=4)]
    dtype: Literal["float16"] = "float16"
    cells: int | None = None
    bytes_per_scene: int
    mean: list[list[Finite]]
    std: list[list[Finite]]
    models: list[PlaneModel]
    shards: list[Shard]

    @model_validator(mode="after")
    def _consistent(self) -> PlaneIndex:
        if self.num_scenes != sum(len(shard.scene_ids) for shard in self.shards):
            raise ValueError("num_scenes is not the number of scenes of the shards")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if [len(values), *{len(channel) for channel in values}] != self.shape[:2]:
                raise ValueError(f"{name} has not the shape {self.shape[:2]} of planes and features")
        return self


def shard_name(number: int) -> str:
    """File name of a shard. Numbers start at 0."""
    return f"shard-{number:05d}.safetensors"


def read_index(folder: Path) -> PlaneIndex:
    """Read an export's index.json. Raises FileNotFoundError where there is no complete export, ValueError naming the
    file where it is damaged."""
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(
            2, f"no whole export of planes here (no {INDEX}); make one with "
            f"`python experiments/export.py --run RUN --what planes --out {shlex.quote(str(folder))}`", str(folder)
        )  # fmt: skip
    try:
        index = PlaneIndex.model_validate_json(read_limited(path))
    except ValueError as error:
        raise ValueError(f"{path}: {first_fault(error)}; export the planes again") from None
    check_format(path, index.format_version, FORMAT_VERSION)
    return index
