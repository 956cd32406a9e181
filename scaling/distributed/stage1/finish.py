"""Makes what stage 1 leaves in a run folder from the stage's last checkpoint."""

from __future__ import annotations

from pathlib import Path

from scaling.config import Settings
from scaling.data.stores import SourceSpec
from scaling.library.ledger import Ledger
from scaling.library.parts import commit_part, part_name
from scaling.library.run_folder import settings_hash
from scaling.library.scene_row import pack_scene
from scaling.library.stored_models import StoredModels
from scaling.models.shared_files import save_shared
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.pictures.of_runs import LogImage, log_scene_pictures
from scaling.storage.json_yaml import parse_json
from scaling.storage.limited import read_limited
from scaling.training.checkpoints.state import load_scenes, read_progress, read_state

SCENES_PER_PART = 256
PICTURED_SCENES = 4


def finish_stage1(ledger: Ledger, checkpoint: Path, settings: Settings, spec: SourceSpec, log_image: LogImage) -> None:
    """Turn the last checkpoint into fitted scenes in the library, pictures, and RUN/shared.

    checkpoint: its folder, with the workers' metrics-*.json.
    """
    run = ledger.run
    shared = SharedModel(settings)
    shared.load_tensors(read_state(checkpoint))
    shared.requires_grad_(False).eval()
    progress, scenes = read_progress(checkpoint), load_scenes(checkpoint)
    ids = progress["scene_ids"]
    reports = [parse_json(read_limited(path)) for path in sorted(checkpoint.glob("metrics-*.json"))]
    metrics = {scene_id: values for report in reports for scene_id, values in report.items()}
    content_hash = shared.content_hash()
    ledger.check_shared(content_hash)
    seconds = progress["seconds"] / len(ids)
    source = spec.open()
    categories = dict(zip(source.ids(), source.categories()))
    # After a crash in here the next driver commits all parts again; of two rows of a scene readers take the first.
    for start in range(0, len(ids), SCENES_PER_PART):
        rows = []
        for scene_id in ids[start : start + SCENES_PER_PART]:
            micro, coefs = scenes[f"{scene_id}/micro_planes"], scenes[f"{scene_id}/coefs"]
            params = SceneParams(micro, coefs, scenes.get(f"{scene_id}/hull"))
            packed = pack_scene(params, "float16")
            rows.append(
                {
                    **vars(packed), **metrics[scene_id], "scene_id": scene_id, "category": categories[scene_id],
                    "stage": 1, "shared": content_hash, "cohort": None, "seconds": seconds,
                    "settings_hash": settings_hash(settings), "seed": settings.seed,
                }
            )  # fmt: skip
        batch = [row["scene_id"] for row in rows]
        ledger.add(commit_part(run.library.folder, rows, part_name(ledger.epoch, 1, batch)))
    ledger.publish()
    models = StoredModels(run, known={content_hash: shared})
    log_scene_pictures(run, source, ids[:PICTURED_SCENES], "stage1", log_image, models)
    # RUN/shared marks the stage done, so it comes last.
    save_shared(shared, run.shared, ids)
