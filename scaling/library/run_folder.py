"""The run folder: where a run keeps its settings, shared model, library, failures, metrics and pictures."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, TypeAdapter

from scaling.config import Settings, SettingsError, as_noted, flatten, merge
from scaling.library.failures import RETRY, read_failures
from scaling.library.manifest import Event
from scaling.library.reader import Library
from scaling.storage.addresses import check_server, masked
from scaling.storage.atomic import replace_file
from scaling.storage.json_yaml import MAX_YAML_BYTES, first_fault, parse_yaml
from scaling.storage.limited import read_limited
from scaling.storage.links import refuse_links
from scaling.storage.paths import AnyPath, to_path, uri_of

# What commands write over in a run folder. Where it is there, config.yaml, or a library, must say that this is a run.
WRITTEN = (
    "metrics.json", "scenes.parquet", "lpips.parquet", "pictures", "sweep.json", "reports.json", "trials", "tune",
    "stage1", "checkpoints", "mlflow", "viewpoints.json", "libraries.log",
)  # fmt: skip
FOLDERS = (
    "library", "failures", "checkpoints", "shared", "leases", "library/parts", "library/manifests",
    "library/leases", "library/cohorts", "checkpoints/stage1",
    "checkpoints/cohorts", "mlflow", "shared/autoencoder",
    "shared/decoder", "shared/student", "pictures", "pictures/scenes", "pictures/epochs", "stage1", "trials", "tune",
)  # fmt: skip
PACKAGES = ("scaling", "torch", "diffusers", "ray", "mlflow", "numpy", "numba", "pyarrow")


class _NotedJob(BaseModel):
    """What config.yaml notes of a stage's job, as far as it is read again."""

    store: str | None = None
    shared: str | None = None
    num_scenes: Annotated[int, Field(ge=0, strict=True)] = 0
    scenes_hash: str | None = None


class _Noted(BaseModel):
    """What config.yaml notes of a stage."""

    settings: dict[str, Any]
    job: _NotedJob


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, as the README lists them."""

    path: AnyPath

    @property
    def name(self) -> str:
        return self.path.absolute().name

    @property
    def shared(self) -> AnyPath:
        return self.path / "shared"

    @property
    def checkpoints(self) -> AnyPath:
        return self.path / "checkpoints"

    @property
    def library(self) -> Library:
        return Library(self.path / "library")

    @property
    def failures(self) -> AnyPath:
        return self.path / "failures"

    def latest_events(self) -> dict[str, Event]:
        """The latest event of each scene that has one: a retry, or why the scene was given up."""
        return read_failures(self.failures, self.library.snapshot().manifest)

    def given_up(self) -> dict[str, Event]:
        """The scenes whose latest event says that they were given up, including scenes that were fitted since."""
        return {scene_id: event for scene_id, event in self.latest_events().items() if event.kind != RETRY}

    @property
    def pictures(self) -> AnyPath:
        return self.path / "pictures"

    @property
    def metrics(self) -> AnyPath:
        return self.path / "metrics.json"

    def shared_in_use(self) -> AnyPath:
        """Folder of the shared model of this run's stage 2: the one that --shared named, else the run's own."""
        noted = self.read_config().get("stage2", {}).get("job", {}).get("shared")
        if noted is None:
            return self.shared
        self._check_server(noted)
        named = to_path(noted)
        # config.yaml holds an absolute path: in a run that was moved, it leads to nothing.
        moved = not (named / "hash.txt").is_file() and (self.shared / "hash.txt").is_file()
        return self.shared if moved else named

    def stage1_run(self) -> RunFolder:
        """The run that trained the shared model in use: this one, or the one whose folder `--shared` named."""
        return RunFolder(self.shared_in_use().parent)

    def check_fitted(self) -> None:
        """Raise FileNotFoundError where the run has no fitted scenes."""
        if not self.library.parts():
            raise FileNotFoundError(
                f"{self.path}: no fitted scenes here (no library/parts/part-*.parquet); fit some with "
                f"`python experiments/stage2.py --run {shlex.quote(str(self.path))} --num-scenes N`"
            )

    def check_own(self) -> None:
        """Check that a driver may write and delete in this folder.

        Raises FileExistsError where it holds what commands would write over and is no run of this program, ValueError
        where a folder in it is a link.
        """
        refuse_links(*(self.path / name for name in FOLDERS))
        if self.read_config() or self.library.parts():
            return
        there = [name for name in WRITTEN if (self.path / name).exists()]
        if (
            self.shared.is_dir()
            and not (self.shared / "hash.txt").is_file()
            and any(True for _ in self.shared.glob("*"))
        ):
            there.append("shared")
        if there:
            raise FileExistsError(
                f"{self.path} is no run folder and holds {there[0]!r}, which is not written over: name another --run"
            )

    def check_same_job(self, stage: str, settings: Settings, job: dict[str, Any], ignore: set[str]) -> None:
        """Raise SettingsError where config.yaml says that the stage was started with other settings or scenes.

        ignore: sections of the settings that may differ.
        """
        noted = self.read_config().get(stage)
        if noted is None:
            return
        before, now = (
            flatten({k: v for k, v in values.items() if k not in ignore})
            # Over the defaults: for a key that is newer than the run, its default is mostly what the run did.
            for values in (merge(Settings().model_dump(), as_noted(noted["settings"])), settings.model_dump())
        )
        changed = [f"{key} = {now.get(key)} (was {before.get(key)})" for key in now if now[key] != before.get(key)]
        if noted["job"].get("scenes_hash") != job["scenes_hash"]:
            changed.append("the scenes")
        if changed:
            raise SettingsError(
                f"{self.path} was started with something else: {', '.join(changed)}; "
                "choose another --run, or give the same settings to go on"
            )

    def write_config(self, stage: str, settings: Settings, job: dict[str, Any]) -> None:
        """Note a stage's resolved settings, versions and command line in config.yaml; the other stage's are kept."""
        known = self.read_config()
        known[stage] = {
            "settings": settings.model_dump(),
            "job": job,
            "seed": settings.seed,
            "command": [masked(argument) for argument in sys.argv],
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
        }
        replace_file(self.path / "config.yaml", yaml.safe_dump(known, sort_keys=False).encode())

    def read_config(self) -> dict[str, Any]:
        """What `write_config` noted, by stage; empty for a new folder. Raises ValueError where the file is damaged."""
        path = self.path / "config.yaml"
        if not path.exists():
            return {}
        try:
            noted = parse_yaml(read_limited(path, MAX_YAML_BYTES)) or {}
            TypeAdapter(dict[str, _Noted]).validate_python(noted)
        except ValueError as error:
            raise ValueError(
                f"{path}: does not say how this run was started ({first_fault(error)}); restore it, or choose another "
                "--run"
            ) from None
        return noted

    def store_of(self, stage: int) -> str:
        """The scene store that a stage used, as its command named it. Raises ValueError where config.yaml does not say
        which."""
        store = self.read_config().get(f"stage{stage}", {"job": {}})["job"].get("store")
        if not isinstance(store, str):
            raise ValueError(f"{self.path}/config.yaml: does not say which store stage {stage} used; restore it")
        self._check_server(store)
        return store

    def _check_server(self, noted: str) -> None:
        check_server(noted, f"{self.path}/config.yaml", uri_of(self.path))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that influence results."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def ids_hash(scene_ids: Sequence[str]) -> str:
    """Twelve hexadecimal digits that change with any scene id and with their order."""
    return hashlib.sha256("|".join(scene_ids).encode()).hexdigest()[:12]


def settings_hash(settings: Settings) -> str:
    """Twelve hexadecimal digits that change with any setting that influences results."""
    return hashlib.sha256(json.dumps(settings.shaping(), sort_keys=True).encode()).hexdigest()[:12]
