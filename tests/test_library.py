"""The library on disk: packing, commits, damaged parts, failures, metrics.json."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import torch

from scaling.files import replace_file
from scaling.library.commit import commit_file
from scaling.library.failures import FailureLog, event, read_failures
from scaling.library.fitted_scenes import METRICS, pack_scene, unpack_scene
from scaling.library.library import Library
from scaling.library.manifest import Manifest
from scaling.library.parts import commit_part
from scaling.library.run_folder import RunFolder
from scaling.library.summary import summarise
from scaling.models.triplanes import SceneParams


def params(seed: int = 0) -> SceneParams:
    generator = torch.Generator().manual_seed(seed)
    return SceneParams(torch.randn(3, 2, 4, 4, generator=generator), torch.randn(5, generator=generator))


def row(scene_id: str, stage: int = 2, psnr: float = 20.0) -> dict:
    metrics = dict.fromkeys(METRICS, 1.0) | {"psnr": psnr, "lpips": None}
    described = {"category": "car", "stage": stage, "shared": "abc", "cohort": None, "seconds": 2.0}
    rest = {"scene_id": scene_id, "settings_hash": "h", "seed": 0}
    return {**vars(pack_scene(params(), "float16")), **metrics, **described, **rest}


@pytest.mark.parametrize(("dtype", "worst"), [("float16", 2e-3), ("int8", 0.5 / 127 * 4)])
def test_packing_round_trip(dtype, worst):
    """float16 keeps 11 bits; int8 is off by at most half a step of a 127th of the channel's largest value."""
    packed = pack_scene(params(), dtype)
    assert len(packed.micro_planes) == 3 * 2 * 4 * 4 * (2 if dtype == "float16" else 1)
    back = unpack_scene({**vars(packed), "scene_id": "a"})
    assert (back.micro_planes - params().micro_planes).abs().max() <= worst
    assert torch.equal(back.coefs, params().coefs)


def test_packing_refuses_numbers_that_are_not_finite():
    broken = params()
    broken.micro_planes[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="diverged"):
        pack_scene(broken, "float16")


def test_unpacking_names_the_scene_whose_bytes_do_not_fit():
    damaged = row("car-7") | {"micro_planes": b"123"}
    with pytest.raises(ValueError, match="scene car-7: 3 bytes"):
        unpack_scene(damaged)


def test_a_commit_is_never_changed(tmp_path):
    path = tmp_path / "parts" / "a"
    assert commit_file(path, b"first")
    assert not commit_file(path, b"second")
    assert path.read_bytes() == b"first"
    replace_file(path, b"third")
    assert path.read_bytes() == b"third"
    assert [p.name for p in path.parent.iterdir()] == ["a"], "no temporary file stays behind"


def test_a_scene_in_two_parts_counts_once(tmp_path):
    commit_part(tmp_path, [row("a"), row("b")])
    commit_part(tmp_path, [row("a"), row("b")])
    commit_part(tmp_path, [row("b"), row("c")])
    library = Library(tmp_path)
    assert len(library.parts()) == 2
    assert sorted(library.ids()) == ["a", "b", "c"]
    assert sorted(scene["scene_id"] for scene in library.scenes()) == ["a", "b", "c"]
    assert library.scene("c")["coefs"] == pytest.approx(params().coefs.tolist())
    with pytest.raises(LookupError, match="no scene 'z'"):
        library.scene("z")


def test_a_damaged_part_is_named(tmp_path):
    path = tmp_path / "parts" / commit_part(tmp_path, [row("a")]).name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=path.name):
        Library(tmp_path).ids()


def test_the_latest_event_of_a_scene_counts(tmp_path):
    log = FailureLog(tmp_path)
    log.add([event("a", 1, "retry", "its actor died"), event("b", 1, "retry", "its actor died")])
    log.add([event("b", 2, "diverged", "not finite")])
    latest = read_failures(tmp_path, Manifest())
    assert {scene_id: found.kind for scene_id, found in latest.items()} == {"a": "retry", "b": "diverged"}


def test_metrics_json_has_every_key(tmp_path):
    run = RunFolder(tmp_path / "run")
    (run.shared).mkdir(parents=True)
    (run.shared / "hash.txt").write_text("abc")
    commit_part(run.library.folder, [row("a", stage=1, psnr=30.0)])
    commit_part(run.library.folder, [row("b", psnr=20.0), row("c", psnr=22.0)])
    FailureLog(run.failures).add([event("d", 1, "bad input", "no image")])
    summarise(run)
    metrics = json.loads(run.metrics.read_text())
    assert (metrics["num_scenes"], metrics["num_failed"], metrics["stage1"]["num_scenes"]) == (2, 1, 1)
    assert (metrics["test"]["psnr"], metrics["stage1"]["test"]["psnr"]) == (21.0, 30.0)
    assert metrics["test"]["lpips"] is None and metrics["test"]["lpips_reason"]
    assert metrics["shared_bytes"] == 3
    part = next(p for p in run.library.parts() if pq.read_table(p).num_rows == 2)
    assert metrics["bytes_per_scene"] == part.stat().st_size / 2
    for key in ("train", "autoencoder", "mean_image", "seconds_per_scene"):
        assert key in metrics
    assert pq.read_table(run.path / "scenes.parquet")["scene_id"].to_pylist() == ["a", "b", "c"]
