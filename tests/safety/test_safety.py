"""Hostile files: nothing of them runs, fills memory or ends the process; each gives one error that names the file."""

from __future__ import annotations

import os
import pickle
import random
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.fitted_rows import row as fitted_row
from helpers.small_sources import picture, row

from scaling.data.choose_scenes import read_ids
from scaling.data.scene_id import is_scene_id
from scaling.data.scene_ref import SceneError
from scaling.data.scene_store import SceneStore
from scaling.data.scene_views import make_row, views_from_row
from scaling.data.store_writer import StoreWriter
from scaling.library.parts import commit_part, encode_rows, read_part
from scaling.library.reader import Library
from scaling.pictures.draw import render_scene_pictures
from scaling.storage import parquet
from scaling.storage.atomic import replace_file

UNSAFE_IDS = [
    "../a",
    "..",
    ".",
    ".hidden",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "C:a",
    "a\0",
    "a\n",
    "é",
    "",
    "a" * 201,
    None,
    3,
]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of one scene; → its only part."""
    with StoreWriter(tmp_path / "store", "test") as writer:
        writer.add(row())
    return tmp_path / "store" / "scenes-00000.parquet"


def read_store(part: Path) -> list[dict[str, Any]]:
    return list(SceneStore(part.parent).rows())


def with_column(path: Path, name: str, column: pa.Array, **options: Any) -> None:
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(name), name, column), path, **options)


# ---------------------------------------------------------------------- types that run code


class Payload:
    """Its unpickling makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.fixture
def pickled(tmp_path: Path) -> tuple[pa.Array, Path]:
    """A column of ray.data's type of Python objects, which importing ray.data registers; and what reading it makes."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    storage = pa.array([pickle.dumps(Payload(tmp_path / "trace"))], pa.large_binary())
    return ArrowPythonObjectType().wrap_array(storage), tmp_path / "trace"


def nested(column: pa.Array) -> list[pa.Array]:
    """The column as it is, in lists, in structures and in both."""
    in_list = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), column)
    in_struct = pa.StructArray.from_arrays([column], ["inner"])
    return [column, in_list, in_struct, pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), in_struct)]


def test_the_attack_is_real(pickled: tuple[pa.Array, Path], tmp_path: Path) -> None:
    column, trace = pickled
    pq.write_table(pa.table({"a": column}), tmp_path / "a.parquet")
    pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert trace.exists()


@pytest.mark.parametrize("depth", range(4))
@pytest.mark.parametrize("name", ["category", "views"])
def test_pickles_in_a_scene_store_are_not_read(
    store: Path, pickled: tuple[pa.Array, Path], depth: int, name: str
) -> None:
    column, trace = pickled
    with_column(store, name, nested(column)[depth])
    with pytest.raises(ValueError, match=rf"{store}: .*Arrow extension type, which may run code"):
        read_store(store)
    pq.write_table(pa.table({"scene_id": nested(column)[depth]}), store.parent / "rejects.parquet")
    with pytest.raises(ValueError, match=r"rejects.parquet: .*Arrow extension type"):
        SceneStore(store.parent).rejects()
    assert not trace.exists()


@pytest.mark.parametrize("depth", range(4))
def test_pickles_in_a_library_are_not_read(tmp_path: Path, pickled: tuple[pa.Array, Path], depth: int) -> None:
    column, trace = pickled
    commit_part(tmp_path, [fitted_row("a")])
    [path] = (tmp_path / "parts").iterdir()
    for name in ("micro_planes", "more"):  # a column that nobody asks for is refused, too
        table = pq.read_table(path)
        kept = [kept_name for kept_name in table.column_names if kept_name != name]
        pq.write_table(table.select(kept).append_column(name, nested(column)[depth]), path)
        with pytest.raises(ValueError, match=rf"{path}: .*Arrow extension type"):
            Library(tmp_path).scene("a")
        with pytest.raises(ValueError, match=rf"{path}: .*Arrow extension type"):
            read_part(path, ["scene_id"])
    assert not trace.exists()


class Opened(pa.ExtensionType):
    """A type that runs code as soon as a file of it is opened."""

    runs = 0

    def __init__(self) -> None:
        super().__init__(pa.large_binary(), "test.opened")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> Opened:
        cls.runs += 1
        return cls()


@pytest.mark.parametrize("registered", [True, False])
def test_a_type_is_refused_before_the_file_is_opened(store: Path, registered: bool) -> None:
    pa.register_extension_type(Opened())
    try:
        for shift in range(6):  # the name's place in the footer's base64 moves with the texts before it
            column = pa.ExtensionArray.from_storage(Opened(), pa.array([b"x"], pa.large_binary()))
            pq.write_table(pa.table({"a" * (shift + 1): column}), store)
            if not registered and shift == 0:
                pa.unregister_extension_type("test.opened")
            Opened.runs = 0
            with pytest.raises(ValueError, match=rf"{store}: .*Arrow extension type"):
                read_store(store)
            assert Opened.runs == 0
    finally:
        if registered:
            pa.unregister_extension_type("test.opened")


# ---------------------------------------------------------------------- tables that are none


def deep_schema() -> bytes:
    """A footer of 50,000 structures in structures, of which pyarrow's own reader dies."""
    one = b"\x35\x02\x18\x01a\x15\x02\x00"  # OPTIONAL, named a, with one child
    count = 50_001
    length = bytes([count & 127 | 128, count >> 7 & 127 | 128, count >> 14])
    footer = b"\x15\x04\x19\xfc" + length + one * count + b"\x16\x00\x19\x0c\x00"
    return b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1"


def test_pyarrow_alone_dies_of_a_deep_schema(tmp_path: Path) -> None:
    """So there is a footer reader of ours. Once pyarrow raises an error here, `storage/parquet_footer.py` can go."""
    (tmp_path / "deep.parquet").write_bytes(deep_schema())
    program = f"import pyarrow.parquet; pyarrow.parquet.ParquetFile({str(tmp_path / 'deep.parquet')!r})"
    assert subprocess.run([sys.executable, "-c", program], stderr=subprocess.DEVNULL).returncode == -signal.SIGSEGV


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda part: part.write_bytes(deep_schema()), "its schema has 50001 fields"),
        (lambda part: part.write_bytes(part.read_bytes()[:-9]), "no Parquet file, or one cut short"),
        (lambda part: part.write_bytes(part.read_bytes()[:-4] + b"PARE"), "no Parquet file"),
        (lambda part: part.write_bytes(part.read_bytes()[:-8] + b"\xff\xff\xff\x7fPAR1"), "no Parquet file"),
        (lambda part: pq.write_table(pq.read_table(part).drop_columns(["views"]), part), "column views is missing"),
        (lambda part: pq.write_table(pq.read_table(part).append_column("views", [[b""]]), part), "views is there 2"),
        (lambda part: with_column(part, "scene_id", pa.array([None], pa.string())), "column scene_id holds nulls"),
        (lambda part: with_column(part, "height", pa.array([None], pa.int32())), "column height holds nulls"),
        (lambda part: with_column(part, "views", pa.array([[picture(), None]])), "column views holds nulls"),
        (lambda part: with_column(part, "height", pa.array([2**40])), "not in range"),
        (lambda part: with_column(part, "cam2world", pa.array(["one"])), "from string to list using function cast"),
        (lambda part: with_column(part, "scene_id", pa.array([b"\xff"])), "nvalid UTF8"),
        (lambda part: with_column(part, "scene_id", pa.array(["../one"])), "bad scene id '../one'"),
        (
            lambda part: with_column(part, "views", pa.array([[bytes(70 << 20)]]), compression="zstd"),
            "says that it unpacks to 1",
        ),
        (lambda part: with_column(part, "test_views", pa.array([[0] * 5000])), "a column has 5000 values; at most"),
        (lambda part: part.unlink() or os.mkfifo(part), "it is no plain file"),
        (lambda part: part.unlink() or part.mkdir(), "it is no plain file"),
    ],
)  # fmt: skip
def test_parts_of_a_store_that_are_none(store: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, told: str) -> None:
    damage(store)
    monkeypatch.setattr(parquet, "MAX_VALUES", 1000)
    with pytest.raises(ValueError, match=r"scenes-00000\.parquet: not a readable part of a scene store") as error:
        read_store(store)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_damage_by_chance_ends_in_an_error_or_harmless(store: Path) -> None:
    good, chance = store.read_bytes(), random.Random(0)
    start = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    for _ in range(100):
        data = bytearray(good)
        data[chance.randrange(start, len(good))] = chance.randrange(256)
        store.write_bytes(data)
        try:
            [views_from_row(found, 8) for found in read_store(store)]
        except ValueError as error:
            assert "scenes-00000.parquet" in str(error) or isinstance(error, SceneError) or "holds" in str(error)


def test_a_scene_of_too_many_views_is_refused() -> None:
    good = row()
    many = {key: list(good[key]) * 5001 for key in ("views", "cam2world", "intrinsics")}
    with pytest.raises(SceneError, match="views: 10002 of them; at most 10000 are read"):
        views_from_row({**good, **many}, 8)


# ---------------------------------------------------------------------- ids


@pytest.mark.parametrize("scene_id", UNSAFE_IDS)
def test_ids_are_checked_before_they_become_paths(tmp_path: Path, scene_id: Any) -> None:
    assert not is_scene_id(scene_id)
    with pytest.raises(ValueError, match="bad scene id"):
        make_row(scene_id, "", *[row()[key] for key in ("views", "cam2world", "intrinsics", "test_views")], 8, 8, "")
    with pytest.raises(ValueError, match="bad scene id"):
        render_scene_pictures(None, None, None, tmp_path / "pictures", scene_id)  # type: ignore[arg-type]
    if isinstance(scene_id, str):
        path = tmp_path / "parts" / f"part-{'0' * 20}.parquet"
        replace_file(path, encode_rows([{**fitted_row(scene_id), "format_version": 1}]))
        with pytest.raises(ValueError, match=rf"{path}: .*bad scene id"):
            Library(tmp_path).ids()
    assert not (tmp_path / "pictures").exists()


def test_a_long_list_of_scenes_with_one_twice_is_read_at_once(tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("".join(f"a{number}\n" for number in range(50_000)) + "a7\n")
    with pytest.raises(ValueError, match="named twice: a7"):
        read_ids(tmp_path / "ids")
