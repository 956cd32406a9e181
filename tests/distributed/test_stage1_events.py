"""What stage 1's driver makes of failures of its workers."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from scaling.config import SettingsError
from scaling.distributed.stage1.events import TRIES, Reports, Story, first_cause, is_lasting
from scaling.training.phase_loop import Diverged


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
        RuntimeError, match=r"worker 1: its process or node is gone; 3 tries in a row made no new checkpoint"
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
