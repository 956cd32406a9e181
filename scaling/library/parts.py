"""Parts of a library: Parquet files of fitted scenes, named by who committed them, never changed afterwards.

A part's name carries the epoch of the driver's lease and the attempt at the batch. From the epoch readers tell a commit
of a driver that had lost its lease (`manifest`). Of two commits of a scene, the one with the smallest epoch and attempt
counts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from scaling.data.scene_id import SceneId
from scaling.library.checks import check_ids, check_planes
from scaling.library.row_schema import FORMAT_VERSION, LATER_METRICS, METRICS, SCHEMA
from scaling.storage.commit import commit_file
from scaling.storage.formats import check_format
from scaling.storage.limited import read_limited
from scaling.storage.parquet import TableError, open_table, read_columns, table_bytes
from scaling.storage.paths import AnyPath, file_of

_NAME = re.compile(r"part-(?:([0-9]{6})-([0-9]{4})-)?[0-9a-f]{20}\.parquet")
PartName = Annotated[str, Field(pattern=rf"^{_NAME.pattern}$")]
MAX_PART_BYTES = 1 << 30
NULLABLE = ("cohort", "hull", *METRICS)
# Columns that older formats lack, and the format version that added them.
ADDED = {
    "hull": 4,
    **dict.fromkeys(LATER_METRICS, 4),
}
ROW_GROUP_BYTES = 1 << 20  # before compression; a reader reads one row group to get one scene
# Highest compression ratio of a part, as readers refuse files that unpack to too much (`storage.parquet`). Planes
# compress less.
MOST_GAIN = 16
FLOATS = (*METRICS, "seconds", "coefs.list.element")


class Part(BaseModel):
    """What is known of a part without opening it. num_bytes, sha256: of the file; stage, shared, settings_hash: of its
    rows, which agree."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: PartName
    sha256: str
    num_bytes: int = Field(ge=0)
    stage: Literal[1, 2]
    shared: str
    settings_hash: str
    scene_ids: tuple[SceneId, ...]


def part_name(epoch: int, attempt: int, batch: Collection[str]) -> str:
    """Name of the part that attempt number `attempt` at the scene ids `batch` commits."""
    digest = hashlib.sha256("|".join(sorted(batch)).encode()).hexdigest()
    return f"part-{epoch:06d}-{attempt:04d}-{digest[:20]}.parquet"


def order(name: str) -> tuple[int, int, str]:
    """Sort key of a part's name: epoch, attempt, name. If two parts hold a scene, the first counts.

    Names of format 1 hold neither number: both are 0. Raises ValueError for other names.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r:.80} is no name of a part")
    return int(match[1] or 0), int(match[2] or 0), name


def is_part(name: str) -> bool:
    """Whether a file name in parts/ is a committed part's; names of temporary files are not."""
    return _NAME.fullmatch(name) is not None


def commit_part(library: AnyPath, rows: Sequence[Mapping[str, Any]], name: str | None = None) -> Part:
    """Commit the rows of a batch as one part. → the part as it is on disk.

    name: from `part_name`; None: the name of epoch 0 and attempt 0, for a library without drivers. Where the name
    exists already, nothing is changed. Raises OSError naming the file where it cannot be written.
    """
    name = name or part_name(0, 0, [row["scene_id"] for row in rows])
    path = library / "parts" / name
    data = encode_rows([{**row, "format_version": FORMAT_VERSION} for row in rows])
    if not commit_file(path, data):
        return describe_part(path)
    return _describe(name, data, rows)


def encode_rows(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows of SCHEMA as the bytes of a Parquet file, with a checksum on each page."""
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA)
    data = _encode(table, "zstd")
    return data if table.nbytes <= MOST_GAIN * len(data) else _encode(table, "none")


def _encode(table: pa.Table, compression: str) -> bytes:
    """The table as the bytes of a Parquet file.

    Statistics and the Arrow schema are left out: nobody reads them, and in a part of 16 scenes they are half of the
    bytes. Floats are split by byte (the first bytes of all values, then the second bytes, …), so that they compress.
    """
    return table_bytes(
        table, compression=compression, use_dictionary=False, use_byte_stream_split=list(FLOATS),
        write_statistics=False, store_schema=False, write_page_checksum=True,
        row_group_size=max(1, ROW_GROUP_BYTES * len(table) // max(table.nbytes, 1)),
    )  # fmt: skip


def describe_part(path: AnyPath) -> Part:
    """Read a part and describe it. Raises ValueError naming a part that is damaged or holds no scene."""
    rows = read_part(path, ["scene_id", "stage", "shared", "settings_hash"]).to_pylist()
    if not rows:
        raise damaged(path, "it holds no scene")
    return _describe(path.name, read_bytes(path), rows)


def read_bytes(path: AnyPath) -> bytes:
    """The bytes of a part. Raises ValueError naming a part that is no plain file or too large."""
    try:
        return read_limited(path, MAX_PART_BYTES)
    except ValueError as error:
        raise damaged(path, str(error)) from None


def _describe(name: str, data: bytes, rows: Sequence[Mapping[str, Any]]) -> Part:
    ids = tuple(row["scene_id"] for row in rows)
    same = {key: rows[0][key] for key in ("stage", "shared", "settings_hash")}
    return Part(name=name, sha256=hashlib.sha256(data).hexdigest(), num_bytes=len(data), scene_ids=ids, **same)


def read_part(path: AnyPath, columns: Sequence[str]) -> pa.Table:
    """Columns of a part, in the schema's types.

    Raises ValueError naming a part that is damaged or of a newer format, FileNotFoundError where it is gone.
    """
    with opened(path) as file:
        return _columns(path, file, columns)


def read_scenes(path: AnyPath, wanted: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yield the whole rows of the wanted scenes, one row group in memory at a time. Raises as `read_part` does."""
    with opened(path) as file:
        # Ids are read first: a row group is read whole only if it holds a wanted scene.
        for group in range(file.num_row_groups):
            ids = _columns(path, file, ["scene_id"], group)["scene_id"].to_pylist()
            found = [index for index, scene_id in enumerate(ids) if scene_id in wanted]
            if found:
                for row in _columns(path, file, SCHEMA.names, group).take(found).to_pylist():
                    try:
                        check_planes(row)
                    except ValueError as error:
                        raise damaged(path, str(error)) from error
                    yield row


@contextmanager
def opened(path: AnyPath) -> Iterator[pq.ParquetFile]:
    """Open a part for reading, with verified page checksums. A fault in the file becomes a ValueError that names it."""
    try:
        with open_table(*file_of(path)) as file:
            yield file
    except TableError as error:
        raise damaged(path, str(error)) from error


def damaged(path: AnyPath, why: str) -> ValueError:
    """The error for a part that cannot be used; it names the part and says what to do."""
    return ValueError(
        f"{path}: not a readable part of a library ({why}): restore it, or move it out of the library and fit its "
        "scenes again"
    )


def _columns(path: AnyPath, file: pq.ParquetFile, columns: Sequence[str], row_group: int | None = None) -> pa.Table:
    """Checked columns of one row group, or of all. Columns that SCHEMA does not have are ignored."""
    version = read_columns(file, pa.schema([SCHEMA.field("format_version")]), row_group=row_group)
    newest = max(version["format_version"].to_pylist(), default=0)
    check_format(path, newest, FORMAT_VERSION)
    optional = [name for name, since in ADDED.items() if newest < since]
    table = read_columns(file, pa.schema([SCHEMA.field(name) for name in columns]), NULLABLE, row_group, optional)
    # Ids and hashes become names of files, so they are checked whenever they are read.
    told = [name for name in ("scene_id", "stage", "shared", "cohort") if name in columns]
    try:
        check_ids(table.select(told).to_pylist())
    except ValueError as error:
        raise damaged(path, str(error)) from error
    return table
