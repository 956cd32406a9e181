"""The failures of a run: events in JSON lines; a scene's latest event is the one that counts."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scaling.files import naming


class FailureLog:
    """Appends events to a file of this process's own, so that two writers never share one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / f"events-{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{os.getpid()}.jsonl"

    def add(self, scene_id: str, attempt: int, kind: str, message: str) -> None:
        """kind: `retry` (it will be tried again) or the reason that it was given up (`bad input`, `diverged`, …)."""
        event = {
            "scene_id": scene_id,
            "attempt": attempt,
            "kind": kind,
            "message": message,
            "when": datetime.now(UTC).isoformat(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with naming(self.path), self.path.open("a") as file:
            file.write(json.dumps(event) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_failures(folder: Path) -> dict[str, dict[str, Any]]:
    """The latest event of each scene that has one. A line that is none, as one cut short by a crash, is passed over:
    its scene is tried again."""
    latest: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("events-*.jsonl")):
        for event in filter(None, map(_event, path.read_bytes().splitlines())):
            known = latest.get(event["scene_id"])
            if known is None or event["when"] >= known["when"]:
                latest[event["scene_id"]] = event
    return latest


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:  # neither JSON nor UTF-8
        return None
    texts = ("scene_id", "kind", "message", "when")
    return event if isinstance(event, dict) and all(isinstance(event.get(key), str) for key in texts) else None


def given_up(folder: Path) -> dict[str, dict[str, Any]]:
    """Scenes whose latest event says that they were given up."""
    return {scene_id: event for scene_id, event in read_failures(folder).items() if event["kind"] != "retry"}
