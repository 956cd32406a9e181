"""Tell whole checkpoints from torn ones: last of all, each worker writes a seal, the sizes and SHA-256 of its files.

A checkpoint of stage 1 is a folder `NNNNN-…` (epochs done) or `done-…`, on a disk or an object store; fit_cohort.py
names its own. The files arrive in any order and may be cut short, lost or changed later. A checkpoint is whole as long
as the seals of all its workers agree with the files.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem
from pydantic import BaseModel

from scaling.storage.atomic import replace_file
from scaling.storage.json_yaml import parse_json

SEAL = re.compile(r"seal-([0-9]{1,5})-of-([0-9]{1,5})\.json")
NAME = re.compile(r"([0-9]{5}|done)-[A-Za-z0-9._-]+")
FIRST = "00001-"
MAX_SEAL_BYTES = 1 << 20  # a hundred times the size of a seal
MAX_FILE_BYTES = 64 << 30  # a minute of hashing; a state of 10,000 scenes with their optimisers has a tenth of it


class NoWholeCheckpoint(ValueError):
    """There are checkpoints of later epochs than the first, and no checkpoint is whole."""


class _Noted(BaseModel):
    bytes: int
    sha256: str


class _Seal(BaseModel):
    files: dict[str, _Noted]


def seal(folder: Path, rank: int = 0, size: int = 1) -> None:
    """Write the sizes and SHA-256 of the files in `folder`, all by worker `rank` of `size`, to one more file."""
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            files[path.name] = {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    replace_file(folder / f"seal-{rank}-of-{size}.json", json.dumps({"version": 1, "files": files}).encode())


def fault(folder: Path | str, filesystem: FileSystem | None = None) -> str | None:
    """What is wrong with a checkpoint; None where it is whole.

    folder: its path in `filesystem`, by default this machine's.
    """
    filesystem, folder = filesystem or LocalFileSystem(), str(folder)
    infos = filesystem.get_file_info(FileSelector(folder))
    # A checkpoint is a flat folder of files. Of a bucket, Ray copies all that lies in it, whatever its name.
    for info in infos:
        if info.type != FileType.File:
            return f"it holds {info.base_name!r}, which is no file of a checkpoint"
    found = {info.base_name: info.size for info in infos}
    seals = [match for match in map(SEAL.fullmatch, sorted(found)) if match]
    if not seals:
        return "it has no seal"
    # Every seal names the number of workers, so a missing seal is noticed too.
    sizes = {int(seal[2]) for seal in seals}
    if len(sizes) > 1 or 0 in sizes:
        return f"its seals are of {' and '.join(map(str, sorted(sizes)))} workers"
    for rank in range(size := max(sizes)):
        own = f"seal-{rank}-of-{size}.json"
        if own not in found:
            return f"{own} is missing"
        with filesystem.open_input_stream(f"{folder}/{own}") as file:
            try:
                files = _Seal.model_validate(parse_json(file.read(MAX_SEAL_BYTES))).files
            except ValueError:
                return f"{own} is damaged"
        if not files:
            return f"{own} names no file"
        for name, noted in files.items():
            if why := _wrong(filesystem, folder, name, noted, found):
                return why
    return None


def _wrong(filesystem: FileSystem, folder: str, name: str, noted: _Noted, found: dict[str, int]) -> str | None:
    if name not in found:
        return f"{name} is missing"
    if found[name] > MAX_FILE_BYTES:
        return f"{name} has {found[name]:,} bytes; at most {MAX_FILE_BYTES:,} are read"
    if found[name] != noted.bytes:
        return f"{name} has {found[name]} bytes instead of {noted.bytes}"
    with filesystem.open_input_stream(f"{folder}/{name}") as file:
        changed = hashlib.file_digest(file, "sha256").hexdigest() != noted.sha256
    return f"{name} has changed" if changed else None


def checkpoint_names(root: FileSystem) -> list[str]:
    """Names of the checkpoints in the folder at which `root` is rooted, whole or not, newest first."""
    infos = root.get_file_info(FileSelector("", allow_not_found=True))
    names = (info.base_name for info in infos if info.type == FileType.Directory)
    return sorted((name for name in names if NAME.fullmatch(name)), reverse=True)


def newest_whole(root: FileSystem, where: str) -> tuple[str | None, dict[str, str]]:
    """→ the newest whole checkpoint (None: training begins), and each newer checkpoint with what is wrong with it.

    where: the folder's name in messages. Raises NoWholeCheckpoint where more than the first epoch would be lost. The
    second epoch begins only when the first one's checkpoint is whole, so a torn first checkpoint costs one epoch.
    """
    torn: dict[str, str] = {}
    for name in checkpoint_names(root):
        why = fault(name, root)
        if why is None:
            return name, torn
        torn[name] = why
    if all(name.startswith(FIRST) for name in torn):
        return None, torn
    listed = "; ".join(f"{name}: {why}" for name, why in torn.items())
    raise NoWholeCheckpoint(
        f"{where}: none of the checkpoints is whole ({listed}); "
        "put back a copy of one of them, or delete the folder to train from the start"
    )


def clear(root: FileSystem, where: str) -> dict[str, str]:
    """Remove all checkpoints but the newest two whole ones. → the torn ones that were newer, and what was wrong.

    Only the one process that holds the run may call this, while nobody writes checkpoints. Raises NoWholeCheckpoint,
    before anything is removed.
    """
    newest, torn = newest_whole(root, where)
    names = checkpoint_names(root)
    older = (name for name in names if newest and name < newest and fault(name, root) is None)
    keep = {newest, next(older, None)}
    for name in names:
        if name not in keep:
            root.delete_dir(name)
    return torn
