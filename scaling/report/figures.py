"""The numbers that a report is made of: a run's metrics, its scenes, and what N scenes cost, shared part included."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scaling.api.scenes import SceneLibrary, load_library
from scaling.config import Settings, as_noted, flatten, merge
from scaling.library.cohorts import cohort_folder
from scaling.library.manifest import Event, manifest_bytes
from scaling.library.parts import read_part
from scaling.library.run_folder import RunFolder
from scaling.library.summary import failed_scenes, gather
from scaling.storage.paths import uri_of

Curves = Mapping[str, Sequence[tuple[int, float]]]  # metric → (step, value), in increasing order of steps
MOST_POINTS = 60  # measured points in a chart


@dataclass(frozen=True)
class Cost:
    """What N scenes cost in all, in seconds or bytes: shared + N · each. Either is None where it is not known.

    measured: (N, total) as the library grew, shared part included.
    """

    shared: float | None
    each: float | None
    measured: Sequence[tuple[int, float]] = ()

    @property
    def is_known(self) -> bool:
        return self.shared is not None and self.each is not None

    def total(self, num_scenes: float) -> float:
        """shared + N · each. Raises ValueError where either is not known."""
        if self.shared is None or self.each is None:
            raise ValueError("the cost is not known")
        return self.shared + num_scenes * self.each

    def cheaper_from(self, other: Cost) -> float | None:
        """The number of scenes from which on this costs less than `other`; None where it never does.

        Raises ValueError where either cost is not known.
        """
        if self.shared is None or self.each is None or other.shared is None or other.each is None:
            raise ValueError("the cost is not known")
        if self.each >= other.each:
            return None
        return max(0.0, (self.shared - other.shared) / (other.each - self.each))


@dataclass(frozen=True)
class RunFigures:
    """One run of a report.

    label: its name, unique in the report; metrics: as in metrics.json; stage: the stage that is shown: 2, or 1 where
    stage 2 has fitted nothing; rows: the scenes of that stage, without planes; noted: see `noted_settings`; failed: the
    scenes that were given up.
    """

    run: RunFolder
    library: SceneLibrary
    label: str
    metrics: dict[str, Any]
    stage: int
    rows: pa.Table
    noted: dict[str, Any]
    seconds: Cost
    num_bytes: Cost
    failed: dict[str, Event]
    curves: Curves

    @property
    def of_stage(self) -> dict[str, Any]:
        """The metrics of the stage that the report shows."""
        return self.metrics if self.stage == 2 else self.metrics["stage1"]

    @property
    def fits_alone(self) -> bool:
        """Whether its scenes share no planes and no autoencoder, which makes it a baseline of the method."""
        noted = self.noted
        no_decoder = noted.get("autoencoder.kind") == "super_resolution" and not noted.get("autoencoder.decoder_blocks")
        return noted.get("representation.num_base_planes") == 0 and no_decoder

    def psnr(self) -> dict[str, float]:
        """Scene id → test PSNR in dB, for the scenes that have a finite one."""
        return {
            scene_id: value
            for scene_id, value in zip(self.rows["scene_id"].to_pylist(), self.rows["psnr"].to_pylist())
            if value is not None and math.isfinite(value)
        }

    def psnr_by_category(self) -> dict[str, tuple[float, int]]:
        """Category → mean test PSNR in dB, and the number of scenes that it is the mean of."""
        psnr, groups = self.psnr(), dict[str, list[float]]()
        for scene_id, category in zip(self.rows["scene_id"].to_pylist(), self.rows["category"].to_pylist()):
            if scene_id in psnr:
                groups.setdefault(category or "", []).append(psnr[scene_id])
        return {name: (float(np.mean(values)), len(values)) for name, values in groups.items()}


def read_figures(run: RunFolder, label: str, curves: Curves) -> RunFigures:
    """Gather the figures of a run.

    Raises FileNotFoundError where the run has no library, ValueError naming a part or a config.yaml that is damaged.
    """
    metrics, table = gather(run)
    fitted = [table.filter(pc.equal(table["stage"], stage)) for stage in (1, 2)]
    stage = 2 if len(fitted[1]) else 1
    shared_bytes = metrics["shared_bytes"]
    return RunFigures(
        run, load_library(uri_of(run.path)), label, metrics, stage, fitted[stage - 1], noted_settings(run),
        seconds=_seconds(_stage1_seconds(run, table), fitted[1]["seconds"].to_pylist(), metrics["seconds_per_scene"]),
        num_bytes=Cost(shared_bytes, metrics["bytes_per_scene"], _thinned(_measured_bytes(run, shared_bytes))),
        failed=failed_scenes(run, set(table["scene_id"].to_pylist())),
        curves=curves,
    )  # fmt: skip


def noted_settings(run: RunFolder) -> dict[str, Any]:
    """The settings of stage 2 as config.yaml notes them, flat; those of stage 1 where stage 2 was not started.

    `stage 1: num_scenes`, `stage 1: store` and the same keys of stage 2 hold the number of scenes and the store that
    each stage was given. Empty where config.yaml notes no stage. Raises ValueError where config.yaml is damaged.
    """
    noted = run.read_config()
    stages = {
        "stage1": noted.get("stage1") or run.stage1_run().read_config().get("stage1"),
        "stage2": noted.get("stage2"),
    }
    last = stages["stage2"] or stages["stage1"]
    if last is None:
        return {}
    # Keys that are newer than the run get the value that held at its time: from `as_noted`, else the default.
    settings = merge(Settings().model_dump(), as_noted(last["settings"]))
    if stages["stage2"] is None:
        del settings["stage2"]
    jobs = {
        f"{stage[:-1]} {stage[-1]}: {key}": values["job"].get(key)
        for stage, values in stages.items()
        if values is not None
        for key in ("num_scenes", "store")
    }
    return jobs | flatten(settings)


def _stage1_seconds(run: RunFolder, table: pa.Table) -> float | None:
    """Device seconds that the shared model took: the sum over stage 1's scenes, each of which notes its share.

    None where no library with these scenes is found, or one of them notes no seconds.
    """
    models = set(table["shared"].to_pylist())
    trained = table
    if not pc.any(pc.equal(table["stage"], 1)).as_py():
        trained = run.stage1_run().library.table(["stage", "shared", "seconds"])
    rows = trained.filter(pc.equal(trained["stage"], 1))
    seconds = [s for s, model in zip(rows["seconds"].to_pylist(), rows["shared"].to_pylist()) if model in models]
    return sum(seconds) if seconds and None not in seconds else None


def _seconds(shared: float | None, seconds: Sequence[float | None], each: float | None) -> Cost:
    known = [value for value in seconds if value is not None]
    if shared is None or len(known) < len(seconds):
        return Cost(shared, each)
    totals = shared + np.cumsum(known)
    return Cost(shared, each, _thinned(list(enumerate(totals.tolist(), 1))))


def _measured_bytes(run: RunFolder, shared_bytes: int) -> list[tuple[int, float]]:
    """(scenes, bytes in all) after each part of stage 2: the bytes of parts, cohorts' own copies, the manifest and the
    shared model."""
    total, seen, cohorts, points = shared_bytes + manifest_bytes(run.library.folder), set[str](), set[str](), []
    for path in run.library.parts():
        rows = read_part(path, ["scene_id", "stage", "cohort"])
        rows = rows.filter(pc.equal(rows["stage"], 2))
        if not len(rows):
            continue
        seen |= set(rows["scene_id"].to_pylist())
        total += path.stat().st_size
        for cohort in set(rows["cohort"].drop_null().to_pylist()) - cohorts:
            files = cohort_folder(run.library.folder, cohort).rglob("*")
            total += sum(file.stat().st_size for file in files if file.is_file())
            cohorts.add(cohort)
        points.append((len(seen), float(total)))
    return points


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most MOST_POINTS of the points, at equal ratios of N; the last point is always kept."""
    if len(points) <= MOST_POINTS:
        return list(points)
    places = np.geomspace(1, len(points), MOST_POINTS).round().astype(int) - 1
    return [points[place] for place in sorted(set(places.tolist()))]
