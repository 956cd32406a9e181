"""Read everything that a run keeps and compare it with what the manifest and the hashes say: `evaluate.py --verify`.

This finds accidents: bytes that a disk or a copy changed, parts that are gone. It does not find a liar: who writes a
part anew can write a manifest that fits it, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from scaling.library.parts import describe_part, read_bytes, read_scenes
from scaling.library.run_folder import RunFolder
from scaling.library.stored_models import StoredModels
from scaling.storage.paths import AnyPath


def verify(run: RunFolder) -> tuple[int, list[str]]:
    """Read every part that counts, every shared model and every cohort. → the number of scenes, and what is wrong, a
    line for each file. While a job runs, its last parts are not in the manifest yet.

    Raises FileNotFoundError where the run has no fitted scenes, ValueError where its manifest cannot be read.
    """
    run.check_fitted()
    snapshot = run.library.snapshot()
    faults = [f"{name}: the manifest lists this part, and it is gone" for name in snapshot.missing]
    models, scenes = StoredModels(run), set()
    for path in snapshot.paths:
        try:
            for scene_id in _read(path, models):
                scenes.add(scene_id)
            listed = snapshot.listed(path)
            if listed is None:
                faults.append(f"{path}: the manifest does not list it: if no job runs, compact.py takes it in")
            if listed and hashlib.sha256(read_bytes(path)).hexdigest() != listed.sha256:
                faults.append(f"{path}: its bytes are not those that the manifest notes")
            elif listed and describe_part(path) != listed:
                faults.append(f"{path}: it holds other scenes than the manifest notes")
        except (ValueError, OSError) as error:
            faults.append(str(error) if str(path) in str(error) else f"{path}: {error}")
    return len(scenes), faults


def _read(path: AnyPath, models: StoredModels) -> Iterator[str]:
    """Read the scenes of a part and the models that they name. → their ids."""
    for row in read_scenes(path, _Everything()):
        models.scene(row)
        yield row["scene_id"]


class _Everything(frozenset[str]):
    """A collection that holds every id."""

    def __contains__(self, item: object) -> bool:
        return True
