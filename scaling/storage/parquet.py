"""Read Parquet files of unknown origin: only tables of plain values are accepted, and checked before conversion.

A file may name Arrow extension types. pyarrow creates them while it opens the file, with code that was registered for
them; ray.data registers a type whose values are pickles. So the footer is searched for such a name first.

Errors give only the reason: the caller knows the path and what to do.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from scaling.storage.parquet_footer import read_struct

MAX_FOOTER_BYTES = 8 << 20
MAX_FIELDS = 1024  # of the schema, nested ones included
MAX_ROWS = 1 << 20  # of a file
MAX_VALUES = 1 << 26  # of a column in a row group
FREE_BYTES, MAX_GROWTH = 64 << 20, 100  # a file may unpack to this many bytes, or to this many times its own size

# Parquet's own numbers: a type of columns, and encodings of values one by one (plain, run length, bits, split by byte).
_BYTE_ARRAY, _PLAIN = 6, {0, 3, 4, 9}

_EXTENSION = b"ARROW:extension:name"


def _marks() -> list[bytes]:
    """The metadata key of an extension type's name, as it is and in base64: the footer holds the schema in base64.

    The base64 form depends on the key's offset modulo 3. Its first and last characters also depend on the neighbours
    of the key, so they are left out.
    """
    marks = [_EXTENSION]
    for offset in range(3):
        rest = _EXTENSION[(3 - offset) % 3 :]
        marks.append(base64.b64encode(rest[: len(rest) // 3 * 3]))
    return marks


_MARKS = _marks()


def table_bytes(table: pa.Table, **options: Any) -> bytes:
    """Encode a table as the bytes of a Parquet file. options: those of `pyarrow.parquet.write_table`."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


class TableError(ValueError):
    """A Parquet file is refused. The message gives the reason, but not the file."""


@contextmanager
def open_table(filesystem: fs.FileSystem, path: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file of plain values and of reasonable unpacked size; reading it verifies its page checksums.

    Raises TableError with the reason where the file is refused, FileNotFoundError where there is none.
    """
    with _reading():
        kind = filesystem.get_file_info(path).type
        if kind not in (fs.FileType.File, fs.FileType.NotFound):  # reading a pipe would never end
            raise TableError("it is no plain file")
        source = filesystem.open_input_file(path)
    with source:
        with _reading():
            _check_footer(source)
            file = pq.ParquetFile(source, page_checksum_verification=True)
            _check_types(file.schema_arrow)
        yield file


def read_columns(
    file: pq.ParquetFile,
    schema: pa.Schema,
    nullable: Collection[str] = (),
    row_group: int | None = None,
    optional: Collection[str] = (),
) -> pa.Table:
    """Read the columns that `schema` names, in its types, from one row group or from all. Others are ignored.

    nullable: the columns that may hold nulls; elements of lists never may. optional: nullable columns that may be
    missing; they are then all null. Raises TableError naming the column that is missing, is there twice or holds nulls;
    also, without a name, where a column is damaged or cannot be converted.
    """
    with _reading():
        there = []
        for name in schema.names:
            places = len(file.schema_arrow.get_all_field_indices(name))
            if places > 1 or (places == 0 and name not in optional):
                raise TableError(f"column {name} is {'missing' if places == 0 else f'there {places} times'}")
            there += [name] * places
        table = file.read(columns=there) if row_group is None else file.read_row_group(row_group, columns=there)
        table.validate(full=True)  # finds offsets that lead out of their buffers, and text that is not UTF-8
        for name in there:
            _check_nulls(name, table[name], name in nullable)
        for name in set(schema.names) - set(there):
            table = table.append_column(name, pa.nulls(len(table), schema.field(name).type))
        return table.select(schema.names).cast(schema)


@contextmanager
def _reading() -> Iterator[None]:
    """Convert what pyarrow raises for wrong bytes to TableError."""
    try:
        yield
    except (FileNotFoundError, TableError):
        raise
    except OSError as error:
        # A disk or a network that fails says nothing about the file. pyarrow gives no number for damage.
        if error.errno is not None or str(error).startswith("When "):
            raise
        raise TableError(str(error).splitlines()[0]) from error
    except (TypeError, ValueError, LookupError, MemoryError, pa.ArrowException) as error:
        raise TableError(next(iter(str(error).splitlines()), type(error).__name__)) from error


def _check_footer(source: pa.NativeFile) -> None:
    """Check the footer before pyarrow parses it: some footers end the process there, instead of raising an error.

    Raises TableError where the file is cut short, or where its footer is damaged, is too large, names an extension type
    or declares absurd sizes.
    """
    # A Parquet file ends with the footer, the footer's length (4 bytes) and the bytes PAR1.
    size = source.size()
    source.seek(max(size - 8, 0))
    end = source.read(8)
    length = int.from_bytes(end[:4], "little")
    if size < 12 or end[4:] != b"PAR1" or length > size - 12:
        raise TableError("it is no Parquet file, or one cut short")
    if length > MAX_FOOTER_BYTES:
        raise TableError(f"its footer has {length} bytes; at most {MAX_FOOTER_BYTES} are read")
    source.seek(size - 8 - length)
    footer = source.read(length)
    if any(mark in footer for mark in _MARKS):
        raise TableError("it holds an Arrow extension type, which may run code; only plain types are read")
    try:
        _check_sizes(read_struct(footer), size)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # fields that are missing, or of other types
        if isinstance(error, TableError):
            raise
        raise TableError(f"its footer is damaged ({error})") from error


def _check_sizes(footer: dict[int, Any], num_bytes: int) -> None:
    """Check the sizes that the footer declares: a few bytes can stand for millions of equal values.

    Keys are the field numbers of Parquet's own definition (FileMetaData, RowGroup, ColumnChunk, ColumnMetaData).
    """
    schema, num_rows, groups = footer[2], footer[3], footer[4]
    if len(schema) > MAX_FIELDS:
        raise TableError(f"its schema has {len(schema)} fields; at most {MAX_FIELDS} are read")
    rows = [group[3] for group in groups]
    if min(rows, default=0) < 0 or sum(rows) != num_rows:
        raise TableError(f"it says that it has {num_rows} rows, its row groups say {sum(rows)}")
    if num_rows > MAX_ROWS:
        raise TableError(f"it says that it has {num_rows} rows; at most {MAX_ROWS} are read")
    columns = [chunk[3] for group in groups for chunk in group[1]]
    values = [column[5] for column in columns]
    if min(values, default=0) < 0 or max(values, default=0) > MAX_VALUES:
        raise TableError(f"it says that a column has {max(values)} values; at most {MAX_VALUES} are read")
    # An entry of a dictionary, or a prefix that others share, is stored once and may be unpacked with every value.
    many = [column for column in columns if column[1] == _BYTE_ARRAY and not _PLAIN.issuperset(column[2])]
    unpacked = sum(max(column[6], 0) for column in columns) + sum(column[5] * max(column[6], 0) for column in many)
    if unpacked > max(FREE_BYTES, MAX_GROWTH * num_bytes):
        raise TableError(f"it has {num_bytes} bytes and says that it unpacks to {unpacked}")


def _check_types(schema: pa.Schema) -> None:
    """Refuse extension types, also those that pyarrow makes from Parquet's own types, such as UUID."""
    for field in schema:
        if _is_extension(field.type):
            raise TableError(f"column {field.name} is of type {field.type}; only plain types are read")


def _is_extension(kind: pa.DataType) -> bool:
    inside = [kind.field(index).type for index in range(kind.num_fields)]
    if pa.types.is_dictionary(kind):
        inside.append(kind.value_type)
    return isinstance(kind, pa.BaseExtensionType) or any(map(_is_extension, inside))


def _check_nulls(name: str, column: pa.ChunkedArray | pa.Array, allowed: bool) -> None:
    if column.null_count and not allowed:
        raise TableError(f"column {name} holds nulls")
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        if pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
            _check_nulls(name, chunk.flatten(), allowed=False)
