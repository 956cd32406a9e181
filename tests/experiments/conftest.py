"""A run to damage, and commands that are run in this process."""

from __future__ import annotations

import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.tiny_run import make_run

from scaling.cli import run_command
from scaling.library.run_folder import RunFolder, ids_hash

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture(scope="module")
def whole(tiny_settings, tiny_scenes, tmp_path_factory) -> RunFolder:
    """Cars 0 and 1 in the shared model, cars 2 and 3 in one part."""
    run = make_run(tmp_path_factory.mktemp("bad") / "cars", tiny_settings, tiny_scenes)
    run.write_config(
        "stage1", tiny_settings, {"scenes_hash": ids_hash(["car-00000", "car-00001"]), "store": "embedded"}
    )
    return run


@pytest.fixture
def run(whole, tmp_path) -> RunFolder:
    """A copy to damage."""
    return RunFolder(Path(shutil.copytree(whole.path, tmp_path / "cars")))


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """Runs an experiment in this process. → its status and what it said on stderr."""

    def run_experiment(name: str, *argv: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        main = runpy.run_path(str(EXPERIMENTS / f"{name}.py"))["main"]
        try:
            status = run_command(main)
        except SystemExit as ended:
            status = int(ended.code or 0)
        return status, capsys.readouterr().err

    return run_experiment
