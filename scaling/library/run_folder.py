"""The run folder: where a run keeps its settings, shared model, library, failures, metrics and pictures."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from scaling.config import Settings
from scaling.library.commit import replace_file
from scaling.library.fitted_scenes import Library

PACKAGES = ("scaling", "torch", "diffusers", "ray", "mlflow", "numpy", "pyarrow")


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, as contracts of the file formats name them."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.absolute().name

    @property
    def shared(self) -> Path:
        return self.path / "shared"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def library(self) -> Library:
        return Library(self.path / "library")

    @property
    def failures(self) -> Path:
        return self.path / "failures"

    @property
    def pictures(self) -> Path:
        return self.path / "pictures"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    def write_config(self, stage: str, settings: Settings, job: dict[str, Any]) -> None:
        """Notes a stage's resolved settings, versions and command line in config.yaml, beside the other stage's."""
        known = self.read_config()
        known[stage] = {
            "settings": settings.model_dump(),
            "job": job,
            "seed": settings.seed,
            "command": sys.argv,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
        }
        replace_file(self.path / "config.yaml", yaml.safe_dump(known, sort_keys=False).encode())

    def read_config(self) -> dict[str, Any]:
        """What write_config noted, by stage; empty for a new folder."""
        path = self.path / "config.yaml"
        return yaml.safe_load(path.read_text()) or {} if path.is_file() else {}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape results."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def settings_hash(settings: Settings) -> str:
    """Twelve hexadecimal digits that change with any setting."""
    return hashlib.sha256(json.dumps(settings.model_dump(), sort_keys=True).encode()).hexdigest()[:12]
