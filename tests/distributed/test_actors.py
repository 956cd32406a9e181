"""What an actor of stage 2 does with a batch in which something is wrong, and when its device hangs."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.tiny_run import train_shared

from scaling.config import Settings
from scaling.data.embedded.scenes import embedded_ids
from scaling.data.scene_store import SCHEMA
from scaling.data.stores import SourceSpec
from scaling.distributed.stage2.actors import FitJob, SceneFitter
from scaling.distributed.stage2.dispatcher import Dispatcher
from scaling.distributed.stage2.messages import FITTED, Counts, Fitted, Outcome, Piece
from scaling.distributed.stage2.pieces import MOST_TOLD
from scaling.training.training_scene import EncodedScene

IDS = embedded_ids(7)[2:]


class ShortOfMemory(SceneFitter):
    """Holds two scenes at a time, and never `too_large`."""

    too_large = IDS[3]
    sizes: list[int]

    def _fit_together(self, scenes: list[EncodedScene]) -> list:
        self.sizes.append(len(scenes))
        if len(scenes) > 2 or self.too_large in [scene.scene_id for scene in scenes]:
            raise torch.OutOfMemoryError("out of memory")
        return super()._fit_together(scenes)


@pytest.fixture
def job(tiny_settings: Settings, tiny_scenes, tmp_path: Path) -> FitJob:
    train_shared(tiny_settings, tiny_scenes[:2], tmp_path / "shared")
    spec = SourceSpec.of(None, tiny_settings.data)
    return FitJob(str(tmp_path / "run"), str(tmp_path / "shared"), tiny_settings.model_dump(), astuple(spec), epoch=3)


def batch(job: FitJob) -> pa.Table:
    rows = [{**row, "error": None} for row in SourceSpec(*job.spec).open().rows(IDS)]
    return pa.Table.from_pylist(rows, schema=SCHEMA.append(pa.field("error", pa.string())))


def test_a_batch_that_does_not_fit_memory_is_halved(job):
    """5 scenes → 2 + 3 → 2 + 1 + 2 → …: the scene that does not fit alone is recorded, the others are fitted."""
    fitter = ShortOfMemory(job)
    fitter.sizes = []
    done = fitter.fit(batch(job), attempt=7)
    assert fitter.sizes == [5, 2, 3, 1, 2, 1, 1]
    kinds = {outcome.scene_id: outcome.kind for outcome in done.outcomes}
    assert kinds == dict.fromkeys(IDS, FITTED) | {IDS[3]: "out of memory"}
    assert done.part is not None and set(done.part.scene_ids) == set(IDS) - {IDS[3]}
    assert done.part.name.startswith("part-000003-0007-")


@pytest.mark.parametrize("overlaps", [False, True])
def test_batches_in_a_pipeline_become_what_they_become_alone(job, overlaps):
    """Three batches at once in one actor, one of which does not fit memory: the same bytes as one after the other."""
    rows = [batch(job).slice(start, size) for start, size in ((0, 2), (2, 2), (4, 1))]
    alone = ShortOfMemory(replace(job, run=f"{job.run}-alone"))
    alone.sizes = []
    expected = [alone.fit(part, attempt=1) for part in rows]
    fitter = ShortOfMemory(replace(job, overlaps=overlaps))
    fitter.sizes = []
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(partial(fitter.fit, attempt=1), rows))
    assert [done.outcomes for done in found] == [done.outcomes for done in expected]
    tables = [
        pq.read_table(of.run.library.folder / "parts" / done.part.name).drop_columns(["seconds"])
        for of, all_done in ((fitter, found), (alone, expected))
        for done in all_done
    ]
    assert sum(map(len, tables)) == 2 * 4 and tables[:3] == tables[3:]


def test_what_lies_outside_of_the_box_reaches_the_user(job, capsys):
    """A box that holds no more than the corner of a car: the actor's outcome says so, and the driver prints it."""
    fitter = SceneFitter(job)
    fitter.shared.renderer.box.corners.copy_(torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.1, 0.1]]))
    done = fitter.fit(batch(job).slice(0, 2), attempt=1)
    assert [outcome.kind for outcome in done.outcomes] == [FITTED] * 2
    assert all(f"scene {outcome.scene_id}: " in outcome.message for outcome in done.outcomes)
    assert all("lies outside of the box from [0, 0, 0]" in outcome.message for outcome in done.outcomes)

    driver = Dispatcher(lambda: None, lambda: 1, max_attempts=1, deadline=1.0, accounts=None)
    rest = [Outcome(f"car-{n}", FITTED, "told") for n in range(2 * MOST_TOLD)]
    counts = Counts(total=100)
    driver.pieces.settle(
        Piece(pa.table({"scene_id": []})), Fitted([*done.outcomes, Outcome("quiet", FITTED), *rest], None), counts
    )
    told = capsys.readouterr().out.splitlines()
    assert counts.done == 3 + 2 * MOST_TOLD
    assert told[:2] == [f"warning: {outcome.message}" for outcome in done.outcomes]
    assert len(told) == MOST_TOLD and told[-1] == "warning: told (further warnings are not shown)"


def test_a_process_that_does_no_step_ends_itself():
    """Also while it is stuck outside Python; one that beats lives on."""
    code = """
import ctypes, time
from scaling.training.watchdog import Watchdog, beat
with Watchdog(0.6):
    for _ in range(10):
        time.sleep(0.1)
        beat()
print("alive", flush=True)
with Watchdog(0.6):
    ctypes.CDLL(None).sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (1, "alive\n")
    assert "Timeout (0:00:00.600000)!" in done.stderr and "<string>" in done.stderr
