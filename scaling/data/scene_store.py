"""The scene store: Parquet parts with one row per scene, a table of rejected scenes, and store.json, written last."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from scaling.data.scene_id import check_scene_id, is_scene_id
from scaling.storage.atomic import replace_file, sync_file
from scaling.storage.formats import check_format
from scaling.storage.json_yaml import parse_json
from scaling.storage.lease import Lease
from scaling.storage.own_folder import claim_folder
from scaling.storage.parquet import TableError, open_table, read_columns, table_bytes
from scaling.storage.paths import AnyPath, ObjectPath, open_uri

FORMAT_VERSION = 1
SCENES_PER_ROW_GROUP = 16
SCENES_PER_PART = 256
MAX_INFO_BYTES = 1 << 20
_PART = re.compile(r"scenes-[0-9]{5}(-[0-9]{6})?\.parquet")
SCHEMA = pa.schema(
    [
        ("scene_id", pa.string()),
        ("category", pa.string()),
        ("views", pa.list_(pa.large_binary())),
        ("cam2world", pa.list_(pa.float32())),
        ("intrinsics", pa.list_(pa.float32())),
        ("test_views", pa.list_(pa.int32())),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("source", pa.string()),
    ]
)
REJECTS_SCHEMA = pa.schema([(name, pa.string()) for name in ("scene_id", "source", "file", "reason")])


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
        self._ids: set[str] = set()
        self._bounds: list[NDArray[np.float64]] = []
        self._rows: list[Mapping[str, Any]] = []
        self._parts: list[str] = []
        self._part: pq.ParquetWriter | None = None
        self.filesystem, self.path = open_uri(store_uri)
        self.root = _root(self.filesystem, self.path, self.uri)
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
            for path in _part_paths(self.filesystem, self.path):
                self.filesystem.delete_file(path)
        except BaseException:
            self._lease.release()
            raise
        return self

    def _check_new(self) -> None:
        if _is_file(self.filesystem, f"{self.path}/store.json"):
            raise FileExistsError(f"{self.uri} already holds a scene store: choose another --store")

    def add(self, row: Mapping[str, Any], bounds: Sequence[Sequence[float]] | None = None) -> bool:
        """Add a row made by `scene_views.make_row`. → False where it is rejected: its id is bad or is in the store.

        bounds: low and high corner of the cuboid around the scene, where its views tell.
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
        if bounds is not None:
            self._bounds.append(np.asarray(bounds, dtype=np.float64))
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

    def _finish(self) -> None:
        """Write the rejects and store.json."""
        assert self._lease is not None
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
            "format_version": FORMAT_VERSION,
            "num_scenes": self.num_scenes,
            "source": self.source,
            "bounds": _union(self._bounds),
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
        self._part.write_table(pa.Table.from_pylist(self._rows, schema=SCHEMA), row_group_size=SCENES_PER_ROW_GROUP)
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


@dataclass(frozen=True)
class _Index:
    """The scenes of a store, in its order. places: id → (number of the part, row group, row in the row group)."""

    categories: list[str] = field(default_factory=list)
    places: dict[str, tuple[int, int, int]] = field(default_factory=dict)


class SceneStore:
    """A complete store, opened for reading.

    Raises FileNotFoundError where there is none, ValueError where it is damaged or of a newer version.
    """

    def __init__(self, uri: str | Path) -> None:
        self.uri = str(uri)
        self.filesystem, self.path = open_uri(uri)
        self.root = _root(self.filesystem, self.path, self.uri)
        if not _is_file(self.filesystem, f"{self.path}/store.json"):
            raise FileNotFoundError(
                f"{self.uri} holds no complete scene store (no store.json): "
                f"make one with experiments/prepare.py --source DIR --store {shlex.quote(self.uri)}"
            )
        with self.filesystem.open_input_stream(f"{self.path}/store.json") as stream:
            text = stream.read(MAX_INFO_BYTES)
        self.digest = hashlib.sha256(text).hexdigest()  # a store that is prepared again has another digest
        try:
            self.info: dict[str, Any] = parse_json(text)
            version, self.num_scenes = int(self.info["format_version"]), int(self.info["num_scenes"])
            listed = self.info.get("parts")
            if listed is not None and not all(_PART.fullmatch(name) for name in listed):
                raise ValueError("parts must be names of parts")
        except (ValueError, TypeError, KeyError, ArithmeticError) as error:
            raise ValueError(f"{self.uri}/store.json is damaged ({error!r}): prepare the store again") from error
        check_format(f"{self.uri}/store.json", version, FORMAT_VERSION)
        # Stores of older programs list no parts: there all count.
        found = _part_paths(self.filesystem, self.path)
        self._paths = found if listed is None else [f"{self.path}/{name}" for name in listed]
        self._index: _Index | None = None

    def __len__(self) -> int:
        return self.num_scenes

    def paths(self) -> list[str]:
        """The paths of the parts on `filesystem`, in store order."""
        return list(self._paths)

    def bounds(self) -> list[list[float]] | None:
        """Low and high corner, in world units, of the cuboid around all scenes, measured when the store was made.

        None for older stores, and where no view tells. Raises ValueError where store.json holds malformed bounds.
        """
        found = self.info.get("bounds")
        if found is None:
            return None
        try:
            corners = np.asarray(found, dtype=np.float64)
        except (TypeError, ValueError):
            corners = np.zeros(0)
        if corners.shape != (2, 3) or not np.isfinite(corners).all() or not (corners[0] < corners[1]).all():
            raise ValueError(f"{self.uri}/store.json: bounds must be a low and a high corner: prepare the store again")
        return [[float(number) for number in corner] for corner in corners]

    def ids(self) -> list[str]:
        """All scene ids, in store order."""
        return list(self._indexed().places)

    def categories(self) -> list[str]:
        """The category of each scene, in store order."""
        return list(self._indexed().categories)

    def rejects(self) -> list[dict[str, str]]:
        """The scenes that preparing left out: scene_id, source, file, reason."""
        with self._opened(f"{self.path}/rejects.parquet") as file:
            return read_columns(file, REJECTS_SCHEMA).to_pylist()

    def rows(self, ids: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """Yield the rows of all scenes in store order, or of the given ids in their order.

        One row group is in memory at a time. Raises ValueError, at the first row, naming ids that the store does not
        hold.
        """
        places = self._indexed().places
        unknown = [] if ids is None else [scene_id for scene_id in ids if scene_id not in places]
        if unknown:
            raise ValueError(f"{self.uri} holds no scene {', '.join(unknown[:5])}{', …' if len(unknown) > 5 else ''}")
        opened: tuple[int, int] | None = None
        group: pa.Table | None = None
        with ExitStack() as stack:  # closes the part that is open
            for scene_id in places if ids is None else ids:
                number, row_group, row = places[scene_id]
                if opened is None or opened[0] != number:
                    stack.close()
                    part, group = stack.enter_context(self._opened(self._paths[number])), None
                if group is None or opened != (number, row_group):
                    group, opened = read_columns(part, SCHEMA, row_group=row_group), (number, row_group)
                yield group.slice(row, 1).to_pylist()[0]

    @contextmanager
    def _opened(self, path: str) -> Iterator[pq.ParquetFile]:
        """Open a Parquet file of the store. Errors in it or in its columns become a ValueError that names the file."""
        try:
            with open_table(self.filesystem, path) as file:
                yield file
        except TableError as error:
            raise ValueError(f"{path}: not a readable part of a scene store ({error}): prepare it again") from error

    def _indexed(self) -> _Index:
        """Read the id and category columns of all parts, once. Raises ValueError where they do not fit store.json."""
        if self._index is not None:
            return self._index
        index = _Index()
        for number, path in enumerate(self._paths):
            with self._opened(path) as part:
                columns = read_columns(part, pa.schema([SCHEMA.field("scene_id"), SCHEMA.field("category")]))
                for scene_id in columns["scene_id"].to_pylist():
                    if not is_scene_id(scene_id):
                        raise TableError(f"bad scene id {scene_id!r:.220}")
                sizes = [part.metadata.row_group(group).num_rows for group in range(part.num_row_groups)]
            in_part = [(number, group, row) for group, size in enumerate(sizes) for row in range(size)]
            index.places.update(zip(columns["scene_id"].to_pylist(), in_part, strict=True))
            index.categories.extend(columns["category"].to_pylist())
        # A repeated id leaves fewer places than categories.
        if not len(index.places) == len(index.categories) == self.num_scenes:
            raise ValueError(
                f"{self.uri} holds {len(index.places)} scenes, its store.json says {self.num_scenes}: prepare it again"
            )
        self._index = index
        return index


def _union(bounds: Sequence[NDArray[np.float64]]) -> list[list[float]] | None:
    if not bounds:
        return None
    every = np.stack(bounds)
    return [every[:, 0].min(0).tolist(), every[:, 1].max(0).tolist()]


def _is_file(filesystem: fs.FileSystem, path: str) -> bool:
    return filesystem.get_file_info(path).type == fs.FileType.File


def _part_paths(filesystem: fs.FileSystem, folder: str) -> list[str]:
    found = filesystem.get_file_info(fs.FileSelector(folder))
    return sorted(info.path for info in found if _PART.fullmatch(info.base_name))


def _root(filesystem: fs.FileSystem, path: str, uri: str) -> AnyPath:
    return Path(path) if isinstance(filesystem, fs.LocalFileSystem) else ObjectPath.of(uri)
