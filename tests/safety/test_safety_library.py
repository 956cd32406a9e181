"""Hostile notes of a run: its config.yaml, its failures, its manifest and the planes of its parts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.damage import LAUGHS
from helpers.fitted_rows import row

from scaling.library.failures import read_failures
from scaling.library.manifest import Manifest, read_manifest
from scaling.library.parts import commit_part
from scaling.library.reader import Library
from scaling.library.run_folder import RunFolder


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: path.write_text(LAUGHS), "aliases"),
        (lambda path: path.write_text("[" * 10**4), "nested too deeply"),
        (lambda path: os.truncate(path, 1 << 30), "has 1073741824 bytes"),
        (lambda path: path.unlink() or os.mkfifo(path), "is no plain file"),
    ],
)
def test_a_config_that_is_none(tmp_path: Path, damage: Any, told: str) -> None:
    (tmp_path / "config.yaml").touch()
    damage(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=rf"{tmp_path}/config.yaml: .*{told}"):
        RunFolder(tmp_path).read_config()


@pytest.mark.parametrize("line", ["[" * 10**5, json.dumps({"scene_id": "../a"}), json.dumps({"scene_id": "a" * 10**6})])
def test_events_that_are_none_are_passed_over(tmp_path: Path, line: str) -> None:
    event = {"scene_id": "b", "attempt": 1, "kind": "diverged", "message": "m", "when": "2026-01-01T00:00:00+00:00"}
    bad = json.dumps(event | json.loads(line)) if line.startswith("{") else line
    (tmp_path / "events-20260101T000000-1.jsonl").write_text(f"{bad}\n{json.dumps(event)}\n")
    assert list(read_failures(tmp_path, Manifest())) == ["b"]


@pytest.mark.parametrize("change", [{"scene_ids": ["../a"]}, {"stage": 7}, {"num_bytes": -1}])
def test_a_manifest_that_is_none(tmp_path: Path, change: dict[str, Any]) -> None:
    part = commit_part(tmp_path, [row("a")])
    path = tmp_path / "manifests" / "manifest-000001-000000.json"
    path.parent.mkdir()
    noted = json.loads(Manifest(epoch=1, parts={part.name: part}).model_dump_json())
    path.write_text(json.dumps(noted))
    assert read_manifest(tmp_path).parts == {part.name: part}
    noted["parts"][part.name] |= change
    path.write_text(json.dumps(noted))
    with pytest.raises(ValueError, match=rf"{path}: not a readable manifest"):
        read_manifest(tmp_path)


def test_planes_that_are_none_name_their_part(tmp_path: Path) -> None:
    part = commit_part(tmp_path, [row("a") | {"micro_planes": np.full(96, np.nan, np.float16).tobytes()}])
    with pytest.raises(ValueError, match=rf"{part.name}: .*scene a: micro_planes holds numbers that are not finite"):
        Library(tmp_path).scene("a")
