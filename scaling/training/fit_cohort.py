"""Mode cohort: fit scenes together, and fine-tune a copy of the shared model's base planes, field and decoder on them.

The phases are stage 2's 2a and 2b, but with every rate in use (paper, section on learning the remaining scenes; there
one cohort holds all scenes). The encoder never moves. A scene whose numbers are no longer finite is left out: the epoch
starts again without the scene, from the checkpoint before the epoch.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from scaling.config import Phase, Settings
from scaling.data.scene_views import SceneViews
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.storage.atomic import sync_folder
from scaling.storage.links import refuse_links
from scaling.storage.paths import AnyPath
from scaling.training import watchdog
from scaling.training.checkpoints.checksums import fault, seal
from scaling.training.checkpoints.state import load_checkpoint, load_optimisers, read_progress, save_checkpoint
from scaling.training.fit_frozen import PHASES, FittedScene, hulls_of, start_params
from scaling.training.phase_loop import Diverged, EpochReport, Phases, PhaseStep
from scaling.training.process_group import Workers
from scaling.training.random_streams import stream
from scaling.training.training_scene import ready_scene

CHECKPOINTS = "epoch-[0-9][0-9][0-9][0-9][0-9]"


@dataclass(frozen=True)
class CohortFit:
    """The result of a cohort.

    shared: the cohort's own model, frozen; tuned: its tensors that differ from the model that the cohort started from;
    scenes: the fitted members, in their order; left_out: members that diverged, and how.
    """

    shared: SharedModel
    tuned: dict[str, Tensor]
    scenes: list[FittedScene]
    left_out: dict[str, str]


class Cohort(Phases):
    """One cohort at its start. `shared` is copied and does not move; `scenes` is iterated once."""

    def __init__(self, shared: SharedModel, shared_hash: str, scenes: Iterable[SceneViews], settings: Settings) -> None:
        own = copy.deepcopy(shared)
        ready = []
        for views in scenes:
            ready.append(ready_scene(own, views))
            watchdog.beat()
        ids = [scene.scene_id for scene in ready]
        phases = {name: getattr(settings.stage2, name) for name in PHASES}
        super().__init__(
            settings,
            own,
            ready,
            table=replace(start_params(shared, settings, ids), hull=hulls_of(ready)),
            phases={name: phase for name, phase in phases.items() if phase.num_epochs},
            identity={"scene_ids": ids, "settings": settings.shaping(), "shared": shared_hash},
            buckets=dict.fromkeys(ids, 0),
            workers=Workers(device=shared.device),
        )
        if settings.stage2.start == "random":
            self._start_field_anew()
        if any(phase.lr.decoder for phase in self.phases.values()):
            own.adapt_decoder()

    def _start_field_anew(self) -> None:
        """Give the field random weights again: as published, stage 2's field starts as stage 1's did."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(self.settings.seed, "field").initial_seed())
            self.shared.field.load_state_dict(self.shared.new_field().state_dict())

    def go_on(self, on_epoch: Callable[[EpochReport], None], last: Path | None) -> None:
        """Go through the phases that are left. last: the checkpoint that was loaded; None at the start."""
        self.run_phases(self._enter, on_epoch, (lambda: load_optimisers(self, last)) if last else None)

    def _enter(self, name: str, phase: Phase) -> PhaseStep:
        return PhaseStep(self.shared, phase)


def fit_cohort(
    shared: SharedModel,
    shared_hash: str,
    scenes: Collection[SceneViews],
    settings: Settings,
    folder: Path,
    on_epoch: Callable[[EpochReport], None] | None = None,
) -> CohortFit:
    """Fit the cohort, or go on from the newest whole checkpoint in `folder`. on_epoch is called after every epoch.

    scenes may be lazy: their views may be made during the iteration. Raises Diverged where numbers are not finite and
    no scene is to blame, or more than half of two or more scenes are; SettingsError where `folder` belongs to another
    job.
    """
    began = time.perf_counter()

    def save(report: EpochReport) -> None:
        cohort.seconds = before + time.perf_counter() - began  # with encoding and discarded epochs
        _save(cohort, folder, report.epochs_done)
        if on_epoch is not None:
            on_epoch(report)

    cohort, last = _resumed(shared, shared_hash, scenes, settings, folder)
    before = cohort.seconds
    # Scenes that diverge are dropped, and the cohort goes on from its last checkpoint, until an attempt succeeds.
    while len(cohort.dropped) < len(scenes):
        try:
            cohort.go_on(save, last)
            break
        except Diverged as error:
            known = cohort.dropped | {scene_id: str(error) for scene_id in error.scene_ids}
            if not error.scene_ids or len(known) > max(1, len(scenes) // 2):
                raise
        del cohort  # before the next one is built: two of them might not fit into a GPU's memory
        cohort, last = _resumed(shared, shared_hash, scenes, settings, folder)
        cohort.dropped = known
    cohort.seconds = before + time.perf_counter() - began
    return _result(cohort, shared)


def started_with(folder: Path, scene_ids: Sequence[str]) -> bool:
    """Whether the newest whole checkpoint in `folder` is of these scenes; True where there is none."""
    last = _newest_whole(folder)
    return last is None or read_progress(last).get("scene_ids") == list(scene_ids)


def epochs_done(folder: AnyPath) -> int:
    """Epochs done by the newest checkpoint of a cohort in `folder`; 0 without one."""
    return max((int(path.name.removeprefix("epoch-")) for path in folder.glob(CHECKPOINTS)), default=0)


def _resumed(
    shared: SharedModel, shared_hash: str, scenes: Collection[SceneViews], settings: Settings, folder: Path
) -> tuple[Cohort, Path | None]:
    """The cohort as its newest whole checkpoint holds it, and that checkpoint; without one, its start and None."""
    cohort = Cohort(shared, shared_hash, scenes, settings)
    last = _newest_whole(folder)
    if last:
        load_checkpoint(cohort, last)
    return cohort, last


def _save(cohort: Cohort, folder: Path, epochs_done: int) -> None:
    """Save a checkpoint, visible only once it is whole. The one before it stays, in case this one is damaged later."""
    older = _checkpoints(folder)[:-1]
    writing, final = folder / ".writing", folder / f"epoch-{epochs_done:05d}"
    refuse_links(writing)
    shutil.rmtree(writing, ignore_errors=True)
    save_checkpoint(cohort, writing)
    seal(writing)
    writing.rename(final)
    sync_folder(folder)
    for path in older:
        shutil.rmtree(path, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob(CHECKPOINTS))


def _newest_whole(folder: Path) -> Path | None:
    """The checkpoint to go on from. Newer, torn ones are removed, and their epochs run again."""
    for path in reversed(_checkpoints(folder)):
        if fault(path) is None:
            return path
        shutil.rmtree(path)
    return None


def _result(cohort: Cohort, start: SharedModel) -> CohortFit:
    own = cohort.shared.requires_grad_(False).eval()
    before = start.state_dict()
    tuned = {
        name: tensor
        for name, tensor in own.state_dict().items()
        if name not in before or not torch.equal(tensor, before[name])
    }
    fitted = [scene.scene_id for scene in cohort.scenes if scene.scene_id not in cohort.dropped]
    scenes = []
    for scene_id in fitted:
        row = cohort.row[scene_id]
        params = cohort.table[row]
        params = SceneParams(params.micro_planes.detach(), params.coefs.detach(), params.hull)
        scenes.append(FittedScene(scene_id, params, cohort.seconds / len(fitted), cohort.scenes[row].warning))
    return CohortFit(own, tuned, scenes, dict(cohort.dropped))
