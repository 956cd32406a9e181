"""Compaction: joins many small parts into few large ones, and deletes the small ones after a grace time.

No part is changed: joined parts are added, and a new manifest names them instead of the small ones. Readers that began
before the new manifest find the old files until the grace time is over.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from scaling.library.ledger import Ledger
from scaling.library.parts import Part, commit_part, damaged, describe_part, order, part_name, read_bytes, read_part
from scaling.library.row_schema import SCHEMA
from scaling.storage.atomic import described
from scaling.storage.paths import AnyPath
from scaling.storage.text import shown

SCENES_PER_PART = 1024
BYTES_PER_PART = 64 << 20
GRACE_SECONDS = 600.0  # far longer than reading a part takes
MANY_PARTS = 16  # a job that ends with at least this many small parts joins them
JOB_GRACE_SECONDS = 10.0  # enough to read a part that is open; where a part is gone, readers look again


def compact(ledger: Ledger, grace_seconds: float = GRACE_SECONDS) -> tuple[int, int]:
    """Join the small parts that count, stage by stage, and delete parts that were replaced longer ago than the grace
    time. → numbers of parts before and after.

    Raises ValueError naming a part whose bytes are not those that the manifest notes.
    """
    before = len(ledger.run.library.parts())
    counts = _where_scenes_count(ledger)
    for group in _groups(_small(ledger)):
        if len(group) > 1:
            _join(ledger, group, counts)
    ledger.publish()
    _forget(ledger, grace_seconds)
    return before, len(ledger.run.library.parts())


def compact_after_job(ledger: Ledger) -> None:
    """Join the small parts when a driver's job is done, if there are at least MANY_PARTS.

    Where that fails (no room on the disk for the old and the new parts together, a damaged part), print a warning and
    leave the parts apart.
    """
    try:
        if len(_small(ledger)) < MANY_PARTS:
            return
        before, after = compact(ledger)
        print(f"library: {before} parts became {after}", flush=True)
    except (OSError, ValueError) as error:
        why = described(error) if isinstance(error, OSError) else error
        print(
            f"warning: the library's parts could not be joined ({shown(why)}); join them later with compact.py",
            flush=True,
        )


def forget_after_job(ledger: Ledger) -> None:
    """Delete the parts that this driver replaced, once the short grace time is over; those that `compact.py` replaced
    before have its longer one."""
    own = [ledger.manifest.replaced[name] for name in ledger.replaced if name in ledger.manifest.replaced]
    if own:
        age = datetime.now(UTC) - max(map(datetime.fromisoformat, own))
        time.sleep(min(max(JOB_GRACE_SECONDS - age.total_seconds(), 0.0), JOB_GRACE_SECONDS))
        _forget(ledger, GRACE_SECONDS, JOB_GRACE_SECONDS)


def _small(ledger: Ledger) -> list[Part]:
    """The parts that count and are not full, in the order in which they count."""
    return [part for path in ledger.run.library.parts() if not _is_full(part := _listed(ledger, path))]


def _listed(ledger: Ledger, path: AnyPath) -> Part:
    """What the manifest says of a part. The manifest lacks parts of actors that the driver took for dead: these parts
    are read."""
    return ledger.manifest.parts.get(path.name) or describe_part(path)


def _where_scenes_count(ledger: Ledger) -> dict[str, str]:
    """Scene → the name of the part whose row counts: the first one, in the order of `parts.order`."""
    counts: dict[str, str] = {}
    for path in ledger.run.library.parts():
        for scene_id in _listed(ledger, path).scene_ids:
            counts.setdefault(scene_id, path.name)
    return counts


def _is_full(part: Part) -> bool:
    return len(part.scene_ids) >= SCENES_PER_PART or part.num_bytes >= BYTES_PER_PART


def _groups(parts: list[Part]) -> Iterator[list[Part]]:
    """Groups of parts, each to be joined into one: of one stage, shared model and settings, in their order, up to the
    size of a full part."""
    for kind in sorted({_kind(part) for part in parts}):
        group: list[Part] = []
        for part in (part for part in parts if _kind(part) == kind):
            scenes = sum(len(other.scene_ids) for other in [*group, part])
            if group and (scenes > SCENES_PER_PART or sum(p.num_bytes for p in [*group, part]) > BYTES_PER_PART):
                yield group
                group = []
            group.append(part)
        if group:
            yield group


def _kind(part: Part) -> tuple[int, str, str]:
    return part.stage, part.shared, part.settings_hash


def _join(ledger: Ledger, group: list[Part], counts: dict[str, str]) -> None:
    """Commit as one part those scenes of several parts whose rows count there. counts: from `_where_scenes_count`."""
    folder = ledger.run.library.folder
    rows: dict[str, dict[str, Any]] = {}
    for part in group:
        path = folder / "parts" / part.name
        if hashlib.sha256(read_bytes(path)).hexdigest() != part.sha256:
            raise damaged(path, "its bytes changed since they were committed")
        found = read_part(path, SCHEMA.names).to_pylist()
        if tuple(row["scene_id"] for row in found) != part.scene_ids:
            raise damaged(path, "it holds other scenes than the manifest notes")
        for row in found:
            if counts[row["scene_id"]] == part.name:
                rows.setdefault(row["scene_id"], row)
    joined = None
    if rows:
        # The first epoch of the group: of two rows of a scene, the same one counts as before. Batches count their
        # attempts from 1, so attempt 0 never gives a batch's name.
        epoch = min(order(part.name)[0] for part in group)
        joined = commit_part(folder, list(rows.values()), part_name(epoch, 0, rows))
        ledger.add(joined)
    now = datetime.now(UTC).isoformat()
    for part in group:
        if joined is None or part.name != joined.name:  # a part of the same scenes may have been joined before
            ledger.manifest.parts.pop(part.name, None)
            ledger.manifest.replaced[part.name] = now
            ledger.replaced.add(part.name)


def _forget(ledger: Ledger, grace_seconds: float, own_grace: float | None = None) -> None:
    """Delete replaced parts whose grace time is over. The manifest notes them as replaced until they are gone.

    own_grace: of the parts that this driver replaced itself. Raises ValueError naming a part whose scenes count nowhere
    else, whatever the manifest says.
    """
    parts, now = ledger.run.library.folder / "parts", datetime.now(UTC)
    grace = {name: own_grace if own_grace is not None and name in ledger.replaced else grace_seconds
             for name in ledger.manifest.replaced}  # fmt: skip
    gone = [
        name for name, when in ledger.manifest.replaced.items()
        if now - datetime.fromisoformat(when) >= timedelta(seconds=grace[name])
    ]  # fmt: skip
    counts = _where_scenes_count(ledger) if gone else {}
    for name in gone:
        with suppress(FileNotFoundError):
            left = set(read_part(parts / name, ["scene_id"])["scene_id"].to_pylist()) - counts.keys()
            if left:
                raise ValueError(f"{parts / name}: noted as replaced, but scene {min(left)} is nowhere else; it stays")
            (parts / name).unlink()
    if gone:
        for name in gone:
            del ledger.manifest.replaced[name]
        ledger.publish()
