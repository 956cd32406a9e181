"""Checkpoints that a crash or a disk damaged, and what stage 1 makes of failures of its workers."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from ray.exceptions import ActorDiedError, RayTaskError

from scaling.config import SettingsError
from scaling.distributed.stage1.events import TRIES, Reports, Story, first_cause, is_lasting
from scaling.training.checkpoints.checksums import NoWholeCheckpoint, checkpoint_names, clear, fault, newest_whole, seal
from scaling.training.phase_loop import Diverged


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
    assert fault(tmp_path / "00001-warmup-a") == why


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


# ---------------------------------------------------------------------- failures of workers


class Dead(Exception):
    """As Ray Train wraps the death of a worker."""

    def __init__(self, text: str, preempted: bool = False) -> None:
        super().__init__(f"A worker health check failed.\n{text}")
        self.health_check_failure = ActorDiedError()
        self.health_check_failure._preempted = preempted


class Events(list[dict[str, Any]]):
    put = list.append


def test_errors_that_would_come_again():
    for error in (SettingsError("s"), Diverged([], "d"), OSError(errno.ENOSPC, "full"), KeyError("k")):
        assert is_lasting(error)
    broken_pipe = RayTaskError("f", "", ValueError("v")).as_instanceof_cause()
    for error in (RuntimeError("connection closed by peer"), OSError(errno.EIO, "io"), Dead("d"), broken_pipe):
        assert not is_lasting(error)


def test_the_worker_that_failed_first_is_blamed():
    peer = RuntimeError("Connection closed by peer")
    assert first_cause({0: peer, 2: Dead("d"), 1: peer})[0] == 2
    assert first_cause({0: peer, 1: Dead("d"), 2: SettingsError("s")})[0] == 2
    assert first_cause({1: peer, 0: peer})[0] == 0


def test_a_job_ends_after_tries_in_vain_and_not_while_it_makes_progress(tmp_path):
    reports = Reports(tmp_path, "sqlite://", Events())  # type: ignore[arg-type]
    for _ in range(20):
        for _ in range(TRIES - 1):
            reports.after_exception(None, {1: Dead("x")})
        reports.after_report(None, [{"done": 1}], None)
    for _ in range(20):
        reports.after_exception(None, {0: Dead("x", preempted=True), 1: RuntimeError("peer")})
    for _ in range(TRIES - 1):
        reports.after_exception(None, {1: Dead("x")})
    with pytest.raises(
        RuntimeError, match=r"worker 1: its process or node is gone; 3 tries in a row came to no new checkpoint"
    ):
        reports.after_exception(None, {1: Dead("x")})


def test_a_full_disk_is_not_tried_again(tmp_path):
    full = OSError(errno.ENOSPC, "Error writing bytes to file")
    with pytest.raises(RuntimeError, match=rf"worker 1: {tmp_path}/checkpoints: No space left on device"):
        Reports(tmp_path, "sqlite://", Events()).after_exception(None, {0: RuntimeError("x"), 1: full})  # type: ignore[arg-type]


def test_the_story_of_a_run():
    def group(workers: int, checkpoint: str | None, torn: dict[str, str] | None = None) -> dict[str, Any]:
        return {"event": "group", "workers": workers, "wanted": 2, "checkpoint": checkpoint, "torn": torn or {}}

    events = [
        group(2, None),
        {"event": "report", "stage1/warmup/latent": 0.5, "step": 1, "total": 9, "seconds": 2.0},
        {"event": "failure", "why": "worker 1: its process or node is gone"},
        {"event": "traceback", "text": "worker 0\nTraceback …"},
        group(1, "00001-warmup-a", {"00002-warmup-a": "it has no seal"}),
        group(2, "00004-warmup-b"),
        group(2, "done-c"),
        {"event": "report", "done": 1},
    ]
    story = Story(start=0)
    assert list(story.lines(events, now=60)) == [
        "stage 1: worker group of 2 starts at epoch 1",
        "stage 1: epoch 1/9  2 s  warmup/latent 0.50000",
        "stage 1: worker 1: its process or node is gone; goes on from the last checkpoint",
        "stage 1: worker group shrinks to 1 (of 2) and goes on at epoch 2; "
        "checkpoint 00002-warmup-a is not whole: it has no seal",
        "stage 1: worker group grows to 2 and goes on at epoch 5",
        "stage 1: worker group of 2 restarts at evaluation",
        "stage 1: trained and evaluated after 60 s",
    ]
    assert story.tracebacks == ["worker 0\nTraceback …"]


def test_a_long_wait_for_workers_is_told_once():
    story = Story(start=0)
    assert [list(story.waiting(now)) for now in (30, 61, 90)] == [
        [], ["stage 1: waits until the cluster has room for a worker"], [],
    ]  # fmt: skip
    list(story.lines([{"event": "failure", "why": "worker 0: gone"}], now=100))
    assert not list(story.waiting(130)) and list(story.waiting(170))
