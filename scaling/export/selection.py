"""What all exports share: which scenes to take, and how to tell whether a file was made of the same fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scaling.data.choose_scenes import read_ids
from scaling.library.run_folder import RunFolder
from scaling.library.stored_models import StoredModels
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.storage.progress import Progress

# Rows with the same values are the same fit, as a fit is stored once and never changed.
ORIGIN = ("scene_id", "category", "stage", "shared", "cohort", "settings_hash", "seed")


def chosen_scenes(run: RunFolder, wanted: Path | None) -> list[dict[str, Any]]:
    """The ORIGIN columns of all committed scenes, or of those that the file `wanted` names, in the library's order.

    Raises FileNotFoundError where nothing is fitted, ValueError where the file cannot be read or names no scene,
    LookupError where it names a scene that the library does not hold.
    """
    run.check_fitted()
    rows = run.library.table(ORIGIN).to_pylist()
    if wanted is None:
        return rows
    ids = set(read_ids(wanted))
    missing = sorted(ids - {row["scene_id"] for row in rows})
    if missing:
        raise LookupError(f"--scenes {wanted}: {run.library.folder} holds no scene {', '.join(missing[:5])}")
    if not ids:
        raise ValueError(f"--scenes {wanted}: names no scene; write one id a line, or leave --scenes out")
    return [row for row in rows if row["scene_id"] in ids]


def read_chosen(
    models: StoredModels, chosen: Sequence[dict[str, Any]], what: str
) -> Iterator[tuple[dict[str, Any], SharedModel, SceneParams]]:
    """Yield each scene's ORIGIN columns, its model and its parameters (S = 1), a few in memory at a time, with a
    progress bar."""
    origins = {row["scene_id"]: row for row in chosen}
    with Progress(total=len(chosen), unit="scene", desc=what) as progress:
        for row in models.run.library.scenes(origins):
            shared, params = models.scene(row)
            yield origins[row["scene_id"]], shared, params
            progress.update()
