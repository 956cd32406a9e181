"""The manifest of a library: which parts count, and which scenes failed, known without opening a part.

LIBRARY/manifests/manifest-<epoch>-<number>.json; the highest one is in force. When a driver has taken the lease of its
epoch, it publishes its first manifest, which closes the earlier epochs: of their parts, only the listed ones count. So
what a driver commits after it has lost its lease is never read. Of the manifest's own epoch every part on disk counts,
listed or not.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError

from scaling.data.scene_id import SceneId
from scaling.library.parts import Part
from scaling.storage.atomic import read_limited
from scaling.storage.commit import commit_file
from scaling.storage.paths import AnyPath

KEPT = 2  # manifests on disk: a reader may just have chosen the last but one


class Event(BaseModel):
    """What happened to a scene. kind: `retry`, or why the scene was given up; when: ISO 8601, UTC."""

    model_config = ConfigDict(frozen=True)

    scene_id: SceneId
    attempt: int
    kind: str
    message: str
    when: str


class Manifest(BaseModel):
    """epoch, number: as in the file's name; parts: by name; replaced: names of parts that `compact` joined into others,
    and when (ISO 8601, UTC); failures: the latest event of each scene that has one."""

    model_config = ConfigDict(extra="forbid")

    format_version: int = 1
    epoch: int = 0
    number: int = 0
    parts: dict[str, Part] = {}
    replaced: dict[str, str] = {}
    failures: dict[str, Event] = {}


def read_manifest(library: AnyPath) -> Manifest:
    """The manifest in force; an empty one of epoch 0 where there is none, as in libraries of format 1.

    Raises ValueError naming a manifest that cannot be read, FileNotFoundError where manifests vanish at every try.
    """
    for _ in range(3):  # the chosen manifest may be removed before it is read
        paths = _paths(library)
        if not paths:
            return Manifest()
        try:
            data = read_limited(paths[-1])
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise ValueError(f"{paths[-1]}: not a readable manifest ({error}): restore or remove it") from None
        try:
            return Manifest.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(
                f"{paths[-1]}: not a readable manifest ({where + ': ' if where else ''}{first['msg']}): restore it, or "
                "remove it: then the one before it is in force"
            ) from None
    raise FileNotFoundError(2, "its manifest vanishes while it is read", str(library))


def publish(library: AnyPath, manifest: Manifest) -> None:
    """Write a manifest, whole or not at all; delete all but the KEPT newest."""
    path = library / "manifests" / f"manifest-{manifest.epoch:06d}-{manifest.number:06d}.json"
    commit_file(path, manifest.model_dump_json().encode())
    for old in _paths(library)[:-KEPT]:
        old.unlink(missing_ok=True)


def manifest_bytes(library: AnyPath) -> int:
    """Bytes on disk of the manifest in force; 0 where there is none."""
    paths = _paths(library)
    return paths[-1].stat().st_size if paths else 0


def _paths(library: AnyPath) -> list[AnyPath]:
    return sorted((library / "manifests").glob("manifest-??????-??????.json"), key=lambda path: path.name)
