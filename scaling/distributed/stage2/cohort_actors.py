"""The actors of stage 2 in mode cohort: each fits the members of a cohort together."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from scaling.config import Settings
from scaling.data.scene_views import SceneViews, views_from_row
from scaling.data.stores import SceneSource
from scaling.distributed.stage2.actors import Fitter, fitted_outcomes
from scaling.distributed.stage2.messages import Fitted, Outcome
from scaling.library.cohorts import commit_cohort
from scaling.library.failures import FailureLog, event
from scaling.library.run_folder import RunFolder, settings_hash
from scaling.storage.mirror import mirrored
from scaling.storage.paths import AnyPath, remove_tree
from scaling.storage.tensors import tensors_hash
from scaling.training import watchdog
from scaling.training.fit_cohort import CohortFit, fit_cohort, started_with
from scaling.training.phase_loop import Diverged
from scaling.training.training_scene import prepare_scene


@dataclass(frozen=True)
class _Members:
    """The views of a cohort's members. Each iteration decodes them anew, as all of them at once would fill memory."""

    source: SceneSource
    ids: list[str]
    image_size: int

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, views: object) -> bool:
        return isinstance(views, SceneViews) and views.scene_id in self.ids

    def __iter__(self) -> Iterator[SceneViews]:
        for row in self.source.rows(self.ids):
            yield views_from_row(row, self.image_size)


class CohortFitter(Fitter):
    """Mode cohort: fits the members of a cohort together, with a copy of the shared parts that they fine-tune."""

    def fit(self, members: pa.Table, attempt: int) -> Fitted:
        """Fit and commit a cohort, or resume it at its last epoch.

        members: scene ids. Their rows are read here, as those of a large cohort would not fit into Ray's object store.
        Raises an error that is no member's own (a disk, the GPU's memory): the job ends, and the next one resumes here.
        """
        with watchdog.Watchdog(self.settings.stage2.stall_seconds):
            return self._fit(members["scene_id"].to_pylist(), attempt)

    def _fit(self, members: list[str], attempt: int) -> Fitted:
        # A member that cannot be used must not stop its cohort, so members are checked one by one before the fit.
        source, outcomes, ids = self.spec.open(), [], []
        for scene_id in members:
            unusable = self._unusable(source, scene_id)
            watchdog.beat()
            if unusable is None:
                ids.append(scene_id)
            else:
                outcomes.append(Outcome(scene_id, "bad input", unusable))
        if not ids:
            return Fitted(outcomes, None)
        scenes = _Members(source, ids, self.settings.data.image_size)
        folder = cohort_checkpoints(self.run, self.shared_hash, self.settings, members)
        try:
            done = self._fit_members(scenes, folder)
        except Diverged as error:
            return Fitted(outcomes + [Outcome(scene_id, "diverged", str(error)) for scene_id in ids], None)
        except torch.AcceleratorError:
            os._exit(1)  # the GPU fails every later call too
        outcomes += [Outcome(scene_id, "diverged", why) for scene_id, why in done.left_out.items()]
        rows, failed = self._finish(done, scenes, attempt)
        part = self._commit(rows, attempt, members)
        remove_tree(folder)
        return Fitted(outcomes + failed + fitted_outcomes(rows, done.scenes), part)

    def _fit_members(self, scenes: _Members, folder: AnyPath) -> CohortFit:
        with mirrored(folder) as (local, bring_back):
            # Where a member could be read then and cannot now, or the other way round, the cohort starts over.
            if not started_with(local, scenes.ids):
                remove_tree(local)
            return fit_cohort(
                self.shared, self.shared_hash, scenes, self.settings, local, on_epoch=lambda report: bring_back()
            )

    def _unusable(self, source: SceneSource, scene_id: str) -> str | None:
        """Why a scene cannot be fitted with its cohort; None where it can."""
        try:
            views = views_from_row(next(iter(source.rows([scene_id]))), self.settings.data.image_size)
            prepare_scene(self.shared, views)
        except (OSError, ValueError) as error:
            return str(error)
        return None

    def _finish(self, done: CohortFit, scenes: _Members, attempt: int) -> tuple[list[dict[str, Any]], list[Outcome]]:
        """Commit the cohort's copy of the shared parts. → library rows, and outcomes of the scenes that failed.

        Members that were left out are recorded first, so that a run resumed after a crash does not try them as new.
        """
        log = FailureLog(self.run.failures, self.epoch)
        log.add(event(scene_id, attempt, "diverged", why) for scene_id, why in done.left_out.items())
        fitted = {scene.scene_id: scene for scene in done.scenes}
        cohort = tensors_hash(done.tuned) if done.tuned else None
        rows, failed = [], []
        for views in scenes:
            if views.scene_id in fitted:
                finished, unfinished = self._finished_rows(done.shared, cohort, [views], [fitted[views.scene_id]])
                rows += finished
                failed += unfinished
        if rows and done.tuned:
            commit_cohort(self.run.library.folder, done.tuned, self.shared_hash, [row["scene_id"] for row in rows])
        return rows, failed


def cohort_checkpoints(run: RunFolder, shared_hash: str, settings: Settings, ids: Sequence[str]) -> AnyPath:
    """The folder of a cohort's checkpoints. Its name is a hash of the shared model, the settings and the members."""
    job = "|".join([shared_hash, settings_hash(settings), *ids])
    return run.checkpoints / "cohorts" / hashlib.sha256(job.encode()).hexdigest()[:20]
