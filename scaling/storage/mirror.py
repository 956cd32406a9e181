"""A folder that changes while one process works on it, mirrored on a local disk where it lies in an object store."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from scaling.storage.atomic import make_folder, replace_file
from scaling.storage.paths import AnyPath, ObjectPath


@contextmanager
def mirrored(folder: AnyPath) -> Iterator[tuple[Path, Callable[[], None]]]:
    """→ the folder as one on a disk, and a function that brings what changed in it back. One on a disk is itself."""
    if isinstance(folder, Path):
        yield folder, lambda: None
        return
    with tempfile.TemporaryDirectory() as temporary:
        local = Path(temporary)
        for name, path in _files(folder).items():
            make_folder((local / name).parent)
            (local / name).write_bytes(path.read_bytes())
        yield local, lambda: _bring_back(local, folder)


def _bring_back(local: Path, folder: ObjectPath) -> None:
    """Files of checkpoints never change, so names tell what is new and what is gone."""
    here, there = _files(local), _files(folder)
    for name in here.keys() - there:
        into: AnyPath = folder
        for step in name.split("/"):
            into = into / step
        replace_file(into, here[name].read_bytes())
    for name in there.keys() - here:
        there[name].unlink(missing_ok=True)


def _files(folder: AnyPath) -> dict[str, AnyPath]:
    """Files below a folder, by their path in it."""
    start = len(folder.path if isinstance(folder, ObjectPath) else str(folder)) + 1
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[(path.path if isinstance(path, ObjectPath) else str(path))[start:]] = path
    return found
