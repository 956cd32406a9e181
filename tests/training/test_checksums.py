"""Checkpoints that a crash or a disk damaged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from scaling.training.checkpoints.checksums import NoWholeCheckpoint, checkpoint_names, clear, fault, newest_whole, seal


def write_checkpoint(folder: Path, size: int = 2) -> None:
    """By `size` workers, each of which writes to a folder of its own; Ray merges them."""
    for rank in range(size):
        own = folder.parent / f"rank-{rank}"
        own.mkdir(parents=True)
        (own / f"scenes-{rank}-of-{size}.safetensors").write_bytes(b"planes" * (rank + 1))
        if rank == 0:
            (own / "progress.json").write_text("{}")
        seal(own, rank, size)
        shutil.copytree(own, folder, dirs_exist_ok=True)
        shutil.rmtree(own)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"!")


@pytest.mark.parametrize(
    ("name", "damage", "why"),
    [
        ("scenes-1-of-2.safetensors", cut, "scenes-1-of-2.safetensors has 11 bytes instead of 12"),
        ("scenes-1-of-2.safetensors", flip, "scenes-1-of-2.safetensors has changed"),
        ("progress.json", lambda path: os.truncate(path, 1 << 40), "progress.json has 1,099,511,627,776 bytes"),
        ("progress.json", Path.unlink, "progress.json is missing"),
        ("seal-1-of-2.json", Path.unlink, "seal-1-of-2.json is missing"),
        ("seal-0-of-2.json", cut, "seal-0-of-2.json is damaged"),
        ("seal-0-of-2.json", lambda path: path.write_text('{"files": [1]}'), "seal-0-of-2.json is damaged"),
    ],
)
def test_every_damage_is_seen(tmp_path, name: str, damage: Callable[[Path], None], why: str):
    write_checkpoint(tmp_path / "00001-warmup-a")
    assert fault(tmp_path / "00001-warmup-a") is None
    damage(tmp_path / "00001-warmup-a" / name)
    assert fault(tmp_path / "00001-warmup-a").startswith(why)


@pytest.fixture
def root(tmp_path) -> SubTreeFileSystem:
    return SubTreeFileSystem(str(tmp_path / "stage1"), LocalFileSystem())


def test_the_newest_whole_checkpoint_is_taken(root, tmp_path):
    assert newest_whole(root, "RUN") == (None, {}), "a new run has no folder yet"
    names = ["00009-warmup-a", "00010-warmup-a", "00010-warmup-b", "00011-joint-b", "done-c"]
    for name in names:
        write_checkpoint(tmp_path / "stage1" / name, size=3)
    (tmp_path / "stage1" / "hang_detector").mkdir()
    assert newest_whole(root, "RUN")[0] == "done-c"
    cut(tmp_path / "stage1" / "done-c" / "progress.json")
    (tmp_path / "stage1" / "00011-joint-b" / "seal-2-of-3.json").unlink()
    last, torn = newest_whole(root, "RUN")
    assert last == "00010-warmup-b" and list(torn) == ["done-c", "00011-joint-b"]
    assert list(clear(root, "RUN")) == ["done-c", "00011-joint-b"]
    assert checkpoint_names(root) == ["00010-warmup-b", "00010-warmup-a"], "the last two, the torn ones are gone"
    assert (tmp_path / "stage1" / "hang_detector").is_dir(), "not ours"


def test_no_whole_checkpoint_is_an_error_unless_nothing_is_lost(root, tmp_path):
    for name in ("00001-warmup-a", "00001-warmup-b"):
        write_checkpoint(tmp_path / "stage1" / name)
        cut(tmp_path / "stage1" / name / "progress.json")
    assert newest_whole(root, "RUN")[0] is None, "the first upload was cut short"
    assert clear(root, "RUN") and checkpoint_names(root) == []
    write_checkpoint(tmp_path / "stage1" / "00002-warmup-c")
    cut(tmp_path / "stage1" / "00002-warmup-c" / "progress.json")
    for looked in (newest_whole, clear):
        with pytest.raises(
            NoWholeCheckpoint, match=r"RUN: none .* \(00002-warmup-c: progress.json .*delete the folder"
        ):
            looked(root, "RUN")
    assert checkpoint_names(root) == ["00002-warmup-c"], "nothing is removed then"
