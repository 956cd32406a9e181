"""The actors of stage 2: each holds the shared model on its device and turns batches of scenes into committed parts."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import torch

from scaling.config import Settings, make_settings
from scaling.data.scene_ref import SceneError
from scaling.data.scene_views import SceneViews, views_from_row
from scaling.data.stores import SceneSource, SourceSpec
from scaling.distributed.stage2.messages import FITTED, Fitted, Outcome
from scaling.library.cohorts import commit_cohort
from scaling.library.failures import FailureLog, event
from scaling.library.parts import Part, commit_part, part_name
from scaling.library.run_folder import RunFolder, settings_hash
from scaling.library.scene_row import NotFinite, pack_scene, unpack_scene
from scaling.models.shared_files import load_shared
from scaling.models.shared_model import SharedModel
from scaling.storage import atomic
from scaling.storage.mirror import mirrored
from scaling.storage.paths import AnyPath, remove_tree, to_path
from scaling.storage.tensors import tensors_hash
from scaling.training import watchdog
from scaling.training.evaluate import evaluate_scene
from scaling.training.fit_cohort import CohortFit, fit_cohort, started_with
from scaling.training.fit_frozen import FittedScene, fit_scenes
from scaling.training.phase_loop import Diverged
from scaling.training.training_scene import prepare_scene


@dataclass(frozen=True)
class FitJob:
    """What an actor needs to know, in plain values. run, shared: as `paths.uri_of` returns them; spec: of a SourceSpec;
    epoch: of the driver's lease, the fencing token of its commits."""

    run: str
    shared: str
    settings: dict[str, Any]
    spec: tuple[str | None, int, int, str | None]
    epoch: int = 0


class Fitter:
    """What the actors of both modes have in common: the shared model, evaluation, commits."""

    def __init__(self, job: FitJob) -> None:
        # With more threads the order of sums, and so the planes, would depend on how many actors share the machine.
        torch.set_num_threads(1)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.settings = make_settings(job.settings)
        self.spec = SourceSpec(*job.spec)
        self.run = RunFolder(to_path(job.run))
        self.epoch = job.epoch
        with watchdog.Watchdog(self.settings.stage2.stall_seconds):  # nothing else would end a start that hangs
            self.shared, self.shared_hash = load_shared(to_path(job.shared), self.device)

    def ready(self) -> bool:
        """Return when the actor has started, that is, when its shared model is loaded."""
        return True

    def _finished_rows(
        self, model: SharedModel, cohort: str | None, scenes: Sequence[SceneViews], fitted: Sequence[Any]
    ) -> tuple[list[dict[str, Any]], list[Outcome]]:
        """Pack and evaluate fitted scenes. → library rows, and outcomes of scenes whose fit or evaluation failed."""
        rows, outcomes = [], []
        for views, result in zip(scenes, fitted, strict=True):
            if not isinstance(result, Exception):
                result = _attempt(partial(self._row, model, cohort, views, result))
            watchdog.beat()
            if isinstance(result, Exception):
                outcomes.append(Outcome(views.scene_id, _kind(result), f"{type(result).__name__}: {result}"))
            else:
                rows.append(result)
        return rows, outcomes

    def _row(self, model: SharedModel, cohort: str | None, views: SceneViews, fitted: FittedScene) -> dict[str, Any]:
        start = time.perf_counter()
        packed = vars(pack_scene(fitted.params, self.settings.stage2.micro_dtype))
        packing = time.perf_counter() - start
        stored = unpack_scene({**packed, "scene_id": views.scene_id})[None].to(self.device)  # as readers will see it
        metrics = evaluate_scene(model, stored, views)
        if not all(value is None or math.isfinite(value) for value in metrics.values()):
            raise NotFinite(f"the fit diverged: its renders are not finite ({metrics})")
        return {
            **packed, **metrics, "scene_id": views.scene_id,
            "category": views.category, "stage": 2, "shared": self.shared_hash, "cohort": cohort,
            "seconds": fitted.seconds + packing, "settings_hash": settings_hash(self.settings),
            "seed": self.settings.seed,
        }  # fmt: skip

    def _commit(self, rows: list[dict[str, Any]], attempt: int, batch: Sequence[str]) -> Part | None:
        name = part_name(self.epoch, attempt, batch)
        return commit_part(self.run.library.folder, rows, name) if rows else None


class SceneFitter(Fitter):
    """Mode frozen: the scenes of a batch share its cost and nothing else."""

    def fit(self, batch: pa.Table, attempt: int) -> Fitted:
        """Fit and commit a batch of store rows. Raises OSError where the part cannot be written."""
        with watchdog.Watchdog(self.settings.stage2.stall_seconds):
            scenes, unread = _decode(batch, self.settings.data.image_size)
            fitted = self._fit(scenes)
            rows, failed = self._finished_rows(self.shared, None, scenes, fitted)
            part = self._commit(rows, attempt, batch["scene_id"].to_pylist())
            return Fitted(unread + failed + _fitted(rows, fitted), part)

    def _fit(self, scenes: list[SceneViews]) -> list[FittedScene | Exception]:
        """Fit a batch together; where this raises (memory may be short), its halves, down to single scenes."""
        if not scenes:
            return []
        fitted = _attempt(lambda: self._fit_together(scenes))
        if not isinstance(fitted, Exception):
            return list(fitted)
        if len(scenes) == 1:
            return [fitted]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        middle = len(scenes) // 2
        return self._fit(scenes[:middle]) + self._fit(scenes[middle:])

    def _fit_together(self, scenes: list[SceneViews]) -> list[FittedScene]:
        return list(fit_scenes(self.shared, scenes, self.settings))


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
        return Fitted(outcomes + failed + _fitted(rows, done.scenes), part)

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


def _decode(batch: pa.Table, image_size: int) -> tuple[list[SceneViews], list[Outcome]]:
    """Decode store rows. → their scenes, and outcomes of the rows that cannot be used."""
    scenes, outcomes = [], []
    for row in batch.to_pylist():
        unread = row.pop("error")
        try:
            if unread:
                raise SceneError(row["scene_id"], "", unread)
            scenes.append(views_from_row(row, image_size))
        except SceneError as error:
            outcomes.append(Outcome(row["scene_id"], "bad input", str(error)))
    return scenes, outcomes


def _attempt(work: Callable[[], Any]) -> Any:
    """Call `work`. → what it returns, or the exception that it raised, without the frames that keep its tensors alive.

    A GPU that has failed fails every later call, too, so the process ends, and the driver starts another one. A full
    disk fails every scene, so its error is raised and ends the job.
    """
    try:
        return work()
    except torch.AcceleratorError:
        os._exit(1)
    except OSError as error:
        if error.errno in atomic.FULL:
            raise
        return error.with_traceback(None)
    except Exception as error:
        return error.with_traceback(None)


def _kind(error: Exception) -> str:
    """The kind of a failure: why a scene has no result."""
    if isinstance(error, NotFinite | Diverged):
        return "diverged"
    return "out of memory" if isinstance(error, torch.OutOfMemoryError | MemoryError) else "raised"


def _fitted(rows: Sequence[dict[str, Any]], fitted: Sequence[FittedScene | Exception]) -> list[Outcome]:
    told = {scene.scene_id: scene.warning for scene in fitted if not isinstance(scene, Exception)}
    return [Outcome(row["scene_id"], FITTED, told.get(row["scene_id"], ""), row["psnr"]) for row in rows]
