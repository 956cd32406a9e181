"""Mode cohort: fits scenes together and fine-tunes a copy of the shared model's base planes, field and decoder on them.

2a and 2b as stage 2 names them, but with every rate in use (paper, section on learning the remaining scenes; there one
cohort holds all scenes). The encoder never moves. A scene whose numbers are no longer finite is left out: the epoch
starts again without it, from the state before it.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scaling.config import Phase, Settings
from scaling.data.scenes import SceneViews
from scaling.models.shared import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.training.checkpoint import load_checkpoint, load_optimisers, save_checkpoint
from scaling.training.phases import Diverged, EpochReport, Phases, PhaseStep
from scaling.training.scene_data import encode_scene
from scaling.training.stage2 import PHASES, FittedScene, start_params
from scaling.training.streams import stream
from scaling.training.workers import Workers


@dataclass(frozen=True)
class CohortFit:
    """shared: the cohort's own model, frozen; tuned: those of its tensors that differ from the model it started from;
    scenes: the fitted members, in their order; left_out: members that diverged, and how."""

    shared: SharedModel
    tuned: dict[str, Tensor]
    scenes: list[FittedScene]
    left_out: dict[str, str]


class Cohort(Phases):
    """One cohort from its start; `shared` is copied, not moved."""

    def __init__(self, shared: SharedModel, shared_hash: str, scenes: Sequence[SceneViews], settings: Settings) -> None:
        began = time.perf_counter()
        own = copy.deepcopy(shared)
        phases = {name: getattr(settings.stage2, name) for name in PHASES}
        super().__init__(
            settings,
            own,
            scenes,
            table=start_params(shared, settings, [views.scene_id for views in scenes]),
            phases={name: phase for name, phase in phases.items() if phase.num_epochs},
            identity={
                "scene_ids": [views.scene_id for views in scenes],
                "settings": settings.model_dump(),
                "shared": shared_hash,
            },
            buckets={views.scene_id: 0 for views in scenes},
            workers=Workers(device=shared.device),
        )
        if settings.stage2.start == "random":
            self._start_field_anew()
        if any(phase.lr.decoder for phase in self.phases.values()):
            own.adapt_decoder()
        for scene in self.scenes:
            encode_scene(own, scene)
        self.seconds = time.perf_counter() - began

    def _start_field_anew(self) -> None:
        """As published: the field of stage 2 starts as stage 1's did, with random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(self.settings.seed, "field").initial_seed())
            self.shared.field.load_state_dict(self.shared.new_field().state_dict())

    def go_on(self, on_epoch: Callable[[EpochReport], None], last: Path | None) -> None:
        """The phases from where they stand; last: the checkpoint that they stand at, None at the start."""
        self.run_phases(self._enter, on_epoch, (lambda: load_optimisers(self, last)) if last else None)

    def _enter(self, name: str, phase: Phase) -> PhaseStep:
        return PhaseStep(self.shared, phase)


def fit_cohort(
    shared: SharedModel,
    shared_hash: str,
    scenes: Sequence[SceneViews],
    settings: Settings,
    folder: Path,
    on_epoch: Callable[[EpochReport], None] | None = None,
) -> CohortFit:
    """Fits the cohort, or goes on from the last epoch that `folder` holds; on_epoch is called after every epoch.

    Raises Diverged where numbers are not finite and no scene is to blame, SettingsError where `folder` belongs to
    another job.
    """

    def save(report: EpochReport) -> None:
        _save(cohort, folder, report.epochs_done)
        if on_epoch is not None:
            on_epoch(report)

    cohort = _resumed(Cohort(shared, shared_hash, scenes, settings), folder)
    while len(cohort.dropped) < len(scenes):
        try:
            cohort.go_on(save, _last(folder))
            break
        except Diverged as error:
            if not error.scene_ids:
                raise
            known = cohort.dropped | {scene_id: str(error) for scene_id in error.scene_ids}
            cohort = _resumed(Cohort(shared, shared_hash, scenes, settings), folder)
            cohort.dropped = known
    return _result(cohort, shared)


def _resumed(cohort: Cohort, folder: Path) -> Cohort:
    last = _last(folder)
    if last:
        load_checkpoint(cohort, last)
    return cohort


def _save(cohort: Cohort, folder: Path, epochs_done: int) -> None:
    """A checkpoint becomes visible whole, and then its forerunners go."""
    older = _checkpoints(folder)
    writing, final = folder / ".writing", folder / f"epoch-{epochs_done:05d}"
    shutil.rmtree(writing, ignore_errors=True)
    save_checkpoint(cohort, writing)
    writing.rename(final)
    for path in older:
        shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch-*"))


def _last(folder: Path) -> Path | None:
    return next(reversed(_checkpoints(folder)), None)


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
        params = SceneParams(cohort.table.micro_planes[row].detach(), cohort.table.coefs[row].detach())
        scenes.append(FittedScene(scene_id, params, cohort.seconds / len(fitted)))
    return CohortFit(own, tuned, scenes, dict(cohort.dropped))
