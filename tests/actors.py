"""Actors for the dispatcher's tests; in a module of their own, so that Ray's workers import them by name."""

from __future__ import annotations

import errno
import os
from typing import Any

import pyarrow as pa
import ray


@ray.remote(max_restarts=0, max_task_retries=0)
class FragileActor:
    """Fits anything, reports scenes named bad-*, and dies at scenes named deadly-*."""

    def ready(self) -> bool:
        return True

    def fit(self, rows: pa.Table) -> list[dict[str, Any]]:
        ids = rows["scene_id"].to_pylist()
        if any(scene_id.startswith("deadly") for scene_id in ids):
            os._exit(1)
        kinds = {scene_id: "bad input" if scene_id.startswith("bad") else "fitted" for scene_id in ids}
        return [{"scene_id": s, "kind": kind, "message": "m", "psnr": 20.0} for s, kind in kinds.items()]


@ray.remote(max_restarts=0, max_task_retries=0)
class FullDiskActor:
    """Fits nothing: its commit finds the disk full."""

    def ready(self) -> bool:
        return True

    def fit(self, rows: pa.Table) -> list[dict[str, Any]]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "RUN/library/parts/part-1.parquet")
