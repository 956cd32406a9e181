"""The library on disk: packing, commits, damaged parts, failures, metrics.json."""

from __future__ import annotations

import json
import time
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.fitted_rows import params, row

from scaling.library import summary
from scaling.library.coding.packed import decode_levels, encode_levels, unpack_hull
from scaling.library.failures import FailureLog, event, read_failures
from scaling.library.manifest import Manifest
from scaling.library.parts import commit_part, part_name
from scaling.library.reader import Library
from scaling.library.row_schema import LATER_METRICS, METRICS, SCHEMA
from scaling.library.run_folder import RunFolder
from scaling.library.scene_row import pack_scene, unpack_scene
from scaling.library.summary import summarise, table_text
from scaling.models.cells import CELLS
from scaling.models.rounding import LEVELS, SEARCHED
from scaling.models.triplanes import SceneParams
from scaling.storage import parquet
from scaling.storage.atomic import replace_file
from scaling.storage.commit import commit_file


@pytest.mark.parametrize(
    ("dtype", "worst"),
    [("float32", 0.0), ("float16", 1e-3), ("int8", 0.5 / 127), ("int6", 1 / 32), ("int5", 1 / 16), ("int4", 1 / 8),
     ("int3", 1 / 4)],
)  # fmt: skip
def test_packing_round_trip(dtype, worst):
    """worst: the largest error as a part of the largest value. float16 keeps 11 bits, int8 is off by half a step of a
    127th; int4 (scale c/8, c at most 1) by half a step, or by one where the largest value has the shorter side."""
    packed = pack_scene(params(), dtype)
    if not packed.micro_scale:
        assert len(packed.micro_planes) == 96 * np.dtype(dtype).itemsize
    back = unpack_scene({**vars(packed), "scene_id": "a"})
    peak = params().micro_planes.abs().amax((2, 3), keepdim=True)
    error = (back.micro_planes - params().micro_planes).abs()
    if dtype in SEARCHED:  # what is clipped may be off by more, to the gain of the rest
        scale = torch.tensor(packed.micro_scale).abs().view(3, 2, 1, 1)
        error = torch.where(params().micro_planes.abs() <= LEVELS[dtype][1] * scale, error, 0)
    assert (error <= worst * peak + 1e-6).all()
    rounded = 0 if dtype == "float32" else 2.0**-12
    assert ((back.coefs - params().coefs).abs() <= rounded * params().coefs.abs()).all()
    assert back.hull is None


def test_int4_with_a_pencil():
    """0, 7, -8, 3 and 1 fit a scale of 1 (turned round: -1)."""
    for sign in (1, -1):
        planes = sign * torch.tensor([0.0, 7.0, -8.0, 3.0, 1.0]).view(1, 1, 1, 5)
        packed = pack_scene(SceneParams(planes, torch.tensor([1 / 3])), "int4")
        assert decode_levels(packed.micro_planes, planes.shape).ravel().tolist() == [0, 7, -8, 3, 1]
        assert packed.micro_scale == [sign]
        assert packed.coefs == [2731 / 8192], "12 bits: 1/3 is 2730.7 of 8192"
        assert torch.equal(unpack_scene(vars(packed)).micro_planes, planes)


def test_rows_of_format_3_are_read(tmp_path):
    """int4: two numbers lie in a byte, the first below, in two's complement; int8: one. They have no hulls."""
    planes = torch.tensor([0.0, 7.0, -8.0, 3.0, 1.0]).view(1, 1, 1, 5)
    half = row("a") | {
        "micro_planes": bytes([0x70, 0x38, 0x01]), "micro_dtype": "int4", "micro_shape": [1, 1, 1, 5],
        "micro_scale": [0.5], "format_version": 3,
    }  # fmt: skip
    whole = half | {
        "scene_id": "b", "micro_planes": bytes([0, 7, 256 - 8, 3, 1]), "micro_dtype": "int8", "micro_scale": [-2.0],
    }  # fmt: skip
    fields = [field for field in SCHEMA if field.name != "hull"]
    table = pa.Table.from_pylist(
        [{key: value for key, value in scene.items() if key != "hull"} for scene in (half, whole)],
        schema=pa.schema(fields),
    )
    (tmp_path / "parts").mkdir()
    pq.write_table(table, tmp_path / "parts" / part_name(0, 0, ["a", "b"]))
    for scene_id, scale in (("a", 0.5), ("b", -2.0)):
        found = unpack_scene(Library(tmp_path).scene(scene_id))
        assert torch.equal(found.micro_planes, planes * scale) and found.hull is None
    with pytest.raises(ValueError, match="scene a: 2 bytes of micro planes"):
        unpack_scene(half | {"micro_planes": bytes([0x70, 0x38])})


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("shape", [(3, 2, 7, 7), (1, 1, 1, 1), (3, 0, 5, 5)])
def test_levels_as_bytes(bits, shape):
    low, high = LEVELS[f"int{bits}"]
    levels = torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(bits))
    assert decode_levels(encode_levels(levels.numpy(), bits), shape).tolist() == levels.tolist()


def test_levels_take_their_entropy_and_neighbours_that_are_alike_less():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 10, 40, 40, generator=generator)
    alone = (noise * 2).round().clamp(-8, 7)
    size = len(encode_levels(alone.numpy(), 4))
    assert size < 0.40 * alone.numel(), "log2(2 · 4.13) = 3.05 bits of entropy are 0.38 bytes"
    smooth = torch.nn.functional.avg_pool2d(noise.flatten(0, 1), 3, stride=1, padding=1).view_as(noise)
    alike = (smooth * 6).round().clamp(-8, 7)
    assert alike.std() > 1.8 and len(encode_levels(alike.numpy(), 4)) < 0.85 * size


HUFFMAN = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)


def test_rows_of_format_4_are_read():
    """Levels one a byte in a raw deflate stream of Huffman codes; a hull as bits, deflated."""
    levels = torch.randint(-8, 8, (3, 2, 30, 30), generator=torch.Generator().manual_seed(0))
    coder = HUFFMAN.copy()
    data = coder.compress(levels.to(torch.int8).numpy().tobytes()) + coder.flush()
    assert decode_levels(data, levels.shape).tolist() == levels.tolist()
    hull = torch.rand(CELLS**3, generator=torch.Generator().manual_seed(0)) < 0.2
    coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = coder.compress(np.packbits(hull.numpy()).tobytes()) + coder.flush()
    assert (unpack_hull(packed) == hull.numpy()).all()


@pytest.mark.parametrize("damage", ["cut", "longer", "changed", "other", "empty"])
def test_bytes_that_are_no_levels_are_refused(damage):
    levels = (torch.arange(100) % 7).view(1, 1, 10, 10)
    data = encode_levels(levels.numpy(), 4)
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    damaged = {
        "cut": data[:-3], "longer": encode_levels(np.zeros((1, 10, 100, 100)), 4), "changed": bytes(changed),
        "other": b"\xff" * 50, "empty": b"",
    }  # fmt: skip
    with pytest.raises(ValueError, match="its bytes"):
        decode_levels(damaged[damage], (1, 1, 10, 10))
    scene = row("a") | {
        "micro_planes": damaged[damage], "micro_dtype": "coded", "micro_shape": [1, 1, 10, 10], "micro_scale": [1.0]
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"scene a: micro planes .*its bytes"):
        unpack_scene(scene)


def test_few_bytes_that_claim_to_be_many_levels_are_refused():
    data = encode_levels(np.zeros((1, 1, 2, 2)), 4)
    for shape, why in (((3, 10, 700, 700), "its bytes"), ((3, 100, 4096, 4096), "at most 16,777,216 are decoded")):
        with pytest.raises(ValueError, match=why):
            decode_levels(data, shape)


def test_a_hull_is_stored_with_its_scene():
    cells = torch.zeros(CELLS, CELLS, CELLS, dtype=torch.bool)
    cells[10:30, 12:28, 5] = True
    cells[3, 39, 39] = True
    hull = cells.view(-1)
    packed = pack_scene(SceneParams(params().micro_planes, params().coefs, hull), "int4")
    assert len(packed.hull) < 100, "CELLS³ are 64,000: 8,000 bytes"
    assert torch.equal(unpack_scene(vars(packed)).hull, hull)
    longer = zlib.compress(bytes(CELLS**3 // 8 + 1), wbits=-zlib.MAX_WBITS)
    for damaged in (longer, packed.hull[:-2], packed.hull[:20] + b"\x01" + packed.hull[21:], b"\xff\xff", b""):
        with pytest.raises(ValueError, match="its bytes"):
            unpack_hull(damaged)
        with pytest.raises(ValueError, match=r"scene car-7: .*hull: its bytes"):
            unpack_scene(row("car-7") | {"hull": damaged})


def test_int4_clips_one_value_for_the_others():
    """200 values of 3.5 beside one of 10. In steps of 10/8 they become 3.75, an error of 12.5 in squares; in steps of
    9/8 they become 3.375 and the 10 becomes 9, an error of 3.125 + 1, and no other step does better."""
    planes = torch.tensor([10.0] + [3.5] * 200).view(1, 1, 1, 201)
    back = unpack_scene(vars(pack_scene(SceneParams(planes, torch.zeros(1)), "int4"))).micro_planes.flatten()
    assert back[:2].tolist() == pytest.approx([9.0, 3.375])


@pytest.mark.parametrize("shape", [(3, 0, 4, 4), (1, 1, 1, 3)])
def test_int4_of_nothing_and_of_zeros(shape):
    packed = pack_scene(SceneParams(torch.zeros(shape), torch.zeros(2)), "int4")
    assert len(packed.micro_planes) == (10 if packed.micro_shape[1] else 0)
    assert torch.equal(unpack_scene(vars(packed)).micro_planes, torch.zeros(shape))


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
    assert library.scene("c")["coefs"] == pytest.approx(params().coefs.tolist(), rel=2**-12)
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


def test_scenes_that_say_nothing_are_in_no_mean(tmp_path):
    """All views of c are white: its mean image has the highest PSNR there is."""
    run = RunFolder(tmp_path / "run")
    run.shared.mkdir(parents=True)
    (run.shared / "hash.txt").write_text("abc")
    commit_part(
        run.library.folder,
        [row("a", psnr=20.0), row("b", psnr=22.0), row("c", psnr=100.0) | {"mean_image_psnr": 100.0}],
    )
    metrics = summarise(run)
    assert (metrics["num_scenes"], metrics["num_left_out"], metrics["test"]["psnr"]) == (3, 1, 21.0)
    assert metrics["mean_image"]["psnr"] < 99 and "in no mean" in table_text(metrics)


def test_metrics_by_category(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.shared.mkdir(parents=True)
    (run.shared / "hash.txt").write_text("abc")
    commit_part(run.library.folder, [row("a", stage=1)])
    plane = row("p", psnr=10.0) | {"category": "plane"}
    commit_part(
        run.library.folder, [row("b", psnr=20.0), row("c", psnr=22.0), plane, row("q", psnr=5.0) | {"category": ""}]
    )
    metrics = summarise(run)
    assert metrics["stage1"]["categories"] == {}, "one category needs no rows of its own"
    found = {name: (part["num_scenes"], part["test"]["psnr"]) for name, part in metrics["categories"].items()}
    assert found == {"car": (2, 21.0), "plane": (1, 10.0), "no category": (1, 5.0)}
    assert "car: test PSNR, dB" in table_text(metrics) and "no category: scenes" in table_text(metrics)


def test_a_category_for_each_scene_costs_no_more_than_one_for_all():
    """One pass over the rows; a filter for each category took minutes for 200,000 of them."""
    one = row("s")
    rows = pa.Table.from_pylist([one | {"category": f"c{i % 5000}"} for i in range(10_000)], schema=SCHEMA)
    start = time.process_time()
    found = summary._categories(rows)
    assert len(found) == 5000 and found["c7"]["num_scenes"] == 2 and time.process_time() - start < 5


def test_a_row_group_is_chosen_by_bytes(tmp_path):
    """What is read to get one scene stays about a megabyte, and small rows share one row group."""
    large = torch.randn(3, 10, 64, 64, generator=torch.Generator().manual_seed(0))  # float32: 480 kB
    rows = [row(f"a{i}") | vars(pack_scene(SceneParams(large, torch.ones(5)), "float32")) for i in range(5)]
    for found, groups in (([row(f"a{i}") for i in range(300)], [300]), (rows, [2, 2, 1])):
        metadata = pq.ParquetFile(tmp_path / "parts" / commit_part(tmp_path, found).name).metadata
        assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == groups


def test_planes_that_compress_too_well_are_still_read(tmp_path, monkeypatch):
    """Scenes that stay where they start have planes of zeros; readers refuse what unpacks to 100 times its size."""
    monkeypatch.setattr(parquet, "FREE_BYTES", 0)
    zeros = vars(pack_scene(SceneParams(torch.zeros(3, 10, 64, 64), torch.ones(5)), "float16"))
    commit_part(tmp_path, [row("a") | zeros, row("b") | zeros])
    assert unpack_scene(Library(tmp_path).scene("b")).micro_planes.count_nonzero() == 0


def test_parts_of_format_2_are_read(tmp_path):
    """Not compressed, metrics as float64."""
    schema = pa.schema([(f.name, pa.float64() if f.name in (*METRICS, "seconds") else f.type) for f in SCHEMA])
    table = pa.Table.from_pylist([row("a", psnr=20.1) | {"format_version": 2}], schema=schema)
    (tmp_path / "parts").mkdir()
    pq.write_table(table, tmp_path / "parts" / part_name(0, 0, ["a"]), compression="none", use_dictionary=False)
    assert Library(tmp_path).scene("a")["psnr"] == pytest.approx(20.1, abs=1e-5)
    assert Library(tmp_path).table(["psnr"])["psnr"].type == pa.float32()


def test_parts_older_than_a_metric_are_read(tmp_path):
    """Beside younger ones: what was not measured then is None, and no mean counts it."""
    run = RunFolder(tmp_path / "run")
    run.shared.mkdir(parents=True)
    commit_part(run.library.folder, [row("new") | {"flip": 0.25}])
    old = pa.Table.from_pylist([row("old") | {"format_version": 3}], SCHEMA).drop_columns(list(LATER_METRICS))
    pq.write_table(old, run.library.folder / "parts" / part_name(0, 0, ["old"]), use_dictionary=False)
    assert [run.library.scene(name)["flip"] for name in ("old", "new")] == [None, 0.25]
    assert run.library.table(["flip", "scene_id"]).column_names == ["flip", "scene_id"]
    metrics = summarise(run)
    assert metrics["num_scenes"] == 2 and metrics["test"]["flip"] == 0.25 and metrics["train"]["ms_ssim"] == 1.0
    assert metrics["stage1"]["autoencoder"]["flip"] is None


def test_what_a_scene_of_coefs_alone_costs(tmp_path):
    """50 coefs, ids and metrics take less than 50 float32 did (200 bytes)."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(1024):
        own = SceneParams(torch.zeros(3, 0, 32, 32), torch.randn(50, generator=generator))
        rows.append(row(f"scene-{index:06d}", psnr=20 + index / 7) | vars(pack_scene(own, "float16")))
    assert commit_part(tmp_path, rows).num_bytes / 1024 < 130
