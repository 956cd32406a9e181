"""Names, numbers and times that somebody else wrote into a run: none becomes a path, an order or an endless wait."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.fitted_rows import row
from safetensors.torch import save

from scaling.data.readers.registry import list_scenes
from scaling.distributed.sweep.driver import _forget_failed
from scaling.distributed.sweep.results import FAILED, write_record
from scaling.library.compact import compact
from scaling.library.failures import RETRY, FailureLog, event, read_failures
from scaling.library.ledger import open_ledger
from scaling.library.manifest import Manifest, read_manifest
from scaling.library.parts import commit_part, part_name
from scaling.library.run_folder import RunFolder
from scaling.library.status import status_text
from scaling.storage.json_yaml import parse_json
from scaling.storage.lease import Lease, holder
from scaling.storage.mirror import mirrored
from scaling.storage.parquet import TableError, open_table
from scaling.storage.paths import file_of, local_path, to_path
from scaling.storage.tensors import load_tensors
from scaling.training.checkpoints.checksums import fault, seal
from scaling.training.checkpoints.state import read_progress

NOW = "2026-11-30T12:00:00+00:00"


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """A run with two fitted scenes in a part each, and beside it a file that must stay."""
    found = RunFolder(tmp_path / "deep" / "run")
    with open_ledger(found) as ledger:
        for name in "ab":
            ledger.add(commit_part(found.library.folder, [row(name)], part_name(ledger.epoch, 1, [name])))
    (tmp_path / "thesis.txt").write_text("a thesis")
    return found


def edit_manifest(run: RunFolder, change: Callable[[dict[str, Any]], None]) -> Path:
    path = max((run.library.folder / "manifests").iterdir())
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("name", ["../../../thesis.txt", "{tmp}/thesis.txt", "part-1.parquet", ""])
def test_a_manifest_deletes_nothing_but_parts(run, tmp_path, name):
    name = name.replace("{tmp}", str(tmp_path))
    path = edit_manifest(run, lambda values: values["replaced"].update({name: "2020-01-01T00:00:00+00:00"}))
    with pytest.raises(ValueError, match=f"{path.name}.*replaced"), open_ledger(run) as ledger:
        compact(ledger, 0.0)
    assert (tmp_path / "thesis.txt").read_text() == "a thesis"
    assert len(list((run.library.folder / "parts").iterdir())) == 2


def test_a_manifest_that_lies_about_replaced_parts_deletes_none(run):
    first = run.library.parts()[0].name
    edit_manifest(run, lambda values: values["replaced"].update({first: "2020-01-01T00:00:00+00:00"}))
    with pytest.raises(ValueError, match="both counts and is replaced"):
        read_manifest(run.library.folder)

    def hide(values: dict[str, Any]) -> None:
        del values["parts"][first]

    edit_manifest(run, hide)
    with pytest.raises(ValueError, match=r"noted as replaced, but scene . is nowhere else"), open_ledger(run) as ledger:
        compact(ledger, 0.0)
    assert len(list((run.library.folder / "parts").iterdir())) == 2


def test_a_part_that_claims_another_parts_scenes_does_not_replace_it(run):
    first = run.library.parts()[0].name
    edit_manifest(run, lambda values: values["parts"][first].update(scene_ids=["a", "b"]))
    with pytest.raises(ValueError, match="holds other scenes than the manifest notes"), open_ledger(run) as ledger:
        compact(ledger, 0.0)
    assert len(list((run.library.folder / "parts").iterdir())) == 2


@pytest.mark.parametrize("when", ["yesterday", "2026-11-30T12:00:00", ""])
def test_a_bad_time_is_named(run, when):
    replaced = {part_name(1, 1, ["x"]): when}
    path = edit_manifest(run, lambda values: values.update(replaced=replaced))
    with pytest.raises(ValueError, match=f"{path.name}.*replaced.part-"):
        read_manifest(run.library.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 2}, "manifest-000002"),
        ({"epoch": -1}, "epoch"),
        ({"number": 10**9}, "number"),
        ({"format_version": 9}, "format version 9, this program reads up to 1: update"),
        ({"parts": {part_name(1, 1, ["q"]): None}}, "parts"),
        ({"failures": {"../x": None}}, "failures"),
    ],
)
def test_other_lies_of_a_manifest(run, change, message):
    path = edit_manifest(run, lambda values: values.update(change))
    with pytest.raises(ValueError, match=message) as error:
        read_manifest(run.library.folder)
    assert path.name in str(error.value)


def test_parts_in_a_folder_that_is_a_link_stay(run, tmp_path):
    """Names of parts are valid names in another library, too."""
    other = tmp_path / "other"
    (run.library.folder / "parts").rename(other)
    (run.library.folder / "parts").symlink_to(other)
    with pytest.raises(ValueError, match="parts is a link"), open_ledger(run):
        pass
    assert len(list(other.iterdir())) == 2


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "a//x", "./x", "", "a/\0"])
def test_a_key_that_leads_out_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="leads out of its folder"):
        local_path(tmp_path, name)


def test_a_key_that_leads_through_a_link_is_refused(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="is a link"):
        local_path(tmp_path / "here", "a/x")
    assert local_path(tmp_path / "here", "b/c") == tmp_path / "here" / "b" / "c"


def test_the_owner_of_a_bucket_writes_nothing_here(s3_server, tmp_path):
    """As mode cohort mirrors its checkpoints."""
    import boto3

    host = s3_server.split("endpoint_override=")[1].split("&")[0]
    client = boto3.client("s3", endpoint_url=f"http://{host}", region_name="us-east-1")
    target = tmp_path / "stolen"
    steps = "/".join([".."] * 12) + str(target)
    client.put_object(Bucket="runs", Key=f"{tmp_path.name}/HASH/{steps}", Body=b"x")
    client.put_object(Bucket="runs", Key=f"{tmp_path.name}/HASH/fine", Body=b"x")
    with pytest.raises(ValueError, match="leads out"), mirrored(to_path(f"s3://runs/{tmp_path.name}/HASH{s3_server}")):
        pass
    assert not target.exists()


@pytest.mark.parametrize("named", ["../../other", "001", "", 5])
def test_a_trial_is_what_its_folder_says(tmp_path, named):
    other = tmp_path / "other" / "trial.json"
    other.parent.mkdir()
    other.write_text("mine")
    write_record(tmp_path / "sweep" / "trials" / "000", {"trial": named, "status": FAILED, "values": {}})
    with pytest.raises(ValueError, match=r"000/trial\.json"):
        _forget_failed(tmp_path / "sweep")
    assert other.read_text() == "mine"


# ---------------------------------------------------------------------- files that never end, and numbers beyond ours


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: sparse(path)])
def test_leases_that_would_never_end(run, make):
    make(run.library.folder / "leases" / "lease-000009.json")
    for read in (lambda: holder(run.library.folder / "leases"), lambda: open_ledger(run).__enter__()):
        with pytest.raises(ValueError, match=r"lease-000009\.json: this is no lease"):
            read()


def sparse(path: Path, size: int = 1 << 40) -> None:
    with path.open("wb") as file:
        file.truncate(size)


@pytest.mark.parametrize("name", ["lease-999999.json", "lease-1000000.json", "lease-x.json"])
def test_lease_numbers_that_cannot_be_ours(tmp_path, name):
    (tmp_path / name).write_text(json.dumps({"host": "h", "machine": "m", "pid": 1, "started": "", "released": True}))
    with pytest.raises(ValueError, match=r"epoch 999999, and none is left|no name of a lease"):
        Lease.take(tmp_path, 1)


def test_the_lease_of_a_newer_program_holds(tmp_path, monkeypatch):
    """Its keys are not ours, and it lives; it is not taken for free."""
    monkeypatch.setattr("scaling.storage.lease.SILENT_SECONDS", 0.5)
    path = tmp_path / "lease-000001.json"
    note = {"host": "h", "machine": "another", "pid": 1, "started": "", "colour": "blue"}
    path.write_text(json.dumps(note))
    assert holder(tmp_path) == "process 1 on h, last sign of life number 0 (another machine)"
    lease = Lease.take(tmp_path, 1)  # after the silence
    assert lease.epoch == 2
    lease.release()


def test_an_event_file_that_would_never_end(run):
    run.failures.mkdir(exist_ok=True)
    os.mkfifo(run.failures / "events-000001-000000-0123abcd.jsonl")
    with pytest.raises(ValueError, match=r"events-000001-000000-0123abcd.jsonl: is no plain file"):
        run.latest_events()


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "00001-joint"
    folder.mkdir()
    (folder / "a").write_text("a")
    seal(folder)
    assert fault(folder) is None
    return folder


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (
            lambda folder: (folder / "seal-0-of-1.json").rename(folder / "seal-0-of-0.json"),
            "its seals are of 0 workers",
        ),
        (lambda folder: (folder / "seal-0-of-2.json").write_text("{}"), "its seals are of 1 and 2 workers"),
        (lambda folder: (folder / "seal-0-of-1.json").write_text('{"files": {}}'), "seal-0-of-1.json names no file"),
        (lambda folder: (folder / "seal-0-of-1.json").unlink(), "it has no seal"),
        (lambda folder: os.mkfifo(folder / "b"), "which is no file of a checkpoint"),
        (lambda folder: (folder / "b").mkdir(), "which is no file of a checkpoint"),
        (lambda folder: [(folder / name).symlink_to(".") for name in "bc"], "which is no file of a checkpoint"),
    ],
)
def test_seals_that_are_none(checkpoint, spoil, why):
    spoil(checkpoint)
    assert why in str(fault(checkpoint))


@pytest.mark.parametrize("shards", [0, -1, "../../x", 1.5, 10**9, None])
def test_the_number_of_shards_is_checked(tmp_path, shards):
    progress = {"phase_index": 0, "epoch": 1, "seconds": 1.0, "num_shards": shards}
    (tmp_path / "progress.json").write_text(json.dumps(progress))
    with pytest.raises(ValueError, match=r"progress\.json: num_shards"):
        read_progress(tmp_path)


def test_leases_are_not_taken_through_a_link(run, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "leases").symlink_to(run.library.folder / "leases")
    before = sorted((run.library.folder / "leases").iterdir())
    with pytest.raises(ValueError, match="leases is a link"):
        Lease.take(tmp_path / "store" / "leases", 1)
    assert sorted((run.library.folder / "leases").iterdir()) == before


@pytest.mark.parametrize("text", ['{"a": 1e999}', "[" + "0," * 5_000_001 + "0]"])
def test_json_that_cannot_be_used(text):
    with pytest.raises(ValueError, match="not valid JSON"):
        parse_json(text)


def test_a_sparse_file_of_tensors_is_not_read(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(save({"a": torch.zeros(3)}))
    assert load_tensors(path)["a"].shape == (3,)
    os.truncate(path, 1 << 40)
    with pytest.raises(ValueError, match=r"has 1099511627776 bytes, its header says \d+"):
        load_tensors(path)


def test_a_dictionary_that_unpacks_to_too_much(tmp_path):
    """14 kB that stand for 300 MB: one long text, named by every row."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": ["x" * 100_000] * 3000}), path)
    with pytest.raises(TableError, match="unpacks to"), open_table(*file_of(path)):
        pass


def test_a_zip_whose_list_is_too_long(tmp_path):
    path = tmp_path / "a.zip"
    with path.open("wb") as file:
        file.truncate(3 << 30)
        file.seek(0, 2)
        file.write(b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 1, 1, 3 << 30, 0, 0))
    with pytest.raises(ValueError, match="list of its members has 3,221,225,472 bytes"):
        list_scenes(path)


def test_half_a_character_in_an_event_is_passed_over(tmp_path):
    """A line that could not be written again."""
    line = json.dumps({"scene_id": "a", "attempt": 1, "kind": "\ud800", "message": "", "when": NOW})
    (tmp_path / "events-000001-000000-0123abcd.jsonl").write_text(line + "\n")
    assert read_failures(tmp_path, Manifest(epoch=1)) == {}


# ---------------------------------------------------------------------- clocks


def test_attempts_count_and_not_the_clock(tmp_path, monkeypatch):
    """The clock is set back an hour between the last try and its end."""
    log = FailureLog(tmp_path, epoch=1)
    for attempt, kind, when in ((1, RETRY, "13:00"), (2, RETRY, "13:01"), (2, "actor died", "12:02")):
        log.add([event("a", attempt, kind, "").model_copy(update={"when": f"2026-11-30T{when}:00+00:00"})])
    assert read_failures(tmp_path, Manifest(epoch=1))["a"].kind == "actor died"
    kept = event("a", 7, "diverged", "")
    FailureLog(tmp_path, epoch=2).add([event("a", 1, RETRY, "again")])
    later = read_failures(
        tmp_path, Manifest(epoch=2, failures={"a": kept, "b": kept.model_copy(update={"scene_id": "b"})})
    )
    assert later["a"].kind == RETRY, "a new driver counts its attempts from one"
    assert later["b"].kind == "diverged"


# ---------------------------------------------------------------------- text that a terminal would obey

FORGED = "\x1b]0;owned\x07\x1b[2J\nall scenes fitted \u202e"


def test_foreign_text_is_shown_in_one_line_without_escapes(run):
    from scaling.config import Settings
    from scaling.library.summary import failures_text

    run.write_config("stage2", Settings(), {"num_scenes": 3})
    FailureLog(run.failures, read_manifest(run.library.folder).epoch).add([event("c", 1, FORGED, FORGED)])
    note = {"host": FORGED, "machine": "another", "pid": 1, "started": ""}
    (run.library.folder / "leases" / "lease-000009.json").write_text(json.dumps(note))
    told = status_text(run) + failures_text(run)
    assert all(letter.isprintable() or letter == "\n" for letter in told)
    assert not any(line.startswith("all scenes fitted") for line in told.splitlines())
    assert "\\x1b[2J all scenes fitted \\u202e" in told
