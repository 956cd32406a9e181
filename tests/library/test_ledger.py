"""One driver at a time: leases, epochs, the manifest, compaction; on a disk and on an S3-compatible server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.fitted_rows import row

from scaling.config import make_settings
from scaling.library import compact as compaction
from scaling.library.compact import compact, compact_after_job, forget_after_job
from scaling.library.failures import event
from scaling.library.ledger import open_ledger
from scaling.library.manifest import read_manifest
from scaling.library.parts import commit_part, part_name
from scaling.library.reader import Library
from scaling.library.run_folder import RunFolder
from scaling.library.status import status_text
from scaling.storage import lease as leases
from scaling.storage.atomic import replace_file
from scaling.storage.lease import Lease, LeaseHeld, LeaseLost
from scaling.storage.paths import AnyPath, remove_tree, to_path, uri_of

pytestmark = pytest.mark.slow


@pytest.fixture(params=["disk", "s3"])
def place(request, tmp_path) -> AnyPath:
    """A new folder on a disk and in an object store: every rule holds on both."""
    if request.param == "disk":
        return tmp_path / "run"
    options = request.getfixturevalue("s3_server")
    return to_path(f"s3://runs/{tmp_path.name}{options}")


@pytest.fixture
def run(place) -> RunFolder:
    return RunFolder(place)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(leases, "SILENT_SECONDS", 1.0)


def commit(ledger: Any, *ids: str, attempt: int = 1) -> None:
    rows = [row(scene_id) for scene_id in ids]
    ledger.add(commit_part(ledger.run.library.folder, rows, part_name(ledger.epoch, attempt, ids)))


def test_files_in_an_object_store_behave_as_paths(place):
    folder = place / "a"
    for name in ("x.json", "y.json"):
        replace_file(folder / name, name.encode())
    assert sorted(path.name for path in folder.glob("*.json")) == ["x.json", "y.json"]
    assert [path.name for path in place.iterdir()] == ["a"] and (folder / "x.json").read_text() == "x.json"
    assert to_path(uri_of(folder / "x.json")).read_bytes() == b"x.json", "another process finds it"
    assert (folder / "y.json").stat().st_size == 6 and not (folder / "z").exists()
    with pytest.raises(FileNotFoundError):
        (folder / "z").read_bytes()
    remove_tree(place)
    assert not list(place.glob("*"))


def test_a_second_driver_is_refused_while_the_first_lives(run, impatient):
    with open_ledger(run) as first, pytest.raises(LeaseHeld, match=rf"process {os.getpid()} on .* only one can"):
        assert first.epoch == 1
        open_ledger(run).__enter__()
    with open_ledger(run) as second:
        assert second.epoch == 2, "a lease that was given back is free at once"


def test_a_dead_driver_of_this_machine_is_taken_over_at_once(run):
    """Its process is gone, so nobody waits for a sign of life."""
    code = f"import os; from scaling.storage.lease import Lease; from scaling.storage.paths import to_path\n" \
        f"Lease.take(to_path({uri_of(run.path / 'leases')!r}), 1); os._exit(1)"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=False)
    start = time.monotonic()
    lease = Lease.take(run.path / "leases", 1)
    assert lease.epoch == 2 and time.monotonic() - start < 5
    lease.release()


def test_a_paused_driver_that_wakes_up_cannot_spoil_the_run(run, impatient):
    """A stops without a word; B takes over; what A commits then does not count, and A is told to stop."""
    with pytest.raises(LeaseLost, match="has taken the work over"), open_ledger(run) as paused:
        commit(paused, "a", "b")
        paused.lease._stop.set()  # no sign of life from here on
        with open_ledger(run) as taken:
            assert taken.epoch == paused.epoch + 1 and run.library.ids() == ["a", "b"]
            commit_part(run.library.folder, [row("c")], part_name(paused.epoch, 1, ["c"]))
            paused.record([event("d", 1, "actor died", "by the paused one")])
            assert run.library.ids() == ["a", "b"] and not run.given_up()
            commit(taken, "c", "d")
        paused.lease._stop.clear()
        paused.lease._renew()
        paused.publish()
    assert sorted(run.library.ids()) == ["a", "b", "c", "d"] and not run.given_up()


def test_the_manifest_answers_without_opening_parts(run):
    with open_ledger(run) as ledger:
        commit(ledger, "a", "b")
        ledger.record([event("z", 1, "bad input", "no image")])
    for path in (run.library.folder / "parts").glob("*"):
        replace_file(path, b"not a part any more")
    assert run.library.ids() == ["a", "b"] and run.given_up()["z"].message == "no image"
    with pytest.raises(ValueError, match="not a readable part"):
        run.library.table(["psnr"])


def test_the_smallest_attempt_of_a_scene_counts(run):
    with open_ledger(run) as ledger:
        commit_part(run.library.folder, [row("a", psnr=2.0)], part_name(ledger.epoch, 2, ["a"]))
        commit_part(run.library.folder, [row("a", psnr=1.0), row("b")], part_name(ledger.epoch, 1, ["a", "b"]))
        assert run.library.table(["psnr"])["psnr"].to_pylist() == [1.0, 20.0]


def test_compaction_changes_nothing_but_the_files(run):
    """Small parts become one; those who read the old ones find them until the grace time is over."""
    with open_ledger(run) as ledger:
        for number in range(5):
            commit(ledger, f"scene-{number}", f"scene-{number + 1}", attempt=number + 1)
        before = {found["scene_id"]: found for found in run.library.scenes()}
        assert compact(ledger) == (5, 1) and len(list((run.library.folder / "parts").glob("part-*"))) == 6
        assert compact(ledger, grace_seconds=0.0) == (1, 1)
    assert len(list((run.library.folder / "parts").glob("part-*"))) == 1
    assert {found["scene_id"]: found for found in run.library.scenes()} == before and len(before) == 6
    assert run.library.scene("scene-3") == before["scene-3"]


def test_a_reader_goes_on_while_its_parts_are_joined_and_removed(run):
    """The rest of the scenes comes from the joined part, each once."""
    with open_ledger(run) as ledger:
        for name in "abcd":
            commit(ledger, name)
        scenes = run.library.scenes()
        found = [next(scenes)["scene_id"]]
        assert compact(ledger, grace_seconds=0.0) == (4, 1)
        found += [scene["scene_id"] for scene in scenes]
    assert sorted(found) == ["a", "b", "c", "d"]


def test_a_job_joins_its_parts_when_there_are_many(run, monkeypatch, capsys):
    """Also one that the driver does not know of, as its actor was taken for dead; the old ones go after the grace
    time, for which the driver waits."""
    monkeypatch.setattr(compaction, "MANY_PARTS", 3)
    monkeypatch.setattr(compaction, "JOB_GRACE_SECONDS", 0.5)
    parts = run.library.folder / "parts"
    with open_ledger(run) as ledger:
        commit(ledger, "a")
        commit(ledger, "b")
        compact_after_job(ledger)
        assert len(run.library.parts()) == 2, "few are left alone"
        commit_part(run.library.folder, [row("b"), row("c")], part_name(ledger.epoch, 2, ["b", "c"]))
        compact_after_job(ledger)
        assert len(run.library.parts()) == 1 and len(list(parts.glob("part-*"))) == 4
        start = time.monotonic()
        forget_after_job(ledger)
        forget_after_job(ledger)
        assert time.monotonic() - start < 5 and len(list(parts.glob("part-*"))) == 1
    assert "3 parts became 1" in capsys.readouterr().out
    assert sorted(run.library.ids()) == ["a", "b", "c"] and len(list(run.library.scenes())) == 3


def test_without_room_the_parts_stay_apart(run, monkeypatch, capsys):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "part-1")

    monkeypatch.setattr(compaction, "MANY_PARTS", 2)
    with open_ledger(run) as ledger:
        commit(ledger, "a")
        commit(ledger, "b")
        monkeypatch.setattr(compaction, "commit_part", full)
        compact_after_job(ledger)
        forget_after_job(ledger)
    assert "could not be joined (part-1: No space left" in capsys.readouterr().out
    assert sorted(run.library.ids()) == ["a", "b"] and len(run.library.parts()) == 2


def test_a_part_that_changed_since_its_commit_is_not_joined(tmp_path):
    run = RunFolder(tmp_path / "run")
    with open_ledger(run) as ledger:
        commit(ledger, "a")
        commit(ledger, "b")
        path = run.library.parts()[0]
        data = bytearray(path.read_bytes())
        data[200] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{path.name}.*its bytes changed since they were committed"):
            compact(ledger)
        with pytest.raises(ValueError, match=path.name):
            list(run.library.scenes())


def test_libraries_of_format_1_are_read_and_taken_over(tmp_path):
    """Parts without epoch or attempt in their names, events in a file that grew, no manifest."""
    run = RunFolder(tmp_path / "run")
    part = commit_part(run.library.folder, [row("a")])
    old = run.library.folder / "parts" / f"part-{'0' * 20}.parquet"
    (run.library.folder / "parts" / part.name).rename(old)
    run.failures.mkdir()
    line = {"scene_id": "b", "attempt": 1, "kind": "diverged", "message": "m", "when": "2026-11-01T00:00:00+00:00"}
    (run.failures / "events-20261101T000000000000-1.jsonl").write_text(json.dumps(line) + "\n")
    assert run.library.ids() == ["a"] and list(run.given_up()) == ["b"]
    with open_ledger(run) as ledger:
        commit(ledger, "c")
    assert run.library.ids() == ["a", "c"] and list(run.given_up()) == ["b"]


def test_a_lost_part_is_missed_and_its_scenes_are_fitted_again(tmp_path):
    run = RunFolder(tmp_path / "run")
    with open_ledger(run) as ledger:
        commit(ledger, "a")
        commit(ledger, "b")
    run.library.parts()[0].unlink()
    assert len(run.library.snapshot().missing) == 1 and len(run.library.ids()) == 1
    with open_ledger(run):
        assert run.library.snapshot().missing == []


@pytest.mark.parametrize("text", ["", "{", '{"epoch": "x"}', '{"parts": {"../a": {}}}', '{"other": 1}', "[" * 100000])
def test_a_manifest_that_says_nothing_is_named(tmp_path, text):
    path: Path = tmp_path / "manifests" / "manifest-000001-000000.json"
    replace_file(path, text.encode())
    with pytest.raises(ValueError, match=rf"{path}: not a readable manifest .* the one before it is in force"):
        Library(tmp_path).ids()
    path.unlink()
    assert read_manifest(tmp_path).epoch == 0


def test_status_counts_from_the_files_alone(run, impatient):
    with pytest.raises(FileNotFoundError, match="no run here"):
        status_text(run)
    run.write_config("stage2", make_settings({}), {"num_scenes": 7, "shared": "s", "store": "embedded"})
    with open_ledger(run) as ledger:
        commit(ledger, "a", "b")
        ledger.record([event("c", 1, "bad input", "no image"), event("d", 1, "diverged", "not finite")])
        ledger.record([event("e", 1, "retry", "gone"), event("a", 1, "actor died", "and fitted since")])
        text = status_text(run)
        assert f"driver   process {os.getpid()} on " in text
    text = status_text(run)
    assert "driver   none\n" in text
    assert "2 of 7 scenes fitted, 2 failed (1 bad input, 1 diverged), 3 left, 1 of them tried before" in text
    assert "  c: bad input: no image" in text and "library  1 parts, " in text
