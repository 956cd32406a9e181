"""Writes a scene store: parts of rows in order, a table of rejected scenes, and store.json, written last."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scaling.data.scene_id import check_scene_id
from scaling.data.scene_store import (
    FORMAT_VERSION,
    REJECTS_SCHEMA,
    SCENES_PER_PART,
    SCENES_PER_ROW_GROUP,
    SCHEMA,
    is_file,
    part_paths,
    store_root,
)
from scaling.storage.atomic import replace_file, sync_file
from scaling.storage.lease import Lease
from scaling.storage.links import refuse_links
from scaling.storage.own_folder import claim_folder
from scaling.storage.parquet import table_bytes
from scaling.storage.paths import open_uri

FARTHEST = 10.0  # usual sizes: larger scenes, or scenes farther away, do not count for the box of all
OUTLIER = f"it is more than {FARTHEST:g} times as large as most scenes, or as far away"


class StoreWriter:
    """Context manager that writes a store. Rows keep the order in which they are added.

    store.json is written when the block ends without an exception; only then is the store complete. What an interrupted
    writer left is replaced. Raises at the start of the block FileExistsError where the folder holds a complete store or
    files of somebody else's, LeaseHeld where another process writes there; at its end LeaseLost where another process
    has taken over, and ValueError where no scene was added.
    """

    def __init__(self, store_uri: str | Path, source: str) -> None:
        self.uri = str(store_uri)
        self.source = str(source)
        self.rejects: list[dict[str, str]] = []
        self.notes: dict[str, list[str]] = {}  # note → scenes
        self.no_bounds: dict[str, list[str]] = {}  # why a scene's views do not tell where it is → scenes
        self.backgrounds: dict[str, list[str]] = {}  # colour, for people → scenes
        self._ids: set[str] = set()
        self._has_splits = False
        self._bounds: dict[str, NDArray[np.float64]] = {}
        self._rows: list[Mapping[str, Any]] = []
        self._parts: list[str] = []
        self._part: pq.ParquetWriter | None = None
        self.filesystem, self.path = open_uri(store_uri)
        self.root = store_root(self.filesystem, self.path, self.uri)
        self._lease: Lease | None = None

    @property
    def num_scenes(self) -> int:
        return len(self._ids)

    def __enter__(self) -> StoreWriter:
        self._check_new()
        claim_folder(self.root, "scene store")
        self._lease = Lease.take(self.root / "leases", 1)
        try:
            self._check_new()  # the writer that was waited for may have finished
            for path in part_paths(self.filesystem, self.path):
                self.filesystem.delete_file(path)
            if isinstance(self.root, Path):  # pyarrow does not list links to nothing, but would write through them
                refuse_links(*self.root.glob("scenes-*"))
        except BaseException:
            self._lease.release()
            raise
        return self

    def _check_new(self) -> None:
        if is_file(self.filesystem, f"{self.path}/store.json"):
            raise FileExistsError(f"{self.uri} already holds a scene store: choose another --store")

    def add(self, row: Mapping[str, Any], bounds: Sequence[Sequence[float]] | str | None = None) -> bool:
        """Add a row made by `scene_views.make_row`. → False where it is rejected: its id is bad or is in the store.

        bounds: low and high corner of the cuboid around the scene; a text that says why its views do not tell; None:
        not measured.
        """
        scene_id = row["scene_id"]
        try:
            check_scene_id(scene_id)
        except ValueError as error:
            self.reject(str(scene_id), row["source"], "", str(error))
            return False
        if scene_id in self._ids:
            self.reject(scene_id, row["source"], "", "another scene of this source has the same id; that one was kept")
            return False
        self._ids.add(scene_id)
        self._has_splits = self._has_splits or bool(row.get("split"))
        if isinstance(bounds, str):
            self.no_bounds.setdefault(bounds, []).append(scene_id)
        elif bounds is not None:
            self._bounds[scene_id] = np.asarray(bounds, dtype=np.float64)
        self._rows.append(row)
        if len(self._rows) == SCENES_PER_ROW_GROUP:
            self._flush()
        if self.num_scenes % SCENES_PER_PART == 0:
            self._close_part()
        return True

    def note(self, scene_id: str, notes: Sequence[str]) -> None:
        """Remember what was taken otherwise than it stands in the source, for people."""
        for note in notes:
            self.notes.setdefault(note, []).append(scene_id)

    def reject(self, scene_id: str, source: str, file: str, reason: str) -> None:
        """Record a scene that is left out of the store, and why."""
        self.rejects.append({"scene_id": scene_id, "source": source, "file": file, "reason": reason})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # After an error the part is closed, but without store.json the store stays incomplete.
        try:
            if kind is not None:
                self._rows.clear()
            self._close_part()
            if kind is None:
                self._finish()
        finally:
            with suppress(OSError):
                if self._lease:
                    self._lease.release()

    def set_outliers_apart(self) -> None:
        """Leave the bounds of scenes out that are far larger than most, or far away: one wrong camera would make the
        box of all scenes useless. They move to `no_bounds`."""
        if not self._bounds:
            return
        every = np.stack(list(self._bounds.values()))
        sides, middles = (every[:, 1] - every[:, 0]).max(1), every.mean(1)
        usual = np.median(sides)
        away = np.abs(middles - np.median(middles, axis=0)).max(1)
        for scene_id, side, distance in zip(list(self._bounds), sides, away):
            if max(side, distance) > FARTHEST * usual:
                del self._bounds[scene_id]
                self.no_bounds.setdefault(OUTLIER, []).append(scene_id)

    def _finish(self) -> None:
        """Write the rejects and store.json."""
        assert self._lease is not None
        self.set_outliers_apart()
        self._lease.check_now()
        # The rejects are written even where no scene is left: they tell why.
        rejects = pa.Table.from_pylist(self.rejects, schema=REJECTS_SCHEMA)
        replace_file(self.root / "rejects.parquet", table_bytes(rejects, use_dictionary=False))
        if not self._ids:
            first = self.rejects[0] if self.rejects else {"scene_id": "-", "reason": "no scenes were given"}
            raise ValueError(
                f"no scene of {self.source} could be used, {len(self.rejects)} were rejected; "
                f"the first, {first['scene_id']}: {first['reason']} (all of them: {self.uri}/rejects.parquet)"
            )
        described = {
            "format_version": FORMAT_VERSION if self._has_splits else 1,
            "num_scenes": self.num_scenes,
            "source": self.source,
            "bounds": _union(list(self._bounds.values())),
            "no_bounds": {} if self._bounds else {why: ids[:100] for why, ids in self.no_bounds.items()},
            "parts": self._parts,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._lease.check_now()
        replace_file(self.root / "store.json", json.dumps(described, indent=1).encode() + b"\n")

    def _flush(self) -> None:
        """Write the waiting rows as one row group."""
        if not self._rows:
            return
        if self._part is None:
            assert self._lease is not None
            self._lease.check_now()
            # A writer that was paused while another one took over has names of its own, which store.json does not list.
            number, epoch = (self.num_scenes - 1) // SCENES_PER_PART, self._lease.epoch
            self._parts.append(f"scenes-{number:05d}{'' if epoch == 1 else f'-{epoch:06d}'}.parquet")
            self._part = pq.ParquetWriter(
                f"{self.path}/{self._parts[-1]}",
                SCHEMA,
                filesystem=self.filesystem,
                compression="none",  # PNGs are compressed already
                use_dictionary=False,
                write_statistics=["scene_id", "category"],
            )
        rows = [{"split": "", **row} for row in self._rows]
        self._part.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), row_group_size=SCENES_PER_ROW_GROUP)
        self._rows.clear()

    def _close_part(self) -> None:
        self._flush()
        if self._part is not None:
            self._part.close()
            self._part = None
            assert self._lease is not None
            self._lease.check_now()  # the writer that took over has removed this part
            if isinstance(self.root, Path):  # store.json must not outlive a power loss that its parts do not
                sync_file(self.root / self._parts[-1])


def _union(bounds: Sequence[NDArray[np.float64]]) -> list[list[float]] | None:
    if not bounds:
        return None
    every = np.stack(bounds)
    return [every[:, 0].min(0).tolist(), every[:, 1].max(0).tolist()]
