"""Cached latents of a store's scenes: STORE/latents/HASH/latents-*.parquet, and latents.json, which is written last.

HASH names the shared model whose encoder made the latents. Part k holds the scenes 16 k to 16 k + 15 of the store, in
order, except those that could not be read. So a scene's part is found without opening others, and parts can be made in
any order. Every part names its shared model and its store: a store that is prepared again in the same place is another
store.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa

from scaling.data.latents import REMEDY
from scaling.data.scene_store import SceneStore
from scaling.storage.atomic import replace_file
from scaling.storage.formats import check_format, is_sha256
from scaling.storage.json_yaml import parse_json
from scaling.storage.limited import read_limited
from scaling.storage.links import refuse_links
from scaling.storage.parquet import TableError, open_table, read_columns, table_bytes
from scaling.storage.paths import AnyPath, file_of

FORMAT_VERSION = 1
SCENES_PER_PART = 16  # a part is one row group: all of it is read to get one scene
MAX_INFO_BYTES = 1 << 20
SCHEMA = pa.schema([("scene_id", pa.string()), ("shape", pa.list_(pa.int32())), ("latents", pa.large_binary())])
ROW_FIELDS = (pa.field("latent_shape", pa.list_(pa.int32())), pa.field("latents", pa.large_binary()))  # of store rows


class LatentCache:
    """The cached latents of one store for one shared model. Raises ValueError where `shared_hash` is not a SHA-256."""

    def __init__(self, store: SceneStore, shared_hash: str) -> None:
        if not is_sha256(shared_hash):
            raise ValueError(f"{shared_hash!r:.80} is no hash of a shared model")
        self.store = store
        self.folder = store.root / "latents" / shared_hash
        self._marks = {b"shared": shared_hash.encode(), b"store": store.digest.encode()}
        self._held: tuple[int, dict[str, dict[str, Any]]] | None = None  # the last part read: number, id → row

    @cached_property
    def _ids(self) -> list[str]:
        return self.store.ids()

    @cached_property
    def _places(self) -> dict[str, int]:
        return {scene_id: place for place, scene_id in enumerate(self._ids)}

    @property
    def num_parts(self) -> int:
        return -(-len(self.store) // SCENES_PER_PART)

    def path(self, number: int) -> AnyPath:
        """The file of part `number`."""
        return self.folder / f"latents-{number:05d}.parquet"

    def ids(self, number: int) -> list[str]:
        """The ids of the store's scenes that belong to part `number`."""
        return self._ids[number * SCENES_PER_PART : (number + 1) * SCENES_PER_PART]

    def num_scenes(self) -> int | None:
        """Number of scenes in a complete cache. None where there is none, or where it belongs to an earlier store.

        Raises ValueError naming latents.json where it is damaged or of a newer version.
        """
        path = self.folder / "latents.json"
        try:
            info = parse_json(read_limited(path, MAX_INFO_BYTES))
            version, shared, store = int(info["format_version"]), str(info["shared"]), str(info["store"])
            count = int(info["num_scenes"])
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error!r:.200}); {REMEDY}") from error
        check_format(path, version, FORMAT_VERSION)
        return count if {b"shared": shared.encode(), b"store": store.encode()} == self._marks else None

    def whole_parts(self) -> dict[int, int]:
        """Number → count of scenes, for the whole parts that an interrupted job left; all others must be written."""
        whole = {}
        for number in range(self.num_parts):
            try:
                whole[number] = len(self._table(number, ["scene_id"]))
            except ValueError:  # missing, damaged or of another store
                continue
        return whole

    def write(self, number: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a part, whole or not at all. rows: of SCHEMA, in the store's order.

        Raises OSError naming the file.
        """
        table = pa.Table.from_pylist(list(rows), schema=SCHEMA.with_metadata(self._marks))
        data = table_bytes(
            table, compression="none", use_dictionary=False, write_statistics=["scene_id"],
            write_page_checksum=True, row_group_size=SCENES_PER_PART,
        )  # fmt: skip
        replace_file(self.path(number), data)

    def begin(self) -> None:
        """Remove latents.json, which may describe an earlier store: the cache is incomplete until `finish`."""
        refuse_links(self.folder.parent, self.folder)
        (self.folder / "latents.json").unlink(missing_ok=True)

    def finish(self, num_scenes: int) -> None:
        """Write latents.json, which marks the cache as complete."""
        marks = {key.decode(): value.decode() for key, value in self._marks.items()}
        info = {"format_version": FORMAT_VERSION, **marks, "num_scenes": num_scenes}
        replace_file(self.folder / "latents.json", json.dumps(info, indent=1).encode() + b"\n")

    def add_to(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the store's rows with two more columns, `latents` and `latent_shape`: None where the scene has none.

        One part is in memory at a time. Raises ValueError naming a part that is missing or damaged.
        """
        for row in rows:
            number = self._places[row["scene_id"]] // SCENES_PER_PART
            if self._held is None or self._held[0] != number:
                self._held = None  # freed before the next part is read: two would take twice the memory
                held = self._table(number, SCHEMA.names).to_pylist()
                self._held = number, {found["scene_id"]: found for found in held}
            found = self._held[1].get(row["scene_id"], {"latents": None, "shape": None})
            yield {**row, "latents": found["latents"], "latent_shape": found["shape"]}

    def _table(self, number: int, columns: Sequence[str]) -> pa.Table:
        """Read columns of a part, scene_id among them.

        Raises ValueError naming the part where it is missing, damaged or not of this cache.
        """
        path = self.path(number)
        try:
            with open_table(*file_of(path)) as file:
                marks = file.schema_arrow.metadata or {}
                if any(marks.get(key) != value for key, value in self._marks.items()):
                    raise TableError("it belongs to another shared model, or to an earlier store in this folder")
                if file.metadata.num_rows > SCENES_PER_PART:
                    raise TableError(f"it has {file.metadata.num_rows} scenes; a part has {SCENES_PER_PART} at most")
                table = read_columns(file, pa.schema([SCHEMA.field(name) for name in columns]))
                # `in` consumes the iterator, so this tests for a subsequence: a part may lack scenes, in order.
                left = iter(self.ids(number))
                if not all(scene_id in left for scene_id in table["scene_id"].to_pylist()):
                    raise TableError("it holds other scenes than this part of the store, or in another order")
                return table
        except FileNotFoundError:
            raise ValueError(f"{path}: this part of the cached latents is missing; {REMEDY}") from None
        except TableError as error:
            raise ValueError(f"{path}: not a readable part of cached latents ({error}); {REMEDY}") from error
