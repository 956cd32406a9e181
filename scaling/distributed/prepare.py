"""Prepares a scene store: lists the source, reads its scenes in parallel with Ray Data, writes them in order."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, Dataset
from tqdm import tqdm

from scaling.data.latent_cache import ROW_FIELDS
from scaling.data.readers.registry import list_scenes, read_scene
from scaling.data.scene_store import REJECTS_SCHEMA, SCHEMA, SceneStore, StoreWriter
from scaling.data.scene_views import SceneError, SceneRef
from scaling.data.stores import SceneSource, SourceSpec, read_rows
from scaling.storage.text import shown
from scaling.training.measure.box import row_bounds

READER_CPUS = 2
BLOCK_BYTES = 4 << 20
OBJECT_STORE_BYTES = 128 << 20


def bound_reading() -> None:
    """Make Ray Data read ahead by a fixed budget, in order, and without its no-progress timeout.

    By default it reads as far ahead as memory allows, and a batch that takes half an hour to fit kills the job.
    """
    context = DataContext.get_current()
    context.target_max_block_size = BLOCK_BYTES
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = context.execution_options.resource_limits.for_limits(
        cpu=READER_CPUS, object_store_memory=OBJECT_STORE_BYTES
    )
    context.execution_no_progress_timeout_s = -1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the commands have progress bars of their own


def scene_dataset(spec: SourceSpec, ids: list[str], rows_per_block: int) -> Dataset:
    """A lazy dataset of scene rows in the order of `ids`. Of a scene that cannot be read, the row holds only the id
    and `error`."""
    blocks = -(-len(ids) // rows_per_block)
    items = [{"scene_id": scene_id} for scene_id in ids]
    named = ray.data.from_items(items, override_num_blocks=blocks)
    return named.map_batches(_ReadRows(spec), batch_size=None, batch_format="pyarrow", zero_copy_batch=True)


def batches_of(dataset: Dataset, size: int) -> Generator[pa.Table]:
    """Yield the rows of a dataset, `size` at a time. The caller must close the generator: otherwise the executor ends
    only with the program, after Ray has shut down; it then starts Ray again and never ends."""
    batches = iter(dataset.iter_batches(batch_size=size, prefetch_batches=1, batch_format="pyarrow"))
    try:
        for batch in batches:
            assert isinstance(batch, pa.Table)
            yield batch
    finally:
        batches.close()  # type: ignore[attr-defined]


class _ReadRows:
    """Turns a block of ids into tables of one row each."""

    def __init__(self, spec: SourceSpec) -> None:
        self.spec = spec

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        for row in read_rows(_opened(self.spec), block["scene_id"].to_pylist()):
            yield pa.Table.from_pylist([row], schema=pa.schema([*SCHEMA, *ROW_FIELDS, ("error", pa.string())]))


@lru_cache(maxsize=1)
def _opened(spec: SourceSpec) -> SceneSource:
    """Open a source once in each reading process: a store's index takes a second per 20,000 scenes."""
    return spec.open()


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
