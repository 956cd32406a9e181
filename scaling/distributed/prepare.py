"""Prepares a scene store: lists the source, reads its scenes in parallel with Ray Data, writes them in order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray
from tqdm import tqdm

from scaling.data.readers.registry import list_scenes, read_scene
from scaling.data.scene_store import REJECTS_SCHEMA, SCHEMA, SceneStore, StoreWriter
from scaling.data.scene_views import SceneError, SceneRef
from scaling.distributed.scene_rows import batches_of, bound_reading
from scaling.storage.text import shown
from scaling.training.measure.box import row_bounds

READ = pa.schema(
    [
        *SCHEMA,
        ("bounds", pa.list_(pa.list_(pa.float64()))),
        ("reject", pa.struct(REJECTS_SCHEMA)),
        ("notes", pa.list_(pa.string())),
    ]
)


def read_refs(block: pa.Table) -> Iterator[pa.Table]:
    """Read a block of scene references into tables of one row each. Where a scene cannot be read, only `reject` is set,
    to its row of the rejects."""
    for values in block.to_pylist():
        ref = SceneRef(**values)
        try:
            read = read_scene(ref)
            notes, bounds = read.pop("notes"), row_bounds(read)
            row: dict[str, Any] = {**read, "bounds": None if bounds is None else bounds.tolist(), "reject": None}
            row["notes"] = notes
        except SceneError as error:
            why = {"source": error.source, "file": error.file, "reason": error.reason}
            row = {"reject": {"scene_id": ref.scene_id, **why}}
        yield pa.Table.from_pylist([row], schema=READ)


def write_rows(writer: StoreWriter, rows: pa.Table) -> None:
    """Store the rows that `read_refs` made: scenes and rejects."""
    for row in rows.to_pylist():
        rejected, bounds, notes = row.pop("reject"), row.pop("bounds"), row.pop("notes")
        if rejected is None:
            if writer.add(row, bounds):
                writer.note(row["scene_id"], notes)
        else:
            writer.reject(**rejected)


def holds(store: str, source: str) -> bool:
    """Whether `store` is a complete scene store that was prepared from a source of this name."""
    try:
        return SceneStore(store).info.get("source") == source
    except FileNotFoundError:
        return False


def prepare(source: str, store: str, layout: str = "auto", category: str | None = None) -> tuple[int, int]:
    """Read every scene of `source`, a folder or a .zip file, into a scene store. → numbers stored and rejected.

    Raises ValueError where the source's layout or the category is unknown or no scene can be used, FileExistsError
    where the store exists already.
    """
    refs = list_scenes(source, layout, category)
    bound_reading()
    with StoreWriter(store, source) as writer:
        dataset = ray.data.from_items([asdict(ref) for ref in refs], override_num_blocks=-(-len(refs) // 8))
        rows = dataset.map_batches(read_refs, batch_size=None, batch_format="pyarrow")
        with tqdm(total=len(refs), unit="scene", desc="prepare") as progress, closing(batches_of(rows, 8)) as batches:
            for batch in batches:
                write_rows(writer, batch)
                progress.update(len(batch))
                progress.set_postfix(rejected=len(writer.rejects))
        for note, scene_ids in writer.notes.items():
            also = f" and {len(scene_ids) - 1} more" if len(scene_ids) > 1 else ""
            tqdm.write(f"note: scene {scene_ids[0]}{also}: {shown(note)}")
    return writer.num_scenes, len(writer.rejects)
