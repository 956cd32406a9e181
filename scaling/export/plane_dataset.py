"""Exported tri-planes as a torch data set, for training generative models."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from scaling.export.plane_index import read_index, shard_name


class PlaneDataset(Dataset[Tensor]):
    """The scenes that `experiments/export.py --what planes` wrote into `folder`, each [P, F, K, K], float32.

    normalise: every channel of every plane gets mean 0 and standard deviation 1 over the set. `denormalise` turns such
    planes, or planes that a model made, back into what the field reads. ids, categories: of the scenes, in order;
    index: the content of index.json. A scene is read when it is asked for, and no file stays open, so workers of a
    DataLoader may share the set.

    Raises FileNotFoundError where the folder holds no complete export, ValueError where it is damaged.
    """

    def __init__(self, folder: str | Path, normalise: bool = True) -> None:
        self.folder = Path(folder)
        self.normalise = normalise
        self.index = read_index(self.folder)
        self.ids = [scene_id for shard in self.index.shards for scene_id in shard.scene_ids]
        self.categories = [category for shard in self.index.shards for category in shard.categories]
        self.mean, std = (torch.tensor(values)[..., None, None] for values in (self.index.mean, self.index.std))
        self.std = torch.where(std > 0, std, 1.0)  # a constant channel needs no scaling
        self._ends = list(accumulate(len(shard.scene_ids) for shard in self.index.shards))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> Tensor:
        """Raises IndexError beyond the last scene, ValueError naming a shard that is missing or damaged."""
        planes = self._tensor(*self._place(number), "planes", self.index.shape).float()
        return (planes - self.mean) / self.std if self.normalise else planes

    def hull(self, number: int) -> Tensor | None:
        """Visual hull of a scene, [cells³] (bool), as `render_planes` takes it; None where the export holds no hulls.
        Raises what __getitem__ raises."""
        if self.index.cells is None:
            return None
        bits = self._tensor(*self._place(number), "hulls", [self.index.cells**3 // 8])
        return torch.from_numpy(np.unpackbits(bits.numpy()).astype(bool))

    def denormalise(self, planes: Tensor) -> Tensor:
        """Normalised planes [..., P, F, K, K], as __getitem__ gives them with `normalise` → planes as the field reads
        them."""
        return planes * self.std.to(planes) + self.mean.to(planes)

    def _place(self, number: int) -> tuple[int, int]:
        """Number of a scene's shard, and its row in the shard. Negative numbers count from the end."""
        number = number + len(self) if number < 0 else number
        if not 0 <= number < len(self):
            raise IndexError(f"scene {number} of {len(self)}")
        shard = bisect_right(self._ends, number)
        return shard, number - (self._ends[shard - 1] if shard else 0)

    def _tensor(self, shard: int, row: int, name: str, shape: Sequence[int]) -> Tensor:
        """One row of a shard's tensor, which must be [scenes, *shape]. Raises ValueError naming the file."""
        path = self.folder / shard_name(shard)
        expected = [len(self.index.shards[shard].scene_ids), *shape]
        try:
            with safe_open(path, framework="pt") as file:
                found = file.get_slice(name)
                if found.get_shape() != expected:
                    raise ValueError(f"{name} are {found.get_shape()}, index.json says {expected}")
                return found[row : row + 1][0]
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); export the planes again") from error
