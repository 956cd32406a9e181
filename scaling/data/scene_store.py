"""The scene store: Parquet parts with one row per scene, a table of rejected scenes, and store.json, written last."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from scaling.data.scene_id import is_scene_id
from scaling.storage.formats import check_format
from scaling.storage.json_yaml import parse_json
from scaling.storage.parquet import TableError, open_table, read_columns
from scaling.storage.paths import AnyPath, ObjectPath, open_uri
from scaling.storage.progress import waiting_for
from scaling.storage.text import shown

FORMAT_VERSION = 2  # 1: no splits; stores without splits still have this version
SCENES_PER_ROW_GROUP = 16
SCENES_PER_PART = 256
MAX_INFO_BYTES = 1 << 20
MAX_SCENES = 100_000_000
LARGEST, SMALLEST = 1e9, 1e-9  # world units, of the bounds: beyond them float32 fails
_PART = re.compile(r"scenes-[0-9]{5}(-[0-9]{6})?\.parquet")
SCHEMA = pa.schema(
    [
        ("scene_id", pa.string()),
        ("category", pa.string()),
        ("split", pa.string()),
        ("views", pa.list_(pa.large_binary())),
        ("cam2world", pa.list_(pa.float32())),
        ("intrinsics", pa.list_(pa.float32())),
        ("test_views", pa.list_(pa.int32())),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("source", pa.string()),
    ]
)
LATER = ("split",)  # columns that stores of older programs lack
REJECTS_SCHEMA = pa.schema([(name, pa.string()) for name in ("scene_id", "source", "file", "reason")])


@dataclass(frozen=True)
class _Index:
    """The scenes of a store, in its order. places: id → (number of the part, row group, row in the row group)."""

    categories: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    places: dict[str, tuple[int, int, int]] = field(default_factory=dict)


class SceneStore:
    """A complete store, opened for reading.

    Raises FileNotFoundError where there is none, ValueError where it is damaged or of a newer version.
    """

    def __init__(self, uri: str | Path) -> None:
        self.uri = str(uri)
        self.filesystem, self.path = open_uri(uri)
        self.root = store_root(self.filesystem, self.path, self.uri)
        if not is_file(self.filesystem, f"{self.path}/store.json"):
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
            if listed is not None and len(set(listed)) < len(listed):
                raise ValueError("parts must be different")
            if not 0 <= self.num_scenes <= MAX_SCENES:
                raise ValueError(f"num_scenes must be between 0 and {MAX_SCENES}")
        except (ValueError, TypeError, KeyError, ArithmeticError) as error:
            raise ValueError(f"{self.uri}/store.json is damaged ({error!r}): prepare the store again") from error
        check_format(f"{self.uri}/store.json", version, FORMAT_VERSION)
        # Stores of older programs list no parts: there all count.
        found = part_paths(self.filesystem, self.path)
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
        sound = corners.shape == (2, 3) and bool((np.abs(corners) < LARGEST).all())
        if not sound or not (corners[1] - corners[0] > SMALLEST).all():
            raise ValueError(f"{self.uri}/store.json: bounds must be a low and a high corner: prepare the store again")
        return [[float(number) for number in corner] for corner in corners]

    def no_bounds(self) -> dict[str, list[str]]:
        """Why no scene's views tell where it is → scenes; empty where some do, and for older stores."""
        found = self.info.get("no_bounds")
        if not isinstance(found, dict) or not all(isinstance(ids, list) for ids in found.values()):
            return {}
        return {shown(why): [each for each in ids if is_scene_id(each)] for why, ids in found.items()}

    def ids(self) -> list[str]:
        """All scene ids, in store order."""
        return list(self._indexed().places)

    def categories(self) -> list[str]:
        """The category of each scene, in store order."""
        return list(self._indexed().categories)

    def splits(self) -> list[str]:
        """The split of each scene, in store order: train, val, test, or "" where the source has none."""
        return list(self._indexed().splits)

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
                    group, opened = read_columns(part, SCHEMA, row_group=row_group, optional=LATER), (number, row_group)
                found = group.slice(row, 1).to_pylist()[0]
                yield {**found, "split": found["split"] or ""}

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
                told = pa.schema([SCHEMA.field(name) for name in ("scene_id", "category", "split")])
                columns = read_columns(part, told, nullable=LATER, optional=LATER)
                for scene_id in columns["scene_id"].to_pylist():
                    if not is_scene_id(scene_id):
                        raise TableError(f"bad scene id {scene_id!r:.220}")
                sizes = [part.metadata.row_group(group).num_rows for group in range(part.num_row_groups)]
            in_part = [(number, group, row) for group, size in enumerate(sizes) for row in range(size)]
            index.places.update(zip(columns["scene_id"].to_pylist(), in_part, strict=True))
            index.categories.extend(columns["category"].to_pylist())
            if len(index.categories) > self.num_scenes:
                break
            index.splits.extend(split or "" for split in columns["split"].to_pylist())
        # A repeated id leaves fewer places than categories.
        if not len(index.places) == len(index.categories) == self.num_scenes:
            raise ValueError(
                f"{self.uri} holds {len(index.places)} scenes, its store.json says {self.num_scenes}: prepare it again"
            )
        self._index = index
        return index


def is_file(filesystem: fs.FileSystem, path: str) -> bool:
    with waiting_for(f"the file system at {path}"):
        return filesystem.get_file_info(path).type == fs.FileType.File


def part_paths(filesystem: fs.FileSystem, folder: str) -> list[str]:
    """The paths of all parts that lie in a store's folder, in their order."""
    found = filesystem.get_file_info(fs.FileSelector(folder))
    return sorted(info.path for info in found if _PART.fullmatch(info.base_name))


def store_root(filesystem: fs.FileSystem, path: str, uri: str) -> AnyPath:
    """The store's folder."""
    return Path(path) if isinstance(filesystem, fs.LocalFileSystem) else ObjectPath.of(uri)
