"""Actors for the dispatcher's tests; in a module of their own, so that Ray's workers import them by name."""

from __future__ import annotations

import errno
import os
import time

import pyarrow as pa
import ray

from scaling.distributed.stage2.messages import FITTED, Fitted, Outcome
from scaling.library.manifest import Event
from scaling.library.parts import Part


class Books:
    """Accounts in memory. committed: what `find` finds, by ids."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.committed: dict[tuple[str, ...], Part] = {}

    def check(self) -> None:
        pass

    def find(self, attempt: int, batch: list[str]) -> Part | None:
        return self.committed.get(tuple(batch))

    def add(self, part: Part) -> None:
        pass

    def record(self, events: list[Event]) -> None:
        self.events += events

    def kinds(self, scene_id: str) -> list[str]:
        return [event.kind for event in self.events if event.scene_id == scene_id]


@ray.remote(max_restarts=0, max_task_retries=0)
class FragileActor:
    """Fits anything, reports scenes named bad-*, dies at deadly-*, hangs at slow-*, and its first write of flaky-*
    fails."""

    def __init__(self, fails: bool = False) -> None:
        if fails:
            os._exit(1)

    def ready(self) -> bool:
        return True

    def fit(self, rows: pa.Table, attempt: int) -> Fitted:
        ids = rows["scene_id"].to_pylist()
        if any(scene_id.startswith("deadly") for scene_id in ids):
            os._exit(1)
        if any(scene_id.startswith("slow") for scene_id in ids):
            time.sleep(600)
        if any(scene_id.startswith("flaky") for scene_id in ids) and attempt == 1:
            raise OSError("the store does not answer")
        kinds = {scene_id: "bad input" if scene_id.startswith("bad") else FITTED for scene_id in ids}
        return Fitted([Outcome(scene_id, kind, "m", 20.0) for scene_id, kind in kinds.items()], None)


@ray.remote(max_restarts=0, max_task_retries=0)
class FullDiskActor:
    """Fits nothing: its commit finds the disk full."""

    def ready(self) -> bool:
        return True

    def fit(self, rows: pa.Table, attempt: int) -> Fitted:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "RUN/library/parts/part-1.parquet")
