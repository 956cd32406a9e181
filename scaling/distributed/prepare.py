"""Prepares a scene store: lists the source, reads its scenes in parallel with Ray Data, writes them in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray

from scaling.data.readers.registry import list_scenes, read_scene
from scaling.data.scene_ref import SceneError, SceneRef
from scaling.data.scene_store import REJECTS_SCHEMA, SCHEMA, SceneStore
from scaling.data.store_writer import StoreWriter
from scaling.distributed.scene_rows import batches_of, bound_reading
from scaling.storage.progress import Progress
from scaling.storage.text import shown
from scaling.training.measure.box import MOST_VIEWS, NoBounds, few_views, scene_bounds
from scaling.training.measure.doctor import colour_name, examine, scene_fault, verdict
from scaling.training.measure.visual_hull import silhouettes

EXAMINED, EXAMINED_VIEWS = 4, 32  # scenes whose cameras are looked at before the rest is read, and views of each
MOST_TOLD = 5  # reasons of rejects that are printed

READ = pa.schema(
    [
        *SCHEMA,
        ("bounds", pa.list_(pa.list_(pa.float64()))),
        ("reject", pa.struct(REJECTS_SCHEMA)),
        ("no_bounds", pa.string()),
        ("background", pa.string()),
        ("notes", pa.list_(pa.string())),
    ]
)


def read_refs(block: pa.Table, force: bool = False) -> Iterator[pa.Table]:
    """Read a block of scene references into tables of one row each. Where a scene cannot be read, or its cameras are
    wrong (unless `force`), only `reject` is set, to its row of the rejects."""
    for values in block.to_pylist():
        ref = SceneRef(**values)
        try:
            read = read_scene(ref)
            row: dict[str, Any] = {**read, "bounds": None, "no_bounds": None, "reject": None}
            views = few_views(read, MOST_VIEWS)
            row["background"] = colour_name(views)
            shown_pixels = silhouettes(views)
            try:
                row["bounds"] = scene_bounds(views, shown_pixels).tolist()
            except NoBounds as error:
                row["no_bounds"] = str(error)
                if not force and (fault := scene_fault(views, shown_pixels, read["convention"])):
                    raise ref.error(ref.source, f"{fault} (for these scenes alone, or --force)") from None
        except SceneError as error:
            why = {"source": error.source, "file": error.file, "reason": error.reason}
            row = {"reject": {"scene_id": ref.scene_id, **why}}
        yield pa.Table.from_pylist([row], schema=READ)


def write_rows(writer: StoreWriter, rows: pa.Table) -> None:
    """Store the rows that `read_refs` made: scenes and rejects."""
    for row in rows.to_pylist():
        rejected, bounds, why, notes = (row.pop(key) for key in ("reject", "bounds", "no_bounds", "notes"))
        background = row.pop("background")
        if rejected is None:
            if writer.add(row, bounds or why):
                writer.note(row["scene_id"], notes)
                writer.backgrounds.setdefault(background, []).append(row["scene_id"])
        else:
            writer.reject(**rejected)


def holds(store: str, source: str) -> bool:
    """Whether `store` is a complete scene store that was prepared from a source of this name."""
    try:
        return SceneStore(store).info.get("source") == source
    except FileNotFoundError:
        return False


def check_cameras(refs: Sequence[SceneRef], force: bool = False) -> None:
    """Print what the cameras of a few scenes look like (see measure/doctor.py).

    Raises ValueError, which says what to do, where the views contradict each other under the poses as they are read,
    unless `force` is given.
    """
    findings, convention = [], None
    for place in sorted({round(i * (len(refs) - 1) / max(1, EXAMINED - 1)) for i in range(EXAMINED)}):
        with suppress(SceneError):  # the store's rejects will tell
            row = read_scene(refs[place])
            convention = row["convention"]
            findings.append(examine(few_views(row, EXAMINED_VIEWS), convention))
            print(f"cameras: {shown(findings[-1].line)}", flush=True)
    wrong = verdict(findings, convention) if convention else ""
    if wrong and not force:
        raise ValueError(f"{wrong}. No store was written, as nothing could be learned from it; --force writes it")
    if wrong:
        print(f"warning: {wrong}")


def prepare(source: str, store: str, force: bool = False, **how: Any) -> tuple[int, int]:
    """Read every scene of `source`, a folder or a .zip file, into a scene store. → numbers stored and rejected.

    force: write the store although its cameras seem wrong; how: see `list_scenes`. Raises ValueError where the source's
    layout or the category is unknown, cameras seem wrong or no scene can be used, FileExistsError where the store
    exists already.
    """
    refs = list_scenes(source, **how)
    check_cameras(refs, force)
    bound_reading()
    with StoreWriter(store, source) as writer:
        dataset = ray.data.from_items([asdict(ref) for ref in refs], override_num_blocks=-(-len(refs) // 8))
        rows = dataset.map_batches(read_refs, fn_kwargs={"force": force}, batch_size=None, batch_format="pyarrow")
        progress = Progress(total=len(refs), unit="scene", desc="prepare")
        with progress, closing(batches_of(rows, 8)) as batches:
            for batch in batches:
                write_rows(writer, batch)
                progress.update(len(batch))
                progress.set_postfix(rejected=len(writer.rejects))
        _print_notes(writer)
    return writer.num_scenes, len(writer.rejects)


def _print_notes(writer: StoreWriter) -> None:
    """Say what is remarkable about the scenes, and why some are left out: a line for each kind."""
    writer.set_outliers_apart()
    unknown = {f"{why}: where it is cannot be told": ids for why, ids in writer.no_bounds.items()}
    mixed = writer.backgrounds if len(writer.backgrounds) > 1 else {}
    most = max((len(ids) for ids in mixed.values()), default=0)
    others = {
        f"the background is {colour}, that of most scenes is another: learn scenes of one background together": ids
        for colour, ids in mixed.items()
        if len(ids) < most or ids[0] != next(ids[0] for ids in mixed.values() if len(ids) == most)
    }
    for note, scene_ids in {**writer.notes, **unknown, **others}.items():
        Progress.write(f"note: scene {_first_and_more(scene_ids)}: {shown(note)}")
    rejected: dict[str, list[str]] = {}
    for reject in writer.rejects:
        rejected.setdefault(reject["reason"], []).append(reject["scene_id"])
    for reason, scene_ids in list(rejected.items())[:MOST_TOLD]:
        Progress.write(f"rejected: scene {shown(_first_and_more(scene_ids))}: {shown(reason)}")


def _first_and_more(scene_ids: Sequence[str]) -> str:
    return scene_ids[0] + (f" and {len(scene_ids) - 1} more" if len(scene_ids) > 1 else "")
