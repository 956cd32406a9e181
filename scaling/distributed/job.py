"""What the drivers of the two stages are asked for."""

from __future__ import annotations

from dataclasses import dataclass

from scaling.config import Settings
from scaling.data.stores import SourceSpec
from scaling.distributed.cluster import Resources
from scaling.library.run_folder import RunFolder


@dataclass(frozen=True)
class Job:
    """scene_ids: all scenes that the run should hold at the end, of the source `spec`; preset: whose settings these
    are, for people who compare runs."""

    run: RunFolder
    settings: Settings
    spec: SourceSpec
    scene_ids: list[str]
    resources: Resources
    preset: str = ""
