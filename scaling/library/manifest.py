"""The manifest of a library: which parts count, and which scenes failed, known without opening a part.

LIBRARY/manifests/manifest-<epoch>-<number>.json; the highest one is in force. When a driver has taken the lease of its
epoch, it publishes its first manifest, which closes the earlier epochs: of their parts, only the listed ones count. So
what a driver commits after it has lost its lease is never read. Of the manifest's own epoch every part on disk counts,
listed or not.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from scaling.data.scene_id import SceneId
from scaling.library.parts import Part, PartName
from scaling.storage.commit import commit_file
from scaling.storage.formats import MAX_EPOCH, NewerFormat, check_format
from scaling.storage.json_yaml import first_fault, parse_json
from scaling.storage.limited import read_limited
from scaling.storage.paths import AnyPath

FORMAT_VERSION = 1
KEPT = 2  # manifests on disk: a reader may just have chosen the last but one
_NAME = re.compile(r"manifest-([0-9]{6})-([0-9]{6})\.json")


def _check_when(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("a time without its zone")
    return text


def _check_text(text: str) -> str:
    text.encode()  # half of a character, as JSON can write it, could not be written again
    return text


Text = Annotated[str, AfterValidator(_check_text)]
When = Annotated[str, AfterValidator(_check_when)]  # ISO 8601, with its zone
Number = Annotated[int, Field(ge=0, le=MAX_EPOCH)]


class Event(BaseModel):
    """What happened to a scene. kind: `retry`, or why the scene was given up; when: in UTC."""

    model_config = ConfigDict(frozen=True)

    scene_id: SceneId
    attempt: int
    kind: Text
    message: Text
    when: When


class Manifest(BaseModel):
    """epoch, number: as in the file's name; parts: by name; replaced: names of parts that `compact` joined into others,
    and when, in UTC; failures: the latest event of each scene that has one."""

    model_config = ConfigDict(extra="forbid")

    format_version: int = FORMAT_VERSION
    epoch: Number = 0
    number: Number = 0
    # Names of parts become paths, and those of `replaced` are deleted.
    parts: dict[PartName, Part] = {}
    replaced: dict[PartName, When] = {}
    failures: dict[SceneId, Event] = {}

    @model_validator(mode="after")
    def _keys(self) -> Manifest:
        for key, name in [(k, part.name) for k, part in self.parts.items()] + [
            (k, event.scene_id) for k, event in self.failures.items()
        ]:
            if key != name:
                raise ValueError(f"key {key} stands for {name}")
        if both := self.parts.keys() & self.replaced.keys():
            raise ValueError(f"{min(both)} both counts and is replaced")
        return self


def read_manifest(library: AnyPath) -> Manifest:
    """The manifest in force; an empty one of epoch 0 where there is none, as in libraries of format 1.

    Raises ValueError naming a manifest that cannot be read, FileNotFoundError where manifests vanish at every try.
    """
    for _ in range(3):  # the chosen manifest may be removed before it is read
        paths = _paths(library)
        if not paths:
            return Manifest()
        try:
            return _read(paths[-1])
        except FileNotFoundError:
            continue
    raise FileNotFoundError(2, "its manifest vanishes while it is read", str(library))


def _read(path: AnyPath) -> Manifest:
    try:
        values = parse_json(read_limited(path))
        if isinstance(values, dict) and isinstance(values.get("format_version"), int):
            check_format(path, values["format_version"], FORMAT_VERSION, NewerFormat)
        manifest = Manifest.model_validate(values)
        if path.name != _file_name(manifest):
            raise ValueError(f"it says that it is {_file_name(manifest)}")
        return manifest
    except NewerFormat:
        raise
    except ValueError as error:
        raise ValueError(
            f"{path}: not a readable manifest ({first_fault(error)}): restore it from a copy; without one, move it out "
            "of this folder: then the one before it is in force, and what was fitted since is fitted again"
        ) from None


def _file_name(manifest: Manifest) -> str:
    return f"manifest-{manifest.epoch:06d}-{manifest.number:06d}.json"


def publish(library: AnyPath, manifest: Manifest) -> None:
    """Write a manifest, whole or not at all; delete all but the KEPT newest."""
    path = library / "manifests" / _file_name(manifest)
    commit_file(path, manifest.model_dump_json().encode())
    for old in _paths(library)[:-KEPT]:
        old.unlink(missing_ok=True)


def manifest_bytes(library: AnyPath) -> int:
    """Bytes on disk of the manifest in force; 0 where there is none."""
    paths = _paths(library)
    return paths[-1].stat().st_size if paths else 0


def _paths(library: AnyPath) -> list[AnyPath]:
    found = (path for path in (library / "manifests").glob("manifest-*.json") if _NAME.fullmatch(path.name))
    return sorted(found, key=lambda path: path.name)
