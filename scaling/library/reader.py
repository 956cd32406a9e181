"""Reads a library of fitted scenes: the parts that count, by its manifest and the epoch in force."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from scaling.library.cohorts import cohort_folder
from scaling.library.manifest import Manifest, manifest_bytes, read_manifest
from scaling.library.parts import Part, is_part, order, read_part, read_scenes
from scaling.library.row_schema import PLANES, SCHEMA
from scaling.storage.paths import AnyPath

TRIES = 3  # to read: compaction may join and delete parts meanwhile


@dataclass(frozen=True)
class Snapshot:
    """What counts at one moment. paths: the parts that count, in order: a scene's first row counts; missing: names of
    parts that the manifest lists and that do not exist."""

    manifest: Manifest
    paths: list[AnyPath]
    missing: list[str]

    def listed(self, path: AnyPath) -> Part | None:
        """What the manifest says of a part; None where the part was committed after the manifest."""
        return self.manifest.parts.get(path.name)


class Library:
    """A library's folder. If two parts hold a scene, the part with the smallest epoch and attempt counts."""

    def __init__(self, folder: AnyPath) -> None:
        self.folder = folder

    def snapshot(self) -> Snapshot:
        """What counts now. Raises ValueError naming a manifest that cannot be read."""
        # A listed part that is missing may have been joined just now: then a newer manifest does not list it.
        for _ in range(TRIES):
            manifest = read_manifest(self.folder)
            there = {path.name: path for path in (self.folder / "parts").glob("part-*.parquet") if is_part(path.name)}
            missing = sorted(manifest.parts.keys() - there)
            if not missing:
                break
        counted = [name for name in there if name in manifest.parts or order(name)[0] == manifest.epoch]
        names = sorted((name for name in counted if name not in manifest.replaced), key=order)
        return Snapshot(manifest, [there[name] for name in names], missing)

    def parts(self) -> list[AnyPath]:
        """The parts that count; an empty list where there are none."""
        return self.snapshot().paths

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of all scenes, one for each; by default all columns but those of PLANES. Raises ValueError naming a
        damaged part."""
        columns = list(columns or [name for name in SCHEMA.names if name not in PLANES])
        read = list(dict.fromkeys(["scene_id", *columns]))
        tables = self._tables(read)
        table = pa.concat_tables(tables) if tables else pa.schema([SCHEMA.field(n) for n in read]).empty_table()
        first: dict[str, int] = {}
        for index, scene_id in enumerate(table["scene_id"].to_pylist()):
            first.setdefault(scene_id, index)
        return table.take(pa.array(list(first.values()), pa.int64())).select(columns)

    def _tables(self, columns: Sequence[str], tries: int = TRIES) -> list[pa.Table]:
        try:
            return [read_part(path, columns) for path in self.parts()]
        except FileNotFoundError:
            if tries == 1:
                raise
            return self._tables(columns, tries - 1)

    def stages(self) -> dict[str, int]:
        """The committed scenes, each with the stage that fitted it. Parts that the manifest lists are not opened."""
        found: dict[str, int] = {}
        snapshot = self.snapshot()
        for path in snapshot.paths:
            part = snapshot.listed(path)
            if part:
                rows = dict.fromkeys(part.scene_ids, part.stage)
            else:
                table = read_part(path, ["scene_id", "stage"])
                rows = dict(zip(table["scene_id"].to_pylist(), table["stage"].to_pylist()))
            for scene_id, stage in rows.items():
                found.setdefault(scene_id, stage)
        return found

    def ids(self, stage: int | None = None) -> list[str]:
        """Ids of the committed scenes of one stage, or of both; no planes are read."""
        return [scene_id for scene_id, found in self.stages().items() if stage is None or found == stage]

    def scene(self, scene_id: str) -> dict[str, Any]:
        """One scene's whole row. Raises LookupError naming the library where it does not hold the scene."""
        for row in self._find([scene_id]):
            return row
        ids = self.ids()
        has = f"it has {', '.join(ids[:5])}{', …' if len(ids) > 5 else ''}" if ids else "no scenes are fitted there"
        raise LookupError(f"{self.folder} holds no scene {scene_id!r}; {has}")

    def scenes(self, ids: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        """Yield the whole rows of all scenes, or of those of `ids` that exist, with a few in memory at a time."""
        yield from self._find(self.ids() if ids is None else ids)

    def _find(self, ids: Collection[str], tries: int = TRIES) -> Iterator[dict[str, Any]]:
        wanted = set(ids)
        snapshot = self.snapshot()
        try:
            for path in snapshot.paths:
                part = snapshot.listed(path)
                if part and wanted.isdisjoint(part.scene_ids):
                    continue
                for row in read_scenes(path, frozenset(wanted)):
                    if row["scene_id"] in wanted:
                        wanted.discard(row["scene_id"])
                        yield row
        except FileNotFoundError:  # compaction deleted the part; the remaining scenes are in joined parts
            if tries == 1:
                raise
            yield from self._find(wanted, tries - 1)

    def num_bytes(self, stage: int) -> int:
        """Bytes on disk of the parts that hold scenes of a stage; for stage 2 also of the cohorts' own tensors and of
        the manifest in force."""
        snapshot = self.snapshot()
        total = 0
        for path in snapshot.paths:
            part = snapshot.listed(path)
            stages = [part.stage] if part else read_part(path, ["stage"])["stage"].to_pylist()
            if stage in stages:
                total += part.num_bytes if part else path.stat().st_size
        if stage == 2:
            # Only cohorts that a row names: a driver that lost its lease may have left others.
            for cohort in set(self.table()["cohort"].drop_null().to_pylist()):
                files = (path for path in cohort_folder(self.folder, cohort).rglob("*") if path.is_file())
                total += sum(path.stat().st_size for path in files)
            total += manifest_bytes(self.folder)
        return total
