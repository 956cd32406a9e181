"""Rows of scenes as a Ray Dataset, read as they are needed, within a budget.

Processes that read start once for each job. They import this module alone, and with it neither torch nor SciPy: that
would take four seconds of a core in each.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from functools import lru_cache

import pyarrow as pa
import ray
from ray.data import DataContext, Dataset

from scaling.data.latent_cache import ROW_FIELDS
from scaling.data.scene_store import SCHEMA
from scaling.data.stores import SceneSource, SourceSpec, read_rows

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
