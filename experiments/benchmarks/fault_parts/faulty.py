"""For faults.py: a fitter that fails on demand. It has a module of its own, because Ray's workers import it by name.

The folder that the environment variable SCALING_FAULTS names holds:
poison.json: the scenes that crash, raise or diverge;
tokens/<kind>-<number>: faults to come; one fitter takes a token, moves it to taken/ and does what it says;
pids/<pid>: one file for each fitter that has started;
fits/<pid>.txt: the scenes that a fitter has begun, one line for each batch.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from scaling.distributed.stage2.actors import FitJob, SceneFitter
from scaling.distributed.stage2.messages import Fitted
from scaling.library.parts import Part
from scaling.models.triplanes import SceneParams
from scaling.training.fit_frozen import FittedScene
from scaling.training.training_scene import EncodedScene

AT_FIT = ("hang",)
AT_COMMIT = ("torn write", "failing write", "full disk", "death after commit")


class FaultyFitter(SceneFitter):
    """What an actor of the campaign runs: real fits, except for the faults."""

    def __init__(self, job: FitJob) -> None:
        self.folder = Path(os.environ["SCALING_FAULTS"])
        super().__init__(job)
        self.poison: dict[str, list[str]] = json.loads((self.folder / "poison.json").read_text())
        (self.folder / "pids" / str(os.getpid())).touch()

    def fit(self, batch: pa.Table, attempt: int) -> Fitted:
        """Fit the batch as usual, unless a scene crashes the process or a token makes it hang."""
        ids = batch["scene_id"].to_pylist()
        with (self.folder / "fits" / f"{os.getpid()}.txt").open("a") as file:
            file.write(" ".join(ids) + "\n")
        if set(ids) & set(self.poison["crash"]):
            os._exit(1)
        if self._take(AT_FIT):
            time.sleep(3600)
        return super().fit(batch, attempt)

    def _fit_together(self, scenes: list[EncodedScene]) -> list[FittedScene]:
        if {scene.scene_id for scene in scenes} & set(self.poison["raise"]):
            raise ArithmeticError("a scene that raises")
        fitted = super()._fit_together(scenes)
        return [self._spoilt(scene) if scene.scene_id in self.poison["diverge"] else scene for scene in fitted]

    def _spoilt(self, scene: FittedScene) -> FittedScene:
        params = SceneParams(scene.params.micro_planes * float("nan"), scene.params.coefs)
        return replace(scene, params=params)

    def _commit(self, rows: list[dict[str, Any]], attempt: int, batch: Sequence[str]) -> Part | None:
        kind = self._take(AT_COMMIT) if rows else None
        if kind == "failing write":
            raise OSError(errno.EIO, os.strerror(errno.EIO), "a write that fails once")
        if kind == "full disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a disk that is full for a while")
        if kind == "torn write":  # the temporary file that a crash in the middle of writing would leave
            parts = self.run.library.folder / "parts"
            assert isinstance(parts, Path)
            parts.mkdir(parents=True, exist_ok=True)
            (parts / f".part-{os.getpid()}.torn").write_bytes(b"PAR1" + bytes(1000))
            os._exit(1)
        part = super()._commit(rows, attempt, batch)
        if kind == "death after commit":
            os._exit(1)
        return part

    def _take(self, kinds: Sequence[str]) -> str | None:
        """Take a token of one of the kinds, if there is one. → its kind. Only one fitter gets a token, because renaming
        is atomic."""
        for token in sorted((self.folder / "tokens").iterdir()):
            kind = token.name.rpartition("-")[0]
            if kind in kinds:
                try:
                    token.rename(self.folder / "taken" / token.name)
                except FileNotFoundError:
                    continue
                return kind
        return None
