"""Output folders and files: what this program did not write stays, and two writers do not meet."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers.small_sources import row

from scaling.data.scene_store import SceneStore
from scaling.data.store_writer import StoreWriter
from scaling.export.meshes import export_meshes
from scaling.export.planes import export_planes
from scaling.export.views import export_views
from scaling.library.ledger import open_ledger
from scaling.library.run_folder import RunFolder
from scaling.storage import lease as leases
from scaling.storage.lease import Lease, LeaseHeld, LeaseLost
from scaling.storage.own_folder import MARK, claim_folder, new_folder, own_folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def users_own(folder: Path, *names: str) -> dict[str, bytes]:
    """Files of a user's in a folder. → what it holds."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"my {name}")
    return contents(folder)


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("views", ["car-00002/transforms.json", "car-00002/images/00000.png", "car-00002/images/00077.png"]),
        ("planes", ["shard-00000.safetensors", "shard-00009.safetensors", "index.json"]),
        ("mesh", ["car-00002.glb", "car-00002.glb.json"]),
    ],
)
def test_an_export_keeps_what_is_not_its_own(run, command, tmp_path, tiny_settings, what, names):
    run.write_config("stage2", tiny_settings, {"store": "embedded"})
    before = users_own(tmp_path / "out", *names)
    status, error = command("export", "--run", run.path, "--what", what, "--out", tmp_path / "out")
    assert status == 1 and "this program's mark" in error and "new or empty" in error
    assert contents(tmp_path / "out") == before


def test_a_scene_of_the_users_in_an_export_stays(run, tmp_path, tiny_settings):
    run.write_config("stage2", tiny_settings, {"store": "embedded"})
    export_views(run, tmp_path / "out", None, "ring", 2)
    shutil.rmtree(tmp_path / "out" / "car-00003")
    before = users_own(tmp_path / "out" / "car-00003", "transforms.json")
    with pytest.raises(FileExistsError, match="car-00003 holds files"):
        export_views(run, tmp_path / "out", None, "ring", 2)
    assert contents(tmp_path / "out" / "car-00003") == before
    shutil.rmtree(tmp_path / "out" / "car-00003")
    elsewhere = users_own(tmp_path / "elsewhere", "images/00000.png")
    (tmp_path / "out" / "car-00003").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="car-00003 is a link"):
        export_views(run, tmp_path / "out", None, "ring", 2)
    assert contents(tmp_path / "elsewhere") == elsewhere


def test_a_shard_of_somebody_elses_is_not_tidied_away(run, tmp_path):
    export_planes(run, tmp_path / "out")
    users_own(tmp_path / "out", "shard-00009.safetensors")
    export_planes(run, tmp_path / "out")
    assert (tmp_path / "out" / "shard-00009.safetensors").read_text() == "my shard-00009.safetensors"


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "car-00003.glb", "car-00003.glb.json"])
def test_a_file_of_the_users_with_a_name_of_ours_is_not_written_over(run, tmp_path, tiny_settings, name):
    run.write_config("stage2", tiny_settings, {"store": "embedded"})

    def export():
        if name.startswith("shard"):
            export_planes(run, tmp_path / "out")
        else:
            export_meshes(run, tmp_path / "out", None, "glb", 8)

    claim_folder(tmp_path / "out", "planes" if name.startswith("shard") else "meshes")
    before = users_own(tmp_path / "out", name) | contents(tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"is not written over: move it"):
        export()
    assert {path: data for path, data in contents(tmp_path / "out").items() if ".leases" not in path} == before


def test_benchmarks_remove_nothing(tmp_path):
    new_folder(tmp_path / "out", "benchmark")
    users_own(tmp_path / "out", "notes.txt")
    with pytest.raises(FileExistsError, match="name a new or empty folder"):
        new_folder(tmp_path / "out", "benchmark")


def test_one_kind_of_folder_is_not_taken_for_another(tmp_path):
    claim_folder(tmp_path / "out", "planes")
    claim_folder(tmp_path / "out", "planes")
    with pytest.raises(FileExistsError, match="calls 'planes'"):
        claim_folder(tmp_path / "out", "views")
    (tmp_path / "out" / MARK).write_text("[]")
    with pytest.raises(FileExistsError, match=r"calls '\?'"):
        claim_folder(tmp_path / "out", "planes")


def test_pictures_are_not_drawn_through_a_link(run, command, tmp_path, tiny_settings):
    run.write_config("stage2", tiny_settings, {"store": "embedded"})
    (tmp_path / "elsewhere").mkdir()
    (run.path / "pictures").symlink_to(tmp_path / "elsewhere")
    status, error = command("render", "--run", run.path, "--scene", "car-00002", "--frames", 1)
    assert status == 1 and "pictures is a link" in error and not contents(tmp_path / "elsewhere")


def test_a_report_replaces_reports_alone(run, command, tmp_path):
    thesis = tmp_path / "thesis.html"
    thesis.write_text("<html>mine</html>")
    status, error = command("report", "--run", run.path, "--out", thesis)
    assert status == 1 and "is no report of this program" in error and thesis.read_text() == "<html>mine</html>"
    for _ in range(2):
        status, error = command("report", "--run", run.path, "--out", tmp_path / "report.html")
        assert status == 0, error


@pytest.mark.parametrize("name", ["metrics.json", "pictures/a.png", "shared/config.json", "trials/x"])
def test_a_folder_of_somebody_elses_is_no_run(tmp_path, name):
    before = users_own(tmp_path / "mine", name)
    with pytest.raises(FileExistsError, match="is no run folder and holds"), open_ledger(RunFolder(tmp_path / "mine")):
        pass
    assert contents(tmp_path / "mine") == before


@pytest.mark.parametrize("name", ["log.txt", "lost+found/x", ".DS_Store", f".config.yaml.{'0' * 32}", "notes/a"])
def test_what_no_command_writes_over_may_lie_in_a_run(tmp_path, name):
    users_own(tmp_path / "mine", name)
    with open_ledger(RunFolder(tmp_path / "mine")):
        pass


def test_what_a_kill_or_a_system_left_does_not_bar_a_folder(tmp_path):
    users_own(tmp_path / "out", f".{MARK}.{'0' * 32}", ".DS_Store", "lost+found/x")
    claim_folder(tmp_path / "out", "planes")


def test_two_exports_do_not_meet(run, tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.05)
    with own_folder(tmp_path / "out", "planes"), pytest.raises(LeaseHeld, match="works here since"):
        export_planes(run, tmp_path / "out")
    assert export_planes(run, tmp_path / "out").num_scenes == 2


def test_files_of_the_users_in_a_marked_scene_stay(run, tmp_path, tiny_settings):
    run.write_config("stage2", tiny_settings, {"store": "embedded"})
    export_views(run, tmp_path / "out", None, "ring", 3)
    users_own(tmp_path / "out" / "car-00003", "images/00077.png")
    export_views(run, tmp_path / "out", None, "ring", 2)
    assert sorted(path.name for path in (tmp_path / "out" / "car-00003" / "images").iterdir()) == [
        "00000.png", "00001.png", "00077.png",
    ]  # fmt: skip
    users_own(tmp_path / "out" / "car-00003", "transforms.json")
    with pytest.raises(FileExistsError, match=r"transforms\.json was not made by this program"):
        export_views(run, tmp_path / "out", None, "ring", 3)


# ---------------------------------------------------------------------- stores


def test_a_store_is_not_written_among_other_files(tmp_path):
    before = users_own(tmp_path / "store", "scenes-00000.parquet", "scenes-mine.parquet")
    with pytest.raises(FileExistsError, match="holds files"), StoreWriter(tmp_path / "store", "test"):
        pass
    assert contents(tmp_path / "store") == before


def test_what_a_killed_writer_left_is_replaced_and_no_more(tmp_path):
    with pytest.raises(KeyError), StoreWriter(tmp_path / "store", "test") as writer:
        for number in range(300):
            writer.add(row(f"scene-{number}"))
        raise KeyError
    users_own(tmp_path / "store", "scenes-mine.parquet")
    with StoreWriter(tmp_path / "store", "test") as writer:
        writer.add(row())
    assert SceneStore(tmp_path / "store").ids() == ["one"]
    assert [path.name for path in sorted((tmp_path / "store").glob("scenes-*"))] == [
        "scenes-00000-000002.parquet", "scenes-mine.parquet",
    ]  # fmt: skip


def test_the_second_writer_of_a_store_is_told_who_is_at_work(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.05)
    with StoreWriter(tmp_path / "store", "first") as writer:
        writer.add(row())
        told = rf"process {os.getpid()} on .* works here since 20.* UTC, and only one can"
        with pytest.raises(LeaseHeld, match=told), StoreWriter(tmp_path / "store", "second"):
            pass
    assert SceneStore(tmp_path / "store").info["source"] == "first"


def test_a_writer_that_was_paused_and_taken_over_changes_nothing(tmp_path, monkeypatch):
    """It sleeps, another one takes over and finishes, it wakes up, and has a part open."""
    monkeypatch.setattr(leases, "SILENT_SECONDS", 0.2)
    with pytest.raises(LeaseLost, match="taken the work over"), StoreWriter(tmp_path / "store", "first") as writer:
        for number in range(20):
            writer.add(row(f"a{number}"))
        writer._lease._stop.set()  # no sign of life any more
        with StoreWriter(tmp_path / "store", "second") as second:
            second.add(row("b"))
        writer.add(row("a20"))
    store = SceneStore(tmp_path / "store")
    assert store.ids() == ["b"] and store.info["source"] == "second" and len(list(store.rows())) == 1


def test_a_store_that_was_finished_meanwhile_stays(tmp_path, monkeypatch):
    """The second writer waits for the first one's lease, and gets it when the store is complete."""
    first = StoreWriter(tmp_path / "store", "first")
    first.__enter__()
    first.add(row())
    take = Lease.take

    def take_late(*arguments: object) -> Lease:
        first.__exit__(None, None, None)
        return take(*arguments)

    monkeypatch.setattr(Lease, "take", take_late)
    with pytest.raises(FileExistsError, match="already holds"), StoreWriter(tmp_path / "store", "second"):
        pass
    assert SceneStore(tmp_path / "store").ids() == ["one"]


# ---------------------------------------------------------------------- what --verify finds


def test_verify_reads_everything(run, command):
    with open_ledger(run):  # publishes a manifest
        pass
    assert command("evaluate", "--run", run.path, "--verify")[0] == 0
    path = run.library.parts()[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert command("evaluate", "--run", run.path, "--verify")[0] == 1
    path.unlink()
    assert command("evaluate", "--run", run.path, "--verify")[0] == 1


@pytest.mark.parametrize(
    ("job", "told"),
    [({"shared": 5}, "stage2.job.shared"), ({"num_scenes": "many"}, "stage2.job.num_scenes"), ({"store": []}, "store")],
)
def test_wrong_types_in_a_config_are_named(run, command, job, told):
    (run.path / "config.yaml").write_text(json.dumps({"stage2": {"settings": {}, "job": job}}))
    status, error = command("status", "--run", run.path)
    assert status == 1 and told in error and "config.yaml" in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["viewpoints.json", "libraries.log", "checkpoints/stage1/00001-mine/weights.pt"])
def test_a_folder_of_somebody_else_is_no_run(tmp_path, name):
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    (tmp_path / "mine" / "library" / "parts").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="is no run folder and holds"):
        RunFolder(tmp_path / "mine").check_own()
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", ["shared/autoencoder", "mlflow"])
def test_links_below_a_run_are_refused(tmp_path, name):
    (tmp_path / "victim").mkdir()
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "victim")
    with pytest.raises(ValueError, match="is a link"):
        RunFolder(tmp_path / "run").check_own()
