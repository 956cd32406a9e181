"""Exported tri-planes: what an independent reader finds, statistics, and exports that were killed."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.export import export_main
from safetensors.numpy import load_file
from torch.utils.data import DataLoader

import scaling
from scaling.cameras import normalised_intrinsics, orbit, pixel_rays
from scaling.export import planes as module
from scaling.export.plane_dataset import PlaneDataset
from scaling.export.plane_index import read_index
from scaling.export.planes import Statistics, export_planes
from scaling.library.cohorts import commit_cohort
from scaling.library.parts import commit_part
from scaling.library.run_folder import RunFolder
from scaling.models.box import STEPS
from scaling.models.cells import CELLS
from scaling.training.evaluate import render_planes


def test_the_command_writes_what_other_readers_find(fitted_run, tmp_path, monkeypatch, capsys):
    assert export_main(monkeypatch, "--run", fitted_run.path, "--what", "planes", "--out", tmp_path) == 0
    assert "planes, 480 bytes each" in capsys.readouterr().err  # 2 bytes · 3 planes · (2 + 3) features · 4²
    index = json.loads((tmp_path / "index.json").read_text())
    assert (index["shape"], index["dtype"], index["num_scenes"]) == ([3, 5, 4, 4], "float16", 2)
    [shard] = index["shards"]
    planes = load_file(tmp_path / "shard-00000.safetensors")["planes"]
    assert planes.dtype == np.float16 and planes.shape == (2, 3, 5, 4, 4)
    library = scaling.load_library(fitted_run.path)
    for scene_id, stored in zip(shard["scene_ids"], planes):
        np.testing.assert_allclose(stored, library[scene_id].tri_planes, rtol=2**-11, atol=1e-7)
    np.testing.assert_allclose(index["mean"], planes.astype(np.float64).mean((0, 3, 4)), atol=1e-12)
    np.testing.assert_allclose(index["std"], planes.astype(np.float64).std((0, 3, 4)), atol=1e-12)


def test_the_data_set_feeds_a_loader(fitted_run, tmp_path):
    export_planes(fitted_run, tmp_path)
    data = PlaneDataset(tmp_path)
    [batch] = DataLoader(data, batch_size=2, num_workers=2)
    assert batch.shape == (2, 3, 5, 4, 4) and batch.dtype == torch.float32
    torch.testing.assert_close(batch.mean((0, 3, 4)), torch.zeros(3, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.std((0, 3, 4), unbiased=False), torch.ones(3, 5))
    plain = PlaneDataset(tmp_path, normalise=False)
    torch.testing.assert_close(data.denormalise(data[1]), plain[1])
    assert len(data) == 2 and torch.equal(data[-1], data[1]) and set(data.ids) == {"car-00002", "car-00003"}
    with pytest.raises(IndexError):
        data[2]


def test_statistics_are_those_of_all_scenes_at_once():
    planes = 1000 + torch.randn(50, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    planes[:, 0, 0] = 7.0
    statistics = Statistics()
    for part in planes.split([1, 30, 19]):
        statistics.add(part)
    values = planes.double().numpy()
    np.testing.assert_allclose(statistics.mean, values.mean((0, 3, 4)), rtol=1e-14)
    np.testing.assert_allclose(statistics.std, values.std((0, 3, 4)), rtol=1e-10)
    assert statistics.std[0, 0] == 0


def test_a_channel_without_spread_stays_finite(fitted_run, tmp_path):
    export_planes(fitted_run, tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    index["std"][0][0] = 0.0
    (tmp_path / "index.json").write_text(json.dumps(index))
    data = PlaneDataset(tmp_path)
    assert torch.isfinite(data[0]).all()
    torch.testing.assert_close(data.denormalise(data[0]), PlaneDataset(tmp_path, normalise=False)[0])


def test_what_the_index_says_is_enough_to_render(fitted_run, tmp_path):
    """Latents of a view by the notes of index.json, with numpy's reader and a few lines of torch: even samples, so
    many that it makes no difference where they lie."""
    export_planes(fitted_run, tmp_path)
    data, index = PlaneDataset(tmp_path, normalise=False), json.loads((tmp_path / "index.json").read_text())
    scene = scaling.load_library(fitted_run.path)[data.ids[0]]
    scene.shared.renderer.samples = 1024
    pose, camera = orbit(1, 1.3), normalised_intrinsics(1.02)[None]
    expected = render_planes(scene.shared, data[0], pose, camera, scene.params.hull[0])["latents"][0]

    model = index["models"][0]
    weights = {name: torch.from_numpy(t) for name, t in load_file(tmp_path / model["renderer"]).items()}
    hulls = load_file(tmp_path / "shard-00000.safetensors")["hulls"]
    assert (model["combine"], model["field_layers"], model["sampled"]) == ("product", 2, "hull")
    assert model["field_activation"] == "relu"
    low, high = torch.tensor(model["box"])
    rays = pixel_rays(pose[0], camera[0], model["latent_size"], model["latent_size"])
    unit = model["unit"]
    near, far = (unit * distance for distance in scene.shared.renderer.span(rays)[:2])
    depths = near[:, None] + (far - near)[:, None] * (torch.arange(100 * STEPS) + 0.5) / (100 * STEPS)
    points = (rays.origins[:, None] + depths[..., None] * rays.directions[:, None] - low) / (high - low) * 2 - 1
    features = 1
    for plane, axes in zip(data[0], model["plane_axes"]):
        place = points[..., ["xyz".index(axis) for axis in axes]]
        features = features * (1 + F.grid_sample(plane[None], place[None], align_corners=False)[0])
    hidden = features.movedim(0, -1) - 1
    for name in ("field.hidden", "field.more.0"):
        hidden = F.relu(F.linear(hidden, weights[f"{name}.weight"], weights[f"{name}.bias"]))
    head = F.linear(hidden, weights["field.head.weight"], weights["field.head.bias"])
    colours = head[..., 1:].sigmoid() * 1.002 - 0.001
    middles = (points[:, 49::100] + points[:, 50::100]) / 2  # of a ray's STEPS parts
    x, y, z = ((middles + 1) / 2 * CELLS).long().clamp(0, CELLS - 1).unbind(-1)
    cells = torch.from_numpy(np.unpackbits(hulls[0]).astype(bool)[: CELLS**3])
    there = cells[(x * CELLS + y) * CELLS + z].repeat_interleave(100, dim=1)
    thick = F.softplus(head[..., 0] - 1) * (far - near)[:, None] / unit / (100 * STEPS) * there
    through = torch.exp(-thick.cumsum(1))
    weight = torch.cat([torch.ones_like(through[:, :1]), through[:, :-1]], 1) - through
    latents = 2 * ((weight[..., None] * colours).sum(1) + through[:, -1:] * weights["background"]) - 1
    assert weight.sum(1).max() > 0.05, "something is there"
    torch.testing.assert_close(latents.T.unflatten(1, expected.shape[1:]), expected, atol=2e-3, rtol=0)


def test_a_killed_export_is_none_and_goes_on(fitted_run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 480)  # a scene a shard
    export_planes(fitted_run, tmp_path / "whole")
    export_planes(fitted_run, tmp_path / "killed")
    write = module.replace_file

    def killed(path, data):
        if path.name == "shard-00001.safetensors":
            raise KeyboardInterrupt
        write(path, data)

    torn = tmp_path / "killed" / "shard-00001.safetensors"
    torn.write_bytes(torn.read_bytes()[:-9])
    larger = tmp_path / "killed" / "shard-00007.safetensors"  # of an earlier, larger export
    larger.write_bytes((tmp_path / "whole" / "shard-00001.safetensors").read_bytes())
    (tmp_path / "killed" / ".shard-00001.safetensors.0123").write_bytes(b"half written")
    monkeypatch.setattr(module, "replace_file", killed)
    with pytest.raises(KeyboardInterrupt):
        export_planes(fitted_run, tmp_path / "killed")
    with pytest.raises(FileNotFoundError, match="no whole export of planes here"):
        PlaneDataset(tmp_path / "killed")

    first = (tmp_path / "killed" / "shard-00000.safetensors").stat()
    monkeypatch.setattr(module, "replace_file", write)
    export_planes(fitted_run, tmp_path / "killed")
    assert (tmp_path / "killed" / "shard-00000.safetensors").stat().st_ino == first.st_ino, "it was whole"
    names = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir() if path.is_file()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "killed").iterdir() if path.is_file()} == names


def test_a_cohort_is_fused_with_its_own_base_planes(fitted_run, tmp_path):
    """A third scene, in a cohort whose base planes are twice the shared ones."""
    shutil.copytree(fitted_run.path, tmp_path / "run")
    copy = RunFolder(tmp_path / "run")
    row = copy.library.scene("car-00003")
    shared = scaling.load_library(copy.path)["car-00003"].shared
    tuned = {"base_planes": 2 * shared.base_planes, "field.head.bias": shared.field.head.bias + 1}
    cohort = commit_cohort(copy.library.folder, tuned, row["shared"], ["car-00009"])
    commit_part(copy.library.folder, [{**row, "scene_id": "car-00009", "cohort": cohort}])

    index = export_planes(copy, tmp_path / "out")
    data = PlaneDataset(tmp_path / "out", normalise=False)
    frozen, own = data[data.ids.index("car-00003")], data[data.ids.index("car-00009")]
    torch.testing.assert_close(own[:, :2], frozen[:, :2])
    torch.testing.assert_close(own[:, 2:], 2 * frozen[:, 2:], rtol=1e-3, atol=1e-4)
    owners = dict(zip(index.shards[0].scene_ids, (index.models[number] for number in index.shards[0].models)))
    assert [owners[f"car-0000{n}"].cohort for n in (2, 3, 9)] == [None, None, cohort]
    biases = [load_file(tmp_path / "out" / owners[f"car-0000{n}"].renderer)["field.head.bias"] for n in (3, 9)]
    np.testing.assert_allclose(biases[1], biases[0] + 1, rtol=1e-6)


def test_scenes_can_be_chosen(fitted_run, tmp_path, monkeypatch, capsys):
    wanted = tmp_path / "scenes.txt"
    wanted.write_text("car-00003\n")
    arguments = ("--run", fitted_run.path, "--what", "planes", "--out", tmp_path / "out", "--scenes", wanted)
    assert export_main(monkeypatch, *arguments) == 0
    assert read_index(tmp_path / "out").shards[0].scene_ids == ["car-00003"]
    wanted.write_text("car-00003\ncar-77777\n")
    assert export_main(monkeypatch, *arguments) == 1
    assert "holds no scene car-77777" in capsys.readouterr().err
    assert export_main(monkeypatch, *arguments, "--num-views", 3) == 2
    assert "--num-views is for --what views" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 9}, "format version 9"),
        ({"num_scenes": 3}, "num_scenes is not"),
        ({"mean": [[0.0]]}, "mean has not the shape"),
        ({"shape": [3, 5, 4, 8]}, "index.json says"),
    ],
)
def test_a_damaged_export_is_named(fitted_run, tmp_path, change, message):
    export_planes(fitted_run, tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | change))
    with pytest.raises(ValueError, match=message) as error:
        PlaneDataset(tmp_path)[0]
    assert str(tmp_path) in str(error.value)
