"""Cached latents: made once, by any number of actors, used by stage 2 in place of the encoder, or refused by name."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.tiny_run import train_shared

from scaling.cli import read_preset, run_command
from scaling.config import make_settings, merge
from scaling.data.embedded.scenes import embedded_car, embedded_ids
from scaling.data.latent_cache import SCHEMA, LatentCache
from scaling.data.latents import pack_latents
from scaling.data.scene_ref import SceneError
from scaling.data.scene_store import SceneStore
from scaling.data.scene_views import SceneViews, views_from_row
from scaling.data.store_writer import StoreWriter
from scaling.data.stores import SourceSpec, read_rows
from scaling.distributed.cache_latents import Encoded, EncodeJob, Encoder, cache_latents
from scaling.distributed.prepare import holds
from scaling.models.shared_files import load_shared
from scaling.models.shared_model import SharedModel
from scaling.storage.atomic import replace_file
from scaling.storage.paths import to_path
from scaling.training import training_scene
from scaling.training.fit_cohort import fit_cohort
from scaling.training.fit_frozen import fit_scenes
from scaling.training.training_scene import encode_scene, prepare_scene

PREPARE = Path(__file__).resolve().parents[2] / "experiments" / "prepare.py"
NUM_SCENES, DAMAGED = 18, 3  # of the second part, two
IDS = embedded_ids(NUM_SCENES)


def make_store(folder: Path | str) -> None:
    with StoreWriter(folder, "cars") as writer:
        for number, scene_id in enumerate(IDS):
            row = embedded_car(scene_id, 16, 5)
            if number == DAMAGED:
                row["views"][1] = row["views"][1][:40]
            writer.add(row)


@pytest.fixture(scope="module")
def made(tiny_settings, tiny_scenes, tmp_path_factory) -> Path:
    """A shared model, and a store with its latents."""
    folder = tmp_path_factory.mktemp("latents")
    train_shared(tiny_settings, tiny_scenes[:2], folder / "shared")
    make_store(folder / "store")
    encode(folder, SourceSpec.of(str(folder / "store"), tiny_settings.data))
    return folder


def encode(folder: Path, spec: SourceSpec) -> None:
    """What the actors and their driver do, in this process."""
    encoder = Encoder(EncodeJob(str(folder / "shared"), astuple(spec), 1, 600.0))
    encoder.ready()
    first, second = encoder.encode(0), encoder.encode(1)
    assert (first.num_scenes, second.num_scenes) == (15, 2)
    assert list(first.left_out) == [IDS[DAMAGED]] and "views[1]" in first.left_out[IDS[DAMAGED]]
    encoder.cache.finish(17)


@pytest.fixture
def mine(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(made, tmp_path / "copy")


@pytest.fixture
def shared(made: Path) -> SharedModel:
    return load_shared(made / "shared")[0]


def spec_of(folder: Path, settings: Any) -> SourceSpec:
    content_hash = (folder / "shared" / "hash.txt").read_text().strip()
    return SourceSpec.of(str(folder / "store"), settings.data).with_latents(content_hash)


def part_of(folder: Path, number: int = 0) -> Path:
    return next((folder / "store" / "latents").iterdir()) / f"latents-{number:05d}.parquet"


def views_of(spec: SourceSpec, ids: list[str]) -> list[SceneViews]:
    return [views_from_row(row, 16) for row in spec.open().rows(ids)]


def test_stage_2_takes_what_the_encoder_would_make(made, tiny_settings, shared):
    """Every view's latents, of scenes in any order, within the rounding of float16."""
    spec = spec_of(made, tiny_settings)
    for views in views_of(spec, [IDS[17], IDS[0], IDS[16]]):
        assert views.latents is not None and views.latents.shape == (5, 4, 8, 8)
        both = views, replace(views, latents=None)
        [cached, encoded] = [encode_scene(shared, prepare_scene(shared, each)) for each in both]
        torch.testing.assert_close(cached.latents, encoded.latents, rtol=0, atol=2.5e-4)
        assert encoded.latents.std() > 0.01
    whole = pq.read_table(part_of(made))
    assert whole["scene_id"].to_pylist() == IDS[:DAMAGED] + IDS[DAMAGED + 1 : 16]
    assert whole.schema.equals(SCHEMA)


@pytest.mark.parametrize("mode", ["frozen", "cohort"])
def test_fits_with_and_without_cached_latents_agree(made, tiny_settings, shared, tmp_path, monkeypatch, mode):
    settings = make_settings(merge(tiny_settings.model_dump(), {"stage2": {"rgb": {"num_epochs": 0}}}))

    def planes(spec: SourceSpec) -> torch.Tensor:
        scenes = views_of(spec, IDS[5:8])
        if mode == "frozen":
            fitted = fit_scenes(shared, scenes, settings)
        else:
            folder = tmp_path / str(spec.latents)
            folder.mkdir()
            fitted = fit_cohort(shared, "hash", scenes, settings, folder).scenes
        return torch.stack([scene.params.micro_planes for scene in fitted])

    spec = spec_of(made, tiny_settings)
    without = planes(replace(spec, latents=None))
    monkeypatch.setattr(training_scene, "encode_images", None)  # nothing may call it now
    assert without.abs().max() > 1e-3
    # As a whole: Adam blows up what rounding does to single texels that hardly any ray meets.
    assert (planes(spec) - without).norm() < 2e-2 * without.norm()


def test_latents_of_others_are_not_used(mine, tiny_settings):
    """Those of another shared model, and those of a store that was prepared anew in the same place."""
    spec = SourceSpec.of(str(mine / "store"), tiny_settings.data)
    assert spec_of(mine, tiny_settings).latents
    assert spec.with_latents("0" * 64) == spec and spec.with_latents("../shared") == spec
    (mine / "store" / "store.json").unlink()
    with StoreWriter(mine / "store", "others") as writer:
        for scene_id in IDS:
            writer.add(embedded_car(scene_id, 16, 5))
    assert spec_of(mine, tiny_settings) == spec
    cache = LatentCache(SceneStore(mine / "store"), part_of(mine).parent.name)
    assert cache.whole_parts() == {}, "nothing of it is kept either"


def rewrite(folder: Path, change: Callable[[list[dict[str, Any]]], object], **options: Any) -> None:
    """Changes the rows of the first part."""
    path = part_of(folder)
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows = change(rows) or rows
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path, **options)


def flip(path: Path) -> None:
    """One bit in the middle of the latents."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda my: part_of(my).write_bytes(part_of(my).read_bytes()[:-9]), "no Parquet file, or one cut short"),
        (lambda my: flip(part_of(my)), "not a readable part of cached latents"),
        (lambda my: part_of(my).unlink(), "this part of the cached latents is missing"),
        (lambda my: shutil.copy(part_of(my, 1), part_of(my)), "it holds other scenes than this part of the store"),
        (lambda my: rewrite(my, lambda rows: rows[::-1]), "or in another order"),
        (lambda my: rewrite(my, lambda rows: rows[:1] * 17), "it has 17 scenes; a part has 16 at most"),
        (lambda my: rewrite(my, lambda rows: rows[0].update(scene_id="../a")), "it holds other scenes"),
        (
            lambda my: rewrite(my, lambda rows: rows[0].update(latents=bytes(70 << 20)), compression="zstd"),
            "says that it unpacks to",
        ),
        (
            lambda my: pq.write_table(pa.Table.from_pylist([], schema=SCHEMA), part_of(my)),
            "belongs to another shared model, or to an earlier store in this folder",
        ),
    ],
)  # fmt: skip
def test_damaged_parts_are_named(mine, tiny_settings, damage, told):
    spec = spec_of(mine, tiny_settings)
    part = part_of(mine)
    damage(mine)
    with pytest.raises(ValueError, match=rf"{part}: .*remove this shared model's folder in STORE/latents") as error:
        list(spec.open().rows(IDS[:1]))
    assert told in str(error.value) and "\n" not in str(error.value)
    rows = read_rows(spec.open(), IDS[15:17])
    assert "error" in rows[0] and rows[1]["latents"], "the scenes of other parts are read"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"shape": [4, 4, 8, 8]}, "the shape [4, 4, 8, 8], the scene has 5 views"),
        ({"shape": [5, 4, 64]}, "the shape [5, 4, 64]"),
        ({"shape": [5, 4, 8, 9]}, "they have 2560 bytes, the shape [5, 4, 8, 9] needs 2880"),
        ({"shape": [5, -4, -8, 8]}, "the shape [5, -4, -8, 8]"),
        ({"latents": np.full(1280, np.nan, "<f2").tobytes()}, "not in [-1, 1]"),
        ({"shape": [5, 2, 8, 16]}, "of shape [2, 8, 16], the shared model's are [4, 8, 8]"),
    ],
)
def test_latents_that_do_not_fit_their_scene(mine, tiny_settings, shared, change, told):
    rewrite(mine, lambda rows: rows[0].update(change))
    with pytest.raises(SceneError, match=f"scene {IDS[0]}.*: cached latents: .*remove this shared") as error:
        prepare_scene(shared, views_of(spec_of(mine, tiny_settings), IDS[:1])[0])
    assert told in str(error.value)
    with pytest.raises(ValueError, match="not finite"):
        pack_latents(torch.tensor([torch.inf]))


@pytest.mark.parametrize("text", ["", "[]", '{"format_version": 1}', '{"format_version": NaN}'])
def test_a_damaged_note_is_named(mine, tiny_settings, text):
    note = part_of(mine).parent / "latents.json"
    note.write_text(text)
    with pytest.raises(ValueError, match=rf"{note} is damaged .*remove this"):
        spec_of(mine, tiny_settings)
    note.write_text(json.dumps({"format_version": 9, "shared": "", "store": "", "num_scenes": 1}))
    with pytest.raises(ValueError, match=rf"{note}: format version 9"):
        spec_of(mine, tiny_settings)


@pytest.mark.filterwarnings("default")
def test_an_interrupted_job_goes_on(ray_6_cpus_4_gpus, mine, tiny_settings, capsys, monkeypatch):
    """It keeps what is whole, makes again what is torn, though an actor dies; a complete cache is left alone."""

    class MortalEncoder(Encoder):  # a local class travels by value: Ray's workers know no module of the tests
        def encode(self, number: int) -> Encoded:
            died = Path(self.job.shared) / "died"
            if not died.exists():
                died.touch()
                os._exit(1)
            return super().encode(number)

    monkeypatch.setattr("scaling.distributed.cache_latents.Encoder", MortalEncoder)
    folder, torn = part_of(mine).parent, part_of(mine, 1)
    whole = torn.read_bytes()
    assert spec_of(mine, tiny_settings).latents
    (folder / "latents.json").unlink()
    torn.write_bytes(whole[: len(whole) // 2])
    kept = part_of(mine).stat().st_mtime_ns
    assert spec_of(mine, tiny_settings).latents is None, "an incomplete one is not used"
    store, model = str(mine / "store"), mine / "shared"
    assert cache_latents(store, model, ray_6_cpus_4_gpus).num_scenes == 17
    assert (model / "died").exists() and torn.read_bytes() == whole and part_of(mine).stat().st_mtime_ns == kept
    assert spec_of(mine, tiny_settings).latents
    written = torn.stat().st_mtime_ns
    assert cache_latents(store, model, ray_6_cpus_4_gpus).num_scenes == 17
    assert "cached already" in capsys.readouterr().out and torn.stat().st_mtime_ns == written
    assert holds(store, "cars") and not holds(store, "vans") and not holds(str(mine / "none"), "cars")


def test_a_store_in_an_object_store(s3_server, made, tiny_settings):
    uri = f"s3://runs/latents{s3_server}"
    make_store(uri)
    spec = SourceSpec.of(uri, tiny_settings.data)
    encode(made, spec)
    used = spec.with_latents((made / "shared" / "hash.txt").read_text().strip())
    [here, there] = [views_of(each, IDS[16:])[1].latents for each in (spec_of(made, tiny_settings), used)]
    assert used.latents and torch.equal(here, there)
    torn = to_path(f"s3://runs/latents/latents/{used.latents}/latents-00001.parquet{s3_server}")
    torn.write_bytes(torn.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"runs/latents/.*latents-00001.parquet: not a readable part"):
        views_of(used, IDS[16:])
    torn.unlink()
    with pytest.raises(ValueError, match=r"latents-00001.parquet: this part of the cached latents is missing"):
        views_of(used, IDS[16:])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--latents"], "--latents and --shared DIR go together"),
        (["--shared", "there"], "--latents and --shared DIR go together"),
        ([], "nothing to do: give --source DIR"),
        (["--latents", "--shared", "there", "--category", "cars"], "--force say how --source is read"),
        (["--latents", "--shared", "RGB"], "kind is super_resolution, which has no network to encode"),
    ],
)
def test_wrong_use(tmp_path, monkeypatch, capsys, flags, told):
    if "RGB" in flags:
        settings = make_settings(read_preset("rgb_triplanes")).model_dump()
        config = {"format_version": 3, "settings": settings}
        replace_file(tmp_path / "rgb" / "config.json", json.dumps(config).encode())
        replace_file(tmp_path / "rgb" / "hash.txt", b"0" * 64)
    given = [flag.replace("RGB", str(tmp_path / "rgb")) for flag in flags]
    monkeypatch.setattr(sys, "argv", [str(PREPARE), "--store", str(tmp_path / "store"), *given])
    main = runpy.run_path(str(PREPARE))["main"]
    try:
        status = run_command(main)
    except SystemExit as end:
        status = end.code
    assert status == 2 and told in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
