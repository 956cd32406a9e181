"""The models that a run's scenes were fitted on: the shared model, or their cohort's own copy of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from scaling.library.cohorts import load_cohort
from scaling.library.run_folder import RunFolder
from scaling.library.scene_row import unpack_scene
from scaling.models.shared_files import load_shared, read_hash
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.storage.paths import AnyPath


def chosen_device(device: torch.device | str | None = None) -> torch.device:
    """The given device; None: the GPU if there is one, else the CPU."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


class StoredModels:
    """Reads a model when the first scene needs it. Shared models stay in memory; of the cohorts' models only the last
    one, as a library's scenes come cohort by cohort. known: models already in memory, by their hash."""

    def __init__(
        self, run: RunFolder, device: torch.device | str = "cpu", known: Mapping[str, SharedModel] | None = None
    ) -> None:
        self.run = run
        self.device = device
        self._shared = dict(known or {})
        self._cohort: tuple[str, SharedModel] | None = None

    def of(self, row: Mapping[str, Any]) -> SharedModel:
        """The model that a library row (scene_id, shared, cohort) names, frozen, on the device.

        Raises ValueError where it is not found, SharedModelError or ValueError where its files are damaged.
        """
        if row["shared"] not in self._shared:
            self._shared[row["shared"]] = load_shared(self._folder(row), self.device)[0]
        shared = self._shared[row["shared"]]
        if row["cohort"] is None:
            return shared
        if self._cohort is None or self._cohort[0] != row["cohort"]:
            own = load_cohort(self.run.library.folder, row["cohort"], shared, row["shared"])
            self._cohort = (row["cohort"], own)
        return self._cohort[1]

    def scene(self, row: Mapping[str, Any]) -> tuple[SharedModel, SceneParams]:
        """A whole row's model, and its parameters (S = 1) as stored: micro planes [1, P, F_mic, K, K], coefs [1, M],
        hull [1, CELLS³] or None. Raises ValueError naming the library and the scene where the two do not fit."""
        model = self.of(row)
        try:
            check_fits(row, model)
            params = unpack_scene(row)
        except ValueError as error:
            raise ValueError(f"{self.run.library.folder}: {error}; restore its part, or fit the scene again") from error
        return model, params[None].to(self.device)

    def _folder(self, row: Mapping[str, Any]) -> AnyPath:
        folders = list(dict.fromkeys([self.run.shared_in_use(), self.run.shared]))
        for folder in folders:
            if (folder / "hash.txt").is_file() and read_hash(folder) == row["shared"]:
                return folder
        looked = ", ".join(str(folder) for folder in folders)
        raise ValueError(
            f"scene {row['scene_id']} was fitted on shared model {row['shared'][:12]}…, not found in {looked}"
        )


def check_fits(row: Mapping[str, Any], shared: SharedModel) -> None:
    """Raise ValueError where a row's planes or coefs do not have the shared model's sizes."""
    shape, num_coefs = tuple(row["micro_shape"]), len(row["coefs"])
    if shape != shared.micro_shape:
        raise ValueError(f"scene {row['scene_id']}: micro planes {list(shape)}, its model has {[*shared.micro_shape]}")
    if num_coefs != len(shared.base_planes):
        raise ValueError(f"scene {row['scene_id']}: {num_coefs} coefs, its model has {len(shared.base_planes)} planes")
