"""The library: one row per fitted scene, in Parquet parts that are committed once and never changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from scaling.library.commit import commit_file
from scaling.models.triplanes import SceneParams

FORMAT_VERSION = 1
METRICS = (
    "psnr", "ssim", "lpips", "train_psnr", "train_ssim", "autoencoder_psnr", "autoencoder_ssim", "mean_image_psnr",
    "latent_psnr",
)  # fmt: skip
PLANES = ("micro_planes", "micro_dtype", "micro_shape", "micro_scale", "coefs")
SCHEMA = pa.schema(
    [
        ("scene_id", pa.string()),
        ("category", pa.string()),
        ("stage", pa.int8()),
        ("shared", pa.string()),
        ("cohort", pa.string()),
        ("micro_planes", pa.large_binary()),
        ("micro_dtype", pa.string()),
        ("micro_shape", pa.list_(pa.int32())),
        ("micro_scale", pa.list_(pa.float32())),
        ("coefs", pa.list_(pa.float32())),
        *[(name, pa.float64()) for name in METRICS],
        ("seconds", pa.float64()),
        ("settings_hash", pa.string()),
        ("seed", pa.int64()),
        ("format_version", pa.int32()),
    ]
)


@dataclass(frozen=True)
class PackedScene:
    """One scene's parameters as bytes. float32, float16: the numbers themselves; int8: numbers / scale, one scale per
    plane and channel, scale [P · F_mic]."""

    micro_planes: bytes
    micro_dtype: str
    micro_shape: tuple[int, ...]
    micro_scale: list[float]
    coefs: list[float]


class NotFinite(ValueError):
    """A fit diverged: it left numbers that cannot be stored."""


def pack_scene(params: SceneParams, micro_dtype: str) -> PackedScene:
    """params of one scene: micro_planes [P, F_mic, K, K], coefs [M]. Raises NotFinite, or ValueError for another
    type than float32, float16 and int8."""
    micro, coefs = params.micro_planes.detach().cpu().float(), params.coefs.detach().cpu().float()
    if not (torch.isfinite(micro).all() and torch.isfinite(coefs).all()):
        raise NotFinite("the fit diverged: planes or coefs are not finite")
    scale: list[float] = []
    if micro_dtype == "int8":
        peak = micro.flatten(2).abs().amax(2) if micro.numel() else micro.new_zeros(micro.shape[:2])
        step = (peak / 127).clamp(min=1e-12)
        micro = (micro / step[..., None, None]).round()
        scale = step.flatten().tolist()
    elif micro_dtype not in ("float16", "float32"):
        raise ValueError(f"micro planes are stored as float32, float16 or int8, not {micro_dtype!r}")
    with np.errstate(over="ignore"):  # told below
        array = micro.numpy().astype(micro_dtype)
    if not np.isfinite(array).all():
        raise NotFinite("the fit diverged: micro planes exceed the range of float16")
    return PackedScene(array.tobytes(), micro_dtype, tuple(array.shape), scale, coefs.tolist())


def unpack_scene(row: Mapping[str, Any]) -> SceneParams:
    """The parameters of a row (or of a PackedScene's fields): micro_planes [P, F_mic, K, K], coefs [M], float32.

    Raises ValueError naming the scene where bytes, shape and type do not fit together.
    """
    name, dtype, shape = row.get("scene_id", "?"), row["micro_dtype"], tuple(row["micro_shape"])
    if dtype not in ("float32", "float16", "int8"):
        raise ValueError(f"scene {name}: unknown type of micro planes {dtype!r}")
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if len(shape) != 4 or len(row["micro_planes"]) != expected:
        found = len(row["micro_planes"])
        raise ValueError(f"scene {name}: {found} bytes of micro planes, shape {shape} needs {expected}")
    micro = torch.from_numpy(np.frombuffer(row["micro_planes"], dtype=dtype).reshape(shape).astype(np.float32))
    if dtype == "int8":
        scale = torch.tensor(row["micro_scale"], dtype=torch.float32)
        if scale.numel() != shape[0] * shape[1]:
            raise ValueError(f"scene {name}: {scale.numel()} scales for {shape[0]} planes of {shape[1]} channels")
        micro = micro * scale.view(*shape[:2], 1, 1)
    return SceneParams(micro, torch.tensor(row["coefs"], dtype=torch.float32))


def commit_part(library: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Commits the rows of a batch as one part, named by its scenes and shared model: the same batch twice is one."""
    names = "|".join(sorted(f"{row['shared']}/{row['scene_id']}" for row in rows))
    path = library / "parts" / f"part-{hashlib.sha256(names.encode()).hexdigest()[:20]}.parquet"
    table = pa.Table.from_pylist([{**row, "format_version": FORMAT_VERSION} for row in rows], schema=SCHEMA)
    sink = pa.BufferOutputStream()
    # Planes are noise to a compressor; statistics of long binaries would store them twice.
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_statistics=["scene_id", "stage"])
    commit_file(path, sink.getvalue().to_pybytes())
    return path


class Library:
    """Reads a library folder. A scene that two parts hold counts once: the first part by name wins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def parts(self) -> list[Path]:
        """The committed parts, sorted by name; empty where there are none."""
        return sorted((self.folder / "parts").glob("part-*.parquet"))

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of all scenes; by default every column but the planes. Raises ValueError naming a damaged part."""
        columns = list(columns or [name for name in SCHEMA.names if name not in PLANES])
        read = list(dict.fromkeys(["scene_id", "format_version", *columns]))
        tables = [_read_part(path, read) for path in self.parts()]
        table = pa.concat_tables(tables) if tables else pa.schema([SCHEMA.field(n) for n in read]).empty_table()
        first: dict[str, int] = {}
        for index, scene_id in enumerate(table["scene_id"].to_pylist()):
            first.setdefault(scene_id, index)
        return table.take(pa.array(list(first.values()), pa.int64())).select(columns)

    def ids(self, stage: int | None = None) -> list[str]:
        """Ids of the committed scenes, without touching planes."""
        rows = self.table(["scene_id", "stage"]).to_pylist()
        return [row["scene_id"] for row in rows if stage is None or row["stage"] == stage]

    def scene(self, scene_id: str) -> dict[str, Any]:
        """One scene's whole row. Raises LookupError naming the library where it is not there."""
        for row in self._find([scene_id]):
            return row
        ids = self.ids()
        has = f"it has {', '.join(ids[:5])}{', …' if len(ids) > 5 else ''}" if ids else "no scenes are fitted there"
        raise LookupError(f"{self.folder} holds no scene {scene_id!r}; {has}")

    def scenes(self) -> Iterator[dict[str, Any]]:
        """All rows, one part in memory at a time."""
        yield from self._find(self.ids())

    def _find(self, ids: Sequence[str]) -> Iterator[dict[str, Any]]:
        wanted = set(ids)
        for path in self.parts():
            present = wanted.intersection(_read_part(path, ["scene_id"])["scene_id"].to_pylist())
            if present:
                for row in _read_part(path, SCHEMA.names).to_pylist():
                    if row["scene_id"] in wanted:
                        wanted.discard(row["scene_id"])
                        yield row

    def num_bytes(self, stage: int) -> int:
        """Bytes on disk of the parts that hold scenes of a stage, and of the cohorts' own copies (stage 2)."""
        parts = [path for path in self.parts() if stage in _read_part(path, ["stage"])["stage"].to_pylist()]
        cohorts = [path for path in (self.folder / "cohorts").rglob("*") if path.is_file()] if stage == 2 else []
        return sum(path.stat().st_size for path in [*parts, *cohorts])


def _read_part(path: Path, columns: Sequence[str]) -> pa.Table:
    """Columns of a part, in the schema's types. A column that the schema does not have does no harm."""
    read = list(dict.fromkeys(["scene_id", "format_version", *columns]))
    try:
        with pq.ParquetFile(path) as part:
            table = part.read(columns=read)
            newest = max(table["format_version"].to_pylist(), default=0)
        if newest <= FORMAT_VERSION:
            table = table.select(read).cast(pa.schema([SCHEMA.field(name) for name in read]))
            if table["scene_id"].null_count:
                raise ValueError("a scene has no id")
    except (OSError, TypeError, ValueError, LookupError, pa.ArrowException) as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"{path}: not a readable part of a library ({why}): restore it, or remove it and fit its scenes again"
        ) from error
    if newest > FORMAT_VERSION:
        raise ValueError(f"{path}: format version {newest}, this program reads up to {FORMAT_VERSION}: update it")
    return table.select(list(columns))
