"""The shared model: what it fixes, and its files."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import Tensor

from scaling.config import SettingsError, make_settings, merge
from scaling.models.shared_files import (
    SharedModelError,
    load_shared,
    read_config,
    read_scene_ids,
    save_shared,
    settings_on,
)
from scaling.models.shared_model import SharedModel


@pytest.fixture
def shared(tiny_settings) -> SharedModel:
    torch.manual_seed(0)
    shared = SharedModel(tiny_settings).requires_grad_(False)
    shared.autoencoder.latent_scale.fill_(0.2)
    shared.background.copy_(shared.autoencoder.background(tiny_settings.data.image_size, "cpu"))
    shared.coefs_mean.copy_(torch.tensor([0.3, -0.2]))
    next(shared.adapt_decoder().parameters()).add_(0.1)
    shared.add_student()
    return shared


@torch.no_grad()
def picture(shared: SharedModel) -> Tensor:
    params = shared.random_params([torch.Generator().manual_seed(5)])
    rays = shared.latent_rays(torch.eye(4), torch.eye(3))
    colours = shared.render(params, rays[None]).colours
    return shared.decode(shared.as_latents(colours))


def test_a_shared_model_survives_disk(shared, tmp_path):
    folder = tmp_path / "run" / "shared"
    saved = save_shared(shared, folder, ["car-1", "car-2"])
    loaded, found = load_shared(folder)
    assert saved == found == shared.content_hash() == loaded.content_hash()
    assert read_scene_ids(folder) == ["car-1", "car-2"]
    assert loaded.settings == shared.settings
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(picture(loaded), picture(shared))
    latents = torch.rand(1, 4, 8, 8) - 0.5
    assert torch.equal(loaded.student(latents), shared.student(latents))
    torch.testing.assert_close(loaded.start_params(3).coefs, torch.tensor([[0.3, -0.2]] * 3))
    assert loaded.start_params(3).micro_planes.shape == (3, 3, 2, 4, 4)
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors", ".txt"}, "no pickles"


def test_the_hash_follows_every_tensor(shared):
    before = shared.content_hash()
    hashes = {before}
    for tensor in (shared.base_planes, shared.background, next(shared.autoencoder.vae.parameters())):
        tensor.view(-1)[0] += 1e-3
        hashes.add(shared.content_hash())
    assert len(hashes) == 4 and len(before) == 64


def test_a_shared_model_in_rgb_space(tiny_values, tmp_path):
    values = {
        "autoencoder": {"kind": "super_resolution", "shrink": 1, "decoder_blocks": 0},
        "stage1": {"joint": {"num_epochs": 0}, "adapt": {"num_epochs": 0}, "distil": {"num_epochs": 0}},
        "stage2": {"rgb": {"num_epochs": 0}},
    }
    shared = SharedModel(make_settings(merge(tiny_values, values))).requires_grad_(False)
    assert shared.latent_size == 16
    assert picture(shared).shape == (1, 3, 16, 16)
    save_shared(shared, tmp_path, [])
    assert torch.equal(picture(load_shared(tmp_path)[0]), picture(shared))
    with pytest.raises(SettingsError, match="no decoder to adapt"):
        shared.adapt_decoder()
    with pytest.raises(SettingsError, match="no decoder to distil"):
        shared.add_student()
    # Format 1 knew of no student: its settings in RGB space must not be read with the default's.
    config = json.loads((tmp_path / "config.json").read_text())
    del config["settings"]["stage1"]["distil"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "format_version": 1}))
    assert read_config(tmp_path).stage1.distil.num_epochs == 0


@pytest.mark.parametrize("file", ["planes.safetensors", "decoder/model.safetensors", "student/model.safetensors"])
def test_a_changed_tensor_is_noticed(shared, tmp_path, file):
    from safetensors.torch import load_file, save_file

    save_shared(shared, tmp_path, [])
    tensors = load_file(tmp_path / file)
    name = next(name for name, tensor in tensors.items() if tensor.numel())
    save_file({**tensors, name: tensors[name] + 1e-3}, tmp_path / file)
    with pytest.raises(SharedModelError, match="the files were changed") as error:
        load_shared(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("damage", ["cut short", "missing"])
@pytest.mark.parametrize(
    "file",
    ["config.json", "planes.safetensors", "autoencoder/diffusion_pytorch_model.safetensors", "autoencoder/config.json"],
)
def test_a_damaged_shared_model_is_named(shared, tmp_path, file, damage):
    save_shared(shared, tmp_path, [])
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).unlink() if damage == "missing" else (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SharedModelError) as error:
        load_shared(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("part", ["decoder", "student"])
def test_a_missing_part_is_noticed(shared, tmp_path, part):
    save_shared(shared, tmp_path, [])
    shutil.rmtree(tmp_path / part)
    with pytest.raises(SharedModelError, match="were changed"):
        load_shared(tmp_path)


def test_a_half_written_shared_model_is_none(shared, tmp_path):
    save_shared(shared, tmp_path / "shared", [])
    (tmp_path / "shared" / "hash.txt").unlink()
    with pytest.raises(SharedModelError, match=r"no shared model here .*stage1\.py --run") as error:
        load_shared(tmp_path / "shared")
    assert str(tmp_path / "shared") in str(error.value)


def test_a_newer_format_is_refused(shared, tmp_path):
    save_shared(shared, tmp_path, [])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "format_version": 99}))
    with pytest.raises(SharedModelError, match=r"config\.json: format version 99, this program reads up to 5"):
        load_shared(tmp_path)


def test_a_model_of_format_1_has_one_background(shared, tmp_path):
    values = shared.settings.model_dump()
    del values["rendering"]["background"]
    (tmp_path / "hash.txt").write_text("0\n")
    (tmp_path / "config.json").write_text(json.dumps({"format_version": 1, "settings": values}))
    assert read_config(tmp_path).rendering.background == "white"


def test_stage_2_takes_its_representation_from_the_shared_model(shared, tmp_path):
    save_shared(shared, tmp_path, [])
    asked = make_settings({"seed": 9, "stage2": {"scenes_per_batch": 7}, "representation": {"resolution": 99}})
    settings = settings_on(tmp_path, asked, {"seed": 9, "stage2.scenes_per_batch": 7})
    assert settings.seed == 9 and settings.stage2 == asked.stage2
    assert settings.representation == shared.settings.representation == read_config(tmp_path).representation
    assert settings.data == shared.settings.data
    with pytest.raises(SettingsError, match=r"representation\.resolution = 99 \(shared model: 4\)") as error:
        settings_on(tmp_path, asked, {"representation.resolution": 99})
    assert str(tmp_path) in str(error.value)


def test_micro_only_has_nothing_to_train_in_the_base_planes(tiny_values):
    values = merge(tiny_values, {"representation": {"macro_features": 0, "num_base_planes": 0}})
    shared = SharedModel(make_settings(values))
    assert shared.base_planes.numel() == 0 and not shared.base_planes.requires_grad
    assert len(shared.content_hash()) == 64
