"""The actors of stage 2: each holds the shared model on its device and turns batches of scenes into committed parts."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from scaling import files
from scaling.config import make_settings
from scaling.data.scene_source import SceneSource, SourceSpec
from scaling.data.scenes import SceneError, SceneViews, views_from_row
from scaling.library.cohorts import commit_cohort
from scaling.library.fitted_scenes import NotFinite, commit_part, pack_scene, unpack_scene
from scaling.library.run_folder import RunFolder, settings_hash
from scaling.models.shared import SharedModel, load_shared
from scaling.training.cohort import CohortFit, fit_cohort
from scaling.training.evaluate import evaluate_scene
from scaling.training.phases import Diverged
from scaling.training.scene_data import prepare_scene
from scaling.training.stage2 import FittedScene, fit_scenes


@dataclass(frozen=True)
class FitJob:
    """What an actor needs to know, in plain values."""

    run: str
    shared: str
    settings: dict[str, Any]
    spec: tuple[str | None, int, int]


class Fitter:
    """What both modes have in common."""

    def __init__(self, job: FitJob) -> None:
        # With more, sums would be ordered by the number of actors that share the machine: planes would depend on it.
        torch.set_num_threads(1)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.settings = make_settings(job.settings)
        self.spec = SourceSpec(*job.spec)
        self.run = RunFolder(Path(job.run))
        self.shared, self.shared_hash = load_shared(Path(job.shared), self.device)

    def ready(self) -> bool:
        """Returns when the actor has started: its shared model is loaded."""
        return True

    def _finished_rows(
        self, model: SharedModel, cohort: str | None, scenes: Sequence[SceneViews], fitted: Sequence[Any]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Library rows of the scenes that were fitted, and outcomes of those whose result is an exception."""
        rows, outcomes = [], []
        for views, result in zip(scenes, fitted, strict=True):
            if not isinstance(result, Exception):
                result = _attempt(partial(self._row, model, cohort, views, result))
            if isinstance(result, Exception):
                kind = "diverged" if isinstance(result, NotFinite | Diverged) else "raised"
                outcomes.append(_outcome(views.scene_id, kind, f"{type(result).__name__}: {result}"))
            else:
                rows.append(result)
        return rows, outcomes

    def _row(self, model: SharedModel, cohort: str | None, views: SceneViews, fitted: FittedScene) -> dict[str, Any]:
        start = time.perf_counter()
        packed = vars(pack_scene(fitted.params, self.settings.stage2.micro_dtype))
        packing = time.perf_counter() - start
        stored = unpack_scene({**packed, "scene_id": views.scene_id})[None].to(self.device)  # what readers will see
        return {
            **packed, **evaluate_scene(model, stored, views), "scene_id": views.scene_id,
            "category": views.category, "stage": 2, "shared": self.shared_hash, "cohort": cohort,
            "seconds": fitted.seconds + packing, "settings_hash": settings_hash(self.settings),
            "seed": self.settings.seed,
        }  # fmt: skip

    def _commit(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if rows:
            commit_part(self.run.library.folder, rows)
        return [_outcome(row["scene_id"], "fitted", "", row["psnr"]) for row in rows]


class SceneFitter(Fitter):
    """Mode frozen: scenes of a batch share its cost and nothing else."""

    def fit(self, batch: pa.Table) -> list[dict[str, Any]]:
        """Fits and commits a batch of store rows. → one outcome a scene: scene_id, kind (`fitted` or why not),
        message, psnr."""
        scenes, unread = _decode(batch, self.settings.data.image_size)
        rows, failed = self._finished_rows(self.shared, None, scenes, self._fit(scenes))
        return unread + failed + self._commit(rows)

    def _fit(self, scenes: list[SceneViews]) -> list[FittedScene | Exception]:
        """A batch together; where that raises, each scene alone, so that one cannot take the others with it."""
        if not scenes:
            return []
        fitted = _attempt(lambda: list(fit_scenes(self.shared, scenes, self.settings)))
        if not isinstance(fitted, Exception):
            return list(fitted)
        return [fitted] if len(scenes) == 1 else [self._fit([views])[0] for views in scenes]


class CohortFitter(Fitter):
    """Mode cohort: fits the members of a cohort together, with a copy of the shared parts that moves with them."""

    def fit(self, members: pa.Table) -> list[dict[str, Any]]:
        """Fits and commits a cohort, or goes on from its last epoch. members: scene ids; their rows are read here, as
        those of a large cohort would not fit the object store. → one outcome a scene."""
        scenes: list[SceneViews] = []
        outcomes: list[dict[str, Any]] = []
        source = self.spec.open()
        for scene_id in members["scene_id"].to_pylist():
            result = _attempt(partial(self._read, source, scene_id))
            if isinstance(result, Exception):
                outcomes.append(_outcome(scene_id, "bad input", str(result)))
            else:
                scenes.append(result)
        if not scenes:
            return outcomes
        folder = self._checkpoints([views.scene_id for views in scenes])
        done = _attempt(lambda: fit_cohort(self.shared, self.shared_hash, scenes, self.settings, folder))
        if isinstance(done, Exception):
            _, failed = self._finished_rows(self.shared, None, scenes, [done] * len(scenes))
            return outcomes + failed
        outcomes += [_outcome(scene_id, "diverged", why) for scene_id, why in done.left_out.items()]
        outcomes += self._finish(done, {views.scene_id: views for views in scenes})
        shutil.rmtree(folder, ignore_errors=True)
        return outcomes

    def _read(self, source: SceneSource, scene_id: str) -> SceneViews:
        views = views_from_row(next(iter(source.rows([scene_id]))), self.settings.data.image_size)
        prepare_scene(self.shared, views)  # a scene beside the box is told here: it must not stop its cohort
        return views

    def _finish(self, done: CohortFit, views: dict[str, SceneViews]) -> list[dict[str, Any]]:
        if not done.scenes:
            return []
        ids = [scene.scene_id for scene in done.scenes]
        library = self.run.library.folder
        cohort = commit_cohort(library, done.tuned, self.shared_hash, ids) if done.tuned else None
        rows, failed = self._finished_rows(done.shared, cohort, [views[scene_id] for scene_id in ids], done.scenes)
        return failed + self._commit(rows)

    def _checkpoints(self, ids: list[str]) -> Path:
        """A folder for these members, settings and shared model; another job's checkpoints never lie there."""
        job = "|".join([self.shared_hash, settings_hash(self.settings), *ids])
        return self.run.checkpoints / "cohorts" / hashlib.sha256(job.encode()).hexdigest()[:20]


def _decode(batch: pa.Table, image_size: int) -> tuple[list[SceneViews], list[dict[str, Any]]]:
    """The scenes of store rows, and outcomes of those that cannot be used."""
    scenes, outcomes = [], []
    for row in batch.to_pylist():
        unread = row.pop("error")
        try:
            if unread:
                raise SceneError(row["scene_id"], "", unread)
            scenes.append(views_from_row(row, image_size))
        except SceneError as error:
            outcomes.append(_outcome(row["scene_id"], "bad input", str(error)))
    return scenes, outcomes


def _attempt(work: Callable[[], Any]) -> Any:
    """What `work` returns, or the exception that it raised, without the frames that would keep its tensors alive.

    A GPU that has failed fails every later call too, so the process ends, and the driver starts another one. A full
    disk fails every scene: it is raised, and ends the job.
    """
    try:
        return work()
    except torch.AcceleratorError:
        os._exit(1)
    except OSError as error:
        if error.errno in files.FULL:
            raise
        return error.with_traceback(None)
    except Exception as error:
        return error.with_traceback(None)


def _outcome(scene_id: str, kind: str, message: str, psnr: float | None = None) -> dict[str, Any]:
    return {"scene_id": scene_id, "kind": kind, "message": message, "psnr": psnr}
