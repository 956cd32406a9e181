"""The job that the driver of a stage is given."""

from __future__ import annotations

from dataclasses import dataclass

from scaling.config import Settings
from scaling.data.stores import SourceSpec
from scaling.distributed.cluster import Resources
from scaling.library.run_folder import RunFolder


@dataclass(frozen=True)
class Job:
    """What a driver works on. scene_ids: all scenes of the source `spec` that the run should hold at the end; preset:
    the name of the settings' preset, for people who compare runs."""

    run: RunFolder
    settings: Settings
    spec: SourceSpec
    scene_ids: list[str]
    resources: Resources
    preset: str = ""
