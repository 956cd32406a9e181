"""The failures of a run: events as JSON lines; a scene's latest event counts.

RUN/failures/events-<epoch>-<number>-<writer>.jsonl: each call writes a new file, as an object store cannot append.
Events of closed epochs are read from the manifest (`manifest.py`), events of the epoch in force from their files.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime

from scaling.library.manifest import Event, Manifest
from scaling.storage.commit import commit_file
from scaling.storage.json_yaml import parse_json
from scaling.storage.limited import read_limited
from scaling.storage.paths import AnyPath

_NAME = re.compile(r"events-(?:(\d{6})-(\d{6})-[0-9a-f]{8}|\d{8}T\d+-\d+)\.jsonl")
RETRY = "retry"


def event(scene_id: str, attempt: int, kind: str, message: str) -> Event:
    """An event of now. kind: `retry` (the scene will be tried again), or why it was given up (`bad input`, …)."""
    when = datetime.now(UTC).isoformat()
    return Event(scene_id=scene_id, attempt=attempt, kind=kind, message=message, when=when)


class FailureLog:
    """Writes events under the epoch of the driver that this process works for, each call to a file of its own."""

    def __init__(self, folder: AnyPath, epoch: int = 0) -> None:
        self.folder, self.epoch = folder, epoch
        self.writer, self.number = uuid.uuid4().hex[:8], 0

    def add(self, events: Iterable[Event]) -> None:
        """Write the events to a new file. Raises OSError naming the file where it cannot be written."""
        lines = "".join(event.model_dump_json() + "\n" for event in events)
        if lines:
            name = f"events-{self.epoch:06d}-{self.number:06d}-{self.writer}.jsonl"
            self.number += 1
            commit_file(self.folder / name, lines.encode())


def read_failures(folder: AnyPath, manifest: Manifest) -> dict[str, Event]:
    """The latest event of each scene that has one: that of the highest attempt, and of several the one in the last
    file. Clocks do not count, as they may be set back. What the epoch in force has to say of a scene is later than what
    the manifest kept of earlier epochs.

    A line that is no event is skipped (a crash may cut a line short): its scene is tried again. Raises ValueError
    naming a file that cannot be read.
    """
    found: dict[str, Event] = {}
    paths: Iterable[AnyPath] = folder.glob("events-*.jsonl")
    for path in sorted(paths, key=lambda path: path.name):
        match = _NAME.fullmatch(path.name)
        if match is None or int(match[1] or 0) != manifest.epoch:
            continue
        for each in filter(None, map(_event, _lines(path))):
            if each.scene_id not in found or each.attempt >= found[each.scene_id].attempt:
                found[each.scene_id] = each
    return manifest.failures | found


def _lines(path: AnyPath) -> list[bytes]:
    try:
        return read_limited(path).splitlines()
    except ValueError as error:
        raise ValueError(f"{path}: {error}; set the file aside") from None


def _event(line: bytes) -> Event | None:
    try:
        return Event.model_validate(parse_json(line), strict=True)
    except ValueError:  # neither JSON nor UTF-8, or other keys
        return None
